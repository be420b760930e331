"""Redis is restarted without its data, or its last data, amid a run: real processes and files."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import httpx
import redis
from disturbed import training_process
from jobs import Jobs, job_spec
from typer.testing import CliRunner

from keel.queue import groups_key, run_key, slot_of
from keel_gateway.cli import app
from keel_gateway.stack import Stack


def test_a_lost_run_stops_with_words_and_new_jobs_run(tmp_path: Path) -> None:
    with Stack(tmp_path) as stack:
        jobs = Jobs(stack.url)
        lost = jobs.submit(job_spec(recipe={"steps": 4000}))
        jobs.wait(lost, step=5)
        for file in (stack.dir / "redis").iterdir():
            file.unlink()
        pid = stack.pid("redis")
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

        deadline = time.monotonic() + 60
        while (reply := jobs.http.get(f"/v1/jobs/{lost}")).status_code != httpx.codes.NOT_FOUND:
            assert time.monotonic() < deadline, reply.text
            time.sleep(0.1)
        told = reply.json()["detail"]
        assert told.startswith(f"run '{lost}' is lost: Redis was restarted without its data")
        assert "UTC" in told
        assert f"Its checkpoints are still in {stack.jobs / lost}" in told
        assert list((stack.jobs / lost / "checkpoints").iterdir())
        (note,) = jobs.http.get("/readyz").json()["notes"]
        assert lost in note
        shown = CliRunner().invoke(app, ["watch", lost, "--url", stack.url])
        assert shown.exit_code == 2
        assert "is lost" in shown.output

        state = jobs.run(job_spec(recipe={"steps": 8}))  # same engine, same trainer, same collector
        assert state["step"] == 8
        assert training_process(lost) is None, "it trains on for nobody"
        with redis.Redis.from_url(stack.redis_url) as client:
            assert not client.hexists(run_key(lost), "spec")


def test_a_lap_whose_entries_are_lost_is_made_again(tmp_path: Path) -> None:
    """The trainer has not read them yet as Redis comes back as it was before they came."""
    with Stack(tmp_path) as stack, redis.Redis.from_url(stack.redis_url) as client:
        jobs, file = Jobs(stack.url), stack.dir / "redis" / "appendonly.aof"
        spec = job_spec(cold_start={"steps": 0}, recipe={"steps": 40}, evaluation={"every": 0})
        job = jobs.submit(spec)
        jobs.wait(job, step=5)
        trainer, server = training_process(job), stack.pid("redis")
        assert trainer is not None
        assert server is not None
        version = _version(client, job)
        while (lap := _version(client, job)) == version:
            pass
        kept = file.read_bytes()
        os.kill(trainer, signal.SIGSTOP)
        deadline = time.monotonic() + 60
        while (entries := _entries(client, job, lap)) < 16:
            assert time.monotonic() < deadline, f"{entries} entries of lap {lap}"
            time.sleep(0.05)
        file.unlink()
        file.write_bytes(kept)
        os.kill(server, signal.SIGKILL)
        os.kill(trainer, signal.SIGCONT)
        while jobs.http.get(f"/v1/jobs/{job}").status_code != httpx.codes.OK:
            assert time.monotonic() < deadline, "Redis does not come back"
            time.sleep(0.1)
        state = jobs.wait(job, timeout_s=120)
        assert (state["phase"], state["step"]) == ("SUCCEEDED", 40)


def _version(client: redis.Redis, job: str) -> int:
    return int(client.hget(run_key(job), "policy_version") or 0)


def _entries(client: redis.Redis, job: str, lap: int) -> int:
    return sum(slot_of(fields).lap == lap for _, fields in client.xrange(groups_key(job)))
