"""Replay: what "auto" means, which routes each pass uses, and how sets compare."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from keel_trainer.algo.replay import RouteSource, compare_routes, replay_plan, resolve_replay
from keel_trainer.diagnostics import merge, metrics, replay_stats, routing_stats

NATURAL, RECORDED, ENGINE = RouteSource.NATURAL, RouteSource.RECORDED, RouteSource.ENGINE


@pytest.mark.parametrize(
    ("replay", "off_policiness", "moe", "mode"),
    [
        ("auto", 1, True, "none"),
        ("auto", 2, True, "R2"),
        ("auto", 3, True, "R2"),
        ("auto", 4, True, "R3"),
        ("auto", 8, True, "R3"),
        ("auto", 8, False, "none"),
        ("none", 8, True, "none"),
        ("none", 8, False, "none"),
        ("R2", 1, True, "none"),
        ("R2", 2, True, "R2"),
        ("R3", 1, True, "R3"),
        ("R3", 8, True, "R3"),
    ],
)
def test_resolution(replay, off_policiness, moe, mode):
    assert resolve_replay(replay, off_policiness=off_policiness, moe=moe) == mode


@pytest.mark.parametrize(
    ("replay", "off_policiness", "scoring", "update"),
    [
        ("none", 1, None, NATURAL),
        ("none", 4, NATURAL, NATURAL),
        ("R2", 1, None, NATURAL),
        ("R2", 4, NATURAL, RECORDED),
        ("R3", 1, None, ENGINE),
        ("R3", 4, ENGINE, ENGINE),
        ("auto", 4, ENGINE, ENGINE),
    ],
)
def test_eq_6_which_pass_uses_which_routes(replay, off_policiness, scoring, update):
    plan = replay_plan(replay, off_policiness=off_policiness, moe=True)
    assert (plan.scoring, plan.update) == (scoring, update)
    assert plan.needs_engine_routes == (update is ENGINE)


@pytest.mark.parametrize(
    ("replay", "off_policiness", "moe"), [("r3", 4, True), ("R3", 4, False), ("auto", 0, True)]
)
def test_impossible_requests_are_refused(replay, off_policiness, moe):
    with pytest.raises(ValueError, match="valid: "):
        resolve_replay(replay, off_policiness=off_policiness, moe=moe)


def test_select_hands_out_what_the_plan_says():
    plan = replay_plan("R2", off_policiness=2, moe=True)
    recorded, engine = torch.zeros(1), torch.ones(1)
    assert plan.select(NATURAL, recorded=recorded, engine=engine) is None
    assert plan.select(RECORDED, recorded=recorded, engine=engine) is recorded
    assert plan.select(ENGINE, recorded=recorded, engine=engine) is engine
    with pytest.raises(AssertionError, match="recorded"):
        plan.select(RECORDED, recorded=None, engine=engine)


def random_routes(seed: int, rows: int = 3, columns: int = 5, layers: int = 2, top_k: int = 3):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(rows, columns, layers, 8, generator=generator)
    return scores.topk(top_k).indices


def test_comparison_by_hand():
    """Two tokens, two layers, K = 2: pairs equal (another order), half, equal, none."""
    a = torch.tensor([[[[0, 1], [2, 3]], [[4, 5], [6, 7]]]])
    b = torch.tensor([[[[1, 0], [2, 9]], [[4, 5], [8, 9]]]])
    stats = routing_stats(a, b, torch.tensor([[True, True]]), layers=(3, 70))
    row = metrics(stats)
    assert row["routing/pair_disagree"] == 0.5
    assert row["routing/token_disagree"] == 1.0
    assert row["routing/overlap"] == (2 + 1 + 2 + 0) / 8
    # by global layer number; the first layer agrees on both tokens, the second on none
    assert row["routing/layer/3"] == 0.0
    assert row["routing/layer/70"] == 1.0
    first_only = metrics(routing_stats(a, b, torch.tensor([[True, False]]), layers=(3, 70)))
    assert first_only["routing/overlap"] == 0.75


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000), split=st.integers(1, 2))
def test_counts_add_up_and_the_order_of_ids_is_irrelevant(seed, split):
    a, b = random_routes(seed), random_routes(seed + 1)
    mask = torch.rand(3, 5, generator=torch.Generator().manual_seed(seed)) < 0.7
    order = torch.randperm(3, generator=torch.Generator().manual_seed(seed))
    whole = routing_stats(a, b, mask, layers=(0, 1))
    shuffled = routing_stats(a[..., order], b, mask, layers=(0, 1))
    parts = merge(
        routing_stats(a[rows], b[rows], mask[rows], layers=(0, 1))
        for rows in (slice(split), slice(split, None))
    )
    row = metrics(whole)
    assert row == metrics(shuffled) == metrics(parts)
    if mask.any():
        layers = (row["routing/layer/0"], row["routing/layer/1"])
        assert sum(layers) / 2 == pytest.approx(row["routing/pair_disagree"], rel=1e-12)
    for token_a, token_b in zip(a[mask].tolist(), b[mask].tolist(), strict=True):
        for k_a, k_b in zip(token_a, token_b, strict=True):
            assert len(set(k_a)) == len(set(k_b)) == 3
    shared = sum(
        len(set(k_a) & set(k_b))
        for token_a, token_b in zip(a[mask].tolist(), b[mask].tolist(), strict=True)
        for k_a, k_b in zip(token_a, token_b, strict=True)
    )
    assert whole["routing_experts_shared"].item() == shared


def test_obedience_counts_only_exact_sets():
    wanted = random_routes(0)
    mask = torch.ones(3, 5, dtype=torch.bool)
    row = metrics(replay_stats(wanted, wanted.flip(-1), mask))
    assert row["replay/rows_requested"] == row["replay/rows_obeyed"] == 3 * 5 * 2
    disjoint = metrics(replay_stats(wanted, wanted + 8, mask))
    assert disjoint["replay/rows_obeyed"] == 0


def test_compact_dtypes_compare_like_int64():
    a, b = random_routes(3), random_routes(4)
    mask = torch.ones(3, 5, dtype=torch.bool)
    for dtype in (torch.uint8, torch.int16):
        compact = vars(compare_routes(a.to(dtype), b, mask))
        for name, counts in vars(compare_routes(a, b, mask)).items():
            assert torch.equal(compact[name], counts), name


def test_nothing_compared_gives_no_routing_columns():
    assert not any(key.startswith("routing/") for key in metrics({}))
    assert metrics({})["replay/rows_requested"] == 0
