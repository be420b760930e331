"""The other objectives: GRPO, CISPO and DPPO, each as its paper has it.

All take the arguments of `minirl_loss` and differ in what decides that a token is left out, what
it is weighed by, and against which policy both are measured; docs/objectives.md has the table.
Length and standard-deviation norms are not here: they are the caller's denominator, `weights_T`
and advantages.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from keel_trainer.algo.filters import IsFilter
from keel_trainer.algo.objective import (
    Batch,
    Stats,
    clip_masks,
    is_weights,
    ratio,
    stats_of,
    weighted_loss,
)


def grpo_loss(
    policy_logprobs_T: Tensor,
    proximal_logprobs_T: Tensor | None,
    rollout_logprobs_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    *,
    denominator: float,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    is_cap: float | None = None,
    importance_sampling: bool = False,
    clip: bool = True,
    is_filter: IsFilter | None = None,
    weights_T: Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """Minus GRPO's J, DeepSeekMath (arXiv 2402.03300) eq (3), without its KL term.

    J = sum_t min(r A, clip(r, 1 - eps_low, 1 + eps_high) A) / denominator, r = pi_theta / pi_old,
    and here gradient flows through the ratio. Both policies are the trainer's; the paper knows no
    third. It divides by |y| and by the group's standard deviation (length_norm, std_norm), and does
    not state eps: 0.2 is PPO's.

    Args:
        importance_sampling: True also multiplies by sg[min(pi_old / mu_old, is_cap)], the engine's
            correction that GRPO lacks. With `is_filter` icepop and no cap this is IcePop.
        clip: False maximises r A.

    The weight of the metrics is the coefficient of A grad log pi_theta where nothing clips.
    """
    batch = Batch.of(
        policy_logprobs_T,
        proximal_logprobs_T,
        rollout_logprobs_T,
        advantages_T,
        mask_T,
        is_filter,
    )
    ratio_T = ratio(batch.policy_T, batch.proximal_T)
    surrogate_T = ratio_T * batch.advantages_T
    high_T = low_T = truncated_T = torch.zeros_like(batch.mask_T)
    if clip:
        clipped_T = ratio_T.clamp(1 - eps_low, 1 + eps_high) * batch.advantages_T
        surrogate_T = torch.minimum(surrogate_T, clipped_T)
        high_T, low_T = clip_masks(ratio_T.detach(), batch.advantages_T, eps_low, eps_high)
    if importance_sampling:
        correction_T = ratio(batch.proximal_T, batch.rollout_T)
        capped_T = is_weights(correction_T, is_cap)
        surrogate_T = capped_T * surrogate_T
        truncated_T = capped_T != correction_T
    loss = -batch.kept(surrogate_T, weights_T).sum() / denominator
    return loss, stats_of(batch, batch.ratio_T(importance_sampling), truncated_T, high_T, low_T)


def cispo_loss(
    policy_logprobs_T: Tensor,
    proximal_logprobs_T: Tensor | None,
    rollout_logprobs_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    *,
    denominator: float,
    eps_low: float = 1.0,
    eps_high: float = 4.0,
    importance_sampling: bool = False,
    clip: bool = True,
    is_filter: IsFilter | None = None,
    weights_T: Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """Minus CISPO's J, MiniMax-M1 (arXiv 2506.13585) eq (4) and (5): weights clipped, none masked.

    J = sum_t sg[clip(r, 1 - eps_low, 1 + eps_high)] * A * log pi_theta / denominator, with
    r = pi_theta / pi_old. Every token keeps its gradient. The paper sets no lower bound (eps_low =
    1 is none), does not publish eps_high, divides by the tokens of the group (here a constant) and
    advantages by the standard deviation, and has no KL term.

    Args:
        importance_sampling: True takes r = pi_theta / mu_old instead.
        clip: False leaves the weight as it is.
    """
    batch = Batch.of(
        policy_logprobs_T,
        proximal_logprobs_T,
        rollout_logprobs_T,
        advantages_T,
        mask_T,
        is_filter,
    )
    ratio_T = batch.ratio_T(importance_sampling)
    weight_T = ratio_T.clamp(1 - eps_low, 1 + eps_high) if clip else ratio_T
    nothing_T = torch.zeros_like(batch.mask_T)
    loss = weighted_loss(batch, weight_T, nothing_T, weights_T) / denominator
    return loss, stats_of(batch, ratio_T, weight_T != ratio_T, nothing_T, nothing_T)


def dppo_loss(
    policy_logprobs_T: Tensor,
    proximal_logprobs_T: Tensor | None,
    rollout_logprobs_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    *,
    denominator: float,
    divergence: Literal["tv", "kl"] = "tv",
    divergence_threshold: float = 0.15,
    is_cap: float | None = None,
    importance_sampling: bool = True,
    clip: bool = True,
    is_filter: IsFilter | None = None,
    weights_T: Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """Minus DPPO's J, arXiv 2602.04879 eq (11): MiniRL's form, masked by divergence from mu_old.

    J = sum_t M_t * sg[pi_theta / mu_old] * A * log pi_theta / denominator, M_t as in
    `divergence_masks`. The weight is not truncated: the paper finds that truncation hurts. pi_old
    plays no part in loss or mask.

    Args:
        divergence: "tv" or "kl", see `binary_tv` and `binary_kl`.
        divergence_threshold: delta; an example script in verl takes 0.15 with tv, 0.05 with kl.
        importance_sampling: False weighs by sg[pi_theta / pi_old]; the mask stays with mu_old.
        clip: False keeps every token.
    """
    batch = Batch.of(
        policy_logprobs_T,
        proximal_logprobs_T,
        rollout_logprobs_T,
        advantages_T,
        mask_T,
        is_filter,
    )
    ratio_T = batch.ratio_T(importance_sampling)
    weight_T = is_weights(ratio_T, is_cap)
    high_T = low_T = torch.zeros_like(batch.mask_T)
    if clip:
        distance = {"tv": binary_tv, "kl": binary_kl}[divergence]
        high_T, low_T = divergence_masks(
            batch.ratio_T(importance_sampling=True),
            batch.advantages_T,
            distance(batch.policy_sg_T, batch.rollout_T),
            divergence_threshold,
        )
    loss = weighted_loss(batch, weight_T, high_T | low_T, weights_T) / denominator
    return loss, stats_of(batch, ratio_T, weight_T != ratio_T, high_T, low_T)


def divergence_masks(
    whole_ratio_T: Tensor, advantages_T: Tensor, divergence_T: Tensor, threshold: float
) -> tuple[Tensor, Tensor]:
    """Tokens that M_t drops, DPPO eq (12), as bool `(high_T, low_T)`.

    High: A > 0, r > 1 and D > delta. Low: A < 0, r < 1 and D > delta, r = pi_theta / mu_old. A
    token on its way back towards mu_old is never dropped, however far away it is.
    """
    far_T = divergence_T > threshold
    high_T = (advantages_T > 0) & (whole_ratio_T > 1) & far_T
    low_T = (advantages_T < 0) & (whole_ratio_T < 1) & far_T
    return high_T, low_T


def binary_tv(policy_logprobs_T: Tensor, rollout_logprobs_T: Tensor) -> Tensor:
    """|pi_theta - mu_old|: total variation of "this token" against "any other", float64."""
    return (_probability(policy_logprobs_T) - _probability(rollout_logprobs_T)).abs()


def binary_kl(policy_logprobs_T: Tensor, rollout_logprobs_T: Tensor) -> Tensor:
    """KL[mu_old || pi_theta] of "this token" against "any other", nats, float64.

    mu log(mu / pi) + (1 - mu) log((1 - mu) / (1 - pi)): infinite where pi_theta is 1 and mu is not.
    """
    policy_T = policy_logprobs_T.double().clamp(max=0.0)  # rounding may leave a log above 0
    rollout_T = rollout_logprobs_T.double().clamp(max=0.0)
    # 1 - p without losing its digits near p = 1; xlogy takes 0 log 0 as 0
    policy_rest_T, rollout_rest_T = -torch.expm1(policy_T), -torch.expm1(rollout_T)
    this_T = rollout_T.exp() * (rollout_T - policy_T)
    others_T = torch.xlogy(rollout_rest_T, rollout_rest_T) - torch.xlogy(
        rollout_rest_T, policy_rest_T
    )
    return this_T + others_T


def _probability(logprobs_T: Tensor) -> Tensor:
    return logprobs_T.double().exp()
