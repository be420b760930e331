"""What the collector does for one run: demonstrations, evaluations, laps."""

from __future__ import annotations

import asyncio
import logging

import redis.asyncio

from keel import metrics
from keel.queue import demos_key, groups_key, metrics_key, run_key
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.spec import COHORT_SEQUENCES, RunSpec
from keel.types.v1 import sequence_pb2
from keel_rollout.collector.assemble import group_envelope, judge, void_envelope
from keel_rollout.collector.backoff import insist
from keel_rollout.collector.engine_client import EngineModel
from keel_rollout.collector.plan import Cohort, Plan, Slot
from keel_rollout.collector.responses import Response
from keel_rollout.collector.sender import Sender
from keel_rollout.collector.streams import SlotKey, SlotStream
from keel_rollout.collector.telemetry import EVALUATIONS, SLOTS
from keel_rollout.collector.text import TextCodec
from keel_rollout.collector.verify import VerifierPool

log = logging.getLogger(__name__)

DEMONSTRATIONS_OUTSTANDING = 256
"""Most batches in the stream: the trainer lags by this much at most."""
_ROOM_POLL_S = 0.05


class Producer:
    """Fills the streams of one run. Each method can be cancelled at any point and begun again."""

    def __init__(
        self,
        run: str,
        spec: RunSpec,
        *,
        client: redis.asyncio.Redis,
        plan: Plan,
        text: TextCodec,
        sender: Sender,
        pool: VerifierPool,
    ) -> None:
        self._run, self._spec, self._redis = run, spec, client
        self._plan, self._text, self._sender, self._pool = plan, text, sender, pool
        self._groups = SlotStream(client, groups_key(run), run)
        self._demos = SlotStream(client, demos_key(run), run)

    async def demonstrate(self, attempt: int) -> None:
        """Adds a batch of demonstrations for every supervised step that has none yet."""
        there = [key.lap for key in await self._demos.added() if key.attempt == attempt]
        # read after the stream: what has left it is trained on
        done = await insist(
            f"run {self._run}",
            lambda: self._redis.hget(run_key(self._run), "cold_start_step"),
        )
        first = max(there) + 1 if there else int(done or 0)
        for step in range(first, self._spec.cold_start.steps):
            while await self._demos.length() >= DEMONSTRATIONS_OUTSTANDING:
                await asyncio.sleep(_ROOM_POLL_S)
            await self._demos.add(self._plan.demonstrations(attempt, step))
        log.info("run %s: demonstrations are out, from step %d on", self._run, first)

    async def evaluate(self, attempt: int, version: int) -> None:
        """Greedy accuracy of a version on the held-out prompts, once, if one is due."""
        step = version * self._spec.recipe.off_policiness
        if step not in self._spec.evaluated_steps():
            return
        key, field = metrics_key(self._run), metrics.evaluation_field(attempt, step)
        if await insist(f"run {self._run}", lambda: self._redis.hexists(key, field)):
            return
        model = await self._sender.model()
        model.check(group_size=1, cohort_sequences=COHORT_SEQUENCES)
        rewards: dict[int, float] = {}

        async def take(slot: Slot, responses: list[Response], _: float, __: str) -> None:
            (judgement,) = await judge(
                self._pool, self._spec.task.verifier, slot.problem, responses, self._text
            )
            rewards[slot.id.slot] = 0.0 if judgement.fault else judgement.reward

        slots = self._plan.evaluation_slots(attempt, version)
        fitting = [slot for slot in slots if not self._too_long(slot, model)]
        if len(fitting) < len(slots):
            log.warning(
                "run %s: %d held-out prompts are too long and count as wrong",
                self._run,
                len(slots) - len(fitting),
            )
        await self._sender.send(
            self._plan.evaluation_cohorts(attempt, version, fitting),
            take,
            num_samples=1,
            sampling=self._sampling(temperature=0.0),
            purpose=pb.PURPOSE_EVALUATION,
            policy_version=version,
        )
        accuracy = sum(rewards.values()) / len(slots)
        row = metrics.encode_row({"step": step, "accuracy/eval": accuracy})
        await insist(f"run {self._run}", lambda: self._redis.hset(key, field, row))
        EVALUATIONS.inc()
        log.info("run %s: accuracy %.3f after step %d", self._run, accuracy, step)

    async def produce_lap(self, attempt: int, lap: int) -> None:
        """Adds the envelope of every slot of the lap that has none yet."""
        await self._groups.forget_before(attempt, lap)
        model = await self._sender.model()
        model.check(
            group_size=self._spec.rollout.group_size,
            cohort_sequences=max(COHORT_SEQUENCES, self._spec.rollout.group_size),
        )
        fitting: list[Slot] = []
        for slot in self._plan.lap_slots(attempt, lap):
            if reason := self._too_long(slot, model):
                await self._add(void_envelope(slot, reason))
            else:
                fitting.append(slot)
        sampling = self._sampling(temperature=self._spec.rollout.temperature)

        async def take(
            slot: Slot, responses: list[Response], generate_s: float, engine: str
        ) -> None:
            if await self._has(slot):
                return  # came with an earlier try
            judgements = await judge(
                self._pool, self._spec.task.verifier, slot.problem, responses, self._text
            )
            await self._add(
                group_envelope(
                    slot, responses, judgements, sampling, generate_s=generate_s, engine=engine
                )
            )

        await self._sender.send(
            [
                cohort
                for cohort in self._plan.lap_cohorts(attempt, lap, fitting)
                if not await self._complete(cohort)
            ],
            take,
            num_samples=self._spec.rollout.group_size,
            sampling=sampling,
            purpose=pb.PURPOSE_TRAINING,
            policy_version=lap,
        )
        log.info("run %s: lap %d is out, %d slots", self._run, lap, self._spec.slots_per_lap)

    async def _add(self, envelope: sequence_pb2.Envelope) -> None:
        await self._groups.add(envelope)
        SLOTS.labels(envelope.WhichOneof("payload")).inc()

    def _sampling(self, *, temperature: float) -> sequence_pb2.SamplingParams:
        return sequence_pb2.SamplingParams(
            temperature=temperature,
            max_tokens=self._spec.rollout.max_tokens,
            stop_token_ids=self._text.end_ids,
        )

    def _too_long(self, slot: Slot, model: EngineModel) -> str:
        needed = len(slot.prompt_ids_P) + self._spec.rollout.max_tokens
        limit = model.signature.max_sequence_tokens
        if needed <= limit:
            return ""
        return (
            f"prompt of {len(slot.prompt_ids_P)} tokens + max_tokens "
            f"{self._spec.rollout.max_tokens} = {needed}; the model takes {limit}"
        )

    async def _has(self, slot: Slot) -> bool:
        key = SlotKey(slot.id.attempt, slot.id.lap, slot.id.slot)
        return key in await self._groups.added()

    async def _complete(self, cohort: Cohort) -> bool:
        return all([await self._has(slot) for slot in cohort.slots])
