"""Room for the next envelope: in the run's bytes in flight, in Redis, and on the blob store's disk.

    packed ──▶ counted in flight ──▶ in the blob store, if it is large ──▶ the entry's fields
                  │ no room, while an earlier lap is in flight
                  ▼
            `queue_full` in the record ──▶ the trainer checkpoints at once, and acknowledges

A lap must be whole before it can be trained and acknowledged, so the bytes of an envelope's own lap
never hold it back; what a lap can take at worst is checked before its run begins.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import redis.asyncio

from keel.blobs import BlobStore
from keel.queue import SlotKey, Stream, pack_blob, pack_bytes
from keel.sizes import REDIS_VALUE_BYTES, show_bytes
from keel.types.v1 import sequence_pb2
from keel_rollout.collector.backoff import FIRST_S, MOST_S
from keel_rollout.collector.flight import Flight, Place
from keel_rollout.collector.holds import Holds
from keel_rollout.collector.redis_memory import RedisMemory

log = logging.getLogger(__name__)

_SMALL_BYTES = 512
"""Up to this an envelope, a VOID one, say, is as small as the entry of a blob, and always added."""


@dataclass(frozen=True, slots=True)
class QueueSettings:
    """How much of a run may be on its way from collector to trainer, and where."""

    queue_bytes: int = 8 * 2**30
    """Bytes of envelopes in flight, of one run, above which the next lap waits."""
    inline_bytes: int = 2**20
    """Larger envelopes go to the blob store."""
    blobs: BlobStore | None = None
    """None: every envelope goes through Redis."""


DEFAULT_QUEUE = QueueSettings()


@dataclass(slots=True)
class Packed:
    """A serialized envelope on its way. It holds the bytes until they are in the blob store."""

    slot: SlotKey
    kind: str
    data: bytes | bytearray
    size: int
    blob: sequence_pb2.BlobRef | None = field(default=None)
    """Where it is, once it is in the blob store."""

    @classmethod
    def of(cls, envelope: sequence_pb2.Envelope) -> Packed:
        """From a message that is small."""
        data = envelope.SerializeToString()
        kind = envelope.WhichOneof("payload")
        return cls(SlotKey.of(envelope.id), kind or "", data, len(data))


class Room:
    """What one run has in flight, and what may be added to it."""

    def __init__(
        self,
        client: redis.asyncio.Redis,
        run: str,
        settings: QueueSettings,
        memory: RedisMemory,
        holds: Holds,
    ) -> None:
        self._run, self.settings = run, settings
        self._memory, self._holds = memory, holds
        self.flight = Flight(client, run)
        """What the run has in flight."""
        self._looked = self._told_inline = False

    @contextlib.asynccontextmanager
    async def entry(self, stream: Stream, packed: Packed) -> AsyncIterator[dict[bytes, bytes]]:
        """The fields of the envelope's stream entry, to be added within the context.

        Waits for room, and while the blob store fails; `queue_full` then says so.
        """
        place = stream, packed.slot
        await self._wait_for_room(place, packed.size)
        with self.flight.coming(place, packed.size):
            if packed.blob is None and await self._belongs_in_store(packed):
                await self._store(stream, packed)
            if packed.blob is not None:
                yield pack_blob(packed.slot, packed.blob)
            else:
                async with self._redis_has_room(place, packed.size):
                    yield pack_bytes(packed.slot, bytes(packed.data))
            self.flight.add(place, packed.size)

    async def _wait_for_room(self, place: Place, size: int) -> None:
        if self._looked and self._fits(place, size):
            return
        await self.flight.look(sure=True)
        self._looked = True
        if self._fits(place, size):
            return
        limit, (attempt, lap) = self.settings.queue_bytes, self.flight.first_lap()
        text = (
            f"{show_bytes(self.flight.bytes())} in flight and {show_bytes(size)} of slot "
            f"{place[1]} are more than --queue-bytes {show_bytes(limit)}; it waits for a "
            f"checkpoint, which acknowledges what is in flight, from attempt/lap {attempt}/{lap} on"
        )
        with self._holds.because("queue", text):
            while not self._fits(place, size):
                await self.flight.look(sure=True)

    def _fits(self, place: Place, size: int) -> bool:
        rest = self.flight.bytes(without=place)  # sent again, it counts once
        return rest + size <= self.settings.queue_bytes or not self.flight.earlier(place)

    async def _belongs_in_store(self, packed: Packed) -> bool:
        """It is large, or Redis is so full that even this would be too much."""
        if self.settings.blobs is None:
            if packed.size > self.settings.inline_bytes and not self._told_inline:
                self._told_inline = True
                log.warning(
                    "run %s: groups of %s go through Redis, which keeps them in memory; with a "
                    "folder for --blobs (of collector and trainer) they would not",
                    self._run,
                    show_bytes(packed.size),
                )
            return False
        if packed.size > min(self.settings.inline_bytes, REDIS_VALUE_BYTES):
            return True
        return packed.size > _SMALL_BYTES and not (await self._memory.read()).takes(packed.size)

    async def _store(self, stream: Stream, packed: Packed) -> None:
        """Puts the envelope into the blob store, however long that fails, and lets its bytes go."""
        blobs = self.settings.blobs
        assert blobs is not None
        wait_s = FIRST_S
        with contextlib.ExitStack() as held:
            while packed.blob is None:
                try:
                    packed.blob = await asyncio.to_thread(
                        blobs.put, self._run, stream, packed.slot, packed.data
                    )
                except OSError as error:
                    if wait_s == FIRST_S:
                        text = (
                            f"the blob store cannot take {show_bytes(packed.size)} of slot "
                            f"{packed.slot}: {error}; it tries again until "
                            "that is mended"
                        )
                        held.enter_context(self._holds.because("blobs", text))
                    await asyncio.sleep(wait_s)
                    wait_s = min(2 * wait_s, MOST_S)
        packed.data = b""

    @contextlib.asynccontextmanager
    async def _redis_has_room(self, place: Place, size: int) -> AsyncIterator[None]:
        """Waits while Redis would have too little left; the bytes count as its own from then on."""
        while size > _SMALL_BYTES and not (level := await self._memory.read()).takes(size):
            await self.flight.look(sure=True)
            waits = self.flight.earlier(place)
            remedy = "it waits for a checkpoint, which frees some" if waits else self._remedy()
            with self._holds.because("redis", f"{level.lack(size)}; {remedy}"):
                while waits == self.flight.earlier(place):
                    await self.flight.look(sure=True)
                    if (await self._memory.read()).takes(size):
                        break
            self._memory.forget()  # what was acknowledged meanwhile is free
        with self._memory.granted(size):
            yield

    def _remedy(self) -> str:
        if self.settings.blobs is not None:
            return "nothing of this run that a checkpoint would free is in flight: raise maxmemory"
        return (
            "nothing of this run that a checkpoint would free is in flight: raise maxmemory, or "
            "give collector and trainer a folder for --blobs"
        )
