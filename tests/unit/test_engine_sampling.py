"""Draws: counter-based, batch-independent, of the right distribution."""

from __future__ import annotations

import numpy as np
import torch

from keel_rollout.engines.torch.sampling import Temperatures, draw, stream_keys, uniforms


def how(temperature: list[float], top_p: float = 1.0, top_k: int = 0) -> Temperatures:
    rows = len(temperature)
    return Temperatures(
        np.array(temperature, np.float32),
        np.full(rows, top_p, np.float32),
        np.full(rows, top_k, np.int64),
        torch.device("cpu"),
    )


def test_uniforms_are_a_function_of_seed_sample_and_position() -> None:
    """In any company; all different over 64 samples x 500 positions; mean 0.5, variance 1/12."""
    keys = stream_keys(2**64 - 1, 64)
    u = np.stack([uniforms(keys, np.full(64, t)) for t in range(500)])
    assert (uniforms(keys[5:6], np.array([77])) == u[77, 5]).all()
    assert len(np.unique(u)) == u.size
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 0.005
    assert abs(u.var() - 1 / 12) < 0.002
    # neighbours are uncorrelated, along samples and along positions: 3 sigma is 0.017
    for a, b in ((u[:, 1:], u[:, :-1]), (u[1:], u[:-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.02
    assert (stream_keys(1, 4) != stream_keys(2, 4)).all()


def test_inverse_cdf_at_the_edges_never_takes_an_impossible_token() -> None:
    """Mass only on tokens 1 and 3: u = 0 gives 1, u just below 1 gives 3."""
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(3, -1)
    u = torch.tensor([0.0, 0.5, 1 - 2**-52], dtype=torch.float64)
    token_B, logprob_B = draw(logits, u, how([1.0, 1.0, 1.0]))
    assert token_B.tolist() == [1, 3, 3]
    torch.testing.assert_close(logprob_B, torch.full((3,), float(np.log(0.5))))


def test_shares_follow_the_tempered_softmax() -> None:
    """20,000 draws at temperature 0.7: every share within 4 standard errors."""
    logits_V = torch.linspace(-2, 2, 8)
    count = 20_000
    u = torch.from_numpy(uniforms(stream_keys(3, count), np.zeros(count, np.int64)))
    token_B, logprob_B = draw(logits_V.expand(count, -1), u, how([0.7] * count))
    p_V = torch.softmax(logits_V.double() / 0.7, -1)
    share_V = torch.bincount(token_B, minlength=8) / count
    assert ((share_V - p_V).abs() < 4 * (p_V * (1 - p_V) / count).sqrt()).all()
    torch.testing.assert_close(logprob_B, p_V.log().float()[token_B], atol=1e-6, rtol=0)


def test_truncation_limits_tokens_and_leaves_logprobs() -> None:
    """p = .5 .25 .125 .125: top_k = 2 keeps two; top_p = .75 two, .76 three, .5 one."""
    logits_V = torch.tensor([0.5, 0.125, 0.25, 0.125]).log()
    u = torch.linspace(0, 1 - 1e-9, 500, dtype=torch.float64)
    logits_BV = logits_V.expand(500, -1)
    for top_p, top_k, kept in (
        (1.0, 2, {0, 2}),
        (0.75, 0, {0, 2}),
        (0.76, 0, {0, 1, 2}),
        (0.5, 0, {0}),
        (0.9, 1, {0}),
    ):
        token_B, logprob_B = draw(logits_BV, u, how([1.0] * 500, top_p, top_k))
        assert set(token_B.tolist()) == kept, (top_p, top_k)
        torch.testing.assert_close(logprob_B, logits_V[token_B])


def test_greedy_rows_stand_beside_sampled_ones() -> None:
    """Temperature 0: the likeliest, its log-prob at temperature 1, whatever u."""
    logits_BV = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    u = torch.zeros(2, dtype=torch.float64)
    token_B, logprob_B = draw(logits_BV, u, how([0.0, 1.0]))
    assert token_B.tolist() == [1, 0]
    torch.testing.assert_close(logprob_B, torch.log_softmax(logits_BV, -1)[[0, 1], [1, 0]])


def test_logits_that_are_not_finite_are_data() -> None:
    """A token of the vocabulary and a log-prob that is not finite: masked later, no crash here."""
    token_B, logprob_B = draw(
        torch.full((1, 4), torch.nan), torch.tensor([0.5], dtype=torch.float64), how([1.0])
    )
    assert 0 <= token_B.item() < 4
    assert not torch.isfinite(logprob_B).any()
