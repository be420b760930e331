"""Follows the run records: a task for every run that lives, none for one that is over."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

import redis.asyncio

from keel.errors import WireError
from keel.queue import RUNS_KEY, run_key
from keel.record import Desired, RunRecord
from keel_rollout.collector.backoff import insist
from keel_rollout.collector.holds import Holds
from keel_rollout.collector.redis_memory import RedisMemory
from keel_rollout.collector.room import DEFAULT_QUEUE, QueueSettings, Room
from keel_rollout.collector.run import collect
from keel_rollout.collector.telemetry import RUNS
from keel_rollout.collector.verify import VerifierPool
from keel_rollout.collector.watched import Watched

log = logging.getLogger(__name__)

POLL_S = 0.05
"""Seconds between two looks: half of it is what a lap waits for its start."""

RawRecord = Mapping[bytes, bytes]


class Follower:
    """Runs and their tasks.

    Example:
        await Follower(client, pool).follow()  # until cancelled
    """

    def __init__(
        self,
        client: redis.asyncio.Redis,
        pool: VerifierPool,
        settings: QueueSettings = DEFAULT_QUEUE,
    ) -> None:
        self._redis, self._pool, self._settings = client, pool, settings
        self._memory = RedisMemory(client)
        self._raw: dict[str, RawRecord] = {}
        self._watched: dict[str, Watched] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._over: set[str] = set()
        self._redis_id = ""
        """Redis has another one after every restart."""

    async def follow(self) -> None:
        """Looks again and again; ends every task when cancelled."""
        try:
            while True:
                for run, raw in (await insist("run records", self._read)).items():
                    self._look(run, raw)
                await asyncio.sleep(POLL_S)
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _read(self) -> dict[str, RawRecord]:
        """The records of all runs that are not known to be over."""
        ids: list[bytes] = await self._redis.zrange(RUNS_KEY, 0, -1)  # type: ignore[assignment]
        runs = [run for run in map(bytes.decode, ids) if run not in self._over]
        gone = self._raw.keys() - set(runs)
        if not runs and not gone:
            return {}
        async with self._redis.pipeline(transaction=False) as pipe:
            for run in runs:
                pipe.hgetall(run_key(run))
            pipe.info("server")
            *replies, server = await pipe.execute()
        self._see(server["run_id"])
        return dict(zip(runs, replies, strict=True)) | {run: {} for run in gone}

    def _see(self, redis_id: str) -> None:
        if self._redis_id not in ("", redis_id):
            log.warning("Redis was restarted: what it should have of each run is looked at again")
            for watched in self._watched.values():
                watched.restarted()
        self._redis_id = redis_id

    def _look(self, run: str, raw: RawRecord) -> None:
        if not raw:
            self._raw.pop(run, None)
            self._drop(run, "its record is gone")
            return
        if raw == self._raw.get(run):
            return
        self._raw[run] = raw
        try:
            record = RunRecord.from_hash(run, raw)
        except WireError as error:
            log.error("not followed: %s", error)
            return
        if record.phase.final:
            self._over.add(run)
            del self._raw[run]
            self._drop(run, f"it is {record.phase}")
        elif record.desired == Desired.CANCELLED:
            self._drop(run, "it is to be cancelled")
        elif run in self._watched:
            self._watched[run].put(record)
        else:
            log.info("run %s (%s): followed", run, record.spec.name)
            watched = self._watched[run] = Watched(record)
            RUNS.set(len(self._watched))
            work = collect(watched, self._redis, self._pool, self._room)
            self._tasks[run] = asyncio.create_task(work)

    def _room(self, run: str, holds: Holds) -> Room:
        return Room(self._redis, run, self._settings, self._memory, holds)

    def _drop(self, run: str, why: str) -> None:
        if self._watched.pop(run, None) is not None:
            log.info("run %s: %s", run, why)
            self._tasks.pop(run).cancel()
            RUNS.set(len(self._watched))
