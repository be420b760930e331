"""Every objective in the forms that a recipe can give it, and random micro-batches for them."""

from __future__ import annotations

from functools import partial

import torch

from keel_trainer.algo.filters import IsFilter
from keel_trainer.algo.objective import minirl_loss
from keel_trainer.algo.variants import cispo_loss, dppo_loss, grpo_loss

ROWS, TOKENS = 6, 8

FORMS = {
    "minirl": minirl_loss,
    "grpo": grpo_loss,
    "grpo corrected": partial(grpo_loss, importance_sampling=True, is_cap=1.3),
    "grpo unclipped": partial(grpo_loss, clip=False),
    "icepop": partial(grpo_loss, importance_sampling=True, is_filter=IsFilter("icepop", 0.8, 1.3)),
    "cispo": partial(cispo_loss, eps_low=0.2, eps_high=0.3),
    "cispo against mu": partial(cispo_loss, importance_sampling=True, eps_high=0.3),
    "dppo tv": partial(dppo_loss, divergence_threshold=0.05),
    "dppo kl": partial(dppo_loss, divergence="kl", divergence_threshold=0.01, is_cap=1.4),
    "dppo by sequence": partial(dppo_loss, is_filter=IsFilter("sequence", 0.9, 1.2)),
    "minirl by sequence": partial(minirl_loss, is_filter=IsFilter("sequence", 0.9, 1.2)),
}


def draw(seed: int, spread: float = 0.3):
    """policy, proximal, rollout log-probs, advantages, mask: all [ROWS, TOKENS], float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> torch.Tensor:
        return torch.randn(ROWS, TOKENS, generator=generator, dtype=torch.float64)

    rollout = -1.5 + 0.3 * normal().clamp(-3, 3)
    proximal = rollout + spread * normal()
    policy = proximal + spread * normal()
    mask = torch.rand(ROWS, TOKENS, generator=generator) < 0.8
    mask[0] = False  # an invalid sequence
    return policy, proximal, rollout, normal(), mask


def gradient(loss_fn, policy, *rest, **switches):
    leaf = policy.clone().requires_grad_()
    loss, stats = loss_fn(leaf, *rest, **({"denominator": 1.0} | switches))
    loss.backward()
    return loss.detach(), leaf.grad, stats


def same(first, second) -> None:
    """Equal loss, gradient and statistics, to the last bit."""
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert first[2].keys() == second[2].keys()
    assert all(torch.equal(first[2][key], second[2][key]) for key in first[2])
