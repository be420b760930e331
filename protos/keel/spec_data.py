"""The sections that say what is asked and what counts as right: task, cold start, evaluation."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePath
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from keel.spec_base import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    across,
)

MULTIPLICATION = "multiplication"
"""The built-in task, and its verifier."""
HELD_OUT = "held_out"
"""Name of the evaluation set that is the training file's held-out share."""
DEFAULT_HELD_OUT = 0.05

BUILT_IN_VERIFIERS = ("exact", "math", "multiplication", "regex")
ANSWER_GROUP = "answer"
"""Group of a regex verifier's pattern that is compared with the row's answer."""
_CUSTOM = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
_LABEL = r"^[A-Za-z_][A-Za-z0-9_.-]{0,62}$"
_FILE = "an absolute path of a JSONL file (in a job file also one relative to it)"


def is_custom_verifier(name: str) -> bool:
    """Whether a verifier's name is module:function."""
    return _CUSTOM.fullmatch(name) is not None


def _file(path: str) -> str:
    if not PurePath(path).is_absolute():
        raise ValueError(_FILE)
    return path


class VerifierSpec(Section):
    """[[task.verifier]]: one judge of responses; the reward is the weighted sum of all."""

    name: str
    """"exact", "math", "regex", "multiplication", or "module:function" that the operator allowed
    (--verifiers of the collector)."""
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """Factor of its value in the reward; below 0 for a penalty."""
    label: Annotated[str, Field(pattern=_LABEL)] | None = None
    """Name of its reward part in the metrics; left out: the verifier's or the function's name."""
    pattern: str | None = None
    """regex: a Python pattern that is searched in the response; the last match counts. With a group
    `(?P<answer>...)`, that is compared with the row's answer; else a match is enough."""
    ignore_case: bool = False
    """exact and regex: upper and lower case are the same."""
    ignore_space: bool = True
    """exact and regex: runs of white space are one space, and none counts at either end."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in BUILT_IN_VERIFIERS and not is_custom_verifier(name):
            raise ValueError(f"one of {', '.join(BUILT_IN_VERIFIERS)}, or module:function")
        return name

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"a Python regular expression ({error})") from error
        return pattern

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.name == "regex") != (self.pattern is not None):
            valid = "a regular expression" if self.name == "regex" else "leave it out: regex has it"
            raise across("task.verifier.pattern", self.pattern, f"{valid} (verifier {self.name})")
        return self

    @property
    def part(self) -> str:
        """Name of its reward part."""
        return self.label or self.name.rpartition(":")[2]

    @property
    def custom(self) -> bool:
        """It is a module:function of the operator's."""
        return ":" in self.name

    @property
    def needs_answer(self) -> bool:
        """It cannot judge a row without an answer."""
        if self.name == "regex":
            assert self.pattern is not None
            return ANSWER_GROUP in re.compile(self.pattern).groupindex
        return not self.custom


def answers_for(verifiers: Iterable[VerifierSpec]) -> str:
    """Which of the verifiers need an answer in every row, in words; empty if none does."""
    needing = [verifier.name for verifier in verifiers if verifier.needs_answer]
    return f"verifier {' and '.join(needing)}" if needing else ""


def _tables(value: Any) -> Any:
    """A bare name as the one table that it stands for."""
    return ({"name": value},) if isinstance(value, str) else value


def _distinct(verifiers: tuple[VerifierSpec, ...]) -> tuple[VerifierSpec, ...]:
    parts = [one.part for one in verifiers]
    if len(set(parts)) < len(parts):
        raise ValueError(f"a label of its own for each verifier; these are {', '.join(parts)}")
    return verifiers


Verifiers = Annotated[
    tuple[VerifierSpec, ...],
    Field(min_length=1),
    BeforeValidator(_tables, json_schema_input_type=str | tuple[VerifierSpec, ...]),
    AfterValidator(_distinct),
]
"""A name, or a table for each of several."""


class TaskSpec(Section):
    """[task]: prompts, and what counts as right."""

    dataset: str = MULTIPLICATION
    """A JSONL file of prompts and answers that the collector can read (docs/data.md), or
    "multiplication", built in: character-level multiplication with a scratchpad."""
    verifier: Verifiers | None = None
    """What judges responses: a name, or a list of tables [[task.verifier]] (docs/verifiers.md).
    Required with a file; the built-in task has its own, "multiplication": 1 if the response ends
    with the right product, else 0 (the paper: binary)."""
    chat: bool = False
    """True: a prompt that is text becomes one user message, for the chat template."""
    system: str | None = None
    """System message put before chat messages that bring none."""
    held_out: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of the file's prompts that are never trained on, for evaluation: at least 1 prompt, at
    most 1,000. Left out: 0.05, or 0 where every evaluation set has a file of its own."""
    difficulty: Annotated[int, Field(ge=2, le=6)] = 3
    """multiplication: most digits of the first factor; it has at least 2. The second factor has
    1."""

    @field_validator("dataset")
    @classmethod
    def _source(cls, dataset: str) -> str:
        if dataset != MULTIPLICATION and not PurePath(dataset).is_absolute():
            raise ValueError(f'"{MULTIPLICATION}", or {_FILE}')
        return dataset

    @model_validator(mode="after")
    def _judged(self) -> Self:
        if self.file and self.verifier is None:
            raise across(
                "task.verifier",
                "missing",
                f"one of {', '.join(BUILT_IN_VERIFIERS)}, or module:function: a file of prompts "
                "needs a judge",
            )
        return self

    @property
    def file(self) -> str:
        """Path of the JSONL file; empty for the built-in task."""
        return "" if self.dataset == MULTIPLICATION else self.dataset

    @property
    def verifiers(self) -> tuple[VerifierSpec, ...]:
        """What judges training responses."""
        return self.verifier or (VerifierSpec(name=MULTIPLICATION),)


class ColdStartSpec(Section):
    """[cold_start]: supervised steps on (noisy) demonstrations before version 0."""

    steps: NonNegativeInt = 0
    """Optimizer steps; 0 means no cold start."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate of AdamW. Keel's choice for small models."""
    batch_size: PositiveInt = 64
    """Demonstrations a step."""
    dataset: str | None = None
    """A JSONL file of prompts and responses to imitate (docs/data.md). Left out: the built-in
    task's own demonstrations; a task from a file has none."""

    @field_validator("dataset")
    @classmethod
    def _source(cls, dataset: str | None) -> str | None:
        return None if dataset is None else _file(dataset)


class EvaluationSet(Section):
    """[[evaluation.sets]]: one set of prompts that are never trained on."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
    """Its name in the metrics: eval/NAME/avg@K, eval/NAME/pass@K."""
    dataset: str | None = None
    """A JSONL file. Left out: what task.held_out keeps from training."""
    verifier: Verifiers | None = None
    """As task.verifier; left out: the task's."""
    samples: PositiveInt | None = None
    """Prompts; left out: evaluation.samples."""

    @field_validator("dataset")
    @classmethod
    def _source(cls, dataset: str | None) -> str | None:
        return None if dataset is None else _file(dataset)


class EvaluationSpec(Section):
    """[evaluation]: rewards on held-out prompts, at version boundaries."""

    every: NonNegativeInt = 0
    """Optimizer steps between evaluations, a multiple of off_policiness; also before the first
    step and after the last. 0: never."""
    samples: PositiveInt = 128
    """Prompts of each set: the same ones at every evaluation; all, if a file has fewer."""
    k: Annotated[int, Field(ge=1, le=1024)] = 1
    """Responses to each prompt: avg@k is their mean reward, pass@k the share of prompts with at
    least one right response."""
    temperature: NonNegativeFloat = 0.0
    """Softmax temperature; 0 is greedy, for k = 1 only."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling, for evaluation only: training samples from the full vocabulary."""
    max_tokens: PositiveInt | None = None
    """Most response tokens; left out: rollout.max_tokens."""
    pass_reward: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """A response is right, for pass@k, from this reward on."""
    sets: tuple[EvaluationSet, ...] = ()
    """Tables [[evaluation.sets]]; the first one's avg@k is accuracy/eval. Left out: one set,
    "held_out", of what the task keeps from training."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.k > 1 and self.temperature == 0:
            raise across(
                "evaluation.temperature",
                self.temperature,
                f"above 0 with evaluation.k = {self.k}: greedy responses are all the same",
            )
        names = [each.name for each in self.sets]
        if len(set(names)) < len(names):
            raise across("evaluation.sets", names, "a name of its own for each set")
        return self
