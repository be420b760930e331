"""What a row is, and what can come of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keel_rollout.conformance.kit import Kit


class Status(StrEnum):
    """Of one row."""

    PASS = "PASS"
    FAIL = "FAIL"
    NOT_CLAIMED = "NOT CLAIMED"
    """The engine's capabilities do not promise it."""
    NOT_RUN = "NOT RUN"
    """It could not be tried here; the note says why. Not a pass."""


@dataclass(frozen=True)
class Number:
    """Something measured, and its limit.

    Example:
        Number("mean |d log p|", 2e-6, 1e-3).ok
    """

    what: str
    value: float
    limit: float
    at_least: bool = False
    """The limit is the least, not the most."""

    @property
    def ok(self) -> bool:
        """Within the limit; NaN is not."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    @property
    def valid(self) -> str:
        """The limit in words."""
        return f"{self.what} {'at least' if self.at_least else 'at most'} {self.limit:.2g}"

    def __str__(self) -> str:
        return f"{self.what} {self.value:.2g} ({'>=' if self.at_least else '<='} {self.limit:.2g})"


class Unmet(Exception):
    """The engine does not keep the contract: what was seen, and what would be valid."""

    def __init__(self, seen: str, valid: str) -> None:
        self.seen, self.valid = seen, valid
        super().__init__(f"{seen}; valid: {valid}")


class NotRun(Exception):
    """A row cannot be tried here, and why."""


Found = Sequence[Number | str]
"""Numbers that a row has measured, and words on what it did."""
Body = Callable[["Kit"], Awaitable[Found]]
Claim = Callable[["Kit"], str]


def always(_kit: Kit) -> str:
    """The claim of rows that hold for every engine."""
    return ""


@dataclass(frozen=True)
class Row:
    """One sentence of the contract, and the function that tries it."""

    name: str
    """Without its stage, e.g. "logprobs"."""
    proves: str
    contract: str
    """Where the contract says so."""
    body: Body
    claim: Claim = always
    """Empty if the engine claims it; else why it does not."""


@dataclass(frozen=True)
class Stage:
    """Rows that are tried in one state of the engine."""

    name: str
    title: str
    rows: tuple[Row, ...]
    enter: Callable[[Kit], Awaitable[None]]
    """Brings the engine into that state."""


@dataclass
class Outcome:
    """What came of a row."""

    name: str
    """With its stage, e.g. "update/logprobs"."""
    proves: str
    contract: str
    status: Status = Status.PASS
    numbers: list[Number] = field(default_factory=list)
    note: str = ""
    """Words on what was done, or why nothing was."""
    seen: str = ""
    valid: str = ""
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """For --json."""
        numbers = [
            {
                "what": n.what,
                "value": n.value if n.value == n.value else None,  # NaN is not JSON
                "limit": n.limit,
                "at_least": n.at_least,
                "ok": n.ok,
            }
            for n in self.numbers
        ]
        return {
            "row": self.name,
            "proves": self.proves,
            "status": str(self.status),
            "numbers": numbers,
            "note": self.note,
            "seen": self.seen,
            "valid": self.valid,
            "contract": self.contract,
            "seconds": round(self.seconds, 3),
        }
