"""Takes envelopes from a Redis stream in slot order; acknowledges what a checkpoint covers.

    stream  --XREADGROUP-->  buffer by (lap, slot)  --take-->  taken  --acknowledge-->  XACK + XDEL

Own pending entries come first, so a restarted trainer finds what it had not yet acknowledged. The
first entry for a slot in stream order wins. What a checkpoint covers is acknowledged unread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import redis

from keel.queue import CONSUMER_GROUP, unpack
from keel.types.v1 import sequence_pb2
from keel_trainer.store import UNREACHABLE

log = logging.getLogger(__name__)

_CONSUMER = "trainer"
_POLL_MS = 500
_RETRY_S = 0.5
_READ_COUNT = 64


class SlotReader:
    """Delivers each slot of one stream once, in the order asked for."""

    def __init__(
        self,
        client: redis.Redis,
        reading: redis.Redis,
        stream: str,
        *,
        run: str,
        attempt: int,
        first_lap: int,
    ) -> None:
        """
        Args:
            client: for everything but reading.
            reading: a client that does not try again by itself: a repeated XREADGROUP would pass
                over what the first one's lost reply held.
            first_lap: earlier laps are covered by the checkpoint in use; their entries are
                acknowledged unread.
        """
        self._redis, self._reading = client, reading
        self._stream, self._run = stream, run
        self._attempt, self._first_lap = attempt, first_lap
        self._buffer: dict[tuple[int, int], sequence_pb2.Envelope] = {}
        self._entry_ids: dict[tuple[int, int], list[bytes]] = {}
        self._seen: set[bytes] = set()
        self._taken: set[tuple[int, int]] = set()
        self._pending_from: bytes | None = b"0"
        self.drained = False
        """The last read found Redis up and nothing new."""
        self.waited_s = 0.0
        """Seconds that `take` has spent waiting."""
        try:
            client.xgroup_create(stream, CONSUMER_GROUP, id="0", mkstream=True)
        except redis.ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise

    def take(self, lap: int, slot: int, check: Callable[[], None]) -> sequence_pb2.Envelope:
        """The envelope of a slot; waits for it.

        Args:
            check: called about twice a second while waiting; raises to stop.
        """
        began = time.perf_counter()
        key = (lap, slot)
        while key not in self._buffer:
            if not self._read():
                check()
        self.waited_s += time.perf_counter() - began
        self._taken.add(key)
        return self._buffer.pop(key)

    def acknowledge(self) -> int:
        """Acknowledges and deletes every entry taken so far; returns how many.

        To be called when a checkpoint that covers them is on disk.
        """
        ids = [entry_id for key in self._taken for entry_id in self._entry_ids.pop(key)]
        if self._taken:
            self._first_lap = max(self._first_lap, max(lap for lap, _ in self._taken) + 1)
        self._taken = set()
        self._remove(ids)
        return len(ids)

    def _remove(self, ids: list[bytes]) -> None:
        if ids:
            with self._redis.pipeline(transaction=True) as pipe:
                pipe.xack(self._stream, CONSUMER_GROUP, *ids)
                pipe.xdel(self._stream, *ids)
                pipe.execute()
            self._seen.difference_update(ids)

    def _read(self) -> bool:
        """Reads what the stream has; False if nothing came within the poll interval."""
        pending = self._pending_from is not None
        start = self._pending_from if pending else ">"
        try:
            reply = self._reading.xreadgroup(
                CONSUMER_GROUP,
                _CONSUMER,
                {self._stream: start},  # type: ignore[dict-item]
                count=_READ_COUNT,
                block=None if pending else _POLL_MS,
            )
        except UNREACHABLE as error:
            # a lost reply leaves its entries pending and unseen: read those first
            log.warning("Redis is away, reading %s again: %s", self._stream, error)
            self._pending_from = b"0"
            self.drained = False
            time.sleep(_RETRY_S)
            return False
        entries = _entries(reply)
        if pending:
            self._pending_from = entries[-1][0] if entries else None
            if not entries:
                return True
        self.drained = not entries
        self._remove([entry_id for entry_id, fields in entries if self._covers(entry_id, fields)])
        return bool(entries)

    def _covers(self, entry_id: bytes, fields: dict[bytes, bytes]) -> bool:
        """Puts an entry where `take` finds it; True if a checkpoint covers it instead."""
        if entry_id in self._seen:
            return False
        self._seen.add(entry_id)
        envelope = unpack(fields, run=self._run)
        key = (envelope.id.lap, envelope.id.slot)
        if envelope.id.attempt != self._attempt or envelope.id.lap < self._first_lap:
            return True
        ids = self._entry_ids.setdefault(key, [])
        if not ids:
            self._buffer[key] = envelope
        else:
            log.info("slot %s came again as %s; the first counts", key, entry_id.decode())
        ids.append(entry_id)
        return False


def _entries(reply: object) -> list[tuple[bytes, dict[bytes, bytes]]]:
    """Entries of one stream's XREADGROUP reply, as redis-py gives it for RESP2 or RESP3."""
    if not reply:
        return []
    if isinstance(reply, dict):
        (batches,) = reply.values()
        return [entry for batch in batches for entry in batch]
    assert isinstance(reply, list)
    ((_, entries),) = reply
    return list(entries)
