"""What a task is: prompts, demonstrations, held-out prompts; and what judges its responses.

Light: the verifier's worker processes import it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

Prompt = str | list[Mapping[str, Any]]
"""Text as it is, or chat messages (role, content)."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A prompt, and what its verifier needs to know.

    Example:
        Problem(prompt="347*6=", answer="2082")
    """

    prompt: Prompt
    answer: str = ""
    """Empty if there is none."""
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Further fields of its row."""
    where: str = field(default="", hash=False, compare=False)
    """Where it stands, for messages."""


@dataclass(frozen=True, slots=True)
class Case:
    """One response to judge."""

    prompt: Prompt
    response: str
    """For people: no end token, no special token."""
    answer: str = ""
    finished: bool = True
    """The model ended it; False: it was cut off at max_tokens."""
    raw: str = ""
    """The response with its special tokens; it ends with `keel.presets.END` if and only if the
    model ended it."""
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a verifier says of one response."""

    reward: float
    parts: Mapping[str, float] = field(default_factory=dict)
    """What it counts besides, by name; for the metrics alone."""


class Task(Protocol):
    """Where prompts come from. Every method is a function of its arguments alone."""

    def training_problem(self, seed: int, index: int) -> Problem:
        """A problem to sample responses to; never one that is held out.

        Args:
            seed: of the place (attempt, lap, slot).
            index: of the slot among all of the run, from 0: where a file of prompts stands.
        """

    def held_out_size(self) -> int | None:
        """How many held-out problems there are; None: as many as one likes."""

    def held_out_problem(self, seed: int, index: int) -> Problem:
        """A problem for evaluation; never one of training or of a demonstration.

        Args:
            seed: of the place, index included.
            index: below `held_out_size()`.
        """

    def demonstration(self, seed: int, index: int) -> tuple[Prompt, str]:
        """A prompt and the response to imitate, `keel.presets.END` included."""


class BuiltInTask(Task, Protocol):
    """A task that makes its prompts."""

    def holds_out(self, prompt: Prompt) -> bool:
        """Whether a prompt, wherever it comes from, is one of those held out."""


class Verifier(Protocol):
    """Judges responses. It runs in a worker process and may fail there in any way."""

    def verify(self, case: Case) -> Verdict:
        """The verdict on one response."""
