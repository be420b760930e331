"""Adds each slot's envelope to its stream once. What the stream holds is the only memory."""

from __future__ import annotations

import asyncio
import logging

import redis.asyncio

from keel.errors import WireError
from keel.queue import SlotKey, pack, slot_of
from keel.types.v1 import sequence_pb2
from keel_rollout.collector.backoff import REDIS_TIMEOUT_S, Backoff, insist, passes

log = logging.getLogger(__name__)

_PAGE = 32
_AT_ONCE = 8
"""Entries being added: Redis syncs those that come together to disk together."""


class SlotStream:
    """One stream of one run. There is one producer, so what it has added needs no second look.

    After a start, and after an XADD that was cancelled or whose reply was lost, the stream is read
    to see what is there. The trainer makes the stream and, when the run is over, deletes it: an
    XADD never makes it anew.
    """

    def __init__(self, client: redis.asyncio.Redis, key: str, run: str) -> None:
        self._redis, self._key, self._run = client, key, run
        self._added: set[SlotKey] = set()
        self._in_doubt = True
        """The stream may hold more than `_added`."""
        self._reading = asyncio.Lock()
        self._adding = asyncio.Semaphore(_AT_ONCE)

    async def added(self) -> set[SlotKey]:
        """Slots known to be, or to have been, in the stream."""
        async with self._reading:  # one reads for all that ask
            while self._in_doubt:
                self._in_doubt = False
                try:
                    self._added |= await self._read()
                except BaseException:
                    self._in_doubt = True
                    raise
        return self._added

    async def add(self, envelope: sequence_pb2.Envelope) -> None:
        """Adds the envelope unless its slot is there; waits while Redis or the stream is away."""
        key = SlotKey.of(envelope.id)
        fields = pack(envelope)
        backoff = Backoff(f"stream {self._key}")
        while key not in await self.added():
            try:
                async with self._adding, asyncio.timeout(REDIS_TIMEOUT_S):
                    entry = await self._redis.xadd(self._key, fields, nomkstream=True)  # type: ignore[arg-type]
            except asyncio.CancelledError:
                self._in_doubt = True  # it may have arrived
                raise
            except Exception as error:
                if not passes(error):
                    raise
                self._in_doubt = True  # it may have arrived
                await backoff.wait(f"{type(error).__name__}: {error}")
            else:
                if entry is not None:
                    self._added.add(key)
                    return
                await backoff.wait("it is gone, as when the run is over")

    async def forget_before(self, attempt: int, lap: int) -> None:
        """Drops what is known of earlier laps; their entries may be gone."""
        self._added = {key for key in await self.added() if key >= (attempt, lap)}

    async def length(self) -> int:
        """Entries in the stream."""
        return await insist(f"stream {self._key}", lambda: self._redis.xlen(self._key))

    async def _read(self) -> set[SlotKey]:
        found: set[SlotKey] = set()
        begin = "-"
        while entries := await self._page(begin):
            for entry_id, fields in entries:
                try:
                    found.add(slot_of(fields))
                except WireError as error:
                    log.warning("stream %s, entry %s: %s", self._key, entry_id.decode(), error)
            begin = f"({entries[-1][0].decode()}"
        return found

    async def _page(self, begin: str) -> list[tuple[bytes, dict[bytes, bytes]]]:
        return await insist(
            f"stream {self._key}",
            lambda: self._redis.xrange(self._key, min=begin, count=_PAGE),  # type: ignore[arg-type, return-value]
        )
