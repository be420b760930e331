"""What a task is: prompts, demonstrations, held-out prompts; and what judges its responses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Problem:
    """A prompt, and what its verifier needs to know.

    Example:
        Problem(prompt="347*6=", reference="2082")
    """

    prompt: str
    reference: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a verifier says of one response."""

    reward: float
    parts: Mapping[str, float] = field(default_factory=dict)
    """The reward's parts by name, before weighting."""


class Task(Protocol):
    """Where prompts come from. Every method is a function of its seed alone."""

    def training_problem(self, seed: int) -> Problem:
        """A problem to sample responses to; never one that is held out."""

    def held_out_problem(self, seed: int) -> Problem:
        """A problem for evaluation; never one of training or of a demonstration."""

    def demonstration(self, seed: int) -> tuple[str, str]:
        """A prompt and the response to imitate, `keel.presets.END` included."""


class Verifier(Protocol):
    """Judges responses. It runs in a worker process and may fail there in any way."""

    def verify(self, prompt: str, response: str, reference: str) -> Verdict:
        """The verdict on one response.

        Args:
            response: its text, special tokens included; it ends with `keel.presets.END` if and only
                if the model ended it, so a truncated response shows.
        """
