"""What is asked where: prompts, seeds and cohorts follow from (spec, attempt, lap, slot) alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from keel import codec
from keel.seeds import derive_seed
from keel.spec import RunSpec
from keel.types.v1 import sequence_pb2
from keel_rollout.collector.data import Evaluated, RunData
from keel_rollout.collector.tasks.base import Problem
from keel_rollout.collector.text import TextCodec


@dataclass(frozen=True, eq=False, slots=True)
class Slot:
    """One prompt in its place."""

    id: sequence_pb2.SlotId
    problem: Problem
    prompt_ids_P: npt.NDArray[np.int32]
    seed: int
    """Seed of the group's tokens."""


@dataclass(frozen=True, eq=False, slots=True)
class Cohort:
    """Slots to be computed as one batch.

    Example:
        Cohort(id="0/12/train/1", slots=...)  # attempt 0, lap 12, second cohort
    """

    id: str
    slots: Sequence[Slot]


class Plan:
    """Everything that a run asks for, whenever it is asked for."""

    def __init__(self, run: str, spec: RunSpec, data: RunData, text: TextCodec) -> None:
        self._run, self._spec, self._data, self._text = run, spec, data, text

    def lap_slots(self, attempt: int, lap: int) -> list[Slot]:
        """The training prompts of a lap, in slot order."""
        first = lap * self._spec.slots_per_lap
        return [
            self._slot(
                self._data.task.training_problem(
                    self._seed(attempt, "prompt", lap, slot), first + slot
                ),
                sequence_pb2.SlotId(run=self._run, attempt=attempt, lap=lap, slot=slot),
                seed=self._seed(attempt, "group", lap, slot),
            )
            for slot in range(self._spec.slots_per_lap)
        ]

    def lap_cohorts(self, attempt: int, lap: int, slots: Sequence[Slot]) -> list[Cohort]:
        """Cuts those slots of a lap that are to be generated."""
        return [
            Cohort(f"{attempt}/{lap}/train/{number}", [slots[index] for index in places])
            for number, places in enumerate(self._spec.cohorts(len(slots)))
        ]

    def evaluation_slots(self, evaluated: Evaluated, attempt: int, version: int) -> list[Slot]:
        """The prompts of an evaluation set, the same at every version."""
        mine = (evaluated.name,) if evaluated.own_seeds else ()
        return [
            self._slot(
                evaluated.problem(self._seed("held-out", *mine, index), index),
                sequence_pb2.SlotId(run=self._run, attempt=attempt, lap=version, slot=index),
                seed=self._seed(attempt, "evaluation", *mine, version, index),
            )
            for index in range(evaluated.size)
        ]

    def evaluation_cohorts(
        self, evaluated: Evaluated, attempt: int, version: int, slots: Sequence[Slot]
    ) -> list[Cohort]:
        """Cuts those prompts of a set that are to be generated, k sequences each."""
        mine = f"/{evaluated.name}" if evaluated.own_seeds else ""
        return [
            Cohort(
                f"{attempt}/{version}/evaluation{mine}/{number}", [slots[index] for index in places]
            )
            for number, places in enumerate(self._spec.evaluation_cohorts(len(slots)))
        ]

    def demonstrations(self, attempt: int, step: int) -> sequence_pb2.Envelope:
        """The batch of one supervised step."""
        batch = sequence_pb2.DemonstrationBatch()
        size = self._spec.cold_start.batch_size
        for index in range(size):
            prompt, response = self._data.task.demonstration(
                self._seed(attempt, "demonstration", step, index), step * size + index
            )
            prompt_ids_P = self._text.prompt_ids(prompt)
            token_ids_T = np.concatenate([prompt_ids_P, self._text.response_ids(response)])
            batch.demonstrations.add(
                token_ids=codec.to_tensor(token_ids_T), prompt_length=len(prompt_ids_P)
            )
        place = sequence_pb2.SlotId(run=self._run, attempt=attempt, lap=step, slot=0)
        return sequence_pb2.Envelope(id=place, demonstrations=batch)

    def _seed(self, *path: int | str) -> int:
        return derive_seed(self._spec.seed, *path)

    def _slot(self, problem: Problem, place: sequence_pb2.SlotId, seed: int) -> Slot:
        return Slot(
            place, problem, self._text.prompt_ids(problem.prompt, problem.where or "prompt"), seed
        )
