"""States of a run's engines: every combination of what the record says has one answer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keel.errors import InvalidField
from keel.fleet import EngineState, engine_state, ready_engines
from keel.record import RunRecord, pack_fields
from keel.spec import RunSpec, parse_spec


def spec(**engine: object) -> RunSpec:
    return parse_spec(
        {
            "name": "r",
            "model": {"path": "preset:tiny-qwen3-moe"},
            "recipe": {"steps": 1},
            "engine": engine,
        }
    )


SPEC = spec()


@pytest.mark.parametrize(
    ("fields", "answers", "state"),
    [
        ({}, True, "JOINING"),
        ({"policy_version": 3, "proved": {"a:1": 3}}, True, "READY"),
        ({"policy_version": 3, "proved": {"a:1": 2}}, True, "JOINING"),
        ({"policy_version": 3, "proved": {"a:1": 4}}, True, "JOINING"),
        ({"policy_version": 3, "proved": {"b:2": 3}}, True, "JOINING"),
        ({"policy_version": 3, "proved": {"a:1": 3}, "draining": ("a:1",)}, True, "DRAINING"),
        ({"policy_version": 3, "proved": {"a:1": 3}, "stale": {"a:1": "x"}}, True, "STALE"),
        ({"stale": {"a:1": "x"}, "draining": ("a:1",)}, True, "STALE"),
        ({"policy_version": 3, "proved": {"a:1": 3}}, False, "LOST"),
    ],
)
def test_states(fields: dict, answers: bool, state: str) -> None:
    record = RunRecord("r", SPEC, 0.0, engines=("a:1", "b:2"), **fields)
    assert engine_state(record, "a:1", answers=answers) is EngineState(state)


@given(
    version=st.none() | st.integers(0, 3),
    proved=st.dictionaries(st.sampled_from("abc"), st.integers(0, 3)),
    stale=st.dictionaries(st.sampled_from("abc"), st.just("why")),
    draining=st.lists(st.sampled_from("abc"), unique=True).map(tuple),
)
def test_only_a_proved_engine_that_stays_is_given_groups(
    version: int | None, proved: dict, stale: dict, draining: tuple
) -> None:
    record = RunRecord(
        "r",
        SPEC,
        0.0,
        engines=("a", "b"),
        policy_version=version,
        proved=proved,
        stale=stale,
        draining=draining,
    )
    for address in ready_engines(record):
        assert address in ("a", "b")
        assert proved[address] == version is not None
        assert address not in stale
        assert address not in draining


def test_the_record_brings_them_back() -> None:
    record = RunRecord(
        "r",
        SPEC,
        0.0,
        engines=("a:1", "b:2"),
        engine_token=9,
        draining=("a:1",),
        drained=("a:1",),
        proved={"a:1": 3},
        stale={"b:2": "median gap 7.2 nats"},
        policy_version=3,
    )
    names = ("draining", "drained", "proved", "stale", "policy_version")
    values = record.to_hash() | pack_fields(**{name: getattr(record, name) for name in names})
    raw = {key.encode(): value.encode() for key, value in values.items()}
    assert RunRecord.from_hash("r", raw) == record


def test_kinds_and_count() -> None:
    assert (SPEC.engine.kinds, SPEC.engine.engines) == (("torch",), 1)
    mixed = spec(kind=["torch", "vllm"])
    assert (mixed.engine.kinds, mixed.engine.engines) == (("torch", "vllm"), 2)
    assert spec(kind="mine", count=4).engine.engines == 4
    assert parse_spec(mixed.model_dump(mode="json")) == mixed


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ({"kind": ["torch", "vllm"], "count": 1}, ("engine.count: 1", "2 or more")),
        ({"kind": ["torch", "torch"]}, ("engine.kind", "each kind once")),
        ({"kind": []}, ("engine.kind",)),
        ({"kind": "No Such"}, ("engine.kind",)),
        ({"count": 0}, ("engine.count: 0",)),
    ],
)
def test_what_is_refused(engine: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(InvalidField) as failure:
        spec(**engine)
    for word in words:
        assert word in str(failure.value)
