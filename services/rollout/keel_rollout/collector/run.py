"""One run, from its first record to its last: what its record asks for is done, again and again.

    a trainer leased               data files opened and checked, verifiers loaded
    artifact set, no version yet   demonstrations of the cold start
    version v                      evaluation of v if due, then lap v

Work belongs to one (attempt, version); when the record moves on, it is dropped.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import redis.asyncio

from keel import codec
from keel.errors import DatasetError, KeelError
from keel.queue import data_key
from keel.record import RunRecord
from keel.spec import RunSpec, VerifierSpec
from keel_rollout.collector.backoff import insist
from keel_rollout.collector.data import RunData
from keel_rollout.collector.fleet import Fleet
from keel_rollout.collector.holds import Holds
from keel_rollout.collector.plan import Plan
from keel_rollout.collector.produce import Producer
from keel_rollout.collector.record_write import set_first, tell
from keel_rollout.collector.room import Room
from keel_rollout.collector.sender import Sender, next_try, together
from keel_rollout.collector.text import TextCodec
from keel_rollout.collector.verify import VerifierPool
from keel_rollout.collector.watched import Watched

log = logging.getLogger(__name__)


MakeRoom = Callable[[str, Holds], Room]
"""Room of a run, from its id and what holds it back."""


async def collect(
    watched: Watched, client: redis.asyncio.Redis, pool: VerifierPool, make_room: MakeRoom
) -> None:
    """Does the run's work until cancelled. An error that no retry mends goes into its record."""
    run = watched.record.run
    fleet = Fleet(watched, client)
    holds = Holds(client, run, watched.record.queue_full)
    room = make_room(run, holds)
    watched.on_restart += [holds.doubt, room.flight.doubt]
    try:
        await watched.until(lambda record: not record.collector_error)
        number = partial(insist, f"run {run}", partial(next_try, client, run))
        work = _work(watched, client, pool, Sender(fleet, number), room)
        await together([fleet.follow(), holds.follow(), room.flight.follow(), work])
    except Exception as error:
        if isinstance(error, KeelError):
            message = str(error)
            log.error("run %s: %s", run, message)
        else:
            message = f"the collector failed: {type(error).__name__}: {error}"
            log.exception("run %s", run)
        await tell(client, run, collector_error=message)
    finally:
        await fleet.close()
        await holds.end()


async def _work(
    watched: Watched,
    client: redis.asyncio.Redis,
    pool: VerifierPool,
    sender: Sender,
    room: Room,
) -> None:
    record = await watched.until(lambda record: bool(record.trainer or record.artifact))
    run, spec = record.run, record.spec
    for field, verifiers in judges(spec).items():
        await pool.load(field, verifiers)
    data = await asyncio.to_thread(RunData, spec)
    try:
        log.info("run %s: %s", run, data.told())
        record = await watched.until(lambda record: bool(record.artifact))
        text = TextCodec.from_artifact(Path(record.artifact), spec.model.chat_template)
        await asyncio.to_thread(data.check, text)
        await check_same(run, spec, data, text, client)
        producer = Producer(
            run,
            spec,
            client=client,
            data=data,
            plan=Plan(run, spec, data, text),
            text=text,
            sender=sender,
            room=room,
            pool=pool,
        )
        watched.on_restart.append(producer.doubt)
        await _follow(watched, producer)
    finally:
        data.close()


async def _follow(watched: Watched, producer: Producer) -> None:
    """Does the work of each place that the record comes to, until cancelled."""
    while True:
        place = _place(watched)
        log.info("run %s: attempt %d, version %s", watched.record.run, *place[:2])
        work = asyncio.create_task(_produce(producer, watched))
        moved = asyncio.create_task(
            watched.until(lambda _, place=place: _place(watched) != place)  # type: ignore[misc]
        )
        try:
            await asyncio.wait({work, moved}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()  # raises what it raised
        finally:
            await _cancel(work)
            await _cancel(moved)


async def _produce(producer: Producer, watched: Watched) -> None:
    """Does the work of the record's place; again for what a restarted Redis has lost of it."""
    record = watched.record
    while True:
        restarts = watched.restarts
        await _pass(producer, record)
        await watched.restarted_after(restarts)


async def _pass(producer: Producer, record: RunRecord) -> None:
    if record.policy_version is None:
        await producer.demonstrate(record.attempt)
        return
    sampling = record.policy_version < record.spec.laps
    if sampling:
        await producer.check_laps(record.attempt)
    await producer.evaluate(record.attempt, record.policy_version)
    if sampling:
        await producer.produce_lap(record.attempt, record.policy_version)


def judges(spec: RunSpec) -> dict[str, tuple[VerifierSpec, ...]]:
    """Verifiers that the run needs, by the job's key."""
    sets = enumerate(spec.evaluation_sets)
    return {"task.verifier": spec.task.verifiers} | {
        f"evaluation.sets.{index}.verifier": each.verifier for index, each in sets if each.verifier
    }


async def check_same(
    run: str, spec: RunSpec, data: RunData, text: TextCodec, client: redis.asyncio.Redis
) -> None:
    """DatasetError if a data file, or the chat template, is not what the run began with."""
    key = data_key(run)
    hashes = data.hashes()
    if text.template is not None:
        hashes["model.chat_template"] = f"{codec.xxh3(text.template.source.encode()):016x}"
    for field, found in hashes.items():
        if not await set_first(client, run, key, field, found):
            return  # the run is gone
        began = await insist(f"run {run}", lambda f=field: client.hget(key, f))  # type: ignore[misc]
        if began is not None and began != found.encode():
            raise DatasetError(
                field,
                data.path(field) or "template",
                "it is not what the run began with, and what was trained on would not be what is "
                "in it; valid: the file as it was, or a new job",
            )


def _place(watched: Watched) -> tuple[int, int | None, int]:
    record = watched.record
    # demonstrations that wait for room would wait for ever for a trainer that waits for lost ones
    restarts = watched.restarts if record.policy_version is None else 0
    return record.attempt, record.policy_version, restarts


async def _cancel(task: asyncio.Task) -> None:
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled() and (error := task.exception()) is not None:
        log.debug("dropped: %s", error)
