"""The newest record of a run, which Redis it came from, and a way to wait for a change."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from keel.record import RunRecord


class Watched:
    """The newest record of a run, and a way to wait for a change."""

    def __init__(self, record: RunRecord) -> None:
        self.record = record
        self.restarts = 0
        """How often Redis was restarted since: it may have come back without its last entries."""
        self.on_restart: list[Callable[[], None]] = []
        """Called at once: what is known of what is in Redis may be wrong."""
        self._changed = asyncio.Event()

    def restarted(self) -> None:
        """Another Redis answers. To be called before a record of it is put."""
        self.restarts += 1
        for doubt in self.on_restart:
            doubt()
        self._notify()

    def put(self, record: RunRecord) -> None:
        """Takes a newer record."""
        if record != self.record:
            self.record = record
            self._notify()

    async def after(self, record: RunRecord) -> RunRecord:
        """The first record that is not `record`."""
        return await self.until(lambda newest: newest is not record)

    async def until(self, holds: Callable[[RunRecord], bool]) -> RunRecord:
        """The first record for which `holds`."""
        while not holds(self.record):
            await self._changed.wait()
        return self.record

    async def restarted_after(self, restarts: int) -> None:
        """Returns once Redis was restarted more often than that."""
        await self.until(lambda _: self.restarts != restarts)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
