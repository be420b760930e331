"""GRPO, CISPO and DPPO: sign tables by hand, published special cases, divergences, metrics."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from objective_forms import draw, gradient, same

from keel_trainer.algo.filters import IsFilter
from keel_trainer.algo.objective import loss_denominator, minirl_loss
from keel_trainer.algo.variants import (
    binary_kl,
    binary_tv,
    cispo_loss,
    divergence_masks,
    dppo_loss,
    grpo_loss,
)
from keel_trainer.diagnostics import metrics

INFINITE = math.inf

# Sign tables: one token, and the coefficient of grad log pi_theta in J by hand.

# A, r = pi_theta / pi_old, d = pi_old / mu_old, coefficient with eps 0.2 / 0.2
GRPO_TABLE = [
    (+1.0, 1.00, 1.0, 1.0),
    (+1.0, 1.19, 1.0, 1.19),
    (+1.0, 1.21, 1.0, 0.0),  # min takes the constant 1.2 A
    (+1.0, 9.00, 1.0, 0.0),
    (+1.0, 0.50, 1.0, 0.5),  # min takes r A: no lower bound
    (-1.0, 1.00, 1.0, -1.0),
    (-1.0, 0.81, 1.0, -0.81),
    (-1.0, 0.79, 1.0, 0.0),
    (-1.0, 3.00, 1.0, -3.0),  # no upper bound either
    (0.0, 1.0, 1.0, 0.0),
    (0.0, 9.0, 1.0, 0.0),
    (+1.0, 1.10, 7.0, 1.1),  # the engine plays no part
    (-2.0, 1.10, 0.1, -2.2),
]


@pytest.mark.parametrize(("advantage", "r", "d", "coefficient"), GRPO_TABLE)
def test_grpo_by_hand(advantage, r, d, coefficient):
    got = one_token(grpo_loss, advantage, r, d)
    assert got == pytest.approx(coefficient, abs=1e-12)


@pytest.mark.parametrize(
    ("switches", "r", "d", "coefficient"),
    [
        ({"importance_sampling": True}, 1.1, 4.0, 4.4),
        ({"importance_sampling": True, "is_cap": 2.0}, 1.1, 4.0, 2.2),  # caps d alone
        ({"importance_sampling": True, "is_cap": 2.0}, 1.3, 4.0, 0.0),  # clipped stays clipped
        ({"clip": False}, 1.3, 4.0, 1.3),
        ({"eps_high": 0.5}, 1.3, 4.0, 1.3),
    ],
)
def test_the_switches_of_grpo_by_hand(switches, r, d, coefficient):
    assert one_token(grpo_loss, 1.0, r, d, **switches) == pytest.approx(coefficient, abs=1e-12)


# A, r, d, coefficient with the weight clipped to [0.9, 1.3]: no token is ever dropped
CISPO_TABLE = [
    (+1.0, 1.0, 1.0, 1.0),
    (+1.0, 1.2, 9.0, 1.2),
    (+1.0, 5.0, 1.0, 1.3),
    (-1.0, 5.0, 1.0, -1.3),
    (+1.0, 0.1, 1.0, 0.9),
    (-1.0, 0.1, 1.0, -0.9),
    (-2.0, 0.95, 1.0, -1.9),
    (0.0, 5.0, 1.0, 0.0),
]


@pytest.mark.parametrize(("advantage", "r", "d", "coefficient"), CISPO_TABLE)
def test_cispo_by_hand(advantage, r, d, coefficient):
    got = one_token(cispo_loss, advantage, r, d, eps_low=0.1, eps_high=0.3)
    assert got == pytest.approx(coefficient, abs=1e-12)


@pytest.mark.parametrize(
    ("switches", "r", "d", "coefficient"),
    [
        ({}, 0.01, 1.0, 0.01),  # by default no lower bound
        ({}, 9.0, 1.0, 5.0),  # and 1 + 4 above
        ({"importance_sampling": True}, 1.5, 2.0, 3.0),
        ({"importance_sampling": True}, 1.5, 9.0, 5.0),
        ({"clip": False}, 9.0, 1.0, 9.0),
    ],
)
def test_the_switches_of_cispo_by_hand(switches, r, d, coefficient):
    assert one_token(cispo_loss, 1.0, r, d, **switches) == pytest.approx(coefficient, abs=1e-12)


# A, mu_old, pi_theta, kept. tv: |pi - mu| > 0.15. kl: mu ln(mu/pi) + (1-mu) ln((1-mu)/(1-pi)) > .05
DPPO_TABLE = [
    # a rare token may grow a hundredfold: 0.0099 of mass moved, 0.0095 nats
    (+1.0, 0.0001, 0.01, {"tv": True, "kl": True}),
    # a sure one may not lose a fifth: 0.19 moved, 0.181 nats
    (-1.0, 0.99, 0.80, {"tv": False, "kl": False}),
    # the same places on the way back are kept, however far: A and r - 1 of opposite sign
    (+1.0, 0.99, 0.80, {"tv": True, "kl": True}),
    (-1.0, 0.10, 0.90, {"tv": True, "kl": True}),
    # further away, beyond the threshold: dropped
    (+1.0, 0.10, 0.90, {"tv": False, "kl": False}),
    (-1.0, 0.90, 0.10, {"tv": False, "kl": False}),
    # inside: kept on either side (tv 0.1; kl 0.0204)
    (+1.0, 0.50, 0.60, {"tv": True, "kl": True}),
    (-1.0, 0.50, 0.40, {"tv": True, "kl": True}),
    # the two differ: 0.02 -> 0.16 moves 0.14 and is .02 ln .125 + .98 ln(.98/.84) = 0.1095 nats
    (+1.0, 0.02, 0.16, {"tv": True, "kl": False}),
    # 0.50 -> 0.656 moves 0.156 and is .5 ln(.5/.656) + .5 ln(.5/.344) = 0.0512; to 0.649: 0.0465
    (+1.0, 0.50, 0.656, {"tv": False, "kl": False}),
    (+1.0, 0.50, 0.649, {"tv": True, "kl": True}),
    # A = 0 and pi = mu: nothing to drop
    (0.0, 0.10, 0.90, {"tv": True, "kl": True}),
    (+1.0, 0.30, 0.30, {"tv": True, "kl": True}),
]


@pytest.mark.parametrize("divergence", ["tv", "kl"])
@pytest.mark.parametrize(("advantage", "mu", "pi", "kept"), DPPO_TABLE)
def test_dppo_by_hand(advantage, mu, pi, kept, divergence):
    threshold = {"tv": 0.15, "kl": 0.05}[divergence]
    for d in (0.2, 1.0, 3.0):  # where pi_old stands is of no account
        got = one_token(
            dppo_loss, advantage, pi / mu / d, d, mu=mu,
            divergence=divergence, divergence_threshold=threshold,
        )  # fmt: skip
        assert got == pytest.approx(kept[divergence] * advantage * pi / mu, rel=1e-9)


@pytest.mark.parametrize(
    ("switches", "coefficient"),
    [
        # mu = 0.02, pi = 0.1 (0.08 moved), pi_old = 0.04
        ({}, 5.0),
        ({"is_cap": 2.0}, 2.0),
        ({"importance_sampling": False}, 2.5),
        ({"divergence_threshold": 0.07}, 0.0),
        ({"divergence_threshold": 0.07, "importance_sampling": False}, 0.0),  # the mask stays
        ({"divergence_threshold": 0.07, "clip": False}, 5.0),
    ],
)
def test_the_switches_of_dppo_by_hand(switches, coefficient):
    got = one_token(dppo_loss, 1.0, 2.5, 2.0, mu=0.02, **switches)
    assert got == pytest.approx(coefficient, abs=1e-12)


def one_token(loss_fn, advantage: float, r: float, d: float, mu: float = 0.1, **switches) -> float:
    """The coefficient of grad log pi_theta in J, for log-probs a factor d and r apart."""
    rollout = torch.tensor([math.log(mu)], dtype=torch.float64)
    proximal = rollout + math.log(d)
    policy = proximal + math.log(r)
    advantages = torch.tensor([advantage], dtype=torch.float64)
    _, grad, stats = gradient(
        loss_fn, policy, proximal, rollout, advantages, torch.tensor([True]), **switches
    )
    row = metrics(stats)
    dropped = advantage != 0 and grad.item() == 0
    assert row["clip/high"] == (dropped and advantage > 0)
    assert row["clip/low"] == (dropped and advantage < 0)
    return -grad.item()


@pytest.mark.parametrize("seed", range(3))
def test_grpo_at_n_1_without_norms_is_the_policy_gradient(seed):
    policy, _, rollout, advantages, mask = draw(seed)
    _, ours, stats = gradient(grpo_loss, policy, None, rollout, advantages, mask)
    assert torch.equal(ours, -advantages.masked_fill(~mask, 0.0))
    row = metrics(stats)
    assert (row["is/mean"], row["is/ess"], row["clip/high"], row["clip/low"]) == (1, 1, 0, 0)


@pytest.mark.parametrize("seed", range(3))
def test_grpo_has_the_gradient_of_minirl_without_is_and_cap(seed):
    """The min of two terms and the mask M_t say the same; only the value of the loss differs."""
    policy, *rest = draw(seed, spread=0.5)
    loss, ours, _ = gradient(grpo_loss, policy, *rest, eps_high=0.27)
    other, theirs, _ = gradient(minirl_loss, policy, *rest, importance_sampling=False, is_cap=None)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    assert loss != other


@pytest.mark.parametrize("divergence", ["tv", "kl"])
@pytest.mark.parametrize("seed", range(3))
def test_dppo_with_an_infinite_threshold_is_unmasked(seed, divergence):
    policy, *rest = draw(seed, spread=1.0)
    infinite = gradient(
        dppo_loss, policy, *rest, divergence=divergence, divergence_threshold=INFINITE
    )
    unmasked = gradient(dppo_loss, policy, *rest, divergence=divergence, clip=False)
    minirl = gradient(minirl_loss, policy, *rest, clip=False, is_cap=None)
    same(infinite, unmasked)
    same(infinite, minirl)


def test_dppo_with_threshold_0_keeps_only_what_leads_back():
    policy, proximal, rollout, advantages, mask = draw(0)
    _, ours, _ = gradient(
        dppo_loss, policy, proximal, rollout, advantages, mask, divergence_threshold=0.0
    )
    back = ((policy - rollout) * advantages < 0) & mask
    assert torch.equal(ours != 0, back)


@pytest.mark.parametrize("importance_sampling", [False, True])
def test_cispo_with_infinite_bounds_is_minirl_without_clip(importance_sampling):
    policy, *rest = draw(1, spread=1.0)
    ours = gradient(
        cispo_loss, policy, *rest, eps_low=1.0, eps_high=INFINITE,
        importance_sampling=importance_sampling,
    )  # fmt: skip
    theirs = gradient(
        minirl_loss, policy, *rest, clip=False, is_cap=None,
        importance_sampling=importance_sampling,
    )  # fmt: skip
    same(ours, theirs)
    same(ours, gradient(cispo_loss, policy, *rest, clip=False,
                        importance_sampling=importance_sampling))  # fmt: skip


@pytest.mark.parametrize("kind", ["icepop", "sequence"])
@pytest.mark.parametrize("loss_fn", [minirl_loss, grpo_loss, cispo_loss, dppo_loss])
def test_a_filter_with_infinite_bounds_is_none(loss_fn, kind):
    policy, *rest = draw(2, spread=1.0)
    filtered = gradient(loss_fn, policy, *rest, is_filter=IsFilter(kind, 0.0, INFINITE))
    assert filtered[2].pop(f"is/dropped/{kind}") == 0
    same(filtered, gradient(loss_fn, policy, *rest))


def test_length_and_std_norm_give_grpo_its_1_over_g_and_1_over_length():
    """Two responses of 1 and 3 tokens, A = 1, on-policy: each adds 1 / G, whatever its length."""
    mask = torch.tensor([[True, False, False], [True, True, True]])
    weights = torch.tensor([[1.0, 0, 0], [1 / 3, 1 / 3, 1 / 3]])
    policy = torch.full((2, 3), -1.0)
    denominator = loss_denominator(groups=1, group_size=2, max_tokens=3, length_norm=True)
    _, grad, _ = gradient(
        grpo_loss, policy, None, policy, torch.ones(2, 3), mask,
        denominator=denominator, weights_T=weights,
    )  # fmt: skip
    assert grad.sum(1).tolist() == pytest.approx([-0.5, -0.5])


@settings(max_examples=100, deadline=None)
@given(mu=st.floats(1e-9, 1.0), pi=st.floats(1e-9, 1.0))
def test_binary_divergences_are_those_of_two_coins(mu, pi):
    logs = [torch.tensor([math.log(p)], dtype=torch.float64) for p in (pi, mu)]
    tv, kl = binary_tv(*logs).item(), binary_kl(*logs).item()
    assert tv == pytest.approx(abs(pi - mu), abs=1e-12)
    if 1e-6 < pi < 1 - 1e-6 and mu < 1:
        coins = [torch.distributions.Bernoulli(torch.tensor(p, dtype=torch.float64))
                 for p in (mu, pi)]  # fmt: skip
        expected = torch.distributions.kl_divergence(*coins).item()
        assert kl == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert kl >= -1e-12
    assert kl >= 2 * tv**2 - 1e-9  # Pinsker


@pytest.mark.parametrize(
    ("policy", "rollout", "kl"),
    [
        (0.0, 0.0, 0.0),  # both sure
        (0.0, math.log(0.5), math.inf),  # sure of what mu doubted: no finite distance
        (math.log(0.5), 0.0, math.log(2)),
        (1e-7, 1e-7, 0.0),  # a log-prob that rounding left above 0
        (-1e-9, -1e-9, 0.0),
        (-60.0, -60.0, 0.0),
    ],
)
def test_binary_kl_at_the_ends(policy, rollout, kl):
    logs = [torch.tensor([value], dtype=torch.float64) for value in (policy, rollout)]
    got = binary_kl(*logs).item()
    assert got == pytest.approx(kl, abs=1e-12)


def test_a_sure_token_is_dropped_only_on_the_way_out():
    whole = torch.tensor([2.0, 2.0])
    far = binary_kl(torch.zeros(2), torch.full((2,), math.log(0.5)))
    high, low = divergence_masks(whole, torch.tensor([1.0, -1.0]), far, 0.05)
    assert high.tolist() == [True, False]
    assert not low.any()


def test_the_metrics_tell_each_objective_s_own_weight_and_mask():
    """Three tokens, mu = .1, pi_old = .2, .1, .1, pi_theta = .3, .7, .05; A = 1, 1, -1.

    r = 1.5, 7, .5; pi_theta / mu = 3, 7, .5; moved: .2, .6, -.05.
    """
    rollout = torch.full((1, 3), 0.1, dtype=torch.float64).log()
    proximal = torch.tensor([[0.2, 0.1, 0.1]], dtype=torch.float64).log()
    policy = torch.tensor([[0.3, 0.7, 0.05]], dtype=torch.float64).log()
    advantages = torch.tensor([[1.0, 1.0, -1.0]], dtype=torch.float64)
    mask = torch.ones(1, 3).bool()

    def row(loss_fn, **switches):
        found = metrics(
            gradient(loss_fn, policy, proximal, rollout, advantages, mask, **switches)[2]
        )
        return tuple(
            found[key] for key in ("is/mean", "is/max", "is/truncated", "clip/high", "clip/low")
        )

    third = 1 / 3
    expected = [
        (row(minirl_loss), (10.5 / 3, 7.0, third, 2 * third, third)),
        (row(grpo_loss), (9 / 3, 7.0, 0.0, 2 * third, third)),
        (
            row(grpo_loss, importance_sampling=True, is_cap=1.5),
            (10.5 / 3, 7.0, third, 2 * third, third),
        ),
        (row(cispo_loss), (9 / 3, 7.0, third, 0.0, 0.0)),
        (row(dppo_loss), (10.5 / 3, 7.0, 0.0, 2 * third, 0.0)),
        (row(dppo_loss, divergence_threshold=0.3), (10.5 / 3, 7.0, 0.0, third, 0.0)),
    ]
    for got, want in expected:
        assert got == pytest.approx(want)
