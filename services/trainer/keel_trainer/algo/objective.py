"""MiniRL, eq (7): the loss, and the factors it is made of.

Three log-probs, always under these names, each of softmax(logits / temperature) over the full
vocabulary: `rollout` (mu_old: the engine, when sampling), `proximal` (pi_old: the trainer at
theta_old), `policy` (pi_theta: the trainer now, with gradient).

Everything is elementwise up to one sum, so `_T` may be any shape, `[N, T]` with padding included:
what the mask excludes is replaced before anything is exponentiated, and so cannot leak.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Stats = dict[str, Tensor]
"""Float64 scalars that add up over micro-batches; keys ending in `_max` take the maximum."""


def ratio(numerator_logprobs_T: Tensor, denominator_logprobs_T: Tensor) -> Tensor:
    """exp(numerator - denominator), exponentiated once, in float32 or wider."""
    return torch.exp(_wide(numerator_logprobs_T) - _wide(denominator_logprobs_T))


def is_weights(ratio_T: Tensor, is_cap: float | None) -> Tensor:
    """The ratio truncated above at `is_cap` (TIS), with no lower bound; None truncates nothing."""
    return ratio_T if is_cap is None else ratio_T.clamp(max=is_cap)


def clip_masks(
    staleness_ratio_T: Tensor, advantages_T: Tensor, eps_low: float, eps_high: float
) -> tuple[Tensor, Tensor]:
    """Tokens that M_t drops, eq (7), as bool `(high_T, low_T)`.

    High: A > 0 and r > 1 + eps_high. Low: A < 0 and r < 1 - eps_low. r = pi_theta / pi_old, both
    from the trainer: the engine never decides the mask.
    """
    high_T = (advantages_T > 0) & (staleness_ratio_T > 1 + eps_high)
    low_T = (advantages_T < 0) & (staleness_ratio_T < 1 - eps_low)
    return high_T, low_T


def loss_denominator(
    *, groups: int, group_size: int, max_tokens: int, length_norm: bool = False
) -> float:
    """B x G x max_tokens, or B x G with length_norm: a constant, whatever was masked."""
    return float(groups * group_size * (1 if length_norm else max_tokens))


def minirl_loss(
    policy_logprobs_T: Tensor,
    proximal_logprobs_T: Tensor | None,
    rollout_logprobs_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    *,
    denominator: float,
    eps_low: float = 0.2,
    eps_high: float = 0.27,
    is_cap: float | None = 5.0,
    importance_sampling: bool = True,
    clip: bool = True,
    weights_T: Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """Minus J of eq (7), to be minimised, and the sums that a step's metrics are made of.

    J = sum_t M_t * sg[min(pi_theta / mu_old, is_cap)] * A * log pi_theta / denominator.

    Args:
        policy_logprobs_T: log pi_theta, with gradient.
        proximal_logprobs_T: log pi_old; None means sg[pi_theta], as at N = 1.
        rollout_logprobs_T: log mu_old.
        advantages_T: A of each token's response.
        mask_T: bool; True at response tokens of valid sequences.
        denominator: constant, see `loss_denominator`; losses of micro-batches then simply add.
        eps_low, eps_high: clip range of pi_theta / pi_old.
        is_cap: upper bound of the weight; None for no truncation.
        importance_sampling: False weighs by sg[pi_theta / pi_old] instead, which is 1 at N = 1.
        clip: False keeps every token (M_t = 1).
        weights_T: factor of each token, for length_norm 1 / |y|; None means 1.

    Returns:
        The loss, a scalar, and Stats: see `_stats`. Over several micro-batches both add up.
    """
    mask_T = mask_T.bool()
    policy_T = _wide(policy_logprobs_T).masked_fill(~mask_T, 0.0)
    policy_sg_T = policy_T.detach()
    rollout_T = _wide(rollout_logprobs_T).masked_fill(~mask_T, 0.0)
    proximal_T = (
        policy_sg_T
        if proximal_logprobs_T is None
        else _wide(proximal_logprobs_T).detach().masked_fill(~mask_T, 0.0)
    )
    advantages_T = advantages_T.to(policy_T.dtype).masked_fill(~mask_T, 0.0)

    staleness_ratio_T = ratio(policy_sg_T, proximal_T)
    whole_ratio_T = ratio(policy_sg_T, rollout_T) if importance_sampling else staleness_ratio_T
    weight_T = is_weights(whole_ratio_T, is_cap)
    high_T, low_T = clip_masks(staleness_ratio_T, advantages_T, eps_low, eps_high)
    if not clip:
        high_T = low_T = torch.zeros_like(mask_T)
    coefficient_T = (weight_T * advantages_T).masked_fill(high_T | low_T | ~mask_T, 0.0)
    if weights_T is not None:
        coefficient_T = coefficient_T * weights_T.to(coefficient_T.dtype).masked_fill(~mask_T, 0.0)
    loss = -(coefficient_T * policy_T).sum() / denominator

    with torch.no_grad():
        stats = _stats(
            policy_sg_T, proximal_T, rollout_T, whole_ratio_T, high_T, low_T, mask_T, is_cap
        )
    return loss, stats


def sft_loss(
    policy_logprobs_T: Tensor, mask_T: Tensor, *, denominator: float
) -> tuple[Tensor, Stats]:
    """Minus the log-likelihood of the masked tokens over `denominator`; used by the cold start."""
    logprobs_T = _wide(policy_logprobs_T).masked_fill(~mask_T, 0.0)
    stats = {"tokens": mask_T.sum().double(), "nll": -logprobs_T.detach().double().sum()}
    return -logprobs_T.sum() / denominator, stats


def _stats(
    policy_T: Tensor,
    proximal_T: Tensor,
    rollout_T: Tensor,
    weight_ratio_T: Tensor,
    high_T: Tensor,
    low_T: Tensor,
    mask_T: Tensor,
    is_cap: float | None,
) -> Stats:
    """Sums over the valid tokens, eq (5)'s two factors apart; at excluded tokens every log is 0.

    Mismatch is pi_old against mu_old, staleness pi_theta against pi_old, whole their product. The
    estimators take d = log new - log old on tokens sampled from mu: k1 = -d, k3 = e^d - d - 1.
    `is` is the weight before truncation.
    """
    mismatch_T = proximal_T.double() - rollout_T.double()
    staleness_T = policy_T.double() - proximal_T.double()
    weight_T = weight_ratio_T.double().masked_fill(~mask_T, 0.0)
    truncated_T = weight_T > (math.inf if is_cap is None else is_cap)
    return {
        "tokens": mask_T.sum().double(),
        "mismatch_k1": -mismatch_T.sum(),
        "mismatch_k3": _k3(mismatch_T),
        "mismatch_abs": mismatch_T.abs().sum(),
        "mismatch_abs_max": _max(mismatch_T.abs()),
        "mismatch_f2": (mismatch_T.abs() > math.log(2)).sum().double(),
        "staleness_k1": -staleness_T.sum(),
        "staleness_k3": _k3(staleness_T),
        "staleness_ratio_max": _max(staleness_T.exp().masked_fill(~mask_T, 0.0)),
        "whole_k1": (rollout_T.double() - policy_T.double()).sum(),
        "is": weight_T.sum(),
        "is_squared": weight_T.square().sum(),
        "is_max": _max(weight_T),
        "is_truncated": truncated_T.sum().double(),
        "clip_high": (high_T & mask_T).sum().double(),
        "clip_low": (low_T & mask_T).sum().double(),
    }


def _k3(d_T: Tensor) -> Tensor:
    # expm1 keeps the digits that e^d - 1 loses near zero, where all of k3 lives
    return (torch.expm1(d_T) - d_T).sum()


def _max(values_T: Tensor) -> Tensor:
    return values_T.max() if values_T.numel() else values_T.new_zeros(())


def _wide(logprobs_T: Tensor) -> Tensor:
    """At least float32; float64 stays, for the tests of the gradient."""
    return logprobs_T if logprobs_T.dtype == torch.float64 else logprobs_T.float()
