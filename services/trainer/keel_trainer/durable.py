"""What a run survives by: its ledger, its checkpoints, and the groups that these let go of.

    ledger: step used these slots  -->  checkpoint on disk  -->  groups of the one before go

What a checkpoint covers is acknowledged when the next one is on disk, so that a checkpoint which
turns out broken costs time only: the one before has all its groups in the queue still. Where the
queue is full, they go at once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeVar

import redis
import torch

from keel.blobs import BlobStore
from keel.ledger import Checkpointed, Line, Outcome, Used
from keel.queue import Stream
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
        reading: redis.Redis,
        folder: Path,
        *,
        spec: RunSpec,
        attempt: int,
        blobs: BlobStore | None,
    ) -> None:
        """Takes the newest checkpoint that is whole.

        Args:
            reading: see `SlotReader`.
            folder: of the run.
        """
        self._store, self._spec = store, spec
        self._ledger = Ledger(folder)
        self._checkpoints = Checkpoints(folder / "checkpoints", spec.checkpoint.keep)
        latest = self._checkpoints.load_latest()
        self._covered = latest[0] if latest else None
        self.progress = self._covered or Progress(attempt, cold_start_step=0, step=0)
        """Where the run goes on."""
        self.state = latest[1] if latest else None
        """What `Backend.state_dict` was there; None at the beginning. To be dropped once loaded."""
        # what the checkpoint before covers too is nobody's any more
        before = self._checkpoints.before(self.progress) or Progress(self.progress.attempt, 0, 0)

        def reader(stream: Stream, first_lap: int, covered_lap: int) -> SlotReader:
            return SlotReader(
                store,
                reading,
                stream,
                attempt=self.progress.attempt,
                first_lap=first_lap,
                covered_lap=covered_lap,
                blobs=blobs,
            )

        self.demos = reader("demos", self.progress.cold_start_step, before.cold_start_step)
        self.groups = reader("groups", self._laps(self.progress), self._laps(before))
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
        with self._timed():
            self._append(lines, check)

    def checkpoint(
        self,
        progress: Progress,
        state: Callable[[], dict[str, torch.Tensor]],
        check: Callable[[], object],
    ) -> None:
        """Writes a checkpoint, then acknowledges what the one before covers."""
        with self._timed():
            self._store.read()  # a lease that is over writes nothing
            name = f"the checkpoint of step {progress.step}"
            self.insist(name, lambda: self._checkpoints.save(progress, state()), check)
            line = Checkpointed(step=progress.step, cold_start_step=progress.cold_start_step)
            self._append([line], check)
            self.list_checkpoints()
            spare = self._covered if self._spec.checkpoint.keep > 1 else progress
            self._covered = progress
            if spare is not None:
                self._acknowledge(spare)

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

    def _append(self, lines: Sequence[Line], check: Callable[[], object]) -> None:
        self.insist("the ledger", lambda: self._ledger.append(lines), check)

    def _holds(self, covered: Progress) -> bool:
        """Something that it covers is still in the queue."""
        if self._cold_start_over(covered) and self.demos.in_flight():
            return True
        return self.demos.holds(covered.cold_start_step) or self.groups.holds(self._laps(covered))

    def _acknowledge(self, covered: Progress) -> None:
        if self._cold_start_over(covered):
            self.demos.drop()
        else:
            self.demos.acknowledge(covered.cold_start_step)
        self.groups.acknowledge(self._laps(covered))

    def _laps(self, progress: Progress) -> int:
        return progress.step // self._spec.recipe.off_policiness

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._spent_s += time.perf_counter() - began

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
