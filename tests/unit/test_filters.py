"""icepop and the sequence filter: by hand, in the gradient, in the metrics."""

from __future__ import annotations

import math

import pytest
import torch
from objective_forms import draw, gradient

from keel_trainer.algo.filters import IsFilter
from keel_trainer.algo.variants import cispo_loss, grpo_loss
from keel_trainer.diagnostics import metrics

ICEPOP, SEQUENCE = IsFilter("icepop", 0.5, 5.0), IsFilter("sequence", 0.999, 1.001)


def test_icepop_by_hand():
    """pi_old / mu of 0.49, 0.51, 1, 4.9, 5.1: the outer two go, each token by itself."""
    gap = torch.tensor([[0.49, 0.51, 1.0, 4.9, 5.1]]).log()
    mask = torch.ones_like(gap).bool()
    dropped = ICEPOP.dropped_T(gap - 1, torch.full_like(gap, -1.0), mask)
    assert dropped.tolist() == [[True, False, False, False, True]]
    mask[0, 0] = False  # what the mask excludes is nobody's loss
    assert ICEPOP.dropped_T(gap, gap * 0, mask).tolist() == [[False] * 4 + [True]]


def test_the_sequence_filter_by_hand():
    """Mean log ratios 0, 0.0009, 0.0011, -0.0011 against ln 1.001 = 0.0009995: rows 2 and 3 go.

    Row 0 holds ratios of e^2 and e^-2 that cancel; the last column is padding and never counts.
    """
    gap = torch.tensor(
        [
            [2.0, -2.0, 0.0, 9.0],
            [0.0027, 0.0, 0.0, 9.0],
            [0.0033, 0.0, 0.0, 9.0],
            [-0.0033, 0.0, 0.0, 9.0],
            [9.0, 9.0, 9.0, 9.0],
        ]
    )
    mask = torch.tensor([[True, True, True, False]] * 4 + [[False] * 4])
    dropped = SEQUENCE.dropped_T(gap, torch.zeros_like(gap), mask)
    assert dropped.any(1).tolist() == [False, False, True, True, False]
    assert torch.equal(dropped, mask & dropped.any(1, keepdim=True))


def test_a_filter_drops_from_the_gradient_and_is_counted():
    policy, proximal, rollout, advantages, mask = draw(3, spread=1.0)
    _, ours, stats = gradient(
        cispo_loss, policy, proximal, rollout, advantages, mask, is_filter=ICEPOP
    )
    r = (proximal - rollout).exp()
    kept = mask & (r >= 0.5) & (r <= 5)
    assert torch.equal(ours != 0, kept)
    row = metrics(stats)
    assert row["is/dropped/icepop"] == pytest.approx(
        (mask & ~kept).sum().item() / mask.sum().item()
    )
    assert 0 < row["is/dropped/icepop"] < 1
    assert row["tokens/trained"] == mask.sum()


def test_icepop_is_grpo_with_an_uncapped_correction_inside_the_bounds():
    """Ring-1T: M(pi_old / mu_old) min(r A, clip(r) A), M(k) = k inside [0.5, 5], else 0."""
    for d, expected in ((0.4, 0.0), (0.6, 0.66), (4.0, 4.4), (6.0, 0.0)):
        got = coefficient_of(grpo_loss, r=1.1, d=d, importance_sampling=True, is_filter=ICEPOP)
        assert got == pytest.approx(expected, abs=1e-12)


def coefficient_of(loss_fn, *, r: float, d: float, **switches) -> float:
    rollout = torch.tensor([-3.0], dtype=torch.float64)
    proximal = rollout + math.log(d)
    one = torch.ones(1, dtype=torch.float64)
    policy = proximal + math.log(r)
    return -gradient(loss_fn, policy, proximal, rollout, one, one.bool(), **switches)[1].item()
