"""How full Redis is, measured against its own `maxmemory`."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import redis.asyncio

from keel.sizes import show_bytes
from keel_rollout.collector.backoff import insist

MOST_FULL = 0.85
"""Share of maxmemory up to which envelopes may fill it. The rest is for the small writes of trainer
and gateway, which noeviction would refuse."""
_FRESH_S = 0.2


@dataclass(frozen=True, slots=True)
class MemoryLevel:
    """Bytes used, what is on its way included, and the limit; 0 is no limit."""

    used: int
    maxmemory: int

    def takes(self, size: int) -> bool:
        """Whether so many bytes more leave enough."""
        return not self.maxmemory or self.used + size <= MOST_FULL * self.maxmemory

    def lack(self, size: int) -> str:
        """Why it does not take so many bytes more, with the numbers."""
        return (
            f"Redis uses {show_bytes(self.used)} of its maxmemory {show_bytes(self.maxmemory)}, "
            f"and {show_bytes(size)} more would fill it above {MOST_FULL:.0%}"
        )


class RedisMemory:
    """The memory of one Redis, shared by all runs of a collector."""

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self._redis = client
        self._level = MemoryLevel(0, 0)
        self._read_s = float("-inf")
        self._granted = 0
        self._reading = asyncio.Lock()

    async def read(self) -> MemoryLevel:
        """The level, at most 0.2 s old."""
        async with self._reading:  # one reads for all that ask
            if time.monotonic() - self._read_s >= _FRESH_S:
                found = await insist("Redis' memory", lambda: self._redis.info("memory"))
                self._level = MemoryLevel(found["used_memory"], found.get("maxmemory", 0))
                self._read_s = time.monotonic()
        return MemoryLevel(self._level.used + self._granted, self._level.maxmemory)

    def forget(self) -> None:
        """The level has changed: the next read looks."""
        self._read_s = float("-inf")

    @contextlib.contextmanager
    def granted(self, size: int) -> Iterator[None]:
        """These bytes are on their way: they count, though INFO does not show them yet."""
        self._granted += size
        try:
            yield
        finally:
            self._granted -= size
            # until the next look they are there
            self._level = MemoryLevel(self._level.used + size, self._level.maxmemory)
