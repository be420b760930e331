"""One run, from its first record to its last: what its record asks for is done, again and again.

    artifact set, no version yet   demonstrations of the cold start
    version v                      evaluation of v if due, then lap v

Work belongs to one (attempt, version); when the record moves on, it is dropped.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import redis.asyncio

from keel.errors import KeelError
from keel.queue import run_key
from keel.record import RunRecord, pack_fields
from keel_rollout.collector.backoff import insist
from keel_rollout.collector.plan import Plan
from keel_rollout.collector.produce import Producer
from keel_rollout.collector.sender import Sender
from keel_rollout.collector.tasks.registry import make_task
from keel_rollout.collector.text import TextCodec
from keel_rollout.collector.verify import VerifierPool

log = logging.getLogger(__name__)


class Watched:
    """The newest record of a run, and a way to wait for a change."""

    def __init__(self, record: RunRecord) -> None:
        self.record = record
        self._changed = asyncio.Event()

    def put(self, record: RunRecord) -> None:
        """Takes a newer record."""
        if record != self.record:
            self.record = record
            self._changed.set()
            self._changed = asyncio.Event()

    async def until(self, holds: Callable[[RunRecord], bool]) -> RunRecord:
        """The first record for which `holds`."""
        while not holds(self.record):
            await self._changed.wait()
        return self.record


async def collect(watched: Watched, client: redis.asyncio.Redis, pool: VerifierPool) -> None:
    """Does the run's work until cancelled. An error that no retry mends goes into its record."""
    run = watched.record.run
    sender = Sender(run, lambda: watched.record.engines)
    try:
        await watched.until(lambda record: not record.collector_error)
        await _work(watched, client, pool, sender)
    except Exception as error:
        if isinstance(error, KeelError):
            message = str(error)
            log.error("run %s: %s", run, message)
        else:
            message = f"the collector failed: {type(error).__name__}: {error}"
            log.exception("run %s", run)
        field = pack_fields(collector_error=message)
        await insist(f"run {run}", lambda: client.hset(run_key(run), mapping=field))  # type: ignore[arg-type]
    finally:
        await sender.close()


async def _work(
    watched: Watched, client: redis.asyncio.Redis, pool: VerifierPool, sender: Sender
) -> None:
    record = await watched.until(lambda record: bool(record.artifact))
    text = TextCodec.from_artifact(Path(record.artifact))
    producer = Producer(
        record.run,
        record.spec,
        client=client,
        plan=Plan(record.run, record.spec, make_task(record.spec.task), text),
        text=text,
        sender=sender,
        pool=pool,
    )
    while True:
        place = _place(watched.record)
        log.info("run %s: attempt %d, version %s", record.run, *place)
        work = asyncio.create_task(_produce(producer, watched.record))
        moved = asyncio.create_task(watched.until(lambda r, place=place: _place(r) != place))  # type: ignore[misc]
        try:
            await asyncio.wait({work, moved}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()  # raises what it raised
                await moved
        finally:
            await _cancel(work)
            await _cancel(moved)


async def _produce(producer: Producer, record: RunRecord) -> None:
    if record.policy_version is None:
        await producer.demonstrate(record.attempt)
        return
    await producer.evaluate(record.attempt, record.policy_version)
    if record.policy_version < record.spec.laps:
        await producer.produce_lap(record.attempt, record.policy_version)


def _place(record: RunRecord) -> tuple[int, int | None]:
    return record.attempt, record.policy_version


async def _cancel(task: asyncio.Task) -> None:
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled() and (error := task.exception()) is not None:
        log.debug("dropped: %s", error)
