"""The data of one run: its files opened and checked, what is trained on, what is evaluated on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from keel.dataset import Dataset
from keel.errors import DatasetError
from keel.rows import Kind
from keel.spec import EvaluationSet, RunSpec, VerifierSpec, answers_for
from keel_rollout.collector.tasks.base import Problem, Prompt, Task
from keel_rollout.collector.tasks.jsonl import JsonlRows, JsonlTask, Taught, shuffle_seed
from keel_rollout.collector.tasks.registry import built_in_task
from keel_rollout.collector.text import TextCodec

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One evaluation set."""

    name: str
    own_seeds: bool
    """Its seeds and cohorts have its name; those of the one set of a job without sets have not."""
    size: int
    """Prompts."""
    verifiers: tuple[VerifierSpec, ...]
    problem: Callable[[int, int], Problem]
    """By seed and index, as `Task.held_out_problem`."""


class RunData:
    """Opened and checked; to be closed.

    Raises:
        DatasetError: a file cannot be used.
    """

    def __init__(self, spec: RunSpec) -> None:
        self._spec = spec
        self._files: dict[str, Dataset] = {}
        self._examples: list[JsonlRows] = []
        self._demonstrations: JsonlRows | None = None
        self.rows = 0
        """Rows of the task's file that are trained on; 0 for a built-in task."""
        try:
            self.sets: list[Evaluated]
            self.task = self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> Task:
        spec = self._spec
        own = {
            index: self._file(f"evaluation.sets.{index}.dataset", each.dataset, verifiers)
            for index, each in enumerate(spec.evaluation_sets)
            if each.dataset is not None and (verifiers := spec.verifiers_of(each))
        }
        task = self._task(_hashes(own.values()))
        self.sets = [
            self._evaluated(index, each, task, own.get(index))
            for index, each in enumerate(spec.evaluation_sets)
        ]
        return task

    def _task(self, evaluated: np.ndarray) -> Task:
        spec = self._spec
        if not spec.task.file:
            task = built_in_task(spec.task)
            demonstrations = self._open_demonstrations(evaluated, task.holds_out)
            return task if demonstrations is None else Taught(task, demonstrations)
        file = self._file("task.dataset", spec.task.file, spec.task.verifiers)
        train, held_out = file.split(spec.held_out)
        train = self._without(file, evaluated, train)
        self.rows = len(train)
        return JsonlTask(
            self._rows(file, train),
            self._rows(file, held_out) if len(held_out) else None,
            self._open_demonstrations(np.concatenate([evaluated, file.prompt_hashes[held_out]])),
        )

    def _open_demonstrations(
        self, evaluated: np.ndarray, holds_out: Callable[[Prompt], bool] | None = None
    ) -> JsonlRows | None:
        spec = self._spec.cold_start
        if spec.dataset is None or not spec.steps:
            return None
        file = self._file("cold_start.dataset", spec.dataset, (), kind="demonstrations")
        if holds_out is not None:
            held = [
                hash
                for row, hash in enumerate(file.prompt_hashes)
                if holds_out(file.row(row).prompt)
            ]
            evaluated = np.concatenate([evaluated, np.array(held, np.uint64)])
        kept = self._without(file, evaluated, np.arange(len(file)))
        self._demonstrations = self._rows(file, kept)
        return self._demonstrations

    def _without(self, file: Dataset, evaluated: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Rows whose prompts are in no evaluation set."""
        kept = rows[~np.isin(file.prompt_hashes[rows], evaluated)]
        if left_out := len(rows) - len(kept):
            log.warning(
                "%s: %s: %d rows are not trained on, their prompts are in an evaluation set",
                file.field,
                file.path,
                left_out,
            )
        if not len(kept):
            raise DatasetError(
                file.field, file.path, "nothing to train on: every prompt is in an evaluation set"
            )
        return kept

    def _evaluated(
        self, index: int, each: EvaluationSet, task: Task, file: Dataset | None
    ) -> Evaluated:
        samples = each.samples or self._spec.evaluation.samples
        if file is None:
            there, problem = task.held_out_size(), task.held_out_problem
        else:
            rows = self._rows(file, np.arange(len(file)))
            there = len(rows)

            def problem(seed: int, index: int) -> Problem:
                return rows.problem(index)

        return Evaluated(
            each.name,
            bool(self._spec.evaluation.sets),
            samples if there is None else min(samples, there),
            self._spec.verifiers_of(each),
            problem,
        )

    def _file(
        self,
        field: str,
        path: str,
        verifiers: tuple[VerifierSpec, ...],
        *,
        kind: Kind = "problems",
    ) -> Dataset:
        file = Dataset.open(field, Path(path), kind=kind, answers=answers_for(verifiers))
        self._files[field] = file
        if self._spec.task.system is not None and not self._spec.task.chat and () in file.shapes:
            line = file.line(file.shapes[()])
            raise DatasetError(
                field,
                path,
                f"line {line}, prompt: it is text, and task.system needs chat messages"
                " or task.chat = true",
            )
        log.info("%s: %s: %d rows, none rejected", field, path, len(file))
        return file

    def _rows(self, file: Dataset, rows: np.ndarray) -> JsonlRows:
        made = JsonlRows(file, rows, self._spec.task, shuffle_seed(self._spec.seed, file.field))
        self._examples.append(made)
        return made

    def check(self, text: TextCodec) -> None:
        """DatasetError for the first row that the model's tokenizer, template or length refuses:
        a prompt of every sequence of roles, and every demonstration that the run will use."""
        for rows in self._examples:
            for problem in rows.examples():
                text.check(problem)
        if self._demonstrations is not None:
            cold = self._spec.cold_start
            for index in range(min(len(self._demonstrations), cold.steps * cold.batch_size)):
                prompt, response = self._demonstrations.demonstration(index)
                text.check_length(prompt, response, self._demonstrations.where(index))

    def hashes(self) -> dict[str, str]:
        """xxh3 of every file, by the job's key."""
        return {field: file.xxh3 for field, file in self._files.items()}

    def path(self, field: str) -> str:
        """Path of a file by the job's key; empty if there is none."""
        return str(self._files[field].path) if field in self._files else ""

    def told(self) -> str:
        """What the run has, for its log."""
        held_out = ", ".join(f"{each.name} {each.size}" for each in self.sets)
        if not self.rows:
            return f"task {self._spec.task.dataset}; evaluation prompts: {held_out}"
        asked = self._spec.laps * self._spec.slots_per_lap
        return (
            f"{self.rows} rows to train on, {asked / self.rows:.2f} epochs of them in "
            f"{self._spec.laps} laps; evaluation prompts: {held_out}"
        )

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()


def _hashes(files: Iterable[Dataset]) -> np.ndarray:
    found = [file.prompt_hashes for file in files]
    return np.concatenate(found) if found else np.zeros(0, np.uint64)
