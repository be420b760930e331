"""A paused run stands still and, resumed, ends with the bits of one that was never paused."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from disturbed import training_process
from jobs import Jobs, job_spec, model_bytes

from keel_gateway.client import GatewayClient
from keel_gateway.stack import Stack


def wait_paused(jobs: Jobs, job: str) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while not (state := jobs.get(job))["paused"]:
        assert state["phase"] == "TRAINING", state
        assert time.monotonic() < deadline, state
        time.sleep(0.1)
    return state


def test_pause_in_the_middle_changes_no_bit(
    jobs: Jobs, stack: Stack, undisturbed: dict[str, Any], taught: dict[str, Any]
) -> None:
    job = jobs.submit(job_spec(model=taught))
    jobs.wait(job, step=1)
    with GatewayClient(stack.url) as client:
        assert client.pause(job).desired == "PAUSED"
        state = wait_paused(jobs, job)
        assert state["step"] in (4, 8), "whole laps"
        assert state["reason"].startswith("paused: keeps trainer")
        time.sleep(1.5)
        assert jobs.get(job)["step"] == state["step"]
        # killed while it is paused, it comes back paused
        pid = training_process(job)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while training_process(job) in (None, pid):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(1.0)
        again = wait_paused(jobs, job)
        assert again["step"] == state["step"]
        listed = client.checkpoints(job)
        assert [one.step for one in listed] == list(range(0, state["step"] + 1, 4))[-2:]
        assert listed[-1].policy_version == state["policy_version"]
        for one in listed:
            files = list(Path(one.folder).iterdir())
            assert one.size_bytes == sum(file.stat().st_size for file in files)
        assert client.resume(job).desired == "RUNNING"
        state = jobs.wait(job)
        assert state["phase"] == "SUCCEEDED", state["error"]
        assert not state["paused"]
        assert model_bytes(state) == model_bytes(undisturbed)
        assert [one.step for one in client.checkpoints(job)] == [8, 12]


def test_a_paused_job_can_be_cancelled(jobs: Jobs) -> None:
    job = jobs.submit(job_spec(recipe={"steps": 4000}))
    jobs.wait(job, step=1)
    assert jobs.http.post(f"/v1/jobs/{job}/pause").is_success
    wait_paused(jobs, job)
    assert jobs.http.post(f"/v1/jobs/{job}/cancel").is_success
    state = jobs.wait(job, timeout_s=30)
    assert (state["phase"], state["paused"]) == ("CANCELLED", False)
