"""A run on two engines, one of them drained and killed half-way: real processes, real signals."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from jobs import FINAL, Jobs, job_spec, model_bytes

from keel.queue import demos_key, groups_key
from keel_gateway.client import GatewayClient
from keel_gateway.engine_kinds import vllm_python
from keel_gateway.report import build_report
from keel_gateway.run_folder import RunData
from keel_gateway.stack import Stack

GROUPS_A_STEP, LAPS = 16, 8
RECIPE = {"groups_per_minibatch": GROUPS_A_STEP, "steps": 4 * LAPS}
"""Laps of 64 groups of 8: two cohorts, one for each engine."""


def several(taught: dict[str, Any], **engine: Any) -> dict[str, Any]:
    return job_spec(
        name="several", model=taught, recipe=RECIPE, engine=engine, checkpoint={"every": 8}
    )


@pytest.fixture(scope="module")
def two_engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with Stack(tmp_path_factory.mktemp("two"), engines=("torch", "torch")) as stack:
        yield stack


@pytest.fixture(scope="module")
def one_engine_weights(jobs: Jobs, taught: dict[str, Any]) -> bytes:
    """What the job of `several` ends with where one engine serves it."""
    return model_bytes(jobs.run(several(taught)))


def kill(stack: Stack, name: str) -> None:
    pid = stack.pid(name)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def wait_until(jobs: Jobs, job: str, engine: str, state: str, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while (found := state_of(jobs, engine)) != state:
        assert time.monotonic() < deadline, f"{engine} is {found}: {jobs.get(job)}"
        assert jobs.get(job)["phase"] not in FINAL, "the job is too short"
        time.sleep(0.05)


def state_of(jobs: Jobs, engine: str) -> str:
    listed = jobs.http.get("/v1/engines").raise_for_status().json()["engines"]
    return str(next(one["run_state"] for one in listed if one["address"] == engine))


def served(rows: list[dict[str, Any]]) -> Counter[str]:
    """Groups trained on, by engine."""
    prefix = "engine/groups/"
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update({k.removeprefix(prefix): n for k, n in row.items() if k.startswith(prefix)})
    return counts


def every_group_once(stack: Stack, jobs: Jobs, job: str) -> None:
    """Each step has trained on all its groups, and nothing is left of them."""
    rows = jobs.rows(job)
    assert [row["step"] for row in rows] == list(range(4 * LAPS + 1))
    assert [sum(served([row]).values()) for row in rows[1:]] == [GROUPS_A_STEP] * 4 * LAPS
    assert all(row["groups/void"] == 0 for row in rows[1:])
    with redis.Redis.from_url(stack.redis_url) as client:
        assert client.xlen(groups_key(job)) + client.xlen(demos_key(job)) == 0


@pytest.mark.parametrize("killed", ["once it is empty", "while it drains"])
def test_an_engine_drained_and_killed_half_way_changes_no_bit(
    two_engines: Stack, taught: dict[str, Any], one_engine_weights: bytes, killed: str
) -> None:
    stack, jobs = two_engines, Jobs(two_engines.url)
    first, second = (f"127.0.0.1:{stack.ports[f'engine-{number}']}" for number in range(2))
    job = jobs.submit(several(taught, count=2))
    assert jobs.wait(job, step=4 * LAPS // 2)["engines"] == [first, second]
    try:
        reply = jobs.http.post(f"/v1/engines/{second}/drain")
        assert reply.status_code == 200, reply.text
        if killed == "once it is empty":
            wait_until(jobs, job, second, "DRAINED")
        kill(stack, "engine-1")
        wait_until(jobs, job, second, "DRAINED")  # it is started again, and stays out of the run
        waits = jobs.get(job)
        assert waits["engines"] == [first]
        assert waits["reason"].startswith("1 of 2 engines READY: waits for 1 of 2 engines")
        state = jobs.wait(job)
    finally:
        jobs.http.post(f"/v1/engines/{second}/undrain")
    assert state["phase"] == "SUCCEEDED", state["error"]
    assert model_bytes(state) == one_engine_weights
    every_group_once(stack, jobs, job)
    rows = jobs.rows(job)
    counts = served(rows)
    assert set(counts) == {first, second}
    last = max(row["step"] for row in rows if row.get(f"engine/groups/{second}"))
    assert last < 4 * LAPS, "it left before the end"
    report = build_report(RunData(state, rows))
    assert "Who served what" in report
    assert f'<th scope="row">{second}</th><td>torch</td>' in report
    assert "has left" in report


def test_an_engine_given_back_joins_the_run_again(
    two_engines: Stack, taught: dict[str, Any], one_engine_weights: bytes
) -> None:
    """Both are drained one after the other, as for an update of each; the run never ends."""
    stack, jobs = two_engines, Jobs(two_engines.url)
    engines = [f"127.0.0.1:{stack.ports[f'engine-{number}']}" for number in range(2)]
    job = jobs.submit(several(taught, count=2))
    jobs.wait(job, step=4)
    for number, engine in enumerate(engines):
        wait_until(jobs, job, engine, "READY")
        jobs.http.post(f"/v1/engines/{engine}/drain").raise_for_status()
        wait_until(jobs, job, engine, "DRAINED")
        kill(stack, f"engine-{number}")
        jobs.http.post(f"/v1/engines/{engine}/undrain").raise_for_status()
    state = jobs.wait(job)
    assert state["phase"] == "SUCCEEDED", state["error"]
    assert model_bytes(state) == one_engine_weights
    every_group_once(stack, jobs, job)


@pytest.mark.skipif(
    not os.access(vllm_python(), os.X_OK),
    reason=f"engine vllm is not installed ({vllm_python()}): make engine-vllm",
)
def test_torch_and_vllm_in_one_run(tmp_path: Path, taught: dict[str, Any]) -> None:
    with Stack(tmp_path, engines=("torch", "vllm")) as stack:
        jobs = Jobs(stack.url)
        torch, vllm = (f"127.0.0.1:{stack.ports[f'engine-{number}']}" for number in range(2))
        engine = {"kind": ["torch", "vllm"], "dtype": "bfloat16", "quantize": "none"}
        with GatewayClient(stack.url) as client:
            job = jobs.submit(several(taught, **engine))
            wait_until(jobs, job, vllm, "JOINING", timeout_s=400)  # it takes half a minute to start
            client.drain(torch)  # which would have done everything before vllm has loaded the model
            wait_until(jobs, job, vllm, "READY", timeout_s=400)
            client.undrain(torch)
            jobs.wait(job, step=4 * LAPS // 2)
            wait_until(jobs, job, torch, "READY")
            assert [one.kind for one in client.engines()] == ["torch", "vllm"]
            client.drain(vllm)
            wait_until(jobs, job, vllm, "DRAINED")
            kill(stack, "engine-1")
            state = jobs.wait(job)
        assert state["phase"] == "SUCCEEDED", state["error"]
        every_group_once(stack, jobs, job)
        rows = jobs.rows(job)
        assert set(served(rows)) == {torch, vllm}
        report = build_report(RunData(state, rows))
        for address, kind in ((torch, "torch"), (vllm, "vllm")):
            assert f'<th scope="row">{address}</th><td>{kind}</td>' in report
