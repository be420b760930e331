"""What the collector does for one run: demonstrations, evaluations, laps."""

from __future__ import annotations

import asyncio
import logging

import numpy as np
import numpy.typing as npt
import redis.asyncio

from keel import metrics
from keel.errors import InvalidField
from keel.queue import SlotKey, metrics_key, run_key
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.spec import COHORT_SEQUENCES, RunSpec
from keel.types.v1 import sequence_pb2
from keel_rollout.collector.assemble import judge, pack_group, void_envelope
from keel_rollout.collector.backoff import insist
from keel_rollout.collector.bounds import check_lap_bytes
from keel_rollout.collector.data import Evaluated, RunData
from keel_rollout.collector.engine_client import EngineModel
from keel_rollout.collector.plan import Cohort, Plan, Slot
from keel_rollout.collector.record_write import set_fields
from keel_rollout.collector.responses import Response
from keel_rollout.collector.room import Packed, Room
from keel_rollout.collector.sender import Sender
from keel_rollout.collector.streams import SlotStream
from keel_rollout.collector.telemetry import EVALUATIONS, SLOTS
from keel_rollout.collector.text import TextCodec
from keel_rollout.collector.verify import VerifierPool

log = logging.getLogger(__name__)

DEMONSTRATIONS_OUTSTANDING = 256
"""Most batches in the stream: the trainer lags by this much at most."""
_ROOM_POLL_S = 0.05
_SUM_ROUNDING = 1e-6
"""A weighted sum of verifiers that should be 1 may come out as 0.9999999999999999."""


class Producer:
    """Fills the streams of one run. Each method can be cancelled at any point and begun again."""

    def __init__(
        self,
        run: str,
        spec: RunSpec,
        *,
        client: redis.asyncio.Redis,
        data: RunData,
        plan: Plan,
        text: TextCodec,
        sender: Sender,
        room: Room,
        pool: VerifierPool,
    ) -> None:
        self._run, self._spec, self._redis, self._data = run, spec, client, data
        self._plan, self._text, self._sender, self._pool = plan, text, sender, pool
        self._room = room
        self._groups = SlotStream(client, "groups", run, room)
        self._demos = SlotStream(client, "demos", run, room)
        self._checked: int | None = None
        """Attempt whose laps are known to fit."""

    async def demonstrate(self, attempt: int) -> None:
        """Adds a batch of demonstrations for every supervised step that has none yet."""
        there = [key.lap for key in await self._demos.added() if key.attempt == attempt]
        # read after the stream: what has left it is trained on
        done = await insist(
            f"run {self._run}",
            lambda: self._redis.hget(run_key(self._run), "cold_start_step"),
        )
        first = min([int(done or 0), *there])
        for step in range(first, self._spec.cold_start.steps):
            if SlotKey(attempt, step, 0) in await self._demos.added():
                continue
            while await self._demos.length() >= DEMONSTRATIONS_OUTSTANDING:
                await asyncio.sleep(_ROOM_POLL_S)
            await self._demos.add(Packed.of(self._plan.demonstrations(attempt, step)))
        log.info("run %s: demonstrations are out, from step %d on", self._run, first)

    def doubt(self) -> None:
        """Redis was restarted: its streams may lack their last entries."""
        self._groups.doubt()
        self._demos.doubt()

    async def check_laps(self, attempt: int) -> None:
        """InvalidField if a lap could be more than may be in flight: it could not be held."""
        if self._checked == attempt:
            return
        model = await self._sender.model()
        spec, settings = self._spec, self._room.settings
        try:  # most jobs fit whatever their prompts are
            most = model.signature.max_sequence_tokens - spec.rollout.max_tokens
            check_lap_bytes(spec, model, max(most, 0), settings)
        except InvalidField:
            check_lap_bytes(spec, model, await self._longest_prompt(attempt, model), settings)
        self._checked = attempt

    async def _longest_prompt(self, attempt: int, model: EngineModel) -> int:
        """Tokens of the longest prompt of all that the attempt will send."""
        laps, longest = self._spec.laps, 0
        if self._data.rows:  # of a file, until each row has come once
            laps = min(laps, -(-self._data.rows // self._spec.slots_per_lap))
        for lap in range(laps):
            for slot in self._plan.lap_slots(attempt, lap):
                if not _too_long(slot, model, self._spec.rollout.max_tokens):
                    longest = max(longest, len(slot.prompt_ids_P))
            await asyncio.sleep(0)
        return longest

    async def evaluate(self, attempt: int, version: int) -> None:
        """Rewards of a version on every evaluation set, once, if they are due."""
        step = version * self._spec.recipe.off_policiness
        if step not in self._spec.evaluated_steps():
            return
        key, field = metrics_key(self._run), metrics.evaluation_field(attempt, step)
        if await insist(f"run {self._run}", lambda: self._redis.hexists(key, field)):
            return
        row: metrics.Row = {"step": step}
        for evaluated in self._data.sets:
            rewards = await self._rewards(evaluated, attempt, version)
            row |= evaluation_columns(evaluated.name, rewards, self._spec.evaluation.pass_reward)
            row.setdefault("accuracy/eval", row[f"eval/{evaluated.name}/avg@{rewards.shape[1]}"])
        encoded = metrics.encode_row(row)
        await set_fields(self._redis, self._run, key, {field: encoded})
        EVALUATIONS.inc()
        log.info("run %s: after step %d %s", self._run, step, encoded)

    async def _rewards(
        self, evaluated: Evaluated, attempt: int, version: int
    ) -> npt.NDArray[np.float64]:
        """[prompts, k]: the rewards of a set; NaN where there is none to be had."""
        asked = self._spec.evaluation
        model = await self._sender.model()
        model.check(group_size=asked.k, cohort_sequences=max(COHORT_SEQUENCES, asked.k))
        rewards_NK = np.full((evaluated.size, asked.k), np.nan)

        async def take(slot: Slot, responses: list[Response], _: float, __: str) -> None:
            judgements = await judge(
                self._pool, evaluated.verifiers, slot.problem, responses, self._text
            )
            rewards_NK[slot.id.slot] = [np.nan if j.fault else j.reward for j in judgements]

        max_tokens = self._spec.evaluation_max_tokens
        slots = self._plan.evaluation_slots(evaluated, attempt, version)
        fitting = [slot for slot in slots if not _too_long(slot, model, max_tokens)]
        if len(fitting) < len(slots):
            log.warning(
                "run %s: %d prompts of evaluation set %s are too long and count as wrong",
                self._run,
                len(slots) - len(fitting),
                evaluated.name,
            )
        await self._sender.send(
            self._plan.evaluation_cohorts(evaluated, attempt, version, fitting),
            take,
            num_samples=asked.k,
            sampling=self._sampling(asked.temperature, max_tokens, top_p=asked.top_p),
            purpose=pb.PURPOSE_EVALUATION,
            policy_version=version,
        )
        return rewards_NK

    async def produce_lap(self, attempt: int, lap: int) -> None:
        """Adds the envelope of every slot of the lap that has none yet."""
        await self._groups.forget_before(attempt, lap)
        model = await self._sender.model()
        model.check(
            group_size=self._spec.rollout.group_size,
            cohort_sequences=max(COHORT_SEQUENCES, self._spec.rollout.group_size),
        )
        max_tokens = self._spec.rollout.max_tokens
        fitting: list[Slot] = []
        for slot in self._plan.lap_slots(attempt, lap):
            if reason := _too_long(slot, model, max_tokens):
                if not await self._has(slot):
                    await self._add(Packed.of(void_envelope(slot, reason)))
            else:
                fitting.append(slot)
        sampling = self._sampling(self._spec.rollout.temperature, max_tokens)

        async def take(
            slot: Slot, responses: list[Response], generate_s: float, engine: str
        ) -> None:
            if await self._has(slot):
                return  # came with an earlier try
            judgements = await judge(
                self._pool, self._spec.task.verifiers, slot.problem, responses, self._text
            )
            await self._add(
                pack_group(
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

    async def _add(self, packed: Packed) -> None:
        await self._groups.add(packed)
        SLOTS.labels(packed.kind).inc()

    def _sampling(
        self, temperature: float, max_tokens: int, *, top_p: float = 1.0
    ) -> sequence_pb2.SamplingParams:
        return sequence_pb2.SamplingParams(
            temperature=temperature,
            max_tokens=max_tokens,
            stop_token_ids=self._text.end_ids,
            top_p=top_p if top_p < 1 else None,
        )

    async def _has(self, slot: Slot) -> bool:
        return SlotKey.of(slot.id) in await self._groups.added()

    async def _complete(self, cohort: Cohort) -> bool:
        return all([await self._has(slot) for slot in cohort.slots])


def evaluation_columns(
    name: str, rewards_NK: npt.NDArray[np.float64], pass_reward: float
) -> metrics.Row:
    """avg@k, the mean reward, and pass@k, the share of prompts with a right response among k.

    With as many samples as k, that share is the unbiased estimate of 2107.03374, eq (1). A response
    without a reward (NaN) counts as 0, and is never right.
    """
    right_N = (rewards_NK >= pass_reward - _SUM_ROUNDING).any(axis=1)
    k = rewards_NK.shape[1]
    return {
        f"eval/{name}/avg@{k}": float(np.nan_to_num(rewards_NK).mean()),
        f"eval/{name}/pass@{k}": float(right_N.mean()),
    }


def _too_long(slot: Slot, model: EngineModel, max_tokens: int) -> str:
    needed = len(slot.prompt_ids_P) + max_tokens
    limit = model.signature.max_sequence_tokens
    if needed <= limit:
        return ""
    return (
        f"prompt of {len(slot.prompt_ids_P)} tokens + max_tokens {max_tokens} = {needed}; the "
        f"model takes {limit}"
    )
