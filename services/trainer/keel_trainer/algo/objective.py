"""MiniRL, eq (7): the loss, and the factors that it and its variants are made of.

Three log-probs, always under these names, each of softmax(logits / temperature) over the full
vocabulary: `rollout` (mu_old: the engine, when sampling), `proximal` (pi_old: the trainer at
theta_old), `policy` (pi_theta: the trainer now, with gradient).

Everything is elementwise up to one sum, so `_T` may be any shape, `[N, T]` with padding included:
what the mask excludes is replaced before anything is exponentiated, and so cannot leak. Only the
filter by sequence asks that the last dimension be one sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from keel_trainer.algo.filters import IsFilter

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


@dataclass(frozen=True)
class Batch:
    """What every objective is a function of: widened, and 0 wherever the mask excludes."""

    policy_T: Tensor  # log pi_theta, with gradient
    policy_sg_T: Tensor  # the same without
    proximal_T: Tensor  # log pi_old; sg[log pi_theta] at N = 1
    rollout_T: Tensor  # log mu_old
    advantages_T: Tensor
    mask_T: Tensor  # bool
    is_filter: IsFilter | None

    @classmethod
    def of(
        cls,
        policy_logprobs_T: Tensor,
        proximal_logprobs_T: Tensor | None,
        rollout_logprobs_T: Tensor,
        advantages_T: Tensor,
        mask_T: Tensor,
        is_filter: IsFilter | None = None,
    ) -> Batch:
        """From the first five arguments of any loss; see `minirl_loss`."""
        mask_T = mask_T.bool()
        policy_T = _wide(policy_logprobs_T).masked_fill(~mask_T, 0.0)
        policy_sg_T = policy_T.detach()
        proximal_T = (
            policy_sg_T
            if proximal_logprobs_T is None
            else _wide(proximal_logprobs_T).detach().masked_fill(~mask_T, 0.0)
        )
        return cls(
            policy_T=policy_T,
            policy_sg_T=policy_sg_T,
            proximal_T=proximal_T,
            rollout_T=_wide(rollout_logprobs_T).masked_fill(~mask_T, 0.0),
            advantages_T=advantages_T.to(policy_T.dtype).masked_fill(~mask_T, 0.0),
            mask_T=mask_T,
            is_filter=is_filter,
        )

    def ratio_T(self, importance_sampling: bool) -> Tensor:
        """sg[pi_theta / mu_old]; without importance sampling sg[pi_theta / pi_old], 1 at N = 1."""
        return ratio(self.policy_sg_T, self.rollout_T if importance_sampling else self.proximal_T)

    def filtered_T(self) -> Tensor:
        """Bool: valid tokens that the filter drops."""
        if self.is_filter is None:
            return torch.zeros_like(self.mask_T)
        return self.is_filter.dropped_T(self.proximal_T, self.rollout_T, self.mask_T)

    def kept(self, values_T: Tensor, weights_T: Tensor | None) -> Tensor:
        """The values, times `weights_T`; 0 where the mask or the filter excludes."""
        values_T = values_T.masked_fill(self.filtered_T() | ~self.mask_T, 0.0)
        if weights_T is None:
            return values_T
        return values_T * weights_T.to(values_T.dtype).masked_fill(~self.mask_T, 0.0)


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
    is_filter: IsFilter | None = None,
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
        is_filter: drops more tokens; not in the paper.
        weights_T: factor of each token, for length_norm 1 / |y|; None means 1.

    Returns:
        The loss, a scalar, and Stats: see `stats_of`. Over several micro-batches both add up.
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
        staleness_ratio_T = batch.ratio_T(importance_sampling=False)
        high_T, low_T = clip_masks(staleness_ratio_T, batch.advantages_T, eps_low, eps_high)
    loss = weighted_loss(batch, weight_T, high_T | low_T, weights_T) / denominator
    return loss, stats_of(batch, ratio_T, weight_T != ratio_T, high_T, low_T)


def weighted_loss(
    batch: Batch, weight_T: Tensor, dropped_T: Tensor, weights_T: Tensor | None
) -> Tensor:
    """Minus sum_t M_t * weight * A * log pi_theta, M_t = 0 where dropped; weights are constants."""
    coefficient_T = (weight_T * batch.advantages_T).masked_fill(dropped_T, 0.0)
    return -(batch.kept(coefficient_T, weights_T) * batch.policy_T).sum()


def sft_loss(
    policy_logprobs_T: Tensor, mask_T: Tensor, *, denominator: float
) -> tuple[Tensor, Stats]:
    """Minus the log-likelihood of the masked tokens over `denominator`; used by the cold start."""
    logprobs_T = _wide(policy_logprobs_T).masked_fill(~mask_T, 0.0)
    stats = {"tokens": mask_T.sum().double(), "nll": -logprobs_T.detach().double().sum()}
    return -logprobs_T.sum() / denominator, stats


@torch.no_grad()
def stats_of(
    batch: Batch, ratio_T: Tensor, truncated_T: Tensor, high_T: Tensor, low_T: Tensor
) -> Stats:
    """Sums over the valid tokens, eq (5)'s two factors apart; at excluded tokens every log is 0.

    Mismatch is pi_old against mu_old, staleness pi_theta against pi_old, whole their product. The
    estimators take d = log new - log old on tokens sampled from mu: k1 = -d, k3 = e^d - d - 1.

    Args:
        ratio_T: the objective's weight before truncation, `is` of the metrics.
        truncated_T: bool; whose weight was truncated.
        high_T, low_T: bool; what the objective's mask drops with A > 0, and with A < 0. The filter
            is counted apart: a token that both would drop is in both counts.
    """
    mask_T = batch.mask_T
    mismatch_T = batch.proximal_T.double() - batch.rollout_T.double()
    staleness_T = batch.policy_sg_T.double() - batch.proximal_T.double()
    weight_T = ratio_T.detach().double().masked_fill(~mask_T, 0.0)
    stats = {
        "tokens": mask_T.sum().double(),
        "mismatch_k1": -mismatch_T.sum(),
        "mismatch_k3": _k3(mismatch_T),
        "mismatch_abs": mismatch_T.abs().sum(),
        "mismatch_abs_max": _max(mismatch_T.abs()),
        "mismatch_f2": (mismatch_T.abs() > math.log(2)).sum().double(),
        "staleness_k1": -staleness_T.sum(),
        "staleness_k3": _k3(staleness_T),
        "staleness_ratio_max": _max(staleness_T.exp().masked_fill(~mask_T, 0.0)),
        "whole_k1": (batch.rollout_T.double() - batch.policy_sg_T.double()).sum(),
        "is": weight_T.sum(),
        "is_squared": weight_T.square().sum(),
        "is_max": _max(weight_T),
        "is_truncated": (truncated_T & mask_T).sum().double(),
        "clip_high": (high_T & mask_T).sum().double(),
        "clip_low": (low_T & mask_T).sum().double(),
    }
    if batch.is_filter is not None:
        stats[f"is/dropped/{batch.is_filter.kind}"] = batch.filtered_T().sum().double()
    return stats


def _k3(d_T: Tensor) -> Tensor:
    # expm1 keeps the digits that e^d - 1 loses near zero, where all of k3 lives
    return (torch.expm1(d_T) - d_T).sum()


def _max(values_T: Tensor) -> Tensor:
    return values_T.max() if values_T.numel() else values_T.new_zeros(())


def _wide(logprobs_T: Tensor) -> Tensor:
    """At least float32; float64 stays, for the tests of the gradient."""
    return logprobs_T if logprobs_T.dtype == torch.float64 else logprobs_T.float()
