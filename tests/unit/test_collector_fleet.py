"""Which engine a cohort goes to."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keel_rollout.collector.fleet import COHORTS_IN_FLIGHT, choose


@pytest.mark.parametrize(
    ("ready", "in_flight", "avoid", "chosen"),
    [
        ("ab", {}, "", "a"),
        ("ab", {"a": 1}, "", "b"),
        ("ab", {"a": 1, "b": 1}, "", "a"),
        ("ab", {"a": 2, "b": 2}, "", None),
        ("ab", {}, "a", "b"),
        ("ab", {"b": 2}, "a", None),  # waits for the other rather than try the same again
        ("a", {}, "a", "a"),
        ("", {}, "", None),
    ],
)
def test_choices(ready: str, in_flight: dict[str, int], avoid: str, chosen: str | None) -> None:
    assert choose(tuple(ready), in_flight, avoid) == chosen


@given(
    ready=st.lists(st.sampled_from("abcde"), unique=True),
    events=st.lists(st.one_of(st.just("place"), st.sampled_from("abcde"))),
    avoid=st.sampled_from(["", *"abcde"]),
)
def test_only_ready_engines_and_never_beyond_their_room(
    ready: list[str], events: list[str], avoid: str
) -> None:
    """`events`: a cohort comes, or one ends at an engine."""
    in_flight: Counter[str] = Counter()
    for event in events:
        if event != "place":
            in_flight[event] -= in_flight[event] > 0
            continue
        address = choose(ready, in_flight, avoid)
        others = [a for a in ready if a != avoid]
        if address is None:
            assert all(in_flight[a] >= COHORTS_IN_FLIGHT for a in others or ready)
            continue
        assert address in ready
        assert address != avoid or not others
        assert in_flight[address] == min(in_flight[a] for a in others or ready)
        in_flight[address] += 1
        assert in_flight[address] <= COHORTS_IN_FLIGHT


@given(engines=st.integers(1, 6), cohorts=st.integers(0, 20))
def test_the_load_is_spread_to_within_one_cohort(engines: int, cohorts: int) -> None:
    ready = [f"engine-{number}" for number in range(engines)]
    in_flight = dict.fromkeys(ready, 0)
    for _ in range(cohorts):
        if address := choose(ready, in_flight):
            in_flight[address] += 1
    assert max(in_flight.values()) - min(in_flight.values()) <= 1
    assert sum(in_flight.values()) == min(cohorts, engines * COHORTS_IN_FLIGHT)
