"""The newest record of a run, and a way to wait for a change."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from keel.record import RunRecord


class Watched:
    """The newest record of a run, and a way to wait for a change."""

    def __init__(self, record: RunRecord) -> None:
        self.record = record
        self._changed = asyncio.Event()

    def put(self, record: RunRecord) -> None:
        """Takes a newer record."""
        if record != self.record:
            self.record = record
            self._changed.set()
            self._changed = asyncio.Event()

    async def after(self, record: RunRecord) -> RunRecord:
        """The first record that is not `record`."""
        return await self.until(lambda newest: newest is not record)

    async def until(self, holds: Callable[[RunRecord], bool]) -> RunRecord:
        """The first record for which `holds`."""
        while not holds(self.record):
            await self._changed.wait()
        return self.record
