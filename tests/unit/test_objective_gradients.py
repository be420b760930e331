"""Every objective: gradients by autograd and differences of plain formulas; invariances."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from objective_forms import FORMS, ROWS, draw, gradient, same

from keel_trainer.diagnostics import merge, metrics


def minus_j(name, policy, proximal, rollout, advantages, mask, held=None) -> torch.Tensor:
    """Minus J / 7 written plainly from probabilities, for autograd or differences to take.

    A stop-gradient weight times log pi is written as the ratio, whose gradient is the same; where
    it is clipped or capped, as a constant times log pi. Masks and clipped weights are those of
    `held`, the policy at which they are looked at.
    """
    pi, old, mu = policy.exp(), proximal.exp(), rollout.exp()
    at = (policy.detach() if held is None else held).exp()
    form, _, by_sequence = name.partition(" by ")
    match form:
        case "minirl":
            dropped = ((advantages > 0) & (at / old > 1.27)) | ((advantages < 0) & (at / old < 0.8))
            terms = torch.where(at / mu > 5, 5 * policy, pi / mu) * advantages * ~dropped
        case "grpo" | "grpo corrected" | "icepop":
            terms = torch.min(pi / old * advantages, (pi / old).clip(0.8, 1.2) * advantages)
            if form == "grpo corrected":
                terms = terms * (old / mu).clip(max=1.3)
            if form == "icepop":
                terms = terms * (old / mu) * ((old / mu >= 0.8) & (old / mu <= 1.3))
        case "grpo unclipped":
            terms = pi / old * advantages
        case "cispo":
            terms = (at / old).clip(0.8, 1.3) * advantages * policy
        case "cispo against mu":
            terms = (at / mu).clip(max=1.3) * advantages * policy
        case "dppo" | "dppo tv":
            moved_out = (at - mu) * advantages.sign()
            terms = pi / mu * advantages * (moved_out <= (0.15 if by_sequence else 0.05))
        case "dppo kl":
            kl = mu * (mu / at).log() + (1 - mu) * ((1 - mu) / (1 - at)).log()
            dropped = ((at - mu) * advantages.sign() > 0) & (kl > 0.01)
            terms = torch.where(at / mu > 1.4, 1.4 * policy, pi / mu) * advantages * ~dropped
    if by_sequence:
        lengths = mask.sum(1, keepdim=True).clip(min=1)
        geometric_mean = (old / mu).where(mask, 1.0).prod(1, keepdim=True) ** (1 / lengths)
        terms = terms * ((geometric_mean >= 0.9) & (geometric_mean <= 1.2))
    return -(terms * mask).sum() / 7.0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", FORMS)
def test_the_gradient_equals_autograd_of_a_plain_formula(name, seed):
    policy, *rest = draw(seed)
    _, ours, _ = gradient(FORMS[name], policy, *rest, denominator=7.0)
    leaf = policy.clone().requires_grad_()
    minus_j(name, leaf, *rest).backward()
    torch.testing.assert_close(ours, leaf.grad, rtol=1e-10, atol=1e-12)
    moved = ours != 0
    assert moved.any()
    if "unclipped" not in name and not name.startswith("cispo"):
        assert (moved != rest[-1]).any(), "nothing was dropped: the case shows nothing"


@pytest.mark.parametrize("name", [n for n in FORMS if n.startswith("grpo") or n == "icepop"])
def test_the_value_of_grpo_is_the_surrogate_and_its_slope_the_gradient(name):
    """Its ratio is differentiated, not held: central differences of the loss itself."""
    policy, *rest = draw(5)
    loss, ours, _ = gradient(FORMS[name], policy, *rest, denominator=7.0)
    assert loss.item() == pytest.approx(minus_j(name, policy, *rest).item(), rel=1e-12)
    slopes = differences(lambda p: FORMS[name](p, *rest, denominator=7.0)[0].item(), policy)
    torch.testing.assert_close(ours, slopes, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", FORMS)
def test_the_gradient_equals_central_differences_of_a_plain_formula(name):
    policy, *rest = draw(6)
    _, ours, _ = gradient(FORMS[name], policy, *rest, denominator=7.0)
    slopes = differences(lambda p: minus_j(name, p, *rest, held=policy).item(), policy)
    torch.testing.assert_close(ours, slopes, rtol=1e-6, atol=1e-8)


def differences(function, at: torch.Tensor, step: float = 1e-6) -> torch.Tensor:
    slopes = torch.zeros_like(at)
    for index in range(at.numel()):
        offset = torch.zeros_like(at)
        offset.view(-1)[index] = step
        slopes.view(-1)[index] = (function(at + offset) - function(at - offset)) / (2 * step)
    return slopes


@pytest.mark.parametrize("name", FORMS)
def test_end_to_end_through_a_softmax(name):
    """Logits of a toy policy, on-policy: every objective starts along sum w A grad log pi."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 5, (3, 4), generator=generator)
    advantages = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    mask = torch.ones(3, 4, dtype=torch.bool)

    def logprobs(values: torch.Tensor) -> torch.Tensor:
        return values.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)

    rollout = logprobs(logits)
    leaf = logits.clone().requires_grad_()
    FORMS[name](logprobs(leaf), None, rollout, advantages, mask, denominator=2.0)[0].backward()
    slopes = differences(lambda v: -(logprobs(v) * advantages).sum().item() / 2, logits)
    torch.testing.assert_close(leaf.grad, slopes, rtol=1e-6, atol=1e-8)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(FORMS)),
    seed=st.integers(0, 10_000),
    pieces=st.integers(1, 4),
    padding=st.integers(0, 5),
)
def test_permutation_padding_and_split_change_nothing_beyond_rounding(name, seed, pieces, padding):
    """Rows in any order, cut into any micro-batches, padded by anything."""
    policy, *rest = draw(seed)
    loss, whole, stats = gradient(FORMS[name], policy, *rest, denominator=11.0)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(seed))
    leaf = policy.clone().requires_grad_()
    total, parts = torch.zeros((), dtype=torch.float64), []
    for piece in order.tensor_split(pieces):

        def padded(values: torch.Tensor, piece: torch.Tensor = piece) -> torch.Tensor:
            fill = False if values.dtype == torch.bool else math.nan
            return torch.nn.functional.pad(values[piece], (0, padding), value=fill)

        part, part_stats = FORMS[name](*(padded(t) for t in (leaf, *rest)), denominator=11.0)
        part.backward()
        total += part.detach()
        parts.append(part_stats)
    torch.testing.assert_close(total, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(leaf.grad, whole, rtol=1e-12, atol=1e-12)
    expected, got = metrics(stats), metrics(merge(parts))
    assert expected.keys() == got.keys()
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, rel=1e-9, abs=1e-12), key


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("name", FORMS)
def test_what_the_mask_excludes_cannot_leak(name, garbage):
    policy, *rest = draw(7)
    mask = rest[-1]
    weights = torch.full_like(policy, 0.25)
    clean = gradient(FORMS[name], policy, *rest, weights_T=weights)
    spoilt = [t.masked_fill(~mask, garbage) for t in (policy, *rest[:-1], weights)]
    same(clean, gradient(FORMS[name], *spoilt[:-1], mask, weights_T=spoilt[-1]))


@pytest.mark.parametrize("name", FORMS)
def test_no_gradient_flows_into_the_other_policies(name):
    policy, proximal, rollout, advantages, mask = draw(8)
    proximal.requires_grad_()
    FORMS[name](policy.requires_grad_(), proximal, rollout, advantages, mask, denominator=1.0)[
        0
    ].backward()
    assert proximal.grad is None


@pytest.mark.parametrize("name", FORMS)
def test_an_empty_mask_gives_a_loss_of_zero_and_no_means(name):
    policy, proximal, rollout, advantages, mask = draw(9)
    loss, grad, stats = gradient(FORMS[name], policy, proximal, rollout, advantages, mask & False)
    assert loss == 0
    assert not grad.any()
    assert set(metrics(stats).values()) == {None, 0.0}
