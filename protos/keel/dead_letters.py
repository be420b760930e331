"""Dead letters: entries that the trainer gave up, and how they lie in Redis.

An entry that could not be read three times makes its slot VOID. What is known of it stays in a hash
(`keel.queue.dead_letters_key`), and its bytes, where the entry held them, in a second one
(`keel.queue.dead_envelopes_key`). Both have the field STREAM/ENTRY-ID.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict

TRIES = 3
"""Recorded failures that end an entry. A restart is none."""


class DeadLetter(BaseModel):
    """One entry that was given up."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    stream: Literal["demos", "groups"]
    """Which of the run's streams it was in."""
    entry: str
    """Its id there."""
    attempt: int | None
    """Attempt of the run; null, like lap and slot, where the entry named no slot of it."""
    lap: int | None
    """The paper's global step, from 0; in the cold start the supervised step."""
    slot: int | None
    """Place in the lap."""
    reason: str
    """What was wrong at the last try."""
    tries: int
    """How often it was tried."""
    died_at: datetime
    """When it was given up."""
    size_bytes: int
    """Bytes of its envelope, as far as they are known."""

    @property
    def field(self) -> str:
        """Its field in both hashes."""
        return f"{self.stream}/{self.entry}"


def parse_dead_letters(raw: Mapping[bytes, bytes]) -> list[DeadLetter]:
    """The letters of a run, in the order of slots."""
    letters = [DeadLetter.model_validate_json(value) for value in raw.values()]

    def place(letter: DeadLetter) -> tuple[int, ...]:
        known = (letter.attempt, letter.lap, letter.slot)
        return tuple(-1 if number is None else number for number in known)

    return sorted(letters, key=lambda letter: (letter.stream, place(letter), letter.entry))
