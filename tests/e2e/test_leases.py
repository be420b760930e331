"""A machine that is gone for good: its run goes on elsewhere. Real processes, killed for real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from enginekit import engine_process
from jobs import Jobs, job_spec, model_bytes

from keel.queue import demos_key, groups_key
from keel_gateway.client import GatewayClient
from keel_gateway.stack import Stack
from keel_gateway.stack_folder import HOST, free_port, write_json

LEASE_S = "5"
"""One question that a busy machine answers too late counts 4 s."""


@contextmanager
def trainer_process(stack: Stack, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A trainer that nobody restarts, on the stack's folder of runs."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "keel_trainer.main", "--listen", f"{HOST}:{port}"),
            *("--redis", stack.redis_url, "--runs", str(stack.jobs), "--threads", "1"),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()


@pytest.fixture
def ports(tmp_path: Path) -> tuple[int, int]:
    """Of a trainer that the test starts, and of the stack's own, which is leased second."""
    first = free_port(set())
    second = free_port({first})
    write_json(tmp_path / "ports.json", {"trainer": second})
    return first, second


def gateway_flags(*trainers: int) -> dict[str, tuple[str, ...]]:
    addresses = ",".join(f"{HOST}:{port}" for port in trainers)
    return {"gateway": ("--trainers", addresses, "--lease-s", LEASE_S)}


@pytest.fixture
def two_trainers(
    tmp_path: Path, ports: tuple[int, int]
) -> Iterator[tuple[Stack, subprocess.Popen[bytes]]]:
    """A stack, and a trainer that is leased before the stack's own; both are up."""
    with (
        Stack(tmp_path, args=gateway_flags(*ports)) as stack,
        trainer_process(stack, ports[0]) as trainer,
    ):
        jobs, deadline = Jobs(stack.url), time.monotonic() + 60
        while 'keel_trainers{state="healthy"} 2' not in (told := jobs.http.get("/metrics").text):
            assert time.monotonic() < deadline, told
            time.sleep(0.1)
        yield stack, trainer


def every_step_once(stack: Stack, jobs: Jobs, job: str, steps: int) -> None:
    with GatewayClient(stack.url) as client:
        ledger = client.ledger(job)
    assert ledger.problems == []
    assert (ledger.steps, ledger.takeovers) == (steps, 1)
    assert ledger.verdict == f"{ledger.trained} groups trained, 0 lost, 0 twice"
    assert [row["step"] for row in jobs.rows(job) if "lap" in row] == list(range(1, steps + 1))
    with redis.Redis.from_url(stack.redis_url) as client:
        assert client.xlen(groups_key(job)) + client.xlen(demos_key(job)) == 0


def test_a_run_goes_on_with_another_trainer_and_changes_no_bit(
    two_trainers: tuple[Stack, subprocess.Popen[bytes]],
    ports: tuple[int, int],
    undisturbed: dict[str, Any],
    taught: dict[str, Any],
) -> None:
    (stack, trainer), jobs = two_trainers, Jobs(two_trainers[0].url)
    job = jobs.submit(job_spec(model=taught))
    assert jobs.wait(job, step=5)["trainer"] == f"{HOST}:{ports[0]}"
    trainer.kill()
    state = jobs.wait(job)
    assert state["phase"] == "SUCCEEDED", state["error"]
    assert state["trainer"] == f"{HOST}:{ports[1]}"
    assert model_bytes(state) == model_bytes(undisturbed)
    every_step_once(stack, jobs, job, 12)


def test_a_training_process_that_does_not_know_that_its_lease_is_over_changes_no_bit(
    two_trainers: tuple[Stack, subprocess.Popen[bytes]],
    ports: tuple[int, int],
    taught: dict[str, Any],
) -> None:
    """Its service is stopped, as if cut off from the gateway: it trains on beside its successor
    until it reads that another has its lease.
    """
    (stack, trainer), jobs = two_trainers, Jobs(two_trainers[0].url)
    spec = job_spec(model=taught, recipe={"steps": 100}, evaluation={"every": 0})
    job = jobs.submit(spec)
    assert jobs.wait(job, step=5)["trainer"] == f"{HOST}:{ports[0]}"
    trainer.send_signal(signal.SIGSTOP)
    state = jobs.wait(job)
    assert state["phase"] == "SUCCEEDED", state["error"]
    assert state["trainer"] == f"{HOST}:{ports[1]}"
    every_step_once(stack, jobs, job, 100)
    assert model_bytes(state) == model_bytes(jobs.run(spec))


def test_a_run_goes_on_with_another_engine_and_changes_no_bit(
    tmp_path: Path, undisturbed: dict[str, Any], taught: dict[str, Any]
) -> None:
    with engine_process() as (mine, process):
        flags = {"gateway": ("--lease-s", LEASE_S)}
        with Stack(tmp_path, engines=(mine, "torch"), args=flags) as stack:
            jobs = Jobs(stack.url)
            theirs = f"{HOST}:{stack.ports['engine-0']}"
            jobs.http.post(f"/v1/engines/{theirs}/drain").raise_for_status()
            job = jobs.submit(job_spec(model=taught))
            assert jobs.wait(job, step=5)["engines"] == [mine]
            process.kill()
            deadline = time.monotonic() + 30
            while f"{theirs} is drained" not in (reason := jobs.get(job)["reason"]):
                assert time.monotonic() < deadline, reason
                time.sleep(0.1)
            assert reason.startswith(f"0 of 1 engines READY: {mine} is LOST")
            jobs.http.post(f"/v1/engines/{theirs}/undrain").raise_for_status()
            state = jobs.wait(job)
            assert state["phase"] == "SUCCEEDED", state["error"]
            assert state["engines"] == [theirs]
            assert model_bytes(state) == model_bytes(undisturbed)
