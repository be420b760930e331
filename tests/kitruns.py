"""Engines behind a real servicer and real gRPC, tried by the conformance kit in this process.

outcomes = tried(lambda: TorchEngine("cpu", 1), model)
failed(outcomes) == set()
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from keel import rpc
from keel.rollout.v1 import rollout_service_pb2_grpc as pb_grpc
from keel_rollout.conformance.catalogue import chosen
from keel_rollout.conformance.reference import Model
from keel_rollout.conformance.runner import Options, kit_for, trial
from keel_rollout.conformance.verdicts import Outcome, Status
from keel_rollout.engines.base import Engine
from keel_rollout.servicer import RolloutServicer

SERVICE = "keel.rollout.v1.RolloutService"


@contextlib.contextmanager
def served(
    make: Callable[[], Engine], servicer: type[RolloutServicer], shared: Path | None
) -> Iterator[str]:
    """Serves an engine in a thread with an event loop of its own; yields its address."""
    ports: queue.Queue[int] = queue.Queue()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        engine = make()
        front = servicer(engine, shared)
        server, port = await rpc.serve(
            "127.0.0.1:0",
            [SERVICE],
            lambda s: pb_grpc.add_RolloutServiceServicer_to_server(front, s),
        )
        ports.put(port)
        await stop.wait()
        await engine.close()
        await server.stop(0)

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{ports.get(timeout=30)}"
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(timeout=20)
        loop.close()


def tried(
    make: Callable[[], Engine],
    model: Model,
    *,
    servicer: type[RolloutServicer] = RolloutServicer,
    shared: Path | None = None,
    only: Sequence[str] = (),
) -> dict[str, Outcome]:
    """The outcome of every row, by its name."""

    async def run(address: str) -> list[Outcome]:
        options = Options(address, "conformance-test", 1, model.a.dtype, shared, timeout_s=60)
        async with kit_for(options, lambda _dtype: model) as (kit, _):
            nothing: Any = lambda *_: None  # noqa: E731
            return await trial(kit, chosen(list(only)), nothing, nothing)

    with served(make, servicer, shared) as address:
        return {outcome.name: outcome for outcome in asyncio.run(run(address))}


def failed(outcomes: dict[str, Outcome]) -> set[str]:
    """Names of the rows that failed."""
    return {name for name, outcome in outcomes.items() if outcome.status is Status.FAIL}


def told(outcomes: dict[str, Outcome]) -> str:
    """What failed, for the message of an assertion."""
    bad = [o for o in outcomes.values() if o.status is Status.FAIL]
    return "\n".join(f"{o.name}: {o.seen}; valid: {o.valid}" for o in bad)
