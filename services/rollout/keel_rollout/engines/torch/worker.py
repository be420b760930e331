"""The compute thread: owns the model, decides what runs, and never waits for a client.

    submit ──▶ cohort book ── complete ──▶ ready ──▶ cohort batch ─┐
       └─────▶ waiting ────── room ───────────────▶ stream batch ──┴─▶ one step each, in turn

One cohort runs at a time, in a batch of its own; what has no cohort shares the stream batch,
joining between steps. Commands are carried out between steps, in the order in which they came.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future

import torch

from keel.errors import KeelError, OvertakenError, StateError
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.types.v1 import sequence_pb2
from keel_rollout.engines.base import BrokenModel, EngineFailed, Finished, Piece
from keel_rollout.engines.torch.batch import Batch, Event, Job
from keel_rollout.engines.torch.cohorts import Cohort, CohortBook
from keel_rollout.engines.torch.model import Model
from keel_rollout.engines.torch.thread import CommandThread

log = logging.getLogger(__name__)

STREAM_ROWS = 1024
"""Rows of the stream batch; a single larger group still runs, alone."""

Delivery = tuple[Job, Piece | Finished | KeelError]


class Worker(CommandThread):
    """Runs commands and steps. Every method but `call` and `post` is called in the thread itself.

    Args:
        deliver: takes what leaves, in order; called in this thread.
    """

    def __init__(self, threads: int, deliver: Callable[[list[Delivery]], None]) -> None:
        super().__init__("keel-compute")
        self._threads = threads
        self._deliver = deliver
        self._outbox: list[Delivery] = []
        self._closed = False
        self.model: Model | None = None
        self.version: int | None = None
        self._paused = False
        self._drained: list[Future[int]] = []
        self._book = CohortBook()
        self._ready: deque[Cohort] = deque()
        self._waiting: deque[Job] = deque()
        self._running: Cohort | None = None
        self._cohort: Batch | None = None
        self._stream: Batch | None = None

    def work(self) -> None:
        """Admits, obeys and steps until closed."""
        torch.set_num_threads(self._threads)
        with torch.inference_mode():
            while not self._closed:
                runnable = self._admit()
                self._flush()
                self.obey(block=not runnable)
                for batch in (self._cohort, self._stream):
                    if batch and not self._paused:
                        self._step(batch)
                self._retire()
                self._flush()

    def _flush(self) -> None:
        if self._outbox:
            self._deliver(self._outbox)
            self._outbox = []

    def _emit(self, events: Iterable[Event]) -> None:
        self._outbox += events

    def _fail(self, jobs: Iterable[Job], error: KeelError) -> None:
        self._outbox += [(job, error) for job in jobs if not job.cancelled]

    # -- what runs ---------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Takes a job in; raises what `CohortBook.add` raises."""
        if job.request.cohort is None:
            self._waiting.append(job)
            return
        cohort, overtaken = self._book.add(job)
        if overtaken is not None:
            self._fail(overtaken.in_order(), OvertakenError(f"{cohort} replaces {overtaken}"))
            self._forget(overtaken)
        if cohort.complete:
            self._ready.append(cohort)

    def cancel(self, job: Job) -> None:
        """Frees what a job holds. In a running cohort its rows go on unheard: others' bits."""
        job.cancelled = True
        if job in self._waiting:
            self._waiting.remove(job)
        if self._stream is not None:
            self._stream.drop(job)
        self._book.withdraw(job)
        if self._running is not None and all(j.cancelled for j in self._running.jobs.values()):
            self._forget(self._running)

    def _admit(self) -> bool:
        """Starts what can start; returns whether there is anything to step."""
        if self._paused or self.version is None:
            return False
        if not self._drained:
            while self._cohort is None and self._ready:
                self._start(self._ready.popleft())
            self._join()
        return self._cohort is not None or self._stream is not None

    def _start(self, cohort: Cohort) -> None:
        jobs = cohort.in_order()
        if all(job.cancelled for job in jobs):
            self._book.finish(cohort)
            return
        for job in jobs:
            refusal = self._refusal(job)
            if refusal is not None:
                self._fail(jobs, refusal)
                self._book.finish(cohort)
                return
        self._running, self._cohort = cohort, self._batch()
        self._guard(self._cohort, jobs, lambda batch: batch.add(jobs))

    def _join(self) -> None:
        jobs = []
        rows = len(self._stream) if self._stream is not None else 0
        while self._waiting:
            need = self._waiting[0].request.num_samples
            if rows and rows + need > STREAM_ROWS:
                break
            job = self._waiting.popleft()
            refusal = self._refusal(job)
            if refusal is not None:
                self._fail([job], refusal)
                continue
            jobs.append(job)
            rows += need
        if jobs:
            if self._stream is None:
                self._stream = self._batch()
            self._guard(self._stream, jobs, lambda batch: batch.add(jobs))

    def _batch(self) -> Batch:
        assert self.model is not None
        assert self.version is not None
        return Batch(self.model, self.version)

    def _refusal(self, job: Job) -> StateError | None:
        wanted = job.request.require_policy_version
        if wanted is None or wanted == self.version:
            return None
        return StateError(
            f"require_policy_version: {wanted} is not served; the engine serves {self.version}"
        )

    def _step(self, batch: Batch) -> None:
        self._guard(batch, [], lambda batch: self._emit(batch.step()))

    def _guard(self, batch: Batch, new: list[Job], action: Callable[[Batch], None]) -> None:
        """Fails a batch's jobs, `new` ones included, where computing fails; and lives on."""
        try:
            action(batch)
        except Exception as error:
            log.exception("a batch failed")
            jobs = {id(job): job for job in (*new, *(row.job for row in batch.rows))}
            if self._running is not None and batch is self._cohort:
                self._forget(self._running)
            else:
                self._stream = None
            failure = EngineFailed(f"the engine failed while computing: {type(error).__name__}")
            self._fail(jobs.values(), failure)

    def _retire(self) -> None:
        if self._cohort is not None and not len(self._cohort):
            assert self._running is not None
            self._forget(self._running)
        if self._stream is not None and not len(self._stream):
            self._stream = None
        if self._drained and self._cohort is None and self._stream is None:
            self._paused = True
            for future in self._drained:
                future.set_result(0)
            self._drained = []

    def _forget(self, cohort: Cohort) -> None:
        if cohort in self._ready:
            self._ready.remove(cohort)
        if cohort is self._running:
            self._running = self._cohort = None
            self._book.finish(cohort)

    # -- commands ----------------------------------------------------------------------------

    def pause(self, mode: pb.PauseMode) -> Future[int]:
        """Stops generation; the future holds the number of sequences frozen or aborted."""
        done: Future[int] = Future()
        done.set_running_or_notify_cancel()
        if mode == pb.PAUSE_MODE_WAIT and not self._paused:
            self._drained.append(done)
            return done
        in_flight = sum(len(batch) for batch in (self._cohort, self._stream) if batch is not None)
        self._paused = True
        if mode == pb.PAUSE_MODE_ABORT:
            self._abort_running()
        done.set_result(in_flight)
        return done

    def resume(self) -> None:
        """Lets generation go on; a pause that still waits is called off."""
        self._paused = False
        for future in self._drained:
            future.set_exception(OvertakenError("Resume came before generation had stopped"))
        self._drained = []

    def load(self, model: Model | None) -> None:
        """Takes another model, without weights; ends every request ABORTED."""
        self._abort_running()
        unheard = [*self._waiting, *self._book.waiting()]
        unheard += [job for cohort in self._ready for job in cohort.in_order()]
        for job in unheard:
            if not job.cancelled:
                for sample in range(job.request.num_samples):
                    self._emit([(job, Finished(sample, sequence_pb2.FINISH_REASON_ABORTED))])
        self._waiting.clear()
        self._ready.clear()
        self._book.clear()
        self.resume()
        self.model, self.version = model, None

    def apply(self, version: int, state: Mapping[str, torch.Tensor]) -> None:
        """Copies a version in; frozen and running rows go on under it with new caches."""
        assert self.model is not None
        try:
            self.model.apply(state)
        except BrokenModel as error:
            self.version = None
            self._fail_all(StateError(f"the engine is STALE: {error}"))
            raise
        self.version = version
        for batch in (self._cohort, self._stream):
            if batch is not None:
                self._guard(batch, [], lambda batch: batch.recompute(version))

    def _fail_all(self, error: KeelError) -> None:
        jobs = [*self._waiting, *self._book.waiting()]
        for cohort in (*self._ready, *([self._running] if self._running else [])):
            jobs += cohort.in_order()
        if self._stream is not None:
            jobs += {id(row.job): row.job for row in self._stream.rows}.values()
        self._fail(jobs, error)
        self._waiting.clear()
        self._ready.clear()
        self._book.clear()
        self._running = self._cohort = self._stream = None

    def _abort_running(self) -> None:
        for batch in (self._cohort, self._stream):
            if batch is not None:
                self._emit(batch.abort())
        self._retire()

    def close(self) -> None:
        """Ends every request ABORTED and stops the thread."""
        self.load(None)
        self._flush()
        self._closed = True
