"""Sends cohorts to the run's engines until they are answered.

A cohort is the unit of placing, and at a deterministic engine of trying too: if the engine fails on
one of its groups, the whole cohort is sent again under the next try number, to another engine if
there is one, so that it is always computed as the same batch. What has come of an earlier try is
handed over all the same; a group handed over twice has the same content. To an engine that is not
deterministic only the groups that have not come are sent again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import redis.asyncio

from keel import codec
from keel.errors import KeelError
from keel.queue import tries_key
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.types.v1 import sequence_pb2
from keel_rollout.collector.engine_client import EngineFailure, EngineModel
from keel_rollout.collector.fleet import Fleet, Member
from keel_rollout.collector.plan import Cohort, Slot
from keel_rollout.collector.responses import Response
from keel_rollout.collector.telemetry import ENGINE_RETRIES

log = logging.getLogger(__name__)

Take = Callable[[Slot, list[Response], float, str], Awaitable[None]]
"""Receives a group: slot, responses, seconds since `send` began, engine address."""
NextTry = Callable[[], Awaitable[int]]
"""Gives the number of a try, each above the one before."""

_YEAR_2026_S = 1_767_225_600


@dataclass(eq=False, slots=True)
class _Waiting:
    """A cohort on its way."""

    cohort: Cohort
    came: set[int] = field(default_factory=set)
    """Slots that have been handed over."""
    failed_at: str = ""
    """Engine that failed it last."""
    refused_by: set[str] = field(default_factory=set)
    """Engines that will never take it. Once all have refused, the run cannot go on."""

    @property
    def avoid(self) -> set[str]:
        """Engines that get it only where there is no other."""
        return {self.failed_at, *self.refused_by}


class _Refusal(Exception):
    """What an engine says to a request would be said again: by this engine, not by every one."""

    def __init__(self, error: KeelError) -> None:
        self.error = error


class Sender:
    """Spreads cohorts over the engines of one run."""

    def __init__(self, fleet: Fleet, next_try: NextTry) -> None:
        self._fleet, self._next_try = fleet, next_try

    async def model(self) -> EngineModel:
        """What the engines have loaded; waits until one has loaded this run's model."""
        return await self._fleet.model()

    async def send(
        self,
        cohorts: Sequence[Cohort],
        take: Take,
        *,
        num_samples: int,
        sampling: sequence_pb2.SamplingParams,
        purpose: pb.Purpose,
        policy_version: int,
    ) -> None:
        """Hands every group of every cohort to `take`, as it comes. Earlier cohorts go first.

        Raises a KeelError for what a resend cannot mend.
        """
        template = pb.GenerateRequest(
            num_samples=num_samples,
            sampling=sampling,
            purpose=purpose,
            require_policy_version=policy_version,
        )
        began_s = time.perf_counter()
        waiting = dict(enumerate(map(_Waiting, cohorts)))
        under_way: dict[asyncio.Task[EngineFailure | None], tuple[int, _Waiting]] = {}
        try:
            while waiting or under_way:
                change = self._fleet.change  # before looking, so that none is missed
                left = len(waiting) + len(under_way)
                for number in sorted(waiting):
                    one = waiting[number]
                    if member := self._fleet.take(policy_version, left, one.avoid):
                        # the model as it is now: a failure beside this one takes it from the member
                        work = self._try(member, member.model, one, template, take, began_s)
                        task = asyncio.create_task(work)
                        # also where it is cancelled before it begins
                        task.add_done_callback(partial(self._ended, member))
                        under_way[task] = number, waiting.pop(number)
                changed = asyncio.create_task(change.wait())
                try:
                    await asyncio.wait({changed, *under_way}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    changed.cancel()
                for task in [task for task in under_way if task.done()]:
                    number, one = under_way.pop(task)
                    if task.result() is not None:  # raises what a resend cannot mend
                        ENGINE_RETRIES.inc()
                        waiting[number] = one
        finally:
            for task in under_way:
                task.cancel()
            if under_way:
                await asyncio.wait(under_way)

    def _ended(self, member: Member, task: asyncio.Task[EngineFailure | None]) -> None:
        sound = not task.cancelled() and task.exception() is None
        self._fleet.give_back(member, task.result() if sound else None)

    async def _try(
        self,
        member: Member,
        model: EngineModel | None,
        waiting: _Waiting,
        template: pb.GenerateRequest,
        take: Take,
        began_s: float,
    ) -> EngineFailure | None:
        """One try of a cohort at one engine; returns what may pass if it is sent again."""
        client = member.client
        assert model is not None, "Fleet.take gives those whose model is known"
        slots = list(waiting.cohort.slots)
        common = pb.GenerateRequest(
            with_routes=model.routed and template.purpose == pb.PURPOSE_TRAINING
        )
        common.MergeFrom(template)
        if model.can.deterministic:
            common.cohort.id = waiting.cohort.id
            common.cohort.size = len(slots)
            common.cohort.try_number = await self._next_try()
        else:
            slots = [slot for slot in slots if slot.id.slot not in waiting.came]
        failures: list[EngineFailure] = []

        async def one(slot: Slot) -> None:
            request = pb.GenerateRequest(
                id=slot.id, prompt_token_ids=codec.to_tensor(slot.prompt_ids_P), seed=slot.seed
            )
            request.MergeFrom(common)
            try:
                responses = await client.generate(request, model)
            except EngineFailure as failure:
                if model.can.deterministic:
                    raise
                failures.append(failure)  # the other groups are of use without this one
                return
            except KeelError as error:
                raise _Refusal(error) from error
            await take(slot, responses, time.perf_counter() - began_s, client.address)
            waiting.came.add(slot.id.slot)

        try:
            await together(one(slot) for slot in slots)
        except EngineFailure as failure:
            failures.append(failure)
        except _Refusal as refusal:
            waiting.refused_by.add(client.address)
            if not self._fleet.others(waiting.refused_by):
                raise refusal.error from None
            failures.append(EngineFailure(str(refusal.error)))
        if not failures:
            member.backoff.reset()
            return None
        waiting.failed_at = client.address
        log.warning("cohort %s is sent again: %s", waiting.cohort.id, failures[0])
        return failures[0]


async def next_try(client: redis.asyncio.Redis, run: str) -> int:
    """A number above those of all tries before, of this collector and of those that it replaces.

    It is kept in Redis: a clock may be set back. It begins at the tenths of a second since 2026,
    where collectors of before it was kept there had come to.
    """
    async with client.pipeline(transaction=True) as pipe:
        pipe.set(tries_key(run), int((time.time() - _YEAR_2026_S) * 10), nx=True)
        pipe.incr(tries_key(run))
        return int((await pipe.execute())[1])


async def together(coroutines: Iterable[Coroutine[object, object, None]]) -> None:
    """Runs all at once. The first error cancels the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            for coroutine in coroutines:
                group.create_task(coroutine)
    except ExceptionGroup as errors:
        # of several at once, one that cannot be mended by a resend
        raise min(errors.exceptions, key=lambda e: isinstance(e, EngineFailure)) from None
