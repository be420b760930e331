"""`keel up` and `keel run` as their users start and end them: real services, real signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from keel_gateway.client import GatewayClient
from keel_gateway.stack_folder import free_port

KEEL = [sys.executable, "-c", "from keel_gateway.cli import main; main()"]
JOB = """
name = "little"
[model]
path = "preset:tiny-qwen3-moe"
[task]
difficulty = 2
[cold_start]
steps = 2
batch_size = 4
[engine]
quantize = "fp8"
[rollout]
group_size = 4
max_tokens = 8
[recipe]
replay = "R3"
off_policiness = 2
groups_per_minibatch = 2
steps = 4
[evaluation]
every = 2
samples = 4
"""


@contextmanager
def keel_up(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`keel up` and its URL, once it says so."""
    port = free_port(set())
    process = subprocess.Popen(
        [*KEEL, "up", "--dir", str(folder), "--port", str(port)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if "Keel is up" in line:
                break
        else:
            pytest.fail("keel up ended before it was up")
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.communicate()


def of_stack(folder: Path) -> list[psutil.Process]:
    """Running processes that name a file or folder of the stack."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        command = " ".join(process.info["cmdline"] or [])
        if str(folder) in command and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def keel(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of keel, to its end."""
    return subprocess.run([*KEEL, *arguments], capture_output=True, text=True, timeout=150)


def wait_until_gone(folder: Path, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while left := of_stack(folder):
        assert time.monotonic() < deadline, [process.cmdline() for process in left]
        time.sleep(0.1)


def test_sigterm_stops_everything_in_order(tmp_path: Path) -> None:
    with keel_up(tmp_path) as (process, url):
        told = json.loads((tmp_path / "stack.json").read_text())
        assert told["url"] == url
        assert told["metrics"].keys() == {"gateway", "engine-0", "trainer", "collector"}
        for address in told["metrics"].values():
            page = httpx.get(address, trust_env=False)
            assert "process_resident_memory_bytes" in page.text
        assert len(of_stack(tmp_path)) >= 5, "keel, redis, engine, trainer, collector, gateway"
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 0
        assert of_stack(tmp_path) == []
    assert not (tmp_path / "stack.json").exists()
    assert "Redis is now ready to exit" in (tmp_path / "logs" / "redis.log").read_text()


def test_nothing_is_left_of_a_killed_stack_and_its_jobs_are_there_again(tmp_path: Path) -> None:
    job_file = tmp_path / "job.toml"
    job_file.write_text(JOB)
    folder = tmp_path / "stack"
    with keel_up(folder) as (process, url):
        done = keel("submit", str(job_file), "--url", url)
        assert done.returncode == 0, done.stderr
        run = done.stdout.split()[0]
        process.kill()
        wait_until_gone(folder, 20)
    with keel_up(folder) as (_, url):
        with GatewayClient(url) as client:
            assert client.find("latest").id == run
        watched = subprocess.run(
            [*KEEL, "watch", run, "--url", url], capture_output=True, text=True
        )
        assert watched.returncode == 0, watched.stdout
        assert "SUCCEEDED step 4/4" in watched.stdout
    wait_until_gone(folder, 20)


def test_run_leaves_job_metrics_report_and_model(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(JOB)
    out = tmp_path / "out"
    events = str(tmp_path / "tb")
    done = keel("run", str(tmp_path / "job.toml"), "--out", str(out), "--tensorboard", events)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Replay was obeyed in every step" in done.stdout
    assert str(out / "report.html") in done.stdout
    assert json.loads((out / "job.json").read_text())["phase"] == "SUCCEEDED"
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in rows if "accuracy/eval" in row] == [0, 2, 4]
    assert all(row["replay/rows_requested"] > 0 for row in rows[1:])
    assert "staleness/k3" in (out / "report.html").read_text()
    logged = EventAccumulator(str(next((tmp_path / "tb").iterdir()))).Reload()
    k3 = {event.step: event.value for event in logged.Scalars("mismatch/k3")}
    assert k3 == {row["step"]: pytest.approx(row["mismatch/k3"], rel=1e-6) for row in rows[1:]}
    assert len(logged.Tensors("samples")) >= 1
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert {one["step"] for one in samples} <= {1, 2, 3, 4}
    assert all(len(one["tokens"]) == len(one["proximal_logprobs"]) > 0 for one in samples)
    assert samples[0]["prompt"] in (out / "report.html").read_text()
    audited = keel("ledger", str(out))
    assert audited.returncode == 0, audited.stdout
    assert audited.stdout.splitlines()[-1].endswith("groups trained, 0 lost, 0 twice")
    with safe_open(next((out / "model").glob("*.safetensors")), "np") as weights:
        assert "model.embed_tokens.weight" in list(weights.keys())
    assert of_stack(out) == []


def test_run_that_fails_says_why_and_where_the_logs_are(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(JOB.replace("preset:tiny-qwen3-moe", str(tmp_path)))
    out = tmp_path / "out"
    done = keel("run", str(tmp_path / "job.toml"), "--out", str(out))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED" in done.stdout
    assert "Error: " in done.stdout
    assert str(out / "stack" / "logs") in done.stdout
    assert "FAILED" in (out / "report.html").read_text()
    assert not (out / "model").exists()
    assert of_stack(out) == []
