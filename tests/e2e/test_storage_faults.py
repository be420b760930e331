"""Disks that fill up, checkpoints that tear, entries that nobody can read, in real runs.

Each run ends with the weights of the undisturbed one, bit for bit, unless something is said to be
given up; and its ledger adds up.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis
from disturbed import training_process
from jobs import Jobs, job_spec, model_bytes
from typer.testing import CliRunner

from keel.dead_letters import parse_dead_letters
from keel.ledger import FILE, Audit, audit, read
from keel.queue import dead_letters_key, groups_key
from keel_gateway.cli import app
from keel_gateway.stack import Stack


def ledger(stack: Stack, job: str) -> Audit:
    """What the job's ledger adds up to; nothing lost, twice or changed."""
    result = audit(read(stack.jobs / job / FILE))
    assert result.problems == []
    return result


def until(true: Callable[[], Any], what: str, timeout_s: float = 60.0) -> Any:
    """Waits for something to be true, and returns it."""
    deadline = time.monotonic() + timeout_s
    while not (found := true()):
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.02)
    return found


def checkpoints(stack: Stack, job: str) -> list[Path]:
    return sorted((stack.jobs / job / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("damage", ["torn", "other bytes", "no progress.json"])
def test_a_broken_checkpoint_costs_time_only(
    jobs: Jobs, stack: Stack, undisturbed: dict[str, Any], taught: dict[str, Any], damage: str
) -> None:
    job = jobs.submit(job_spec(model=taught))
    until(lambda: len(checkpoints(stack, job)) == 2, "two checkpoints")
    pid = until(lambda: training_process(job), "the training process")
    os.kill(pid, signal.SIGSTOP)
    newest = checkpoints(stack, job)[-1]
    state = newest / "state.safetensors"
    if damage == "torn":
        os.truncate(state, state.stat().st_size // 2)
    elif damage == "other bytes":
        with state.open("r+b") as file:
            file.seek(-5, os.SEEK_END)
            file.write(b"\xff")
    else:
        (newest / "progress.json").unlink()
    os.kill(pid, signal.SIGKILL)
    end = jobs.wait(job)
    assert end["phase"] == "SUCCEEDED", end["error"]
    assert model_bytes(end) == model_bytes(undisturbed)
    assert "taking the one before" in stack.log_file("trainer").read_text()
    result = ledger(stack, job)
    assert (result.steps, result.trained + result.void, result.takeovers) == (12, 48, 1)
    assert result.again > 0


class SmallDisk:
    """Too little room for what a training process writes into a folder, until `grow`.

    A small file system there; where mounting is not allowed, a limit to the process's files, which
    fails half-way through a write just so.
    """

    def __init__(self, folder: Path, process: Callable[[], int | None]) -> None:
        self._folder, self._process = folder, process
        folder.mkdir(parents=True)
        self._mounted = self._mount("-t", "tmpfs", "-o", "size=25m", "keel-test")
        self.says = "No space left on device" if self._mounted else "File too large"
        if not self._mounted:
            self._limit(8_000_000)

    def grow(self) -> None:
        """There is room from now on."""
        if self._mounted:
            assert self._mount("-o", "remount,size=64m")
        else:
            self._limit(resource.RLIM_INFINITY)

    def close(self) -> None:
        """What was mounted goes."""
        if self._mounted:
            subprocess.run(["umount", "-l", str(self._folder)], check=True)

    def _mount(self, *options: str) -> bool:
        command = ["mount", *options, str(self._folder)]
        return subprocess.run(command, capture_output=True).returncode == 0

    def _limit(self, size_bytes: int) -> None:
        pid = until(self._process, "the training process")
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size_bytes, hard))


def test_a_full_disk_makes_the_run_wait_and_say_so(
    jobs: Jobs, stack: Stack, undisturbed: dict[str, Any], taught: dict[str, Any]
) -> None:
    """Room for two checkpoints of 11 MB, and a third is needed before the first can go."""
    job = jobs.submit(job_spec(model=taught))
    folder = stack.jobs / job / "checkpoints"
    disk = SmallDisk(folder, lambda: training_process(job))
    try:
        reason = until(
            lambda: "waits for room" in (text := jobs.get(job)["reason"]) and text, "the reason"
        )
        assert f"cannot write to {folder}" in reason
        assert disk.says in reason
        assert "bytes needed" in reason
        assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
        there = jobs.get(job)
        assert (there["phase"], there["error"]) == ("TRAINING", "")
        disk.grow()
        end = jobs.wait(job)
        assert end["phase"] == "SUCCEEDED", end["error"]
        assert (end["reason"], model_bytes(end)) == ("", model_bytes(undisturbed))
        assert ledger(stack, job).takeovers == 0
    finally:
        if not jobs.get(job)["finished_at"]:
            jobs.http.post(f"/v1/jobs/{job}/cancel")
            jobs.wait(job)
        disk.close()


def test_an_entry_that_nobody_can_read_costs_its_slot_only(
    jobs: Jobs, stack: Stack, taught: dict[str, Any], tmp_path: Path
) -> None:
    """Somebody else's entry for a slot comes before the collector's: the first one counts."""
    job = jobs.submit(job_spec(model=taught))
    with redis.Redis.from_url(stack.redis_url) as client:
        until(lambda: client.exists(groups_key(job)), "the stream")
        entry = client.xadd(groups_key(job), {"slot": "0/2/5", "envelope": b"\xff\xff"})
        end = jobs.wait(job)
        assert end["phase"] == "SUCCEEDED", end["error"]
        (letter,) = parse_dead_letters(client.hgetall(dead_letters_key(job)))
    assert (letter.lap, letter.slot, letter.tries) == (2, 5, 3)
    assert letter.entry == entry.decode()
    assert "no Envelope" in letter.reason
    rows = {row["step"]: row for row in jobs.rows(job)}
    assert rows[10]["groups/void"] >= 1, "slots 4 to 7 of lap 2 are step 10"
    result = ledger(stack, job)
    assert (result.dead, result.trained + result.void) == (1, 47)
    assert jobs.get(job)["dead_letters"] == 1
    keel = partial(CliRunner().invoke, app, env={"KEEL_URL": stack.url, "COLUMNS": "200"})
    told = keel(["dead-letters", job, "--save", str(tmp_path)])
    assert "lap 2, slot 5" in told.output, told.output
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"\xff\xff"]
    told = keel(["ledger", job])
    assert told.exit_code == 0, told.output
    assert f"{result.trained} groups trained, 0 lost, 0 twice" in told.output


def test_a_lap_that_nobody_can_read_ends_the_run(
    jobs: Jobs, stack: Stack, taught: dict[str, Any]
) -> None:
    job = jobs.submit(job_spec(model=taught))
    with redis.Redis.from_url(stack.redis_url) as client:
        until(lambda: client.exists(groups_key(job)), "the stream")
        for slot in range(16):
            client.xadd(groups_key(job), {"slot": f"0/1/{slot}", "envelope": b"\xff\xff"})
    end = jobs.wait(job)
    assert end["phase"] == "FAILED"
    assert end["error"].startswith("no group of lap 1 could be read: all 16 are dead letters")
