"""Bytes of a run's envelopes on their way to the trainer: added, or about to be, not acknowledged.

Redis has them by slot (`keel.queue.bytes_key`), so that one that was added twice counts once. Only
the collector adds to them, so what it read once, and added since, is never too little: it is read
again only where it is too much. A run without checkpoints may have a million slots there.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator, Mapping
from itertools import chain

import redis.asyncio

from keel.queue import SlotKey, Stream, bytes_key, stream_key
from keel_rollout.collector.backoff import insist
from keel_rollout.collector.telemetry import BYTES_IN_FLIGHT

Place = tuple[Stream, SlotKey]

_FRESH_S, _MOST_S = 0.1, 5.0
"""Least time between two looks, and most that a look waits."""
_SHARE = 0.05
"""Most of the time that is spent looking, up to that wait."""
_GAUGE_S = 1.0


class Flight:
    """What one run has in flight."""

    def __init__(self, client: redis.asyncio.Redis, run: str) -> None:
        self._redis, self._run = client, run
        self._hashes: Mapping[Stream, str] = {
            "demos": bytes_key(stream_key(run, "demos")),
            "groups": bytes_key(stream_key(run, "groups")),
        }
        self._there: dict[Place, int] = {}
        """Bytes by slot as Redis had them, and what was added since."""
        self._there_bytes = 0
        self._since: dict[Place, int] = {}
        """Added since the last look began."""
        self._coming: dict[Place, int] = {}
        """Granted, and not added yet."""
        self._began_s = self._next_s = float("-inf")
        """When the last look began, and when there may be another."""
        self._in_doubt = False
        """Redis may have other slots than it had, though as many."""
        self._looking = asyncio.Lock()
        self._gauge = 0

    async def follow(self) -> None:
        """Keeps the gauge of bytes in flight until cancelled."""
        try:
            while True:
                await self.look()
                self._show(self.bytes())
                await asyncio.sleep(_GAUGE_S)
        finally:
            self._show(0)

    async def look(self, *, sure: bool = False) -> None:
        """Reads what Redis has, unless that was done a moment ago.

        Args:
            sure: what it has now. That may have to wait for a moment.
        """
        asked_s = time.monotonic()
        async with self._looking:  # one reads for all that ask
            if sure and self._began_s >= asked_s:
                return
            if (wait_s := self._next_s - time.monotonic()) > 0:
                if not sure:
                    return
                await asyncio.sleep(wait_s)
            self._since, self._began_s = {}, time.monotonic()
            if self._in_doubt or await insist(f"run {self._run}", self._changed):
                self._in_doubt = False
                found = await insist(f"run {self._run}", self._read)
                self._there = found | self._since
                self._there_bytes = sum(self._there.values())
            now_s = time.monotonic()
            rest_s = min((now_s - self._began_s) / _SHARE, _MOST_S)
            self._next_s = now_s + max(rest_s, _FRESH_S)

    def doubt(self) -> None:
        """Redis may have lost some, or have some again."""
        self._in_doubt = True

    @contextlib.contextmanager
    def coming(self, place: Place, size: int) -> Iterator[None]:
        """An envelope is about to be added, and counts already."""
        self._coming[place] = size
        try:
            yield
        finally:
            del self._coming[place]

    def add(self, place: Place, size: int) -> None:
        """An envelope was added, or may have been."""
        self._there_bytes += size - self._there.get(place, 0)
        self._there[place] = self._since[place] = size

    def bytes(self, without: Place | None = None) -> int:
        """Bytes in flight, those of `without` left out."""
        coming = {place: size for place, size in self._coming.items() if place != without}
        twice = sum(self._there.get(place, 0) for place in {*coming, without} if place)
        return self._there_bytes - twice + sum(coming.values())

    def earlier(self, place: Place) -> bool:
        """Something is in flight that can be trained and acknowledged without this envelope."""
        own = _order(place)
        return any(_order(other) < own for other in chain(self._coming, self._there))

    def first_lap(self) -> tuple[int, int]:
        """Attempt and lap (or supervised step) of the oldest; there must be one."""
        attempt, _, lap = min(map(_order, self._there))
        return attempt, lap

    def largest(self, stream: Stream) -> int:
        """Bytes of the largest envelope of a stream."""
        return max((size for (name, _), size in self._there.items() if name == stream), default=0)

    async def _changed(self) -> bool:
        """Others only remove: as many slots as before are the same slots."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for key in self._hashes.values():
                pipe.hlen(key)
            counts: list[int] = await pipe.execute()
        return sum(counts) != len(self._there)

    async def _read(self) -> dict[Place, int]:
        async with self._redis.pipeline(transaction=False) as pipe:
            for key in self._hashes.values():
                pipe.hgetall(key)
            replies: list[dict[bytes, bytes]] = await pipe.execute()
        return {
            (stream, SlotKey.parse(slot)): int(size)
            for stream, reply in zip(self._hashes, replies, strict=True)
            for slot, size in reply.items()
        }

    def _show(self, size: int) -> None:
        BYTES_IN_FLIGHT.inc(size - self._gauge)
        self._gauge = size


def _order(place: Place) -> tuple[int, bool, int]:
    """What is trained and acknowledged first comes first; slots of one lap are equal."""
    stream, slot = place
    return slot.attempt, stream == "groups", slot.lap
