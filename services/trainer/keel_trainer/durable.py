"""What a run survives by: its ledger, its checkpoints, and the groups that these let go of.

    ledger: step used these slots  -->  checkpoint on disk  -->  groups of the one before go

What a checkpoint covers is acknowledged when the next one is on disk, so that a checkpoint which
turns out broken costs time only: the one before has all its groups in the queue still. Where the
queue is full, they go at once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Literal, TypeVar

import torch

from keel.ledger import Checkpointed, Line, Outcome, Used
from keel.spec import RunSpec
from keel_trainer.checkpoint import Checkpoints, Progress
from keel_trainer.consumer import SlotReader, Taken
from keel_trainer.ledger import Ledger
from keel_trainer.storage import insist
from keel_trainer.store import RunStore

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class Durable:
    """Ledger, checkpoints and acknowledgement of one run."""

    def __init__(
        self,
        store: RunStore,
        ledger: Ledger,
        checkpoints: Checkpoints,
        demos: SlotReader,
        groups: SlotReader,
        *,
        spec: RunSpec,
        covered: Progress | None,
    ) -> None:
        """
        Args:
            covered: the checkpoint that the run goes on from.
        """
        self._store, self._ledger, self._checkpoints = store, ledger, checkpoints
        self._demos, self._groups, self._spec = demos, groups, spec
        self._covered = covered
        self._spent_s = 0.0

    def spent_s(self) -> float:
        """Seconds spent here since this was asked last."""
        spent_s, self._spent_s = self._spent_s, 0.0
        return spent_s

    def enter(self, *lines: Line, check: Callable[[], object]) -> None:
        """Enters lines into the ledger; they are on disk when it returns.

        Args:
            check: called while the disk takes nothing; raises to give up.
        """
        began = time.perf_counter()
        self.insist("the ledger", lambda: self._ledger.append(lines), check)
        self._spent_s += time.perf_counter() - began

    def checkpoint(
        self,
        progress: Progress,
        state: Callable[[], dict[str, torch.Tensor]],
        check: Callable[[], object],
    ) -> None:
        """Writes a checkpoint, then acknowledges what the one before covers."""
        began = time.perf_counter()
        self._store.read()  # a lease that is over writes nothing
        name = f"the checkpoint of step {progress.step}"
        self.insist(name, lambda: self._checkpoints.save(progress, state()), check)
        line = Checkpointed(step=progress.step, cold_start_step=progress.cold_start_step)
        self._spent_s += time.perf_counter() - began
        self.enter(line, check=check)
        began = time.perf_counter()
        self.list_checkpoints()
        spare = self._covered if self._spec.checkpoint.keep > 1 else progress
        self._covered = progress
        if spare is not None:
            self._acknowledge(spare)
        self._spent_s += time.perf_counter() - began

    def make_room(
        self,
        progress: Progress,
        state: Callable[[], dict[str, torch.Tensor]],
        check: Callable[[], object],
    ) -> None:
        """Acknowledges all that has been trained on, by a checkpoint out of turn if need be."""
        if self._covered is not None and self._holds(self._covered):
            self._acknowledge(self._covered)  # that may do, and needs no room on any disk
        elif self._holds(progress):
            log.info("a checkpoint out of turn, after step %d", progress.step)
            self.checkpoint(progress, state, check)
            self._acknowledge(progress)

    def list_checkpoints(self) -> None:
        """Tells which checkpoints there are."""
        spec = self._spec
        self._store.write_checkpoints(
            self._checkpoints.existing(spec.recipe.off_policiness, spec.cold_start.steps)
        )

    def insist(self, what: str, write: Callable[[], Result], check: Callable[[], object]) -> Result:
        """See `storage.insist`."""
        return insist(what, write, tell=self._store.tell, check=check)

    def _holds(self, covered: Progress) -> bool:
        """Something that it covers is still in the queue."""
        if self._cold_start_over(covered) and self._demos.in_flight():
            return True
        lap = covered.step // self._spec.recipe.off_policiness
        return self._demos.holds(covered.cold_start_step) or self._groups.holds(lap)

    def _acknowledge(self, covered: Progress) -> None:
        if self._cold_start_over(covered):
            self._demos.drop()
        else:
            self._demos.acknowledge(covered.cold_start_step)
        self._groups.acknowledge(covered.step // self._spec.recipe.off_policiness)

    def _cold_start_over(self, covered: Progress) -> bool:
        return covered.cold_start_step >= self._spec.cold_start.steps


def used(
    kind: Literal["group", "demonstrations"], step: int, taken: Taken, outcome: Outcome
) -> Used:
    """The ledger's line of a slot.

    Args:
        step: that it is used by, from 1.
        outcome: of an entry that could be read.
    """
    return Used(
        kind=kind,
        step=step,
        attempt=taken.slot.attempt,
        lap=taken.slot.lap,
        slot=taken.slot.slot,
        entry=taken.entry,
        xxh3=taken.xxh3,
        outcome="dead" if taken.content is None else outcome,
    )
