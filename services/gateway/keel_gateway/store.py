"""Runs and their metrics in Redis: the gateway's only memory.

Every change of a record is a pure function (`keel_gateway.transitions`) applied in an optimistic
transaction, so that a change never builds on a record that somebody else has meanwhile written.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, cast

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import WatchError

from keel.checkpoints import CheckpointInfo, decode_checkpoints
from keel.dead_letters import DeadLetter, parse_dead_letters
from keel.errors import WireError
from keel.metrics import Row, evaluation_field, fields_after, merge_rows, row_field, whole
from keel.queue import (
    DRAINED_KEY,
    FENCING_KEY,
    RUNS_KEY,
    checkpoints_key,
    dead_envelopes_key,
    dead_letters_key,
    metrics_key,
    queue_keys,
    run_key,
    samples_key,
)
from keel.record import Phase, RunRecord, pack_fields
from keel.samples import Sample, fields_by_step, parse_samples
from keel.spec import RunSpec
from keel_gateway.continuity import Continuity

log = logging.getLogger(__name__)

SUFFIX_ALPHABET = "23456789abcdefghjkmnpqrstuvwxyz"
"""Of run ids: no characters that are mistaken for each other."""
GATEWAY_FIELDS = (
    *("desired", "trainer", "engines", "fencing_token", "engine_token", "phase", "finished_s"),
    *("error", "engine_kinds", "draining", "drained", "proved", "stale"),
)
"""Fields of a record that a transition may change."""
PROBE_KEY = "keel:probe"
"""Written to see whether Redis takes writes; expires at once."""
STEPS_PER_READ = 256
MOST_CONNECTIONS = 32
"""To Redis, at once."""


def connect(url: str) -> Redis:
    """A client that gives up within seconds, so that an outage becomes an answer and not a wait.

    A crowd of requests waits for its few connections: redis-py's own pool would refuse the 101st.
    Longer than for an answer of Redis: on a busy machine 300 requests at once need several seconds.
    """
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=MOST_CONNECTIONS,
        timeout=30,
        socket_timeout=5,
        socket_connect_timeout=2,
        retry=Retry(ExponentialBackoff(cap=0.2, base=0.05), 2),
    )
    return Redis.from_pool(pool)


class Store:
    """Reads and changes run records. Redis errors pass through: callers answer 503 or retry."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._continuity = Continuity(redis)
        self._last_token = 0
        self._last_place_s = 0.0
        self._dead_letters: dict[str, int] = {}
        self._ended: dict[str, Phase] = {}  # such a phase stays: these need no more reading

    async def probe(self) -> None:
        """Returns if Redis answers and takes writes."""
        await self._redis.set(PROBE_KEY, b"", px=1000)

    async def check(self) -> None:
        """Looks whether Redis has lost what it held; `losses` then says so."""
        await self._continuity.check()

    @property
    def losses(self) -> list[str]:
        """A sentence for each time that Redis has lost its data since the gateway began."""
        return self._continuity.notes

    async def create(self, spec: RunSpec) -> RunRecord:
        """Writes the record of a new run, QUEUED, under an id that no other run has."""
        record = _new_record(spec)
        place_s = await self._next_place_s(record.created_s)
        async with self._redis.pipeline(transaction=True) as pipe:
            while True:
                try:
                    await pipe.watch(run_key(record.run))
                    if there := await _hgetall(pipe, record.run):
                        if float(there.get(b"created_s", 0)) == record.created_s:
                            return record  # written before, and only the reply was lost
                        record = _new_record(spec)
                        continue
                    pipe.multi()
                    pipe.hset(run_key(record.run), mapping=cast(Any, record.to_hash()))
                    pipe.zadd(RUNS_KEY, {record.run: place_s})
                    await pipe.execute()
                except WatchError:
                    continue
                self._continuity.saw_records([record])
                return record

    async def _next_place_s(self, created_s: float) -> float:
        """Its place in the order of submission: the time, or just after the last if a clock was set
        back.
        """
        reply = self._redis.zrange(RUNS_KEY, -1, -1, withscores=True)
        newest = cast(list[tuple[bytes, float]], await reply)
        last_s = max(self._last_place_s, *(score for _, score in newest), 0.0)
        self._last_place_s = max(created_s, last_s + 0.001)
        return self._last_place_s

    async def get(self, run: str) -> RunRecord:
        """The record of `run`, or NotFound."""
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.hgetall(run_key(run))
            pipe.hlen(dead_letters_key(run))
            raw, dead = await pipe.execute()
        record = await self._record(run, raw)
        self._dead_letters[run] = dead
        return record

    async def newest(self, limit: int) -> list[RunRecord]:
        """At most `limit` records, the last submitted first; unreadable ones are left out."""
        return await self._readable(await self._runs(0, limit - 1, desc=True))

    async def unfinished(self) -> list[RunRecord]:
        """Every run that has not ended, in the order of submission."""
        runs = await self._runs(0, -1)
        records = await self._readable([run for run in runs if run not in self._ended])
        self._continuity.saw(runs)
        self._continuity.saw_records(records)
        there = set(runs)
        self._ended = {run: phase for run, phase in self._ended.items() if run in there}
        self._ended |= {record.run: record.phase for record in records if record.phase.final}
        return [record for record in records if not record.phase.final]

    def ended_phases(self) -> Iterable[Phase]:
        """The phase of each run that was over at the last `unfinished`."""
        return self._ended.values()

    async def next_fencing_token(self) -> int:
        """A token greater than any given before."""
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.set(FENCING_KEY, max(int(time.time()), self._last_token), nx=True)
            pipe.incr(FENCING_KEY)
            token = int((await pipe.execute())[1])
        if token <= self._last_token:  # Redis was put back to an older copy of its data
            token = self._last_token + 1
            await self._redis.set(FENCING_KEY, token)
        self._last_token = token
        return token

    async def drained_engines(self) -> frozenset[str]:
        """Addresses of the engines that operators want empty."""
        members = await cast(Awaitable[set[bytes]], self._redis.smembers(DRAINED_KEY))
        return frozenset(address.decode() for address in members)

    async def set_drained(self, address: str, *, wanted: bool) -> None:
        """Remembers that an engine is wanted empty, or no longer is."""
        await (self._redis.sadd if wanted else self._redis.srem)(DRAINED_KEY, address)

    async def change(self, run: str, transition: Callable[[RunRecord], RunRecord]) -> RunRecord:
        """Applies a transition to the record as it is now, and returns what it became.

        The transition may run more than once. Errors: NotFound, and what the transition raises.
        """
        async with self._redis.pipeline(transaction=True) as pipe:
            while True:
                await pipe.watch(run_key(run))
                before = await self._record(run, await _hgetall(pipe, run))
                after = transition(before)
                changed = {
                    name: getattr(after, name)
                    for name in GATEWAY_FIELDS
                    if getattr(after, name) != getattr(before, name)
                }
                if not changed:
                    return after
                pipe.multi()
                pipe.hset(run_key(run), mapping=cast(Any, pack_fields(**changed)))
                try:
                    await pipe.execute()
                except WatchError:
                    continue
                return after

    async def drop_streams(self, run: str) -> None:
        """Removes demonstrations and groups of a run that no trainer will train on."""
        await self._redis.delete(*queue_keys(run))

    async def rows(self, record: RunRecord, *, after: int, limit: int) -> list[Row]:
        """Metric rows of steps in (after, record.step], ascending, at most `limit`."""
        rows: list[Row] = []
        while len(rows) < limit and after < record.step:
            last = min(after + STEPS_PER_READ, record.step)
            rows += await self._read_rows(record.run, fields_after(after, last, record.attempt))
            after = last
        return rows[:limit]

    async def newest_evaluation(self, record: RunRecord) -> Row | None:
        """The last evaluation that has arrived.

        It comes after the row of its step: a reader who goes forward by step alone would miss it.
        """
        # the next lap waits for the evaluation before it: one of the last two has arrived
        due = [step for step in record.spec.evaluated_steps() if step <= record.step][-2:]
        fields = [
            evaluation_field(attempt, step) for step in due for attempt in range(record.attempt + 1)
        ]
        rows = await self._read_rows(record.run, fields)
        return rows[-1] if rows else None

    async def checkpoints(self, run: str) -> list[CheckpointInfo]:
        """The checkpoints that the run's trainer says it has."""
        value = await self._redis.get(checkpoints_key(run))
        return decode_checkpoints(cast(bytes | None, value))

    def dead_letter_count(self, run: str) -> int:
        """How many dead letters the run had when it was last read."""
        return self._dead_letters.get(run, 0)

    async def dead_letters(self, run: str) -> list[DeadLetter]:
        """What the run's trainer gave up, in the order of slots."""
        raw = await cast(Awaitable[dict[bytes, bytes]], self._redis.hgetall(dead_letters_key(run)))
        return parse_dead_letters(raw)

    async def dead_envelope(self, run: str, field: str) -> bytes | None:
        """The bytes of a dead letter; None: there are none."""
        reply = self._redis.hget(dead_envelopes_key(run), field)
        return await cast(Awaitable[bytes | None], reply)

    async def samples(self, record: RunRecord, *, after: int, limit: int) -> list[Sample]:
        """Samples of steps after `after`, ascending; whole steps, at least one, up to `limit`."""
        names = cast(list[bytes], await self._redis.hkeys(samples_key(record.run)))
        steps = fields_by_step(names, off_policiness=record.spec.recipe.off_policiness)
        wanted: list[str] = []
        for step, fields in steps.items():
            if step > after:
                if wanted and len(wanted) + len(fields) > limit:
                    break
                wanted += fields
        if not wanted:
            return []
        values = await cast(
            Awaitable[list[bytes | None]], self._redis.hmget(samples_key(record.run), wanted)
        )
        return parse_samples(values)

    async def first_step(self, record: RunRecord) -> int | None:
        """The first step that the newest attempt has a row of; None: it has none yet."""
        if record.attempt == 0:
            return 1
        names = cast(list[bytes], await self._redis.hkeys(metrics_key(record.run)))
        places = [name.split(b":") for name in names]
        steps = [int(p[1]) for p in places if len(p) == 2 and int(p[0]) == record.attempt]
        return min(steps, default=None)

    async def whole_rows(self, record: RunRecord, *, after: int, first: int | None) -> list[Row]:
        """Rows of steps after `after`, ascending, at most STEPS_PER_READ.

        Up to the first that its trainer will write again; once the run is over, none is.

        Args:
            first: see `first_step`; from it on only the newest attempt's count.
        """
        rows: list[Row] = []
        while len(rows) < STEPS_PER_READ and after < record.step:
            steps = range(after + 1, min(after + STEPS_PER_READ, record.step) + 1)
            for row in await self._newest_rows(record, steps, row_field, first):
                if not record.phase.final and not (row and whole(row)):
                    return rows
                rows += [row] if row else []
            after = steps[-1]
        return rows[:STEPS_PER_READ]

    async def evaluations(self, record: RunRecord, *, after: int, first: int | None) -> list[Row]:
        """Evaluations of steps after `after` that have arrived, ascending, as `whole_rows`."""
        due = [step for step in record.spec.evaluated_steps() if after < step <= record.step]
        rows = await self._newest_rows(record, due[:STEPS_PER_READ], evaluation_field, first)
        return [row for row in rows if row]

    async def _newest_rows(
        self,
        record: RunRecord,
        steps: Sequence[int],
        field: Callable[[int, int], str],
        first: int | None,
    ) -> list[Row | None]:
        """By step: the row of the newest attempt that has one, and counts there."""
        count = record.attempt + 1
        fields = [field(attempt, step) for step in steps for attempt in range(count)]
        values = await self._hmget(record.run, fields)
        found: list[Row | None] = []
        for index, step in enumerate(steps):
            there = values[index * count : (index + 1) * count]
            if first is not None and step >= first:
                there = there[-1:]
            newest = next((value for value in reversed(there) if value is not None), None)
            found.append(None if newest is None else json.loads(newest))
        return found

    async def _hmget(self, run: str, fields: list[str]) -> list[bytes | None]:
        if not fields:
            return []
        reply = self._redis.hmget(metrics_key(run), fields)
        return await cast(Awaitable[list[bytes | None]], reply)

    async def _read_rows(self, run: str, fields: list[str]) -> list[Row]:
        return list(merge_rows(await self._hmget(run, fields)))

    async def _runs(self, begin: int, end: int, *, desc: bool = False) -> list[str]:
        names = await self._redis.zrange(RUNS_KEY, begin, end, desc=desc)
        return [name.decode() for name in cast(list[bytes], names)]

    async def _readable(self, runs: list[str]) -> list[RunRecord]:
        async with self._redis.pipeline(transaction=False) as pipe:
            for run in runs:
                pipe.hgetall(run_key(run))
                pipe.hlen(dead_letters_key(run))
            found = await pipe.execute() if runs else []
        records = []
        for run, raw, dead in zip(runs, found[::2], found[1::2], strict=True):
            self._dead_letters[run] = dead
            try:
                if b"spec" in raw:
                    records.append(RunRecord.from_hash(run, raw))
                else:
                    log.warning("left out: %s is listed and has no record", run)
            except WireError as error:
                log.warning("left out: %s", error)
        return records

    async def _record(self, run: str, raw: dict[bytes, bytes]) -> RunRecord:
        if b"spec" not in raw:  # what a service still writes of a lost run makes no record
            await self.check()
            raise self._continuity.missing(run)
        record = RunRecord.from_hash(run, raw)
        self._continuity.saw_records([record])
        return record


def _new_record(spec: RunSpec) -> RunRecord:
    suffix = "".join(secrets.choice(SUFFIX_ALPHABET) for _ in range(6))
    return RunRecord(f"{spec.name}-{suffix}", spec, created_s=time.time())


async def _hgetall(redis: Any, run: str) -> dict[bytes, bytes]:
    return await redis.hgetall(run_key(run))
