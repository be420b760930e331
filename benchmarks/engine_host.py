"""One engine twice over: behind gRPC, and called in process when a line on stdin says so.

Started by `benchmarks/engines.py`, in the Python of the engine's kind. Both ways share engine,
model and weights, so that the difference is servicer, messages and wire; for vLLM, which is called
as AsyncLLM, also Keel's engine around it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import numpy as np

from keel import rpc
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.rollout.v1 import rollout_service_pb2_grpc as pb_grpc
from keel_rollout.engine_main import create
from keel_rollout.engines.base import CohortKey, GroupRequest, Piece
from keel_rollout.servicer import RolloutServicer


@dataclass(frozen=True)
class Work:
    """One round: `groups` prompts, `samples` responses of exactly `tokens` tokens to each."""

    round: int
    groups: int
    samples: int
    tokens: int
    prompt: int
    vocab: int
    with_routes: bool
    cohort_groups: int
    """Groups of a cohort; 0 for an engine that is not deterministic."""

    def prompt_of(self, slot: int) -> np.ndarray:
        """int32 [P], token 0 and 1 (padding, end) not among them."""
        return np.random.default_rng(slot).integers(2, self.vocab, self.prompt).astype(np.int32)

    def cohort_of(self, way: str, slot: int) -> tuple[str, int] | None:
        """Name and size of the cohort that a slot belongs to."""
        if not self.cohort_groups:
            return None
        number, size = slot // self.cohort_groups, self.cohort_groups
        return f"{way}/{self.round}/{number}", min(size, self.groups - number * size)


@dataclass
class Took:
    """What a group has given so far, by sample."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    rows: list[int]

    def check(self, work: Work) -> None:
        """A finite log-prob for every token, and all rows of routes."""
        for tokens, logprobs in zip(self.tokens, self.logprobs, strict=True):
            assert len(tokens) == len(logprobs)
            assert np.isfinite(logprobs).all()
        due = work.prompt + work.tokens - 1
        assert not work.with_routes or self.rows == [due] * work.samples, (self.rows, due)


async def by_engine(engine: Any, request: GroupRequest, took: Took) -> None:
    """`Engine.generate`, the seam under the servicer."""
    events: Any = engine.generate(request)
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Piece):
                took.tokens[event.sample] += event.token_ids_T.tolist()
                took.logprobs[event.sample] += event.rollout_logprobs_T.tolist()
                took.rows[event.sample] += 0 if event.routes_RLK is None else len(event.routes_RLK)


async def by_async_llm(engine: Any, request: GroupRequest, took: Took) -> None:
    """vLLM's own RequestOutputs, as they come from AsyncLLM."""
    ended = asyncio.Event()

    def sink(output: Any) -> None:
        for completion in output.outputs:
            took.tokens[completion.index] += completion.token_ids
            took.logprobs[completion.index] += [
                next(iter(entry.values())).logprob for entry in completion.logprobs
            ]
            if completion.finish_reason is not None and completion.routed_experts is not None:
                took.rows[completion.index] = len(completion.routed_experts)
        if output.finished:
            ended.set()

    await engine._client.submit(request, request.seed, sink)
    await ended.wait()


async def in_process(engine: Any, kind: str, work: Work) -> dict[str, Any]:
    """Seconds of one round without servicer and wire, and the tokens of each sample."""
    call = by_async_llm if kind == "vllm" else by_engine

    async def one(slot: int) -> list[list[int]]:
        cohort = work.cohort_of(f"in-process/{work.with_routes}", slot)
        request = GroupRequest(
            slot=slot,
            prompt_P=work.prompt_of(slot),
            num_samples=work.samples,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            max_tokens=work.tokens,
            stop_token_ids=(),
            seed=slot,
            with_routes=work.with_routes,
            cohort=CohortKey(*cohort, try_number=0) if cohort else None,
        )
        each = range(work.samples)
        took = Took([[] for _ in each], [[] for _ in each], [0 for _ in each])
        await call(engine, request, took)
        took.check(work)
        return took.tokens

    began_s = time.perf_counter()
    groups = await asyncio.gather(*(one(slot) for slot in range(work.groups)))
    return {"seconds": time.perf_counter() - began_s, "tokens": groups}


async def main() -> None:
    """Serves until stdin ends. The first line that it writes is the port."""
    parse = argparse.ArgumentParser()
    parse.add_argument("--kind", required=True)
    parse.add_argument("--threads", type=int, default=1)
    arguments = parse.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else an engine prints, and the processes that it starts
    engine = create(arguments.kind, "cpu", arguments.threads)
    servicer = RolloutServicer(engine, None)
    server, port = await rpc.serve(
        "127.0.0.1:0",
        [pb.DESCRIPTOR.services_by_name["RolloutService"].full_name],
        lambda server: pb_grpc.add_RolloutServiceServicer_to_server(servicer, server),
    )
    print(json.dumps({"port": port}), file=answers, flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        answer = await in_process(engine, arguments.kind, Work(**json.loads(line)))
        print(json.dumps(answer), file=answers, flush=True)
    await engine.close()
    await server.stop(0)


if __name__ == "__main__":
    asyncio.run(main())
