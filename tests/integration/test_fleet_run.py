"""Whole runs on several real engines that are killed, restarted, drained, joined, and that lie.

Every run of `job` must end with the weights that one undisturbed engine gives, bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fleetkit import EngineProcess, Fleet, weights
from jobs import job_spec

from keel.record import Desired

SLOTS = 16
LAPS = 3


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with Fleet(tmp_path_factory.mktemp("fleet")) as fleet:
        yield fleet


@pytest.fixture
def fleet(whole: Fleet) -> Iterator[Fleet]:
    yield whole
    whole.rest()


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    """Laps of two cohorts of 256 sequences; a fifth of them is rewarded from the start."""
    return job_spec(
        task={"difficulty": 2, "verifier": [{"name": "regex", "pattern": "0"}]},
        cold_start={"steps": 0},
        engine={"quantize": "none", "count": 2},
        rollout={"group_size": 32},
        recipe={"steps": 4 * LAPS},
        evaluation={"every": 4 * LAPS, "samples": 300},
    )


@pytest.fixture(scope="module")
def expected(whole: Fleet, job: dict[str, Any]) -> bytes:
    """The weights after the run on one engine; they are not those that it began with."""
    whole.start(job, whole.engine())
    record = whole.wait()
    whole.rest()
    assert weights(record) != (Path(record.artifact) / "model.safetensors").read_bytes()
    return weights(record)


def check_nothing_lost_or_twice(fleet: Fleet) -> dict[str, int]:
    """Groups by engine, over all steps."""
    steps = fleet.groups()
    assert [sum(step.values()) for step in steps] == [SLOTS // 4] * 4 * LAPS
    assert fleet.left_in_queue() == 0
    total: dict[str, int] = {}
    for step in steps:
        for engine, groups in step.items():
            total[engine] = total.get(engine, 0) + groups
    return total


def mid_lap(fleet: Fleet, lap: int) -> None:
    """Waits until some groups of a lap are there and it is not over, as far as can be told."""
    fleet.until(lambda record: record.policy_version == lap and len(record.proved) > 1)
    time.sleep(0.15)


def resume_when_proved(fleet: Fleet, *engines: EngineProcess) -> None:
    """Lets a paused run go on once these engines hold its version, which is not its last."""
    version = fleet.until(lambda record: record.paused).policy_version
    assert version in (0, 1)
    proved = {engine.address: version for engine in engines}
    fleet.until(lambda record: record.proved == proved)
    fleet.desire(Desired.RUNNING)


def test_two_engines_give_the_weights_of_one(
    fleet: Fleet, job: dict[str, Any], expected: bytes
) -> None:
    engines = fleet.engine(), fleet.engine()
    fleet.start(job, *engines)
    assert weights(fleet.wait()) == expected
    served = check_nothing_lost_or_twice(fleet)
    assert served.keys() == {engine.address for engine in engines}


def test_an_engine_killed_mid_lap_for_good_changes_no_bit(
    fleet: Fleet, job: dict[str, Any], expected: bytes
) -> None:
    first, second = fleet.engine(), fleet.engine()
    fleet.start(job, first, second)
    mid_lap(fleet, 1)
    first.kill()
    assert weights(fleet.wait()) == expected
    served = check_nothing_lost_or_twice(fleet)
    assert served[second.address] > served.get(first.address, 0)


def test_an_engine_restarted_empty_is_brought_back_in_the_background(
    fleet: Fleet, job: dict[str, Any], expected: bytes
) -> None:
    first, second = fleet.engine(), fleet.engine()
    fleet.start(job, first, second)
    mid_lap(fleet, 0)
    second.kill()
    fleet.desire(Desired.PAUSED)  # the run is short, and an engine's start is long
    again = fleet.engine(listen=second.address)
    resume_when_proved(fleet, first, again)
    assert weights(fleet.wait()) == expected
    check_nothing_lost_or_twice(fleet)
    assert again.address in fleet.groups()[-1] | fleet.groups()[-4]


def test_an_engine_that_lies_is_stale_gets_no_groups_and_the_run_ends_on_the_other(
    fleet: Fleet, job: dict[str, Any], expected: bytes
) -> None:
    honest, liar = fleet.engine(), fleet.engine(lies_from=1)
    fleet.start(job, honest, liar)
    stale = fleet.until(lambda record: liar.address in record.stale).stale[liar.address]
    assert "its log-probs are not those of these weights: median gap" in stale
    assert "nats, valid: at most 0.02" in stale
    record = fleet.wait()
    assert weights(record) == expected
    assert liar.address in record.stale
    check_nothing_lost_or_twice(fleet)
    after_the_first_lap = fleet.groups()[4:]
    assert {engine for step in after_the_first_lap for engine in step} == {honest.address}


def test_a_liar_alone_fails_the_run_with_the_numbers(fleet: Fleet, job: dict[str, Any]) -> None:
    """It asks for one engine: one that asks for more, and lacks one, would wait for that."""
    liar = fleet.engine(lies_from=1)
    fleet.start(job | {"engine": {"quantize": "none"}}, liar)
    record = fleet.wait()
    assert record.phase == "FAILED"
    assert f"engine {liar.address} has loaded version 1" in record.error
    assert "nats, valid: at most 0.02" in record.error
    assert record.policy_version == 0


def test_an_engine_is_drained_and_replaced_in_mid_run(
    fleet: Fleet, job: dict[str, Any], expected: bytes
) -> None:
    first, second = fleet.engine(), fleet.engine()
    fleet.start(job, first, second)
    mid_lap(fleet, 0)
    fleet.desire(Desired.PAUSED)
    fleet.lease(first, second, draining=(second.address,))
    fleet.until(lambda record: record.drained == (second.address,))
    fleet.lease(first)
    second.kill()
    third = fleet.engine()
    fleet.lease(first, third)
    resume_when_proved(fleet, first, third)
    assert weights(fleet.wait()) == expected
    assert check_nothing_lost_or_twice(fleet)[third.address] > 0


def test_weights_by_reference_change_no_bit(
    fleet: Fleet, job: dict[str, Any], expected: bytes, tmp_path: Path
) -> None:
    """One engine shares the folder, one does not."""
    engines: tuple[EngineProcess, ...] = (fleet.engine(shared=tmp_path), fleet.engine())
    fleet.start(job, *engines, weights=tmp_path)
    assert weights(fleet.wait()) == expected
    check_nothing_lost_or_twice(fleet)
    assert not list(tmp_path.glob("weights/*/*"))
