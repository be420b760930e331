"""Prompts from JSONL files: an endless shuffle of the training rows, and sets kept from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from keel.dataset import Dataset, Rows, shuffled
from keel.errors import StateError
from keel.presets import END
from keel.rows import Row
from keel.seeds import derive_seed
from keel.spec import TaskSpec
from keel_rollout.collector.tasks.base import Problem, Prompt


class JsonlRows:
    """Some rows of a file, in an order that follows from the seed."""

    def __init__(self, dataset: Dataset, rows: Rows, spec: TaskSpec, seed: int) -> None:
        self._dataset, self._rows, self._spec, self._seed = dataset, rows, spec, seed

    def __len__(self) -> int:
        return len(self._rows)

    def problem(self, index: int) -> Problem:
        """The one at place `index` of the endless shuffle."""
        row, where = self._at(index)
        return Problem(self._prompt(row), row.answer, row.fields, where)

    def demonstration(self, index: int) -> tuple[Prompt, str]:
        """The one at place `index` of the endless shuffle."""
        row, _ = self._at(index)
        return self._prompt(row), row.response + END

    def where(self, index: int) -> str:
        """Where the row at place `index` stands, for messages."""
        return self._at(index)[1]

    def examples(self) -> list[Problem]:
        """A problem for each sequence of roles in the file: what a chat template can refuse."""
        return [
            Problem(self._prompt(self._dataset.row(row)), where=self._where(row))
            for row in self._dataset.shapes.values()
        ]

    def _at(self, index: int) -> tuple[Row, str]:
        row = int(self._rows[shuffled(self._seed, index, len(self._rows))])
        return self._dataset.row(row), self._where(row)

    def _where(self, row: int) -> str:
        dataset = self._dataset
        return f"{dataset.field}: {dataset.path}: line {dataset.line(row)}"

    def _prompt(self, row: Row) -> Prompt:
        return chat_prompt(row.prompt, self._spec)


class JsonlTask:
    """The task of a file. What it has none of (held-out rows, demonstrations) is None."""

    def __init__(
        self, train: JsonlRows, held_out: JsonlRows | None, demonstrations: JsonlRows | None
    ) -> None:
        self._train, self._held_out, self._demonstrations = train, held_out, demonstrations

    def training_problem(self, seed: int, index: int) -> Problem:
        """Each training row once an epoch."""
        return self._train.problem(index)

    def held_out_size(self) -> int | None:
        """The held-out rows."""
        return len(self._held_out) if self._held_out else 0

    def held_out_problem(self, seed: int, index: int) -> Problem:
        """The same ones for the same seed of the run."""
        assert self._held_out is not None
        return self._held_out.problem(index)

    def demonstration(self, seed: int, index: int) -> tuple[Prompt, str]:
        """Each demonstration once an epoch."""
        if self._demonstrations is None:
            raise StateError("a task from a file has no demonstrations without cold_start.dataset")
        return self._demonstrations.demonstration(index)


class Taught:
    """A built-in task with demonstrations from a file."""

    def __init__(self, task: Any, demonstrations: JsonlRows) -> None:
        self._demonstrations = demonstrations
        self.training_problem = task.training_problem
        self.held_out_size = task.held_out_size
        self.held_out_problem = task.held_out_problem

    def demonstration(self, seed: int, index: int) -> tuple[Prompt, str]:
        """Each demonstration once an epoch."""
        return self._demonstrations.demonstration(index)


def chat_prompt(prompt: Prompt, spec: TaskSpec) -> Prompt:
    """A row's prompt as the job wants it: text as one user message, a system message before."""
    messages: list[Mapping[str, Any]]
    if isinstance(prompt, str):
        if not spec.chat:
            return prompt
        messages = [{"role": "user", "content": prompt}]
    else:
        messages = prompt
    if spec.system is None or messages[0]["role"] in ("system", "developer"):
        return messages
    return [{"role": "system", "content": spec.system}, *messages]


def shuffle_seed(seed: int, field: str) -> int:
    """Seed of a file's order. Not of the attempt: after a rollback an epoch goes on as it was."""
    return derive_seed(seed, "shuffle", field)
