"""Group-relative advantages: A = R - mean of the group's valid responses."""

from __future__ import annotations

import torch
from torch import Tensor

STD_EPS = 1e-6
"""Added to the standard deviation under std_norm (GRPO's switch, off in MiniRL)."""


def group_advantages(
    rewards_N: Tensor, groups_N: Tensor, valid_N: Tensor | None = None, *, std_norm: bool = False
) -> Tensor:
    """Reward minus the mean over the valid of its group; invalid sequences get 0.

    A group whose valid rewards are all equal gets exactly 0, whatever their value.

    Args:
        rewards_N: total reward of each response; what stands at invalid ones is never read.
        groups_N: integer group of each response, in any order.
        valid_N: bool; None means all.
        std_norm: also divide by the group's sample standard deviation (n - 1) plus 1e-6.

    Returns:
        Advantages [N] in the dtype of the rewards (float32 for integers), computed in float64.

    Raises:
        ValueError: shapes differ, or a valid reward is not finite.
    """
    rewards_N = torch.as_tensor(rewards_N)
    groups_N = torch.as_tensor(groups_N, device=rewards_N.device)
    valid_N = (
        torch.ones_like(rewards_N, dtype=torch.bool)
        if valid_N is None
        else torch.as_tensor(valid_N, device=rewards_N.device).bool()
    )
    if not rewards_N.shape == groups_N.shape == valid_N.shape or rewards_N.dim() != 1:
        raise ValueError(
            f"rewards_N {tuple(rewards_N.shape)}, groups_N {tuple(groups_N.shape)} and "
            f"valid_N {tuple(valid_N.shape)} must be vectors of one length"
        )
    if not torch.isfinite(rewards_N[valid_N].double()).all():
        raise ValueError("rewards_N must be finite where valid_N")

    advantages_N = torch.zeros_like(rewards_N, dtype=torch.float64)
    for group in groups_N[valid_N].unique():
        members_N = valid_N & (groups_N == group)
        rewards = rewards_N[members_N].double()
        # measured from one of them, equal rewards give exactly 0: x * n / n need not be x
        rewards = rewards - rewards.min()
        advantages = rewards - rewards.mean()
        if std_norm and len(rewards) > 1:
            advantages = advantages / (rewards.std() + STD_EPS)
        advantages_N[members_N] = advantages
    return advantages_N.to(rewards_N.dtype if rewards_N.is_floating_point() else torch.float32)
