"""Takes envelopes from a Redis stream in slot order; acknowledges what a checkpoint covers.

    stream  --XREADGROUP-->  entries by (lap, slot)  --take: read, decode-->  acknowledge  --> XACK
                                                          | three times in vain               XDEL
                                                          v                                   blobs
                                                     dead letters

Own pending entries come first, so a restarted trainer finds what it had not yet acknowledged. The
first entry for a slot in stream order wins. Laps that a checkpoint covers are not read again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

import redis

from keel.blobs import BlobStore
from keel.codec import xxh3
from keel.errors import IntegrityError, KeelError, WireError
from keel.queue import (
    CONSUMER_GROUP,
    SlotKey,
    Stream,
    envelope_bytes,
    parse_envelope,
    slot_of,
    stream_key,
)
from keel.types.v1 import sequence_pb2
from keel_trainer.dead_letters import DeadLetters
from keel_trainer.store import UNREACHABLE, RunStore, takes_no_writes

log = logging.getLogger(__name__)

_CONSUMER = "trainer"
_POLL_MS = 500
_CHECK_S = 0.5
_LOOK_S = 5.0
"""Seconds without anything new, after which it looks at what another trainer may have taken."""
_RETRY_S = 0.5
_STORAGE_RETRY_S = 2.0
_READ_COUNT = 64
_READ_BYTES = 64 * 2**20
"""About the most that is read at once."""
_REMOVED_AT_ONCE = 1000

Fields = dict[bytes, bytes]
Content = TypeVar("Content")


@dataclass(frozen=True, slots=True)
class Taken(Generic[Content]):
    """What a slot held."""

    slot: SlotKey
    entry: str
    """Id of its entry."""
    xxh3: str
    """xxh3-64 of its envelope, 16 hexadecimal digits; empty where it could not be read."""
    content: Content | None
    """None: it is a dead letter."""
    reason: str = ""
    """Why it is one."""


class SlotReader:
    """Delivers each slot of one stream once, in the order asked for."""

    def __init__(
        self,
        store: RunStore,
        reading: redis.Redis,
        stream: Stream,
        *,
        attempt: int,
        first_lap: int,
        covered_lap: int = 0,
        blobs: BlobStore | None = None,
    ) -> None:
        """
        Args:
            reading: a client that does not try again by itself: a repeated XREADGROUP would pass
                over what the first one's lost reply held.
            first_lap: earlier laps are covered by the checkpoint in use; their entries stay unread
                until they are acknowledged.
            covered_lap: those before this one need not stay: they go at sight.
            blobs: where entries refer to; None: an entry that refers to a blob cannot be read.
        """
        self._store, self._reading, self._run = store, reading, store.run
        self._stream, self._key = stream, stream_key(store.run, stream)
        self._attempt, self._blobs = attempt, blobs
        self._first_lap, self._covered_lap = first_lap, covered_lap
        self._dead = DeadLetters(store, stream)
        self._entries: dict[tuple[int, int], tuple[bytes, Fields]] = {}
        """First entry of each slot that is yet to be taken."""
        self._ids: dict[tuple[int, int], list[bytes]] = {}
        """Ids of all entries that are not acknowledged, by slot."""
        self._seen: set[bytes] = set()
        self._pending_from: bytes | None = b"0"
        self._news_s = time.monotonic()
        """When anything new was read last, or looked for."""
        self._checked_s = time.monotonic()
        self._unremoved: set[SlotKey] = set()
        """Slots whose blobs could not be removed yet."""
        self._dropped = False
        self.drained = False
        """The last read found Redis up and nothing new."""
        self.waited_s = 0.0
        """Seconds that `take` has spent waiting."""
        store.make_stream(self._key)
        self._sweep()

    def take(
        self,
        lap: int,
        slot: int,
        decode: Callable[[sequence_pb2.Envelope], Content],
        check: Callable[[], None],
    ) -> Taken[Content]:
        """What `decode` makes of the envelope of a slot; waits for it.

        An entry that cannot be read or decoded three times is a dead letter; so it remains for a
        trainer that is started again.

        Args:
            decode: raises KeelError where the envelope is no good.
            check: called about twice a second while waiting; raises to stop.
        """
        began = time.perf_counter()
        key = (lap, slot)
        while key not in self._entries:
            self._read(check)
            if key not in self._entries and time.monotonic() - self._checked_s >= _CHECK_S:
                check()  # also while other entries keep coming
                self._checked_s = time.monotonic()
        self.waited_s += time.perf_counter() - began
        entry_id, fields = self._entries.pop(key)
        return self._decoded(SlotKey(self._attempt, *key), entry_id, fields, decode, check)

    def acknowledge(self, before_lap: int) -> int:
        """Acknowledges and deletes every entry of earlier laps, and their blobs; returns how many.

        To be called when a checkpoint that covers them is on disk.
        """
        keys = [key for key in self._ids if key[0] < before_lap]
        removed: list[tuple[bytes, SlotKey | None]] = [
            (entry_id, SlotKey(self._attempt, *key)) for key in keys for entry_id in self._ids[key]
        ]
        for key in keys:
            del self._ids[key]
            self._entries.pop(key, None)
        self._first_lap = max(self._first_lap, before_lap)
        self._covered_lap = max(self._covered_lap, before_lap)
        self._remove(removed)
        return len(removed)

    def holds(self, before_lap: int) -> bool:
        """Entries of earlier laps are not acknowledged."""
        return any(lap < before_lap for lap, _ in self._ids)

    def in_flight(self) -> bool:
        """Something is not acknowledged, read or not."""
        return not self._dropped and bool(self._store.in_flight(self._key))

    def drop(self) -> None:
        """Removes the whole stream, read or not: a checkpoint covers all that it will hold."""
        if self._dropped:
            return
        there = self._store.in_flight(self._key)
        self._store.drop_stream(self._key)
        self._dropped = True
        self._entries, self._ids, self._seen = {}, {}, set()
        self._remove_blobs(SlotKey.parse(slot) for slot in there)

    def _decoded(
        self,
        slot: SlotKey,
        entry_id: bytes,
        fields: Fields,
        decode: Callable[[sequence_pb2.Envelope], Content],
        check: Callable[[], None],
    ) -> Taken[Content]:
        entry, failed = entry_id.decode(), False
        while (reason := self._dead.reason(entry)) is None:
            try:
                data = envelope_bytes(fields, self._blob)
                content = decode(parse_envelope(data, slot, run=self._run))
            except KeelError as error:
                failed = True
                if not self._dead.failed(entry, slot, fields, str(error)):
                    time.sleep(_RETRY_S)
            except OSError as error:
                # the store is away as a whole, which is no fault of this entry
                self._store.tell(f"slot {slot} cannot be read from the blob store: {error}")
                time.sleep(_STORAGE_RETRY_S)
            else:
                self._store.tell("")
                if failed:
                    self._dead.mended(entry)
                return Taken(slot, entry, f"{xxh3(data):016x}", content)
            check()
            fields = self._store.entry(self._key, entry_id) or fields
        self._store.tell("")
        return Taken(slot, entry, "", None, reason)

    def _blob(self, ref: sequence_pb2.BlobRef) -> bytes:
        if self._blobs is None:
            raise OSError(f"start the trainer with --blobs, as the collector: it is at {ref.uri}")
        return self._blobs.get(ref, run=self._run)

    def _remove(self, entries: list[tuple[bytes, SlotKey | None]]) -> None:
        for at in range(0, len(entries), _REMOVED_AT_ONCE):
            self._store.acknowledge(self._key, entries[at : at + _REMOVED_AT_ONCE])
        self._seen.difference_update(entry_id for entry_id, _ in entries)
        self._remove_blobs(slot for _, slot in entries if slot is not None)

    def _remove_blobs(self, slots: Iterable[SlotKey]) -> None:
        """Now, or where the store is away with those of a later acknowledgement."""
        self._unremoved.update(self._dead.without(slots))
        if self._blobs is None or not self._unremoved:
            return
        try:
            self._blobs.remove(self._run, self._stream, self._unremoved)
            self._unremoved = set()
        except OSError as error:
            log.warning("blobs of %d slots stay for now: %s", len(self._unremoved), error)

    def _sweep(self) -> None:
        """Removes blobs that a crash between acknowledgement and removal left behind."""
        if self._blobs is None:
            return
        try:
            there = self._blobs.slots(self._run, self._stream)
        except OSError as error:
            log.warning("the blob store is not swept: %s", error)
            return
        self._remove_blobs(slot for slot in there if (slot.attempt, slot.lap) < self._covered)

    @property
    def _covered(self) -> tuple[int, int]:
        return self._attempt, self._covered_lap

    def _read(self, check: Callable[[], None]) -> None:
        """Reads what the stream has; comes back within the poll interval."""
        pending = self._pending_from is not None
        start = self._pending_from if pending else ">"
        try:
            reply = self._reading.xreadgroup(
                CONSUMER_GROUP,
                _CONSUMER,
                {self._key: start},  # type: ignore[dict-item]
                count=self._count(),
                block=None if pending else _POLL_MS,
            )
        except UNREACHABLE as error:
            self._read_again(error)
            return
        except redis.ResponseError as error:
            if takes_no_writes(error):  # reading writes down who has read
                self._read_again(error)
                return
            if not str(error).startswith("NOGROUP"):
                raise
            check()  # says so where the run's record is gone too
            raise IntegrityError(
                f"{self._key} is gone from Redis, and what was sampled with it: Redis has lost "
                "data, or somebody has deleted it"
            ) from error
        entries = _entries(reply)
        if pending:
            self._pending_from = entries[-1][0] if entries else None
            if not entries:
                return
        elif not entries and time.monotonic() - self._news_s > _LOOK_S:
            entries = self._taken_by_another()
        self.drained = not entries
        if entries or pending:
            self._news_s = time.monotonic()
        unwanted = [(entry_id, self._put(entry_id, fields)) for entry_id, fields in entries]
        self._remove([(entry_id, slot) for entry_id, (drop, slot) in unwanted if drop])

    def _read_again(self, error: Exception) -> None:
        """A lost reply leaves its entries pending and unseen: those are read first then."""
        log.warning("%s is read again: %s", self._key, error)
        self._pending_from = b"0"
        self.drained = False
        time.sleep(_RETRY_S)

    def _taken_by_another(self) -> list[tuple[bytes, Fields]]:
        """Entries that a trainer whose lease is over has read after this one had begun."""
        self._news_s = time.monotonic()
        unseen = [i for i in self._store.pending(self._key) if i not in self._seen]
        found = [(i, self._store.entry(self._key, i)) for i in unseen[: self._count()]]
        return [(entry_id, fields) for entry_id, fields in found if fields is not None]

    def _count(self) -> int:
        """Entries to be read at once. Those that refer to a blob are small."""
        if self._blobs is not None:
            return _READ_COUNT
        sizes = [int(size) for size in self._store.in_flight(self._key).values()]
        return max(1, min(_READ_COUNT, _READ_BYTES // max([1, *sizes])))

    def _put(self, entry_id: bytes, fields: Fields) -> tuple[bool, SlotKey | None]:
        """Puts an entry where `take` finds it; its slot, and whether nobody will ever want it."""
        if entry_id in self._seen:
            return False, None
        self._seen.add(entry_id)
        try:
            slot = slot_of(fields)
        except WireError as error:
            self._dead.bury(entry_id.decode(), None, fields, str(error))
            return True, None
        key = (slot.lap, slot.slot)
        if slot.attempt != self._attempt or slot.lap < self._covered_lap:
            return True, slot
        ids = self._ids.setdefault(key, [])
        if ids:
            log.info("slot %s came again as %s; the first counts", key, entry_id.decode())
        elif slot.lap >= self._first_lap:
            self._entries[key] = entry_id, fields
        ids.append(entry_id)
        return False, slot


def _entries(reply: object) -> list[tuple[bytes, Fields]]:
    """Entries of one stream's XREADGROUP reply, as redis-py gives it for RESP2 or RESP3."""
    if not reply:
        return []
    if isinstance(reply, dict):
        (batches,) = reply.values()
        return [entry for batch in batches for entry in batch]
    assert isinstance(reply, list)
    ((_, entries),) = reply
    return list(entries)
