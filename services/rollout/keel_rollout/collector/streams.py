"""Adds each slot's envelope to its stream once. What the stream holds is the only memory."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import redis.asyncio

from keel.errors import WireError
from keel.queue import SlotKey, Stream, bytes_key, slot_of, stream_key
from keel_rollout.collector.backoff import REDIS_TIMEOUT_S, Backoff, insist, passes
from keel_rollout.collector.room import Packed, Room

log = logging.getLogger(__name__)

_PAGE, _PAGE_BYTES = 32, 32 * 2**20
"""Most entries read at once, and about the most bytes."""
_AT_ONCE = 8
"""Entries being added: Redis syncs those that come together to disk together."""


class SlotStream:
    """One stream of one run. There is one producer, so what it has added needs no second look.

    After a start, after an addition that was cancelled or whose reply was lost, and after a restart
    of Redis, the stream is read to see what is there. The trainer acknowledges no entry of a lap
    before all of them are trained on, so what is not there then is added again; a slot that comes
    twice is taken once. The trainer makes the stream and, when the run is over, deletes it: an
    addition never makes it anew.
    """

    def __init__(self, client: redis.asyncio.Redis, name: Stream, run: str, room: Room) -> None:
        self._redis, self._name, self._room = client, name, room
        self._key = stream_key(run, name)
        self._added: set[SlotKey] = set()
        self._in_doubt = True
        """The stream may hold more than `_added`, or less."""
        self._since: set[SlotKey] = set()
        """Added since the last reading began."""
        self._reading = asyncio.Lock()
        self._adding = asyncio.Semaphore(_AT_ONCE)

    def doubt(self) -> None:
        """Redis may have lost entries that it had."""
        self._in_doubt = True

    async def added(self) -> set[SlotKey]:
        """Slots that are in the stream, or were there after it was last in doubt."""
        async with self._reading:  # one reads for all that ask
            while self._in_doubt:
                self._in_doubt, self._since = False, set()
                try:
                    self._added = await self._read() | self._since
                except BaseException:
                    self._in_doubt = True
                    raise
        return self._added

    async def add(self, packed: Packed) -> None:
        """Adds the envelope unless its slot is there; waits for room, for Redis, for the stream."""
        backoff = Backoff(f"stream {self._key}")
        while packed.slot not in await self.added():
            async with self._adding, self._room.entry(self._name, packed) as fields:
                trouble = await self._try(packed, fields)
            if not trouble:
                self._added.add(packed.slot)
                self._since.add(packed.slot)
                return
            await backoff.wait(trouble)

    async def _try(self, packed: Packed, fields: dict[bytes, bytes]) -> str:
        """Adds the entry and its bytes in one transaction; says what was in the way."""
        slot, hash = str(packed.slot), bytes_key(self._key)
        try:
            async with (
                asyncio.timeout(REDIS_TIMEOUT_S),
                self._redis.pipeline(transaction=True) as pipe,
            ):
                pipe.hset(hash, slot, str(packed.size))
                pipe.xadd(self._key, fields, nomkstream=True)  # type: ignore[arg-type]
                _, entry = await pipe.execute()
                if entry is None:
                    await self._redis.hdel(hash, slot)
        except asyncio.CancelledError:
            self._in_doubt = True  # it may have arrived
            raise
        except Exception as error:
            if not passes(error):
                raise
            self._in_doubt = True  # it may have arrived
            return f"{type(error).__name__}: {error}"
        return "" if entry is not None else "it is gone, as when the run is over"

    async def forget_before(self, attempt: int, lap: int) -> None:
        """Drops what is known of earlier laps; their entries may be gone."""
        self._added = {key for key in await self.added() if key >= (attempt, lap)}

    async def length(self) -> int:
        """Entries in the stream."""
        return await insist(f"stream {self._key}", lambda: self._redis.xlen(self._key))

    async def _read(self) -> set[SlotKey]:
        found: set[SlotKey] = set()
        await self._room.flight.look()
        largest = self._room.flight.largest(self._name)
        begin, count = "-", max(1, min(_PAGE, _PAGE_BYTES // max(1, largest)))
        while entries := await self._page(begin, count):
            for entry_id, fields in entries:
                try:
                    found.add(slot_of(fields))
                except WireError as error:
                    log.warning("stream %s, entry %s: %s", self._key, entry_id.decode(), error)
            begin = f"({entries[-1][0].decode()}"
        return found

    async def _page(self, begin: str, count: int) -> list[tuple[bytes, dict[bytes, bytes]]]:
        reading: Any = self._redis.xrange
        return await insist(
            f"stream {self._key}", lambda: reading(self._key, min=begin, count=count)
        )
