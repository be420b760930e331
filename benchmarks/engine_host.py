"""One engine twice over: behind gRPC, and called in process when a line on stdin says so.

Started by `benchmarks/engines.py`, in the Python of the engine's kind. Both ways share engine,
model and weights, so that the difference is servicer, messages and wire.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import numpy as np

from keel import rpc
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.rollout.v1 import rollout_service_pb2_grpc as pb_grpc
from keel_rollout.engine_main import create
from keel_rollout.engines.base import CohortKey, Finished, GroupRequest
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


async def in_process(engine: Any, work: Work) -> dict[str, Any]:
    """Seconds of one round by `Engine.generate`, and the tokens of each sample."""

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
        tokens: list[list[int]] = [[] for _ in range(work.samples)]
        rows = [0] * work.samples
        events: AsyncIterator[Any] = engine.generate(request)
        async with aclosing(events):  # type: ignore[type-var]
            async for event in events:
                if isinstance(event, Finished):
                    continue
                assert np.isfinite(event.rollout_logprobs_T).all()
                tokens[event.sample] += event.token_ids_T.tolist()
                rows[event.sample] += 0 if event.routes_RLK is None else len(event.routes_RLK)
        due = work.prompt + work.tokens - 1 if work.with_routes else 0
        assert rows == [due] * work.samples, f"{rows} rows of routes, {due} due"
        return tokens

    began_s = time.perf_counter()
    groups = await asyncio.gather(*(one(slot) for slot in range(work.groups)))
    return {"seconds": time.perf_counter() - began_s, "tokens": groups}


async def main() -> None:
    """Serves until stdin ends. The first line that it writes is the port."""
    parse = argparse.ArgumentParser()
    parse.add_argument("--kind", required=True)
    parse.add_argument("--threads", type=int, default=1)
    arguments = parse.parse_args()
    engine = create(arguments.kind, "cpu", arguments.threads)
    servicer = RolloutServicer(engine, None)
    server, port = await rpc.serve(
        "127.0.0.1:0",
        [pb.DESCRIPTOR.services_by_name["RolloutService"].full_name],
        lambda server: pb_grpc.add_RolloutServiceServicer_to_server(servicer, server),
    )
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever else an engine prints
    print(json.dumps({"port": port}), file=answers, flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        answer = await in_process(engine, Work(**json.loads(line)))
        assert math.isfinite(answer["seconds"])
        print(json.dumps(answer), file=answers, flush=True)
    await engine.close()
    await server.stop(0)


if __name__ == "__main__":
    asyncio.run(main())
