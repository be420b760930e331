"""Redis is restarted without its data in the middle of a run: real processes, real files."""

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

from keel.queue import run_key
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
