"""TrainerService: wakes and watches one child process a run. Loads no torch.

StartRun --> child (keel_trainer.run) --> writes the run record
               | killed from outside: started again, resumes from its checkpoint
               | ended: the record holds the final phase
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc

from keel.blobs import BlobStore
from keel.errors import FencedError, InvalidField, NotFound, StateError, WireError
from keel.record import Desired, Phase, RunRecord
from keel.trainer.v1 import trainer_service_pb2 as pb
from keel.trainer.v1 import trainer_service_pb2_grpc as pb_grpc
from keel_trainer.storage import drop_blobs
from keel_trainer.store import UNREACHABLE, RunLostError, RunStore, connect

log = logging.getLogger(__name__)

_WATCH_INTERVAL_S = 0.5
_RESTART_DELAY_S = 1.0
_MAX_FAILURES, _FAILURES_WITHIN_S = 10, 3600.0
"""More deaths of a run's process than this within this time, in one place, end the run."""
_STOP_GRACE_S = 5.0


@dataclass(frozen=True, slots=True)
class ChildOptions:
    """What every child is started with."""

    redis_url: str
    runs: Path
    device: str
    threads: int
    weights: Path | None = None
    """Folder for weights by reference."""
    blobs: str = ""
    """Folder or URL of what is too large for the queue."""

    def argv(self, run: str, fencing_token: int) -> list[str]:
        """The child's command line; what is secret goes by `env`."""
        return [
            *(sys.executable, "-m", "keel_trainer.run", "--run", run),
            *("--runs", str(self.runs), "--fencing-token", str(fencing_token)),
            *("--device", self.device, "--threads", str(self.threads)),
            *(("--weights", str(self.weights)) if self.weights else ()),
            *(("--blobs", self.blobs) if self.blobs else ()),
        ]

    def env(self) -> dict[str, str]:
        """The child's environment."""
        # cuBLAS repeats its bits only with a workspace of fixed size
        fixed = {"KEEL_REDIS_URL": self.redis_url, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        return os.environ | fixed


class TrainerServicer(pb_grpc.TrainerServiceServicer):
    """One trainer: any number of runs, one child each."""

    def __init__(self, options: ChildOptions) -> None:
        self._options = options
        self._redis = connect(options.redis_url, retries=3)
        self._children: dict[str, asyncio.Task[None]] = {}
        self._blobs = BlobStore(options.blobs) if options.blobs else None

    async def StartRun(
        self, request: pb.StartRunRequest, context: grpc.aio.ServicerContext
    ) -> pb.StartRunResponse:
        record = await self._record(request.run, request.fencing_token)
        if record.phase.final:
            raise StateError(f"run {record.run!r} is over: {record.phase}")
        if not self._running(record.run):
            self._children[record.run] = asyncio.create_task(
                self._supervise(record.run, request.fencing_token)
            )
        return pb.StartRunResponse(run=self._view(record))

    async def PauseRun(
        self, request: pb.PauseRunRequest, context: grpc.aio.ServicerContext
    ) -> pb.PauseRunResponse:
        return pb.PauseRunResponse(run=await self._desire(request, Desired.PAUSED))

    async def ResumeRun(
        self, request: pb.ResumeRunRequest, context: grpc.aio.ServicerContext
    ) -> pb.ResumeRunResponse:
        return pb.ResumeRunResponse(run=await self._desire(request, Desired.RUNNING))

    async def CancelRun(
        self, request: pb.CancelRunRequest, context: grpc.aio.ServicerContext
    ) -> pb.CancelRunResponse:
        view = await self._desire(request, Desired.CANCELLED)
        if not view.running:
            # read again: its process may have ended it a moment ago
            record = await self._record(request.run)
            if not record.phase.final:
                store = self._store(request.run, request.fencing_token)
                await asyncio.to_thread(store.end, Phase.CANCELLED)
                await asyncio.to_thread(drop_blobs, self._blobs, request.run)
            view = self._view(await self._record(request.run))
        return pb.CancelRunResponse(run=view)

    async def GetRun(
        self, request: pb.GetRunRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetRunResponse:
        return pb.GetRunResponse(run=self._view(await self._record(request.run)))

    async def WatchRun(
        self, request: pb.WatchRunRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.WatchRunResponse]:
        last = None
        while True:
            record = await self._record(request.run)
            view = self._view(record)
            if view != last:
                yield pb.WatchRunResponse(run=view)
                last = view
            if record.phase.final:
                return
            await asyncio.sleep(_WATCH_INTERVAL_S)

    def running(self) -> list[str]:
        """Ids of the runs that have a process, or are about to."""
        return [run for run in list(self._children) if self._running(run)]

    async def sweep(self) -> None:
        """Removes what runs that are over have left in the blob store: a group came too late, or
        somebody was killed before it could.
        """
        if self._blobs is None:
            return
        for run in await asyncio.to_thread(self._blobs.runs):
            try:
                record = await self._record(run)
            except (NotFound, WireError):
                continue  # of another Redis, perhaps
            if record.phase.final:
                await asyncio.to_thread(drop_blobs, self._blobs, run)

    async def close(self) -> None:
        """Stops every child; their runs resume when the trainer is back."""
        for task in self._children.values():
            task.cancel()
        await asyncio.gather(*self._children.values(), return_exceptions=True)

    async def _supervise(self, run: str, fencing_token: int) -> None:
        deaths: list[float] = []
        place = None
        while len(deaths) <= _MAX_FAILURES:
            child = await asyncio.create_subprocess_exec(
                *self._options.argv(run, fencing_token),
                env=self._options.env(),
                # never written to: it ends with this process, and the child with it
                stdin=asyncio.subprocess.PIPE,
            )
            log.info("run %s: child %d started", run, child.pid)
            try:
                status = await child.wait()
            finally:
                await _stop(child)
            if status == 0:
                return
            log.warning("run %s: child %d ended with status %d", run, child.pid, status)
            await asyncio.sleep(_RESTART_DELAY_S)
            try:
                at = await self._progress(run)
            except RunLostError as lost:
                log.error("run %s is not started again: %s", run, lost)
                return
            if at is None:
                continue  # no fault of the run
            now_s = time.monotonic()
            if at != place:
                deaths, place = [], at
            deaths = [*(s for s in deaths if now_s - s < _FAILURES_WITHIN_S), now_s]
        if (await self._record(run)).phase.final:
            return
        store = self._store(run, fencing_token)
        error = f"its training process died {len(deaths)} times in one place, with status {status}"
        try:
            await asyncio.to_thread(store.end, Phase.FAILED, error=error)
        except (FencedError, RunLostError) as over:
            log.warning("%s", over)
            return
        await asyncio.to_thread(drop_blobs, self._blobs, run)

    async def _progress(self, run: str) -> tuple[int, int] | None:
        """Supervised and optimizer steps done; None while Redis is away."""
        try:
            record = await self._record(run)
        except UNREACHABLE:
            return None
        return record.cold_start_step, record.step

    async def _desire(
        self,
        request: pb.PauseRunRequest | pb.ResumeRunRequest | pb.CancelRunRequest,
        desired: Desired,
    ) -> pb.Run:
        record = await self._record(request.run, request.fencing_token)
        if not record.phase.final:
            store = self._store(request.run, request.fencing_token)
            await asyncio.to_thread(store.write, desired=desired)
        return self._view(record)

    async def _record(self, run: str, fencing_token: int | None = None) -> RunRecord:
        if not run:
            raise InvalidField("run", run, "a run id")
        record = await asyncio.to_thread(self._store(run, 2**63).read)
        if fencing_token is not None and fencing_token != record.fencing_token:
            raise FencedError(
                f"fencing_token: {fencing_token} is not the lease of run {run!r}; "
                f"valid: {record.fencing_token}"
            )
        return record

    def _store(self, run: str, fencing_token: int) -> RunStore:
        return RunStore(self._redis, run, fencing_token)

    def _running(self, run: str) -> bool:
        task = self._children.get(run)
        return task is not None and not task.done()

    def _view(self, record: RunRecord) -> pb.Run:
        return pb.Run(
            run=record.run,
            phase=f"RUN_PHASE_{record.phase}",
            step=record.step,
            policy_version=record.policy_version,
            error=record.error,
            running=self._running(record.run),
        )


async def _stop(child: asyncio.subprocess.Process) -> None:
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            child.terminate()
            try:
                await asyncio.wait_for(child.wait(), _STOP_GRACE_S)
            except TimeoutError:
                child.kill()
                await child.wait()
