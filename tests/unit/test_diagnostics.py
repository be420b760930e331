"""Merging and the row's columns. The numbers themselves are in test_objective and test_replay."""

from __future__ import annotations

import math

import pytest
import torch

from keel_trainer.diagnostics import engine_stats, entropy_stats, merge, metrics


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def test_sums_add_and_maxima_do_not():
    merged = merge(
        [
            {"tokens": scalar(2), "is": scalar(3), "is_max": scalar(2)},
            {"tokens": scalar(1), "is": scalar(6), "is_max": scalar(5), "clip_low": scalar(1)},
        ]
    )
    row = metrics(merged)
    assert row["tokens/trained"] == 3
    assert row["is/mean"] == 3
    assert row["is/max"] == 5
    assert row["clip/low"] == 1 / 3


def test_entropy_counts_valid_tokens_only():
    entropy = torch.tensor([[1.0, 2.0, 100.0]])
    mask = torch.tensor([[True, True, False]])
    assert metrics(entropy_stats(entropy, mask) | {"tokens": scalar(2)})["entropy"] == 1.5


def test_k3_is_told_by_the_engine_that_sampled():
    """Two tokens off by log 2, one exact; a row of an unknown engine counts nowhere."""
    gap = torch.tensor([[0.0, math.log(2)], [0.0, 0.0], [math.log(2), 9.0]])
    mask = torch.tensor([[True, True], [True, True], [True, False]])
    stats = engine_stats(["a:1", "", "b:2"], gap, torch.zeros(3, 2), mask)
    row = metrics(stats)
    k3 = 2 - math.log(2) - 1
    assert {key: value for key, value in row.items() if key.startswith("engine")} == {
        "engine/k3/a:1": pytest.approx(k3 / 2),
        "engine/k3/b:2": pytest.approx(k3),
    }


def test_the_columns_that_issue_2_fixes_are_all_there():
    stats = {key: scalar(1) for key in ("tokens", "is_squared", "is", "routing_pairs",
                                        "routing_tokens", "routing_experts")}  # fmt: skip
    assert metrics(stats).keys() == {
        "mismatch/k1", "mismatch/k3", "mismatch/logprob_abs_mean", "mismatch/logprob_abs_max",
        "mismatch/f2", "staleness/k1", "staleness/k3", "staleness/ratio_max", "is/mean", "is/max",
        "is/ess", "is/truncated", "clip/high", "clip/low", "entropy", "routing/pair_disagree",
        "routing/token_disagree", "routing/overlap", "replay/rows_requested", "replay/rows_obeyed",
        "tokens/trained",
    }  # fmt: skip


def test_an_empty_step_has_counts_of_zero_and_no_means():
    row = metrics({})
    counted = {key for key, value in row.items() if value == 0}
    assert counted == {"tokens/trained", "replay/rows_requested", "replay/rows_obeyed"}
    assert {value for key, value in row.items() if key not in counted} == {None}
