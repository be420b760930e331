"""The run's engines, seen from the collector: who may be given a cohort, and who is empty.

    record: READY ──asked for its model──▶ answers ──chosen──▶ a cohort in flight
                         ▲ after a while                           │
                         └─────────────── failed ◀─────────────────┘

Only an engine that is READY in the record and has answered since it last failed is chosen, so that
a dead one holds up nobody. What drains is given nothing; empty, it is told so in the record.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping, Sequence

import redis.asyncio

from keel.errors import KeelError
from keel.fleet import ready_engines
from keel_rollout.collector.backoff import Backoff
from keel_rollout.collector.engine_client import EngineClient, EngineFailure, EngineModel
from keel_rollout.collector.record_write import tell
from keel_rollout.collector.watched import Watched

log = logging.getLogger(__name__)

COHORTS_IN_FLIGHT = 2
"""Of one engine: one computes and one waits there, so that it never idles."""


def choose(
    ready: Sequence[str],
    in_flight: Mapping[str, int],
    avoid: Collection[str] = (),
    room: int = COHORTS_IN_FLIGHT,
) -> str | None:
    """The engine for a cohort: of those with room the least loaded, in order of lease.

    Args:
        ready: addresses that may be given one.
        in_flight: cohorts by address; none where it is missing.
        avoid: have failed or refused this cohort, and get it again only if there is no other.
        room: most cohorts of one engine.

    Returns:
        None where the cohort has to wait.
    """
    suited = [address for address in ready if address not in avoid] or ready
    free = [a for a in suited if in_flight.get(a, 0) < room]
    return min(free, key=lambda address: in_flight.get(address, 0), default=None)


class Member:
    """One engine of the run."""

    def __init__(self, run: str, address: str) -> None:
        self.client = EngineClient(address)
        self.model: EngineModel | None = None
        """What it has loaded; None until it answers, and again from each failure on."""
        self.cohorts = 0
        """In flight."""
        self.asking: asyncio.Task[None] | None = None
        self.backoff = Backoff(f"run {run}")

    @property
    def address(self) -> str:
        """Its host:port."""
        return self.client.address


class Fleet:
    """The engines that the record names at each moment."""

    def __init__(self, watched: Watched, client: redis.asyncio.Redis) -> None:
        self._watched, self._redis = watched, client
        self._run = watched.record.run
        self._members: dict[str, Member] = {}
        self._change = asyncio.Event()

    async def follow(self) -> None:
        """Keeps up with the record until cancelled."""
        telling = asyncio.create_task(self._tell_drained())
        try:
            while True:
                record = self._watched.record
                await self._sync()
                changed = asyncio.create_task(self._watched.after(record))
                try:
                    await asyncio.wait({changed, telling}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    changed.cancel()
                if telling.done():
                    telling.result()  # raises what it raised
        finally:
            telling.cancel()

    @property
    def change(self) -> asyncio.Event:
        """Set as soon as an engine may have become free or usable."""
        return self._change

    async def model(self) -> EngineModel:
        """What a usable engine has loaded; waits for one."""
        while not (usable := self._usable()):
            await self._change.wait()
        model = self._members[usable[0]].model
        assert model is not None
        return model

    def others(self, than: Collection[str]) -> bool:
        """Whether the run has an engine besides these that may still serve it."""
        record = self._watched.record
        return bool(set(record.engines) - set(record.draining) - record.stale.keys() - set(than))

    def take(self, version: int, left: int, avoid: Collection[str] = ()) -> Member | None:
        """An engine for a cohort of `version`, by `choose`; the cohort then counts as in flight.

        Args:
            left: cohorts that are not done yet. Where each engine can have one of its own, none
                gets two, though the others prove the version a moment later.
        """
        record = self._watched.record
        if record.policy_version != version:
            return None
        in_flight = {address: member.cohorts for address, member in self._members.items()}
        coming = set(record.engines) - set(record.draining) - record.stale.keys()
        room = 1 if left <= len(coming) else COHORTS_IN_FLIGHT
        address = choose(self._usable(), in_flight, avoid, room)
        if address is None:
            return None
        member = self._members[address]
        member.cohorts += 1
        return member

    def give_back(self, member: Member, failure: EngineFailure | None = None) -> None:
        """The cohort is no longer in flight. An engine that failed it is asked before the next."""
        member.cohorts -= 1
        if failure is not None:
            member.model = None
            self._ask(member, failure)
        self._notify()

    async def close(self) -> None:
        """Closes the channels."""
        members, self._members = list(self._members.values()), {}
        for member in members:
            await _close(member)

    def _usable(self) -> list[str]:
        members = self._members
        ready = ready_engines(self._watched.record)
        return [a for a in ready if a in members and members[a].model is not None]

    async def _sync(self) -> None:
        record = self._watched.record
        for address in self._members.keys() - set(record.engines):
            await _close(self._members.pop(address))
        ready = ready_engines(record)
        for address in record.engines:
            if address not in self._members:
                self._members[address] = Member(self._run, address)
            member = self._members[address]
            if address in ready:
                self._ask(member)
            elif member.asking is not None:
                member.asking.cancel()
                member.asking = None
        self._notify()

    def _ask(self, member: Member, failure: EngineFailure | None = None) -> None:
        """Sees to it that its model is known, if it is not; after a failure not at once."""
        asked = member.asking is not None and not member.asking.done()
        if member.model is None and not asked and self._members.get(member.address) is member:
            member.asking = asyncio.create_task(self._learn(member, failure))

    async def _learn(self, member: Member, failure: Exception | None) -> None:
        while member.model is None:
            if failure is not None:
                await member.backoff.wait(failure)
            try:
                member.model = await member.client.model(self._run)
            except (EngineFailure, KeelError) as again:
                failure = again
        self._notify()

    async def _tell_drained(self) -> None:
        """Writes which of the draining engines have nothing of this run in flight."""
        written: tuple[str, ...] | None = None
        restarts = self._watched.restarts
        while True:
            members, record = self._members, self._watched.record
            if restarts != self._watched.restarts:
                written, restarts = None, self._watched.restarts  # the record may be an older one
            empty = tuple(a for a in record.draining if a in members and not members[a].cohorts)
            if empty != (record.drained if written is None else written):
                await tell(self._redis, self._run, drained=empty)
                written = empty
                log.info("run %s: drained %s", self._run, ", ".join(empty) or "nobody")
                continue
            await self._change.wait()

    def _notify(self) -> None:
        self._change.set()
        self._change = asyncio.Event()


async def _close(member: Member) -> None:
    if member.asking is not None:
        member.asking.cancel()
    await member.client.close()
