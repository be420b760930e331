"""Samples of a real run say what the step's metrics say."""

from __future__ import annotations

from typing import Any

import pytest
from jobs import Jobs, job_spec

from keel.samples import Sample
from keel_gateway.client import GatewayClient
from keel_gateway.stack import Stack

LAYERS = 2


@pytest.mark.parametrize(("replay", "off_policiness"), [("R3", 4), ("none", 1)])
def test_gaps_and_experts_are_those_of_the_metrics(
    jobs: Jobs, stack: Stack, replay: str, off_policiness: int
) -> None:
    """One group of four is a mini-batch: its samples are all that the row is about."""
    spec = job_spec(
        rollout={"group_size": 4},
        recipe={
            "replay": replay,
            "off_policiness": off_policiness,
            "groups_per_minibatch": 1,
            "steps": 8,
        },
        engine={"quantize_router": True},
        evaluation={"every": 0},
    )
    job = jobs.run(spec)["id"]
    rows = {row["step"]: row for row in jobs.rows(job)}
    with GatewayClient(stack.url) as client:
        samples = client.samples(job)
    assert sorted({one.lap for one in samples}) == list(range(8 // off_policiness))
    differing = 0
    for step in sorted({one.step for one in samples}):
        group, row = [one for one in samples if one.step == step], rows[step]
        assert [(one.slot, one.sample) for one in group] == [
            ((step - 1) % off_policiness, sample) for sample in range(4)
        ]
        assert {one.policy_version for one in group} == {row["policy_version"]}
        differing += holds_against_the_row(group, row)
    assert differing > 0


def holds_against_the_row(group: list[Sample], row: dict[str, Any]) -> int:
    """Returns the (token, layer) pairs of the responses whose experts differ."""
    gaps, differ = [], 0
    for one in group:
        assert one.valid
        assert "".join(one.tokens) == one.response
        assert one.proximal_logprobs is not None
        assert one.experts_differ is not None
        pairs = zip(one.proximal_logprobs, one.rollout_logprobs, strict=True)
        gaps += [p - r for p, r in pairs if p is not None and r is not None]
        assert all(0 <= layers <= LAYERS for layers in one.experts_differ)
        differ += sum(one.experts_differ)
    mean = sum(one.reward or 0.0 for one in group) / len(group)
    assert mean == pytest.approx(row["reward/mean"])
    assert [one.advantage for one in group] == [(one.reward or 0.0) - mean for one in group]
    assert len(gaps) == row["tokens/trained"]
    assert -sum(gaps) / len(gaps) == pytest.approx(row["mismatch/k1"], abs=2e-6)
    assert max(map(abs, gaps)) == pytest.approx(row["mismatch/logprob_abs_max"], abs=2e-6)
    # the row counts every fed position: those of prompt tokens but each last one, too
    prompt = row["tokens/prompt"] - len(group)
    everywhere = row["routing/pair_disagree"] * LAYERS * (len(gaps) + prompt)
    assert differ - 1e-6 <= everywhere <= differ + LAYERS * prompt + 1e-6
    return differ
