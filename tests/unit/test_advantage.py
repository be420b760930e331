"""Group advantages: by hand, and by hypothesis against a plain loop."""

from __future__ import annotations

import math
import statistics

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from keel_trainer.algo.advantage import group_advantages

responses = st.lists(
    st.tuples(
        st.floats(-1e3, 1e3, width=32), st.integers(0, 4), st.booleans()
    ),  # reward, group, valid
    min_size=1,
    max_size=40,
)


def columns(rows):
    rewards, groups, valid = zip(*rows, strict=True)
    return torch.tensor(rewards), torch.tensor(groups), torch.tensor(valid)


@settings(max_examples=200, deadline=None)
@given(responses, st.booleans())
def test_equals_a_plain_loop(rows, std_norm):
    rewards, groups, valid = columns(rows)
    advantages = group_advantages(rewards, groups, valid, std_norm=std_norm)
    for index, (reward, group, is_valid) in enumerate(rows):
        members = [r for r, g, v in rows if g == group and v]
        if not is_valid:
            expected = 0.0
        elif std_norm and len(members) > 1:
            expected = (reward - statistics.fmean(members)) / (statistics.stdev(members) + 1e-6)
        else:
            expected = reward - statistics.fmean(members)
        assert advantages[index].item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


@settings(max_examples=100, deadline=None)
@given(responses)
def test_valid_advantages_of_a_group_sum_to_zero_and_order_does_not_matter(rows):
    rewards, groups, valid = columns(rows)
    rewards = rewards.double()
    advantages = group_advantages(rewards, groups, valid)
    for group in range(5):
        assert abs(advantages[(groups == group) & valid].sum().item()) < 1e-9
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    shuffled = group_advantages(rewards[order], groups[order], valid[order])
    torch.testing.assert_close(shuffled, advantages[order], rtol=1e-12, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.floats(-1e6, 1e6, width=32), st.integers(1, 9), st.booleans())
def test_equal_rewards_give_exactly_zero(reward, size, std_norm):
    rewards = torch.full((size,), reward)
    zeros = group_advantages(rewards, torch.zeros(size, dtype=torch.int64), std_norm=std_norm)
    assert zeros.tolist() == [0.0] * size


def test_by_hand():
    """Group 7: 1, 0, 0, and an invalid 100 -> mean 1/3. Group 2: 1, 1 -> 0."""
    advantages = group_advantages(
        torch.tensor([1.0, 1.0, 0.0, 100.0, 0.0, 1.0]),
        torch.tensor([7, 2, 7, 7, 7, 2]),
        torch.tensor([True, True, True, False, True, True]),
    )
    assert advantages.tolist() == pytest.approx([2 / 3, 0, -1 / 3, 0, -1 / 3, 0])


def test_what_stands_at_invalid_ones_is_never_read():
    valid = torch.tensor([True, True, False])
    advantages = group_advantages(torch.tensor([1.0, 0.0, math.nan]), torch.zeros(3).int(), valid)
    assert advantages.tolist() == [0.5, -0.5, 0.0]


def test_all_invalid_gives_zeros():
    none = torch.zeros(3, dtype=torch.bool)
    assert group_advantages(torch.ones(3), torch.zeros(3).int(), none).tolist() == [0, 0, 0]


def test_integer_rewards_become_float():
    advantages = group_advantages(torch.tensor([1, 0]), torch.tensor([0, 0]))
    assert advantages.dtype == torch.float32
    assert advantages.tolist() == [0.5, -0.5]


@pytest.mark.parametrize(
    ("rewards", "groups", "message"),
    [
        (torch.ones(3), torch.zeros(2).int(), "one length"),
        (torch.ones(2, 2), torch.zeros(2, 2).int(), "vectors"),
        (torch.tensor([1.0, math.inf]), torch.zeros(2).int(), "finite"),
    ],
)
def test_a_callers_fault_is_named(rewards, groups, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, groups)
