"""Brings runs to trainers: grants leases, and sees to it that every leased run is being worked on.

One loop. Each pass reads the unfinished records, grants what `keel_gateway.leases` plans, and looks
after each leased run in a task of its own, so that a trainer that hangs delays no other run:

    cancelled wanted                       -> CancelRun
    not yet started by this gateway,
    or its trainer was away or is another  -> StartRun (idempotent: a known id resumes)
    otherwise, every few seconds           -> GetRun, and StartRun if nobody works on it

The same pass empties engines: it marks in the records those that operators want drained, and takes
away what the collector has found empty.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Collection
from contextlib import suppress
from functools import partial

import grpc
from redis.exceptions import RedisError

from keel import rpc
from keel.errors import StateError
from keel.fleet import EngineState
from keel.record import Desired, Phase, RunRecord
from keel.trainer.v1 import trainer_service_pb2 as pb
from keel.trainer.v1 import trainer_service_pb2_grpc
from keel_gateway import fleet_view, redis_trouble, transitions
from keel_gateway.leases import Grant, plan
from keel_gateway.registry import MUTE, Registry, describe
from keel_gateway.schemas import Job
from keel_gateway.store import Store

log = logging.getLogger(__name__)

CALL_DEADLINE_S = 10.0
"""Of a call to a trainer: it may start a process before it answers."""
LOOK_EVERY_S = 3.0
"""Seconds between two looks at a run that is leased."""
SLOW_AFTER_S = 10.0
"""An engine that is JOINING for longer is worth telling of."""


class Scheduler:
    """Grants leases and drives trainers until it is stopped."""

    def __init__(self, store: Store, registry: Registry, *, poll_s: float, lease_s: float) -> None:
        self._store, self._registry = store, registry
        self._poll_s, self._lease_s = poll_s, lease_s
        self._loop: asyncio.Task[None] | None = None
        self._stopping = False
        self._wake = asyncio.Event()
        self._pass = asyncio.Lock()  # two passes at once would grant the same engine twice
        self._stuck = ""
        self._waiting: dict[str, str] = {}
        self._trouble: dict[str, str] = {}
        self._joining_since_s: dict[tuple[str, str], float] = {}
        self._started: set[str] = set()
        self._looks: dict[str, asyncio.Task[None]] = {}
        self._next_look_s: dict[str, float] = {}

    def job(self, record: RunRecord) -> Job:
        """The run as the REST interface shows it."""
        states = fleet_view.states(record, self._registry.engines)
        dead = self._store.dead_letter_count(record.run)
        return Job.from_record(record, self.reason(record), states, dead)

    def reason(self, record: RunRecord) -> str:
        """Why a run does not go on, for people to read; empty where it does, or has ended."""
        if record.phase.final:
            return ""
        paused = record.desired is Desired.PAUSED
        if record.trainer:
            expected = ""
            if paused:
                until = f"keeps trainer {record.trainer} and its engines until it is resumed"
                expected = f"paused: {until}" if record.paused else "pauses before its next lap"
            elif record.desired is Desired.CANCELLED:
                expected = f"trainer {record.trainer} is stopping it"
            elif record.phase is Phase.QUEUED:
                expected = f"trainer {record.trainer} is starting it"
            trouble = self._silent_trainer(record) or record.trouble
            return trouble or expected or self._engine_trouble(record) or record.queue_full
        if paused:
            return "paused: gets no trainer and no engine until it is resumed"
        return self._stuck or self._waiting.get(record.run, "waits for the scheduler's next pass")

    def _silent_trainer(self, record: RunRecord) -> str:
        trouble = self._trouble.get(record.run, "")
        if trouble and record.trainer in self._registry.lapsed(self._lease_s):
            trouble = "; ".join(filter(None, [trouble, self._waiting.get(record.run, "")]))
        return trouble

    def _engine_trouble(self, record: RunRecord) -> str:
        since = time.monotonic() - SLOW_AFTER_S
        slow = {
            address
            for address in record.engines
            if self._joining_since_s.get((record.run, address), math.inf) < since
        }
        short = len(record.engines) < record.spec.engine.engines
        no_pass_yet = "waits for the scheduler's next pass" if short else ""
        waits = self._waiting.get(record.run, no_pass_yet)
        return fleet_view.trouble(record, self._registry.engines, slow, waits)

    def wake(self, run: str) -> None:
        """Has the loop look after `run` at once."""
        self._next_look_s.pop(run, None)
        self._wake.set()

    def start(self) -> None:
        """Begins to loop."""
        self._loop = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Ends the loop and whatever it is doing."""
        # Not by cancelling: on Python 3.11, wait_for inside redis-py may swallow a cancellation.
        self._stopping = True
        self._wake.set()
        if self._loop is not None:
            await self._loop
        looks = list(self._looks.values())
        for task in looks:
            task.cancel()
        await asyncio.gather(*looks, return_exceptions=True)

    async def _run(self) -> None:
        while not self._stopping:
            self._wake.clear()
            try:
                await self._look_after(await self.grant_leases())
                self._tell("")
            except RedisError as error:  # the next pass may succeed
                self._tell(redis_trouble.describe(error))
            except Exception as error:
                log.warning("a pass failed: %s: %s", type(error).__name__, error)
            with suppress(TimeoutError):
                async with asyncio.timeout(self._poll_s):
                    await self._wake.wait()

    def _tell(self, stuck: str) -> None:
        """Logs once that passes fail, and once that they no longer do."""
        if stuck != self._stuck:
            log.warning("%s", stuck or "Redis works again")
        self._stuck = stuck

    async def grant_leases(self) -> list[RunRecord]:
        """Gives what is free to the runs that wait; returns every run that holds a lease now."""
        async with self._pass:
            await self._store.check()
            drained = await self._store.drained_engines()
            unfinished = await self._store.unfinished()
            records = [await self._empty(record, drained) for record in unfinished]
            self._note_joining(records)
            for record in records:
                if record.trainer and record.trainer not in self._registry.trainers:
                    self._registry.ask_former_trainer(record.trainer)
            lapsed = self._registry.lapsed(self._lease_s)
            planned = plan(
                records, self._registry.trainers, self._registry.engines, drained, lapsed
            )
            self._waiting = planned.waiting
            granted = [await self._grant(grant) for grant in planned.grants]
            return [record for record in (*records, *granted) if record and record.trainer]

    async def drain(self, address: str, *, wanted: bool) -> None:
        """Has an engine emptied and kept out of runs, or, with `wanted` false, back in them."""
        async with self._pass:  # or a pass that goes on could lease it
            await self._store.set_drained(address, wanted=wanted)
        await self.grant_leases()

    async def _empty(self, record: RunRecord, drained: Collection[str]) -> RunRecord:
        """The record once its engines drain that are to, and those that are empty have left."""
        lost = {address for address, one in self._registry.engines.items() if one.silent}

        def empty(record: RunRecord) -> RunRecord:
            return transitions.leave(transitions.drain(record, wanted=drained), lost=lost)

        if empty(record) == record:
            return record
        after = await self._store.change(record.run, empty)
        if gone := set(record.engines) - set(after.engines):
            log.info("%s left %s, empty", ", ".join(sorted(gone)), record.run)
        return after

    def _note_joining(self, records: list[RunRecord]) -> None:
        now = time.monotonic()
        self._joining_since_s = {
            (record.run, address): self._joining_since_s.get((record.run, address), now)
            for record in records
            if record.policy_version is not None
            for address, state in fleet_view.states(record, self._registry.engines).items()
            if state is EngineState.JOINING
        }

    async def _grant(self, grant: Grant) -> RunRecord | None:
        token = await self._store.next_fencing_token()
        try:
            record = await self._store.change(grant.run, partial(grant.apply, token=token))
        except StateError as error:  # cancelled since the pass began
            log.info("%s", error)
            return None
        leased = ", ".join(filter(None, (grant.trainer, *grant.engines)))
        instead = f", instead of {', '.join(grant.lost)}" if grant.lost else ""
        log.info("%s leased to %s%s, token %d", leased, grant.run, instead, token)
        if grant.trainer:
            self._forget(grant.run)  # what was known is of the trainer before
            if (look := self._looks.get(grant.run)) is not None:
                look.cancel()
        self.wake(grant.run)
        return record

    async def _look_after(self, records: list[RunRecord]) -> None:
        leased = {record.run: record for record in records}
        known = self._next_look_s.keys() | self._trouble.keys() | self._started
        for run in known - leased.keys():
            self._forget(run)
        for run, record in leased.items():
            trainer = self._registry.trainers.get(record.trainer)
            gone = record.trainer in self._registry.lapsed(self._lease_s)
            ends = gone and record.desired is Desired.CANCELLED
            if trainer is not None and not trainer.healthy and not ends:
                self._trouble[run] = f"trainer {record.trainer} {trainer.problem}"
                self._started.discard(run)
                self._next_look_s[run] = 0.0
            elif run not in self._looks and time.monotonic() >= self._next_look_s.get(run, 0.0):
                self._next_look_s[run] = time.monotonic() + LOOK_EVERY_S
                task = asyncio.create_task(self._look(record))
                self._looks[run] = task
                task.add_done_callback(partial(self._looked, run))

    def _looked(self, run: str, task: asyncio.Task[None]) -> None:
        del self._looks[run]
        if not task.cancelled() and (error := task.exception()):
            log.error("looking after %s failed", run, exc_info=error)

    def _forget(self, run: str) -> None:
        self._next_look_s.pop(run, None)
        self._trouble.pop(run, None)
        self._started.discard(run)

    async def _look(self, record: RunRecord) -> None:
        try:
            async with rpc.aio_channel(record.trainer) as channel:
                stub = trainer_service_pb2_grpc.TrainerServiceStub(channel)
                if record.desired is Desired.CANCELLED:
                    await self._cancel(record, stub)
                elif record.run not in self._started or not await self._running(record, stub):
                    await self._start(record, stub)
            self._trouble.pop(record.run, None)
        except grpc.aio.AioRpcError as error:
            self._started.discard(record.run)
            trouble = f"trainer {record.trainer} {describe(error)}"
            if record.trainer not in self._registry.trainers:
                trouble += "; the gateway was not told of it (--trainers, KEEL_TRAINERS)"
            self._trouble[record.run] = trouble
            log.warning("%s: %s", record.run, self._trouble[record.run])
        except (RedisError, StateError) as error:  # the next look sees what is true then
            log.warning("%s: %s: %s", record.run, type(error).__name__, error)

    async def _running(
        self, record: RunRecord, stub: trainer_service_pb2_grpc.TrainerServiceStub
    ) -> bool:
        answer = await stub.GetRun(pb.GetRunRequest(run=record.run), timeout=CALL_DEADLINE_S)
        # a child that has just finished has written so before it went
        return answer.run.running or (await self._store.get(record.run)).phase.final

    async def _start(
        self, record: RunRecord, stub: trainer_service_pb2_grpc.TrainerServiceStub
    ) -> None:
        request = pb.StartRunRequest(run=record.run, fencing_token=record.fencing_token)
        try:
            await stub.StartRun(request, timeout=CALL_DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            if (
                record.phase is not Phase.QUEUED
                or error.code() is not grpc.StatusCode.INVALID_ARGUMENT
            ):
                raise
            reason = f"trainer {record.trainer} refuses the run: {error.details()}"
            await self._store.change(
                record.run, partial(transitions.refuse, error=reason, now_s=time.time())
            )
            self._wake.set()  # what was leased is free
            return
        self._started.add(record.run)

    async def _cancel(
        self, record: RunRecord, stub: trainer_service_pb2_grpc.TrainerServiceStub
    ) -> None:
        request = pb.CancelRunRequest(run=record.run, fencing_token=record.fencing_token)
        try:
            await stub.CancelRun(request, timeout=CALL_DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            # The operator has taken this trainer away, or it is silent for long: nobody else would
            # ever free the engines. If its process lives after all, it reads in the record that it
            # is to stop.
            taken_away = record.trainer not in self._registry.trainers
            gone = taken_away or record.trainer in self._registry.lapsed(self._lease_s)
            orphan = gone and error.code() in MUTE
            untaken = record.phase is Phase.QUEUED and error.code() is grpc.StatusCode.NOT_FOUND
            if not (orphan or untaken):
                raise
            end = partial(transitions.abandon, now_s=time.time(), orphan=orphan)
            await self._store.change(record.run, end)
            await self._store.drop_streams(record.run)
        self._wake.set()
