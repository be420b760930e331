"""Each planted lie is found: by the rows that should find it, and by no other."""

from __future__ import annotations

from pathlib import Path

import pytest
from kitruns import failed, told, tried
from liars import LIES

from keel_rollout.conformance.catalogue import names
from keel_rollout.conformance.reference import Model
from keel_rollout.conformance.verdicts import Status

AGAIN = ("aborted", "pause-abort", "pause-wait", "pause-keep")
"""Stages whose suite tells of most lies nothing that those of first, update and midway do not."""
SUITE = ("logprobs", "logprobs-0.7", "logprobs-greedy", "probe", "routes-shape", "routes-used")


@pytest.fixture(scope="module")
def model() -> Model:
    """Versions A and B of the preset, and the reference for both."""
    return Model("preset:tiny-qwen3-moe", "float32")


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_found_by_the_right_rows(
    name: str, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails is what the lie says, row by row; what is told names a number or a field."""
    lie = LIES[name]
    lie.patch(monkeypatch)
    rows = [row for row, _ in names()]
    if not lie.everywhere:
        rows = [r for r in rows if r not in {f"{stage}/{row}" for stage in AGAIN for row in SUITE}]
    outcomes = tried(lie.engine, model, shared=tmp_path, only=rows)
    found = failed(outcomes) - lie.may_spoil
    assert found == {row for row in lie.found_by if row in rows}, told(outcomes)
    assert all(o.seen and o.valid for o in outcomes.values() if o.status is Status.FAIL)


def test_unpacked_experts_are_found_in_bfloat16(tmp_path: Path) -> None:
    """Where rounding hides most: the engine's gap after an update is far over its limit."""
    rows = ["first/*", "update/*"]
    model = Model("preset:tiny-qwen3-moe", "bfloat16")
    outcomes = tried(LIES["UnpackedExperts"].engine, model, shared=tmp_path, only=rows)
    found = failed(outcomes)
    assert found == {f"update/{row}" for row in SUITE if row != "routes-shape"}, told(outcomes)
    number = outcomes["update/logprobs"].numbers[0]
    assert number.value > 10 * number.limit
