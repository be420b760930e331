"""Entries that cannot be read: failures are counted in Redis, and the third ends an entry.

What was given up once stays so: a trainer that is started again must make the same slots VOID.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

from google.protobuf.message import DecodeError

from keel.dead_letters import TRIES, DeadLetter, parse_dead_letters
from keel.queue import BLOB_FIELD, ENVELOPE_FIELD, SlotKey, Stream
from keel.types.v1 import sequence_pb2
from keel_trainer.store import RunStore

log = logging.getLogger(__name__)


class DeadLetters:
    """Those of one stream."""

    def __init__(self, store: RunStore, stream: Stream) -> None:
        self._store, self._stream = store, stream
        letters = [
            letter for letter in parse_dead_letters(store.dead_letters()) if letter.stream == stream
        ]
        self._reasons = {letter.entry: letter.reason for letter in letters}
        self._slots = {slot for letter in letters if (slot := _slot(letter)) is not None}

    def reason(self, entry: str) -> str | None:
        """Why an entry was given up; None if it was not."""
        return self._reasons.get(entry)

    def without(self, slots: Iterable[SlotKey]) -> list[SlotKey]:
        """Those of the slots whose blobs nobody will want to look at."""
        return [slot for slot in slots if slot not in self._slots]

    def mended(self, entry: str) -> None:
        """The entry could be read after all: what failed before does not count any more."""
        self._store.forget_failures(self._stream, entry)

    def failed(self, entry: str, slot: SlotKey, fields: Mapping[bytes, bytes], reason: str) -> bool:
        """Counts a failure; True if it was the last one, and the entry is given up."""
        tries = self._store.count_failure(self._stream, entry)
        log.warning("entry %s, slot %s, try %d of %d: %s", entry, slot, tries, TRIES, reason)
        if tries < TRIES:
            return False
        self.bury(entry, slot, fields, reason, tries=tries)
        return True

    def bury(
        self,
        entry: str,
        slot: SlotKey | None,
        fields: Mapping[bytes, bytes],
        reason: str,
        *,
        tries: int = 1,
    ) -> None:
        """Gives an entry up.

        Args:
            slot: None where the entry names none.
        """
        letter = DeadLetter(
            stream=self._stream,
            entry=entry,
            attempt=slot.attempt if slot else None,
            lap=slot.lap if slot else None,
            slot=slot.slot if slot else None,
            reason=reason,
            tries=tries,
            died_at=datetime.now(UTC),
            size_bytes=_size(fields),
        )
        self._store.write_dead_letter(letter, fields.get(ENVELOPE_FIELD))
        self._reasons[entry] = reason
        if slot is not None:
            self._slots.add(slot)
        log.error("entry %s, slot %s is a dead letter: %s", entry, slot or "unknown", reason)


def _slot(letter: DeadLetter) -> SlotKey | None:
    if letter.attempt is None or letter.lap is None or letter.slot is None:
        return None
    return SlotKey(letter.attempt, letter.lap, letter.slot)


def _size(fields: Mapping[bytes, bytes]) -> int:
    if (data := fields.get(ENVELOPE_FIELD)) is not None:
        return len(data)
    try:
        return sequence_pb2.BlobRef.FromString(fields.get(BLOB_FIELD, b"")).size_bytes
    except DecodeError:
        return 0
