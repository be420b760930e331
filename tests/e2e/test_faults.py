"""The stack stays up: bad jobs, cancelled jobs, restarted gateways, killed trainers and engines."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
from typing import Any

import pytest
import redis
from disturbed import Fault, training_process
from faults import fault_table
from jobs import Jobs, job_spec, model_bytes

from keel.queue import run_key
from keel.record import RunRecord
from keel_gateway.stack import Stack


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"recipe": {"stepz": 8}}, "recipe.stepz"),
        ({"recipe": {"steps": -4}}, "recipe.steps"),
        ({"recipe": {"steps": 7}}, "recipe.steps"),
        ({"evaluation": {"every": 6}}, "evaluation.every"),
        ({"rollout": {"temperature": 0}}, "rollout.temperature"),
        ({"rollout": {"top_p": 0.9}}, "rollout.top_p"),
        ({"model": {"path": "preset:nothing"}}, "model.path"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_a_bad_spec_is_422_and_names_the_field(
    jobs: Jobs, changes: dict[str, Any], field: str
) -> None:
    reply = jobs.http.post("/v1/jobs", json=job_spec(**changes))
    assert reply.status_code == 422
    assert reply.headers["content-type"] == "application/problem+json"
    assert [error["field"] for error in reply.json()["errors"]] == [field]
    assert all(error["valid"] for error in reply.json()["errors"])


def test_a_folder_that_is_no_model_fails_its_run_only(jobs: Jobs, stack: Stack) -> None:
    state = jobs.wait(jobs.submit(job_spec(model={"path": str(stack.dir / "logs")})))
    assert state["phase"] == "FAILED"
    assert "is not a model folder, it lacks config.json" in state["error"]
    jobs.run(job_spec(recipe={"steps": 4}))


def test_responses_longer_than_the_model_takes_fail_with_the_field(
    jobs: Jobs, taught: dict[str, Any]
) -> None:
    """A preset's limits are known at submission, a folder's only where the folder is."""
    long = {"max_tokens": 4096}
    assert jobs.http.post("/v1/jobs", json=job_spec(rollout=long)).status_code == 422
    state = jobs.wait(jobs.submit(job_spec(model=taught, rollout=long)))
    assert state["phase"] == "FAILED"
    assert "rollout.max_tokens: 4096" in state["error"]


def test_prompts_longer_than_the_model_takes_are_void_and_counted(jobs: Jobs) -> None:
    """508 response tokens leave 4 of 512 positions: every prompt has at least 5."""
    state = jobs.run(
        job_spec(
            cold_start={"steps": 0},
            rollout={"max_tokens": 508},
            recipe={"steps": 4},
            evaluation={"every": 0},
        )
    )
    rows = jobs.rows(state["id"])
    assert [row["groups/void"] for row in rows] == [4] * 4
    assert [row["tokens/trained"] for row in rows] == [0] * 4


def test_cancel_ends_a_run_and_frees_its_engine(jobs: Jobs) -> None:
    job = jobs.submit(job_spec(recipe={"steps": 4000}))
    jobs.wait(job, step=1)
    assert jobs.http.post(f"/v1/jobs/{job}/cancel").is_success
    assert jobs.wait(job, timeout_s=30)["phase"] == "CANCELLED"
    jobs.run(job_spec(recipe={"steps": 4}))


def test_two_jobs_share_one_engine_one_after_the_other(jobs: Jobs) -> None:
    first = jobs.submit(job_spec(name="first", recipe={"steps": 40}))
    second = jobs.submit(job_spec(name="second", recipe={"steps": 4}))
    jobs.wait(first, step=1)
    queued = jobs.get(second)
    assert queued["phase"] == "QUEUED"
    assert queued["reason"]
    assert jobs.wait(second)["phase"] == "SUCCEEDED"
    assert jobs.get(first)["phase"] == "SUCCEEDED"


def kill(stack: Stack, name: str) -> None:
    pid = stack.pid(name)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def test_jobs_survive_the_gateway(
    jobs: Jobs, stack: Stack, undisturbed: dict[str, Any], taught: dict[str, Any]
) -> None:
    job = jobs.submit(job_spec(model=taught))
    jobs.wait(job, step=1)
    kill(stack, "gateway")
    jobs.wait_up()
    state = jobs.wait(job)
    assert state["phase"] == "SUCCEEDED", state["error"]
    assert model_bytes(state) == model_bytes(undisturbed)


@pytest.mark.parametrize("victim", ["training process", "trainer", "collector", "engine-0"])
def test_a_killed_process_changes_no_bit(
    jobs: Jobs, stack: Stack, undisturbed: dict[str, Any], taught: dict[str, Any], victim: str
) -> None:
    job = jobs.submit(job_spec(model=taught))
    jobs.wait(job, step=5)
    if victim == "training process":
        pid = training_process(job)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
    else:
        kill(stack, victim)
    state = jobs.wait(job)
    assert state["phase"] == "SUCCEEDED", state["error"]
    assert model_bytes(state) == model_bytes(undisturbed)
    assert [row["step"] for row in jobs.rows(job)] == list(range(13))


def test_a_hand_of_faults_changes_no_bit() -> None:
    """A part of `make faults`: kills at named moments, and one of each other kind."""
    hand = [
        Fault("grant-start", "gateway"),
        Fault("SIGSTOP", "collector"),
        Fault("apply-probe", "engine-0"),
        Fault("clock", "collector"),
        Fault("checkpoint-ack", "training process"),
        Fault("blob-entry", "collector"),
        Fault("SIGKILL", "redis"),
        Fault("cut", "engine-0"),
        Fault("end-blobs", "training process"),
    ]
    table = fault_table([hand], laps=75, seed=1, say=logging.getLogger("faults").info)
    assert table.inflicted.total() >= 8, "one may find its victim away"
    assert len(table.audits) == 1


def test_a_finished_run_stays_finished(stack: Stack, undisturbed: dict[str, Any]) -> None:
    """Its process was killed after the last write, and is started once more."""
    job = undisturbed["id"]
    with redis.Redis.from_url(stack.redis_url) as client:
        token = RunRecord.from_hash(job, client.hgetall(run_key(job))).fencing_token
    argv = ["--run", job, "--runs", str(stack.jobs), "--fencing-token", str(token)]
    with subprocess.Popen(
        [sys.executable, "-m", "keel_trainer.run", *argv],
        env=os.environ | {"KEEL_REDIS_URL": stack.redis_url},
        stdin=subprocess.PIPE,
    ) as process:
        assert process.wait(60) == 0
    assert Jobs(stack.url).get(job) == undisturbed


def test_lost_checkpoints_end_the_run_with_words(
    jobs: Jobs, stack: Stack, taught: dict[str, Any]
) -> None:
    """What they covered is gone from the queue: it would be waited for without end."""
    job = jobs.submit(job_spec(model=taught, recipe={"steps": 4000}))
    jobs.wait(job, step=9)
    kill(stack, "trainer")
    shutil.rmtree(stack.jobs / job / "checkpoints")
    state = jobs.wait(job)
    assert state["phase"] == "FAILED"
    assert "it cannot go on; submit it anew" in state["error"]
