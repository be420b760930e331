"""Which engines and trainers there are, and what they can do: asked over gRPC, again and again.

Operators give addresses; an engine needs to know nothing of the gateway. What an engine last said
that it can do is kept while it is away, so that jobs can be judged meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from keel import rpc
from keel.rollout.v1 import rollout_service_pb2, rollout_service_pb2_grpc

log = logging.getLogger(__name__)

DEADLINE_S = 3.0
"""Of each question. A busy engine on a small machine may take a second."""

MUTE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
"""Codes of a call that nobody has answered."""

SILENT_AFTER_S = 10.0
"""Without an answer in time for so long, nothing answers: a busy one may miss a question."""

Capabilities = rollout_service_pb2.GetCapabilitiesResponse


@dataclass(slots=True)
class Peer:
    """A trainer or an engine, as last seen."""

    address: str
    healthy: bool = False
    """It answered the last question, and its health is SERVING."""
    last_seen_s: float | None = None
    """Unix time of its last answer, s: for people. What is decided by, is monotonic time below."""
    heard_s: float | None = None
    """Monotonic time of its last answer, s."""
    quiet_s: float = 0.0
    """For how long it has not been healthy, s: since it last was, or since the gateway began to
    ask. Time in which the gateway did not ask, since it was stopped itself say, counts little."""
    problem: str = "has not been asked yet"
    """Why it is not healthy, as the rest of a sentence; empty where it is."""
    silent: bool = False
    """Nothing answers at its address."""
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once the first question is answered or has failed."""


@dataclass(slots=True)
class Engine(Peer):
    """An engine, as last seen."""

    capabilities: Capabilities | None = None
    """Its last answer; None before the first."""


class Registry:
    """Keeps `trainers` and `engines` up to date between `start` and `stop`."""

    def __init__(self, engines: Sequence[str], trainers: Sequence[str], *, poll_s: float) -> None:
        self.engines = {address: Engine(address) for address in engines}
        self.trainers = {address: Peer(address) for address in trainers}
        self.former_trainers: dict[str, Peer] = {}
        """Those that a run is leased to, and that this gateway was not told of."""
        self._poll_s = poll_s
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, *, patience_s: float = 2.0) -> None:
        """Begins to ask, and waits until everyone was asked once, though at most `patience_s`."""
        peers = [*self.engines.values(), *self.trainers.values()]
        for engine in self.engines.values():
            self._tasks.append(asyncio.create_task(self._follow(engine, _ask_engine)))
        for trainer in self.trainers.values():
            self._tasks.append(asyncio.create_task(self._follow(trainer, _ask_health)))
        first = [asyncio.create_task(peer.asked.wait()) for peer in peers]
        if first:
            _, late = await asyncio.wait(first, timeout=patience_s)
            for task in late:
                task.cancel()

    def ask_former_trainer(self, address: str) -> None:
        """Keeps a trainer in `former_trainers` from now on."""
        if address not in self.former_trainers:
            peer = self.former_trainers[address] = Peer(address)
            self._tasks.append(asyncio.create_task(self._follow(peer, _ask_health)))

    def lapsed(self, lease_s: float) -> frozenset[str]:
        """Trainers not healthy, and engines where nothing answers, for `lease_s` seconds."""
        trainers = [*self.trainers.values(), *self.former_trainers.values()]
        engines = [engine for engine in self.engines.values() if engine.silent]
        return frozenset(p.address for p in (*trainers, *engines) if p.quiet_s >= lease_s)

    async def stop(self) -> None:
        """Ends the asking."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _follow(
        self, peer: Any, ask: Callable[[Any, grpc.aio.Channel], Awaitable[None]]
    ) -> None:
        channel = rpc.aio_channel(peer.address)
        told_s = time.monotonic()
        try:
            while True:
                begun = time.monotonic()
                try:
                    await ask(peer, channel)
                    _note(peer, "")
                except Exception as error:  # whatever one peer answers, the others are asked on
                    _note(peer, describe(error), silent=_silent(peer, error))
                    # A new channel resolves the name anew and knows no backoff, which would
                    # otherwise hide for minutes that the peer is back.
                    await channel.close()
                    channel = rpc.aio_channel(peer.address)
                since_s, told_s = told_s, time.monotonic()
                quiet_s = min(told_s - since_s, 2 * DEADLINE_S + self._poll_s)
                peer.quiet_s = 0.0 if peer.healthy else peer.quiet_s + quiet_s
                peer.asked.set()
                await asyncio.sleep(max(0.0, self._poll_s - (time.monotonic() - begun)))
        finally:
            await channel.close()


async def _ask_health(peer: Peer, channel: grpc.aio.Channel) -> None:
    stub: Any = health_pb2_grpc.HealthStub(channel)  # its type stubs know no asyncio
    answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=DEADLINE_S)
    _hear(peer)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        name = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
        raise ConnectionError(f"says that it is {name}")


async def _ask_engine(engine: Engine, channel: grpc.aio.Channel) -> None:
    stub = rollout_service_pb2_grpc.RolloutServiceStub(channel)
    engine.capabilities = await stub.GetCapabilities(
        rollout_service_pb2.GetCapabilitiesRequest(), timeout=DEADLINE_S
    )
    _hear(engine)
    await _ask_health(engine, channel)


def _hear(peer: Peer) -> None:
    peer.last_seen_s, peer.heard_s = time.time(), time.monotonic()


def describe(error: Exception) -> str:
    """What went wrong with a peer, as the rest of a sentence that begins with its address."""
    if isinstance(error, grpc.aio.AioRpcError):
        details = (error.details() or "").rpartition("last error: UNKNOWN: ")[2]
        verb = "does not answer" if error.code() in MUTE else "answers with an error"
        return f"{verb} ({error.code().name}: {details})"
    return str(error) or type(error).__name__


def _silent(peer: Peer, error: Exception) -> bool:
    """Whether an error means that nothing answers: at once if nobody listens, else after a time."""
    code = error.code() if isinstance(error, grpc.aio.AioRpcError) else None
    if code is grpc.StatusCode.UNAVAILABLE:
        return True
    late = code is grpc.StatusCode.DEADLINE_EXCEEDED
    return late and (peer.heard_s is None or time.monotonic() - peer.heard_s > SILENT_AFTER_S)


def _note(peer: Peer, problem: str, *, silent: bool = False) -> None:
    if peer.healthy is bool(problem) or not peer.asked.is_set():
        log.info("%s %s", peer.address, problem or "is healthy")
    peer.healthy, peer.problem, peer.silent = not problem, problem, silent
