"""One mini-batch: assembled from envelopes, scored under theta_old, trained on."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from keel.errors import WireError
from keel.spec import RecipeSpec, RunSpec
from keel.types.v1 import sequence_pb2
from keel_trainer import diagnostics, samples
from keel_trainer.algo.advantage import group_advantages
from keel_trainer.algo.objective import loss_denominator, sft_loss
from keel_trainer.algo.replay import ReplayPlan
from keel_trainer.backends.base import Backend, ScoreOutput
from keel_trainer.batch import MicroBatch, collate, cut_micro_batches
from keel_trainer.objectives import objective_of
from keel_trainer.sequences import (
    RouteShape,
    TrainSequence,
    decode_demonstration,
    decode_sequence,
)

log = logging.getLogger(__name__)

Row = dict[str, float | int | None]


@dataclass(frozen=True, slots=True)
class Group:
    """What one slot holds, checked."""

    sequences: list[TrainSequence]
    """[G]; empty where the slot is VOID."""
    lap: int
    slot: int
    engine: str
    """Address of the engine that sampled it."""
    generate_s: float
    """Seconds of generation, from the lap's first request."""
    void_reason: str = ""

    @classmethod
    def void(cls, lap: int, slot: int, reason: str) -> Group:
        """A slot with nothing to train on."""
        return cls([], lap, slot, engine="", generate_s=0.0, void_reason=reason)

    @property
    def trained(self) -> bool:
        """Some of it is trained on."""
        return any(sequence.valid for sequence in self.sequences)


@dataclass(slots=True)
class MiniBatch:
    """B groups, cut into micro-batches that scoring and update share."""

    micros: list[MicroBatch]
    """Valid sequences only, in slot order."""
    engines: list[list[str]]
    """Address of the engine that sampled each row, by micro-batch."""
    denominator: float
    temperature: float
    row: Row
    """Columns of the metric row that the data alone decides."""
    generate_s: float
    """Slowest group's seconds of generation."""
    scores: list[ScoreOutput] = field(default_factory=list)
    """By micro-batch; empty at N = 1, where pi_old = sg[pi_theta]."""
    score_s: float = 0.0
    shown: list[samples.Shown] = field(default_factory=list)
    """Sequences of one group that people may see; empty where the lap is not sampled."""

    @classmethod
    def assemble(
        cls,
        slots: Sequence[Group],
        spec: RunSpec,
        *,
        trainer_version: int,
        device: str,
        show: bool = False,
    ) -> MiniBatch:
        """Cuts the groups of one mini-batch, given in slot order.

        Args:
            trainer_version: version of the weights that will be updated first.
            show: fill `shown`.
        """
        began = time.perf_counter()
        _report_invalid(slots)
        groups = [slot.sequences for slot in slots]
        everything = [sequence for group in groups for sequence in group]
        rewards_N = torch.tensor([s.reward if s.valid else 0.0 for s in everything])
        groups_N = torch.tensor(
            [g for g, group in enumerate(groups) for _ in group], dtype=torch.long
        )
        valid_N = torch.tensor([s.valid for s in everything], dtype=torch.bool)
        recipe = spec.recipe
        advantages_N = group_advantages(rewards_N, groups_N, valid_N, std_norm=recipe.std_norm)
        kept = [i for i, sequence in enumerate(everything) if sequence.valid]
        sequences = [everything[i] for i in kept]
        cuts = cut_micro_batches([s.fed_length for s in sequences], spec.trainer.micro_batch_tokens)
        micros = [
            collate(
                _alike(sequences[cut.start : cut.stop]),
                advantages_N[kept[cut.start : cut.stop]],
                device=device,
            )
            for cut in cuts
        ]
        engines_N = [slot.engine for slot in slots for _ in slot.sequences]
        row = _data_row(
            groups,
            everything,
            sequences,
            trainer_version,
            [verifier.part for verifier in spec.task.verifiers],
        ) | _engine_row(slots)
        return cls(
            micros=micros,
            engines=[[engines_N[kept[i]] for i in cut] for cut in cuts],
            denominator=loss_denominator(
                groups=recipe.groups_per_minibatch,
                group_size=spec.rollout.group_size,
                max_tokens=spec.rollout.max_tokens,
                length_norm=recipe.length_norm,
            ),
            temperature=spec.rollout.temperature,
            row=row,
            generate_s=max((slot.generate_s for slot in slots), default=0.0),
            shown=samples.choose(groups, advantages_N.tolist(), cuts) if show else [],
            score_s=time.perf_counter() - began,
        )


def score(backend: Backend, minibatch: MiniBatch, plan: ReplayPlan) -> None:
    """The scoring pass: pi_old of every token and, for R2, e^pi_old. Nothing at N = 1."""
    if plan.scoring is None:
        return
    began = time.perf_counter()
    for micro in minibatch.micros:
        routes = plan.select(plan.scoring, recorded=None, engine=micro.engine_routes_NTLK)
        minibatch.scores.append(
            backend.score(micro, temperature=minibatch.temperature, routes_NTLK=routes)
        )
    minibatch.score_s += time.perf_counter() - began


def update(
    backend: Backend, minibatch: MiniBatch, plan: ReplayPlan, recipe: RecipeSpec, *, step: int
) -> Row:
    """One optimizer step of the recipe's objective under the plan's routes; its metric columns.

    A mini-batch without a valid token leaves weights and optimizer untouched.

    Args:
        step: optimizer steps done before, for the learning rate.
    """
    began = time.perf_counter()
    objective = objective_of(recipe)
    stats = []
    for index, micro in enumerate(minibatch.micros):
        scored = minibatch.scores[index] if minibatch.scores else None
        routes = plan.select(
            plan.update,
            recorded=scored.natural_NTLK if scored else None,
            engine=micro.engine_routes_NTLK,
        )

        def loss_fn(
            policy_logprobs_NT: torch.Tensor,
            micro: MicroBatch = micro,
            scored: ScoreOutput | None = scored,
        ) -> tuple[torch.Tensor, diagnostics.Stats]:
            return objective(
                policy_logprobs_NT,
                scored.logprobs_NT if scored else None,
                micro.rollout_logprobs_NT,
                micro.advantages_NT,
                micro.mask_NT,
                denominator=minibatch.denominator,
                weights_T=micro.length_weights_NT if recipe.length_norm else None,
            )

        out = backend.update(micro, loss_fn, temperature=minibatch.temperature, routes_NTLK=routes)
        stats += [out.stats, diagnostics.entropy_stats(out.entropy_NT, micro.mask_NT)]
        if routes is not None:
            assert out.dispatched_NTLK is not None
            stats.append(
                diagnostics.replay_stats(routes, out.dispatched_NTLK, micro.routes_mask_NT)
            )
        live = scored.natural_NTLK if scored else out.natural_NTLK
        proximal_NT = scored.logprobs_NT if scored else out.policy_logprobs_NT
        stats.append(
            diagnostics.engine_stats(
                minibatch.engines[index], proximal_NT, micro.rollout_logprobs_NT, micro.mask_NT
            )
        )
        samples.see(minibatch.shown, index, micro, proximal_NT, live)
        if micro.engine_routes_NTLK is not None and live is not None:
            stats.append(
                diagnostics.routing_stats(
                    micro.engine_routes_NTLK,
                    live,
                    micro.routes_mask_NT,
                    layers=backend.info.moe_layer_numbers,
                )
            )
    grad_norm = backend.step(learning_rate(recipe, step)) if minibatch.micros else None
    if grad_norm is not None and not math.isfinite(grad_norm):
        log.warning("step %d: the gradient norm is %s, nothing is changed", step + 1, grad_norm)
    return (
        minibatch.row
        | diagnostics.metrics(diagnostics.merge(stats))
        | {
            "grad_norm": grad_norm,
            "time/score_s": minibatch.score_s,
            "time/update_s": time.perf_counter() - began,
        }
    )


def learning_rate(recipe: RecipeSpec, step: int) -> float:
    """Linear warm-up, then constant. `step` counts steps done before this one."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    return recipe.learning_rate


def imitate(
    backend: Backend,
    demonstrations: Sequence[TrainSequence],
    *,
    rate: float,
    budget_tokens: int,
    device: str,
) -> float:
    """One supervised step, the mean over response tokens; returns the loss in nats per token.

    Routes are the model's own, as in any SFT.
    """
    denominator = float(sum(demonstration.response_length for demonstration in demonstrations))
    loss = 0.0
    for cut in cut_micro_batches([d.fed_length for d in demonstrations], budget_tokens):
        micro = collate(demonstrations[cut.start : cut.stop], device=device)
        out = backend.update(
            micro,
            lambda policy_NT, micro=micro: sft_loss(  # type: ignore[misc]
                policy_NT, micro.mask_NT, denominator=denominator
            ),
            temperature=1.0,
        )
        loss += out.loss
    backend.step(rate)
    return loss


def decode_demonstrations(envelope: sequence_pb2.Envelope, vocab_size: int) -> list[TrainSequence]:
    """The demonstrations of one supervised step. WireError if the envelope holds something else."""
    kind = envelope.WhichOneof("payload")
    if kind != "demonstrations":
        raise WireError(
            f"supervised step {envelope.id.lap}: payload {kind} is not valid; valid: demonstrations"
        )
    return [
        decode_demonstration(demonstration, vocab_size=vocab_size)
        for demonstration in envelope.demonstrations.demonstrations
    ]


def decode_group(
    envelope: sequence_pb2.Envelope,
    spec: RunSpec,
    *,
    vocab_size: int,
    routes: RouteShape | None,
    routes_needed: bool = False,
) -> Group:
    """What a slot holds: no sequence where it is VOID, none valid where fewer than two are.

    Args:
        routes: shape of the routes that sequences bring; None: a dense model.
        routes_needed: every sequence must bring them. Otherwise the group of an engine that reports
            none is as good as any, and only the comparison of routes is not made.

    Raises:
        WireError: the envelope is malformed.
    """
    kind = envelope.WhichOneof("payload")
    lap, slot = envelope.id.lap, envelope.id.slot
    if kind == "void":
        return Group.void(lap, slot, envelope.void.reason)
    place = f"slot {lap}/{slot}"
    if kind != "group":
        raise WireError(f"{place}: payload {kind} is not valid; valid: group or void")
    if len(envelope.group.sequences) != spec.rollout.group_size:
        raise WireError(
            f"{place}: {len(envelope.group.sequences)} sequences are not valid; "
            f"valid: {spec.rollout.group_size}"
        )
    wanted = routes if routes_needed or _has_routes(envelope) else None
    group = []
    for index, sequence in enumerate(envelope.group.sequences):
        field = f"{place} sequences[{index}]"
        _check_sampling(sequence.sampling, spec.rollout.temperature, f"{field}.sampling")
        group.append(decode_sequence(sequence, vocab_size=vocab_size, routes=wanted, field=field))
    if sum(sequence.valid for sequence in group) < 2:
        lonely = "fewer than two of its group are valid"
        group = [replace(s, valid=False, invalid_reason=s.invalid_reason or lonely) for s in group]
    return Group(group, lap, slot, envelope.group.engine, envelope.group.generate_s)


def _has_routes(envelope: sequence_pb2.Envelope) -> bool:
    return any(sequence.HasField("routes") for sequence in envelope.group.sequences)


def _alike(sequences: Sequence[TrainSequence]) -> Sequence[TrainSequence]:
    """All with their routes or, where one has none, all without: a micro-batch of two engines."""
    if all(sequence.routes_TLK is not None for sequence in sequences):
        return sequences
    return [replace(sequence, routes_TLK=None) for sequence in sequences]


def _check_sampling(sampling: sequence_pb2.SamplingParams, temperature: float, field: str) -> None:
    """Another temperature than the trainer's, or truncation, would bias pi / mu unseen."""
    if not math.isclose(sampling.temperature, temperature, rel_tol=1e-6):
        raise WireError(
            f"{field}.temperature: {sampling.temperature} is not valid; valid: {temperature}"
        )
    if sampling.top_k or (sampling.HasField("top_p") and sampling.top_p != 1):
        raise WireError(
            f"{field}: top_k {sampling.top_k}, top_p {sampling.top_p} are not valid; "
            "valid: 0 and 1, the full vocabulary"
        )


def _report_invalid(slots: Sequence[Group]) -> None:
    """Says what is not trained on, and why."""
    for slot in slots:
        reasons = [s.invalid_reason for s in slot.sequences if not s.valid]
        if not slot.sequences:
            reasons = [f"VOID: {slot.void_reason}"]
        if reasons:
            place = (slot.lap, slot.slot)
            log.warning("slot %d/%d: %d left out: %s", *place, len(reasons), reasons[0])


def _data_row(
    groups: Sequence[Sequence[TrainSequence]],
    everything: Sequence[TrainSequence],
    valid: Sequence[TrainSequence],
    trainer_version: int,
    verifiers: Sequence[str],
) -> Row:
    lengths = [s.response_length for s in everything]
    lags = [trainer_version - s.policy_versions_R for s in valid]
    rewards = [[s.reward for s in group if s.valid] for group in groups]
    trained = [group for group in rewards if group]
    return {
        "reward/mean": _mean([reward for group in trained for reward in group]),
        **_reward_parts(valid, verifiers),
        "response/length_mean": _mean(lengths),
        "response/truncated": _mean([s.truncated for s in everything]),
        "groups/zero_advantage": _mean([len(set(group)) == 1 for group in trained]),
        "groups/void": sum(not any(s.valid for s in group) for group in groups),
        "version_lag/mean": float(np.concatenate(lags).mean()) if lags else None,
        "version_lag/max": int(max(lag.max() for lag in lags)) if lags else None,
        "tokens/prompt": sum(s.prompt_length for s in everything),
        "tokens/response": sum(lengths),
    }


def _engine_row(slots: Sequence[Group]) -> Row:
    """Groups that are trained on, by the engine that sampled them."""
    trained = [slot.engine for slot in slots if slot.engine and slot.trained]
    return {f"engine/groups/{engine}": count for engine, count in sorted(Counter(trained).items())}


def _reward_parts(valid: Sequence[TrainSequence], verifiers: Sequence[str]) -> Row:
    """Means of the parts that responses have; a verifier's own is there in every row."""
    values: dict[str, list[float]] = {part: [] for part in verifiers}
    for sequence in valid:
        for part, value in sequence.reward_parts.items():
            values.setdefault(part, []).append(value)
    return {f"reward/part/{part}": _mean(values[part]) for part in sorted(values)}


def _mean(values: Sequence[float]) -> float | None:
    """None of nothing: a mini-batch may hold only VOID slots, and 0 would look measured."""
    return float(np.mean(values)) if values else None
