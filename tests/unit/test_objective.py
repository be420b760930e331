"""The objective's numbers: signs by hand, gradients by autograd and differences, invariances."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from keel_trainer.algo.objective import (
    clip_masks,
    is_weights,
    loss_denominator,
    minirl_loss,
    ratio,
    sft_loss,
)
from keel_trainer.diagnostics import merge, metrics

LOG2 = math.log(2)


def draw(seed: int, tokens: int = 40, spread: float = 0.3, dtype: torch.dtype = torch.float64):
    """policy, proximal, rollout log-probs, advantages, mask: all [T]."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> torch.Tensor:
        return torch.randn(tokens, generator=generator, dtype=torch.float64).to(dtype)

    rollout = -1.5 + 0.5 * normal()
    proximal = rollout + spread * normal()
    policy = proximal + spread * normal()
    mask = torch.rand(tokens, generator=generator) < 0.8
    return policy, proximal, rollout, normal(), mask


# One token, log mu_old = -1, denominator 10. Columns: A, r = pi_theta / pi_old,
# d = pi_old / mu_old, then the coefficient of log pi_theta in J that eq (7) gives by hand:
# M * min(r * d, cap) * A, with eps_low = 0.2, eps_high = 0.27, cap = 5.
SIGN_TABLE = [
    # inside the range: kept, weight r * d
    (+1.0, 1.0, 1.0, 1.0),
    (+1.0, 1.26, 1.0, 1.26),
    (+1.0, 0.5, 1.0, 0.5),  # A > 0 has no lower bound
    (-1.0, 1.0, 1.0, -1.0),
    (-1.0, 0.81, 1.0, -0.81),
    (-1.0, 3.0, 1.0, -3.0),  # A < 0 has no upper bound
    # outside: dropped
    (+1.0, 1.28, 1.0, 0.0),
    (+1.0, 9.0, 1.0, 0.0),
    (-1.0, 0.79, 1.0, 0.0),
    (-1.0, 0.1, 1.0, 0.0),
    # A = 0 gives nothing anywhere
    (0.0, 1.0, 1.0, 0.0),
    (0.0, 9.0, 1.0, 0.0),
    (0.0, 0.1, 1.0, 0.0),
    # the discrepancy enters the weight and never the mask
    (+1.0, 1.0, 3.0, 3.0),
    (+1.0, 1.0, 0.01, 0.01),  # no lower bound of the weight
    (-1.0, 1.0, 0.01, -0.01),
    (+2.0, 1.2, 2.0, 4.8),
    # truncation above at 5
    (+1.0, 1.0, 7.0, 5.0),
    (-1.0, 1.0, 7.0, -5.0),
    (-1.0, 6.0, 1.0, -5.0),
    (+0.5, 0.9, 10.0, 2.5),
    (+1.0, 1.28, 7.0, 0.0),  # clipped stays clipped
]


@pytest.mark.parametrize(("advantage", "staleness", "discrepancy", "coefficient"), SIGN_TABLE)
def test_the_hand_computed_table(advantage, staleness, discrepancy, coefficient):
    rollout = torch.tensor([-1.0], dtype=torch.float64)
    proximal = rollout + math.log(discrepancy)
    policy = (proximal + math.log(staleness)).requires_grad_()
    loss, _ = minirl_loss(
        policy,
        proximal,
        rollout,
        torch.tensor([advantage], dtype=torch.float64),
        torch.tensor([True]),
        denominator=10.0,
    )
    loss.backward()
    assert policy.grad.item() == pytest.approx(-coefficient / 10, abs=1e-12)
    assert loss.item() == pytest.approx(-coefficient * policy.item() / 10, abs=1e-12)


@pytest.mark.parametrize(
    ("switches", "coefficient"),
    [
        # A = +1, r = 1.5, d = 4: clipped, and with the cap at 5 where nothing clips
        ({}, 0.0),
        ({"clip": False}, 5.0),
        ({"clip": False, "is_cap": None}, 6.0),
        ({"clip": False, "is_cap": 2.0}, 2.0),
        ({"clip": False, "importance_sampling": False}, 1.5),
        ({"clip": False, "importance_sampling": False, "is_cap": 1.25}, 1.25),
        ({"eps_high": 0.6}, 5.0),
        ({"eps_high": 0.6, "is_cap": None, "weights_T": torch.tensor([0.25])}, 1.5),
    ],
)
def test_each_switch_by_hand(switches, coefficient):
    rollout = torch.tensor([-3.0], dtype=torch.float64)
    proximal = rollout + math.log(4.0)
    policy = (proximal + math.log(1.5)).requires_grad_()
    one = torch.ones(1, dtype=torch.float64)
    loss, _ = minirl_loss(
        policy, proximal, rollout, one, torch.tensor([True]), denominator=1.0, **switches
    )
    loss.backward()
    assert policy.grad.item() == pytest.approx(-coefficient, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_gradient_equals_autograd_of_the_plain_ratio(seed):
    """Uncapped, sg[w] A grad log pi is the gradient of (pi / mu) A: autograd must agree."""
    policy, proximal, rollout, advantages, mask = draw(seed)
    ours = policy.clone().requires_grad_()
    loss, _ = minirl_loss(ours, proximal, rollout, advantages, mask, denominator=7.0, is_cap=None)
    loss.backward()
    plain = policy.clone().requires_grad_()
    high, low = clip_masks(torch.exp(policy - proximal), advantages, 0.2, 0.27)
    kept = mask & ~high & ~low
    assert 0 < kept.sum() < mask.sum()
    (-(torch.exp(plain - rollout) * advantages)[kept].sum() / 7.0).backward()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_gradient_equals_central_differences(seed):
    """The truncated weight is a constant: differences of sum w A log pi with w frozen."""
    policy, proximal, rollout, advantages, mask = draw(seed, tokens=12, spread=0.9)
    ours = policy.clone().requires_grad_()
    minirl_loss(ours, proximal, rollout, advantages, mask, denominator=3.0, is_cap=1.5)[
        0
    ].backward()
    weight = torch.exp(policy - rollout).clamp(max=1.5)
    assert (weight == 1.5).any()
    r = torch.exp(policy - proximal)
    kept = mask & ~((advantages > 0) & (r > 1.27)) & ~((advantages < 0) & (r < 0.8))

    def objective(logprobs: torch.Tensor) -> float:
        return (-(weight * advantages * logprobs)[kept].sum() / 3.0).item()

    step = 1e-6
    for token in range(12):
        offset = torch.zeros_like(policy)
        offset[token] = step
        slope = (objective(policy + offset) - objective(policy - offset)) / (2 * step)
        assert ours.grad[token].item() == pytest.approx(slope, abs=1e-8)


def test_central_differences_through_a_softmax():
    """End to end: logits of a toy policy, on-policy first order, against numeric slopes."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 5, (6,), generator=generator)
    advantages = torch.randn(6, generator=generator, dtype=torch.float64)
    mask = torch.tensor([True, True, False, True, True, True])

    def logprobs(values: torch.Tensor) -> torch.Tensor:
        return values.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)

    rollout = logprobs(logits) + 0.1
    leaf = logits.clone().requires_grad_()
    minirl_loss(logprobs(leaf), None, rollout, advantages, mask, denominator=2.0, is_cap=None)[
        0
    ].backward()
    for index in [(0, 1), (1, 4), (2, 0), (5, 3)]:
        offset = torch.zeros_like(logits)
        offset[index] = 1e-6
        plus, minus = (
            (-(torch.exp(logprobs(logits + s * offset) - rollout) * advantages)[mask].sum() / 2)
            for s in (1, -1)
        )
        assert leaf.grad[index].item() == pytest.approx(((plus - minus) / 2e-6).item(), abs=1e-7)


def test_no_proximal_means_the_detached_policy():
    policy, _, rollout, advantages, mask = draw(0)
    first, stats = minirl_loss(policy, None, rollout, advantages, mask, denominator=1.0)
    second, _ = minirl_loss(policy, policy, rollout, advantages, mask, denominator=1.0)
    assert torch.equal(first, second)
    row = metrics(stats)
    assert row["staleness/k1"] == row["staleness/k3"] == row["clip/high"] == row["clip/low"] == 0
    assert row["staleness/ratio_max"] == 1


def test_without_importance_sampling_weight_is_one_at_n_1():
    policy, _, rollout, advantages, mask = draw(0)
    leaf = policy.clone().requires_grad_()
    minirl_loss(leaf, None, rollout, advantages, mask, denominator=1.0, importance_sampling=False)[
        0
    ].backward()
    assert torch.equal(leaf.grad, -advantages.masked_fill(~mask, 0.0))


def test_no_gradient_flows_through_weight_or_proximal():
    policy, proximal, rollout, advantages, mask = draw(1)
    proximal.requires_grad_()
    rollout.requires_grad_()
    policy.requires_grad_()
    minirl_loss(policy, proximal, rollout.detach(), advantages, mask, denominator=1.0)[0].backward()
    assert proximal.grad is None


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_what_the_mask_excludes_cannot_leak(garbage):
    policy, proximal, rollout, advantages, mask = draw(2)
    clean = policy.clone().requires_grad_()
    loss, stats = minirl_loss(clean, proximal, rollout, advantages, mask, denominator=1.0)
    loss.backward()
    spoilt = [t.masked_fill(~mask, garbage) for t in (policy, proximal, rollout, advantages)]
    spoilt[0].requires_grad_()
    loss2, stats2 = minirl_loss(
        *spoilt, mask, denominator=1.0, weights_T=torch.ones(40).masked_fill(~mask, garbage)
    )
    loss2.backward()
    assert torch.equal(loss, loss2)
    assert torch.equal(clean.grad, spoilt[0].grad)
    assert all(torch.equal(stats[key], stats2[key]) for key in stats)


def test_an_empty_mask_gives_a_loss_of_zero_and_no_means():
    policy, proximal, rollout, advantages, mask = draw(3)
    loss, stats = minirl_loss(
        policy.requires_grad_(), proximal, rollout, advantages, mask & False, denominator=5.0
    )
    loss.backward()
    assert loss.item() == 0
    assert not policy.grad.any()
    assert set(metrics(stats).values()) == {None, 0.0}


def test_half_precision_is_widened_before_it_is_exponentiated():
    policy, proximal, rollout, advantages, mask = draw(4)
    halves = [t.bfloat16() for t in (policy, proximal, rollout)]
    loss, _ = minirl_loss(*halves, advantages.float(), mask, denominator=1.0)
    wide, _ = minirl_loss(*(t.float() for t in halves), advantages.float(), mask, denominator=1.0)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, wide)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), pieces=st.integers(1, 5), padding=st.integers(0, 7))
def test_permutation_padding_and_split_change_nothing_beyond_rounding(seed, pieces, padding):
    policy, proximal, rollout, advantages, mask = draw(seed, tokens=30)
    whole = policy.clone().requires_grad_()
    loss, stats = minirl_loss(whole, proximal, rollout, advantages, mask, denominator=11.0)
    loss.backward()

    order = torch.randperm(30, generator=torch.Generator().manual_seed(seed))
    leaf = policy.clone().requires_grad_()
    total, parts = torch.zeros((), dtype=torch.float64), []
    for piece in order.tensor_split(pieces):

        def padded(values: torch.Tensor, piece: torch.Tensor = piece) -> torch.Tensor:
            return torch.nn.functional.pad(values[piece], (0, padding))[None]

        part, part_stats = minirl_loss(
            *(padded(t) for t in (leaf, proximal, rollout, advantages, mask)), denominator=11.0
        )
        part.backward()
        total += part.detach()
        parts.append(part_stats)
    torch.testing.assert_close(total, loss.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(leaf.grad, whole.grad, rtol=1e-12, atol=1e-12)
    expected, got = metrics(stats), metrics(merge(parts))
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, rel=1e-9, abs=1e-12), key


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), spread=st.floats(0.0, 2.0))
def test_k1_of_the_whole_is_the_sum_of_its_factors(seed, spread):
    """Eq (5), over the same valid tokens, also where tokens are clipped or truncated."""
    policy, proximal, rollout, advantages, mask = draw(seed, spread=spread, dtype=torch.float32)
    _, stats = minirl_loss(policy, proximal, rollout, advantages, mask, denominator=1.0)
    whole = (rollout.double() - policy.double())[mask].sum()
    assert stats["whole_k1"].item() == pytest.approx(whole.item(), abs=1e-9)
    total = stats["mismatch_k1"] + stats["staleness_k1"]
    assert total.item() == pytest.approx(whole.item(), abs=1e-9)


def test_metrics_by_hand():
    """Two valid tokens. log mu = -1, -1; log pi_old = -1 + ln 3, -1; r = 1.5, 0.5; A = +1, -1.

    d = ln 3, 0: k1 = -ln 3 / 2, k3 = (3 - ln 3 - 1) / 2, F(2) = 1/2. w = 4.5, 0.5: mean 2.5,
    ESS = 2.5^2 / ((20.25 + 0.25) / 2) = 6.25 / 10.25; one above the cap of 4; one clipped each way.
    """
    rollout = torch.tensor([-1.0, -1.0, 0.0], dtype=torch.float64)
    proximal = rollout + torch.tensor([math.log(3), 0.0, 9.0])
    policy = proximal + torch.tensor([math.log(1.5), math.log(0.5), 9.0])
    _, stats = minirl_loss(
        policy,
        proximal,
        rollout,
        torch.tensor([1.0, -1.0, 1.0]),
        torch.tensor([True, True, False]),
        denominator=1.0,
        is_cap=4.0,
    )
    row = metrics(stats)
    expected = {
        "tokens/trained": 2,
        "mismatch/k1": -math.log(3) / 2,
        "mismatch/k3": (2 - math.log(3)) / 2,
        "mismatch/logprob_abs_mean": math.log(3) / 2,
        "mismatch/logprob_abs_max": math.log(3),
        "mismatch/f2": 0.5,
        "staleness/k1": -(math.log(1.5) - LOG2) / 2,
        "staleness/k3": (0.5 - math.log(1.5) - 0.5 + LOG2) / 2,
        "staleness/ratio_max": 1.5,
        "is/mean": 2.5,
        "is/max": 4.5,
        "is/ess": 6.25 / 10.25,
        "is/truncated": 0.5,
        "clip/high": 0.5,
        "clip/low": 0.5,
    }
    for key, value in expected.items():
        assert row[key] == pytest.approx(value, rel=1e-6), key


def test_factors():
    log3 = torch.tensor([math.log(3.0)])
    torch.testing.assert_close(ratio(log3, torch.zeros(1)), torch.tensor([3.0]))
    weights = torch.tensor([0.001, 1.0, 5.0, 6.0])
    assert is_weights(weights, 5.0).tolist() == pytest.approx([0.001, 1.0, 5.0, 5.0])
    assert is_weights(weights, None) is weights


def test_the_denominator_is_a_constant_of_the_recipe():
    assert loss_denominator(groups=4, group_size=8, max_tokens=30) == 960
    assert loss_denominator(groups=4, group_size=8, max_tokens=30, length_norm=True) == 32


def test_length_norm_weighs_every_response_alike():
    """Two responses of 1 and 3 tokens, A = 1, on-policy: with weights 1/|y| each adds 1 / (B G)."""
    mask = torch.tensor([[True, False, False], [True, True, True]])
    weights = torch.tensor([[1.0, 0, 0], [1 / 3, 1 / 3, 1 / 3]])
    policy = torch.full((2, 3), -1.0, requires_grad=True)
    denominator = loss_denominator(groups=1, group_size=2, max_tokens=3, length_norm=True)
    minirl_loss(
        policy, None, policy.detach(), torch.ones(2, 3), mask,
        denominator=denominator, weights_T=weights,
    )[0].backward()  # fmt: skip
    assert policy.grad.sum(1).tolist() == pytest.approx([-0.5, -0.5])


def test_sft_is_the_mean_log_likelihood():
    policy = torch.tensor([-1.0, -2.0, -9.0], requires_grad=True)
    loss, stats = sft_loss(policy, torch.tensor([True, True, False]), denominator=2.0)
    loss.backward()
    assert loss.item() == 1.5
    assert policy.grad.tolist() == [-0.5, -0.5, 0.0]
    assert stats["nll"].item() == 3.0
