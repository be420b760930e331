"""Sends cohorts to the run's engine until they are answered.

A cohort is the unit of trying: if the engine fails on one of its groups, the whole cohort is sent
again under the next try number, so that it is always computed as the same batch. What has come of
an earlier try is handed over all the same; a group handed over twice has the same content.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence

from keel import codec
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.types.v1 import sequence_pb2
from keel_rollout.collector.backoff import Backoff
from keel_rollout.collector.engine_client import EngineClient, EngineFailure, EngineModel
from keel_rollout.collector.plan import Cohort, Slot
from keel_rollout.collector.responses import Response
from keel_rollout.collector.telemetry import ENGINE_RETRIES

Take = Callable[[Slot, list[Response], float, str], Awaitable[None]]
"""Receives a group: slot, responses, seconds since `send` began, engine address."""

COHORTS_IN_FLIGHT = 2
"""One computes and one waits at the engine, so that it never idles."""

_YEAR_2026_S = 1_767_225_600


class Sender:
    """The run's engines, as its record names them at each moment."""

    def __init__(self, run: str, engines: Callable[[], Sequence[str]]) -> None:
        """
        Args:
            engines: the leased engines' addresses now; the first one is used.
        """
        self._run, self._engines = run, engines
        self._client: EngineClient | None = None
        self._try_number = 0

    async def model(self) -> EngineModel:
        """What the engine has loaded; waits until it has loaded this run's model."""
        return (await self._ready())[1]

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
        """Hands every group of every cohort to `take`, as it comes.

        Raises a KeelError for what a resend cannot mend.
        """
        began_s = time.perf_counter()
        slots_in_flight = asyncio.Semaphore(COHORTS_IN_FLIGHT)

        async def send_one(cohort: Cohort) -> None:
            async with slots_in_flight:
                backoff = Backoff(f"run {self._run}, cohort {cohort.id}")
                while True:
                    client, model = await self._ready()
                    template = pb.GenerateRequest(
                        num_samples=num_samples,
                        sampling=sampling,
                        purpose=purpose,
                        require_policy_version=policy_version,
                        with_routes=model.routed and purpose == pb.PURPOSE_TRAINING,
                    )
                    try:
                        return await self._try(client, model, cohort, template, take, began_s)
                    except EngineFailure as failure:
                        ENGINE_RETRIES.inc()
                        await backoff.wait(failure)

        await together(send_one(cohort) for cohort in cohorts)

    async def close(self) -> None:
        """Closes the channel."""
        if self._client is not None:
            await self._client.close()

    async def _ready(self) -> tuple[EngineClient, EngineModel]:
        backoff = Backoff(f"run {self._run}")
        while True:
            try:
                client = await self._connected()
                return client, await client.model(self._run)
            except EngineFailure as failure:
                await backoff.wait(failure)

    async def _connected(self) -> EngineClient:
        addresses = self._engines()
        if not addresses:
            raise EngineFailure("no engine is leased")
        if self._client is None or self._client.address != addresses[0]:
            # replaced before the old one is closed: other cohorts come here meanwhile
            old, self._client = self._client, EngineClient(addresses[0])
            if old is not None:
                await old.close()
        return self._client

    async def _try(
        self,
        client: EngineClient,
        model: EngineModel,
        cohort: Cohort,
        template: pb.GenerateRequest,
        take: Take,
        began_s: float,
    ) -> None:
        self._try_number = max(self._try_number + 1, _ticks())
        if model.can.deterministic:
            template.cohort.id = cohort.id
            template.cohort.size = len(cohort.slots)
            template.cohort.try_number = self._try_number

        async def one(slot: Slot) -> None:
            request = pb.GenerateRequest(
                id=slot.id, prompt_token_ids=codec.to_tensor(slot.prompt_ids_P), seed=slot.seed
            )
            request.MergeFrom(template)
            responses = await client.generate(request, model)
            await take(slot, responses, time.perf_counter() - began_s, client.address)

        await together(one(slot) for slot in cohort.slots)


def _ticks() -> int:
    """Tenths of a second since 2026: tries must grow across restarts, and we remember nothing."""
    return int((time.time() - _YEAR_2026_S) * 10)


async def together(coroutines: Iterable[Coroutine[object, object, None]]) -> None:
    """Runs all at once. The first error cancels the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            for coroutine in coroutines:
                group.create_task(coroutine)
    except ExceptionGroup as errors:
        # of several at once, one that cannot be mended by a resend
        raise min(errors.exceptions, key=lambda e: isinstance(e, EngineFailure)) from None
