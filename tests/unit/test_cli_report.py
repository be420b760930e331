"""`keel report` and `keel compare`: of a gateway's jobs, and of folders left by `keel run`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clikit import Gateway, job, row

from keel.record import Phase
from keel_gateway.run_folder import RunData, write_run

pytest_plugins = ["cli_fixtures"]

SAMPLE = {
    "attempt": 0,
    "step": 1,
    "lap": 0,
    "slot": 0,
    "sample": 0,
    "policy_version": 0,
    "reward": 1.0,
    "reward_parts": {"correct": 1.0},
    "advantage": 0.5,
    "truncated": False,
    "valid": True,
    "invalid_reason": "",
    "prompt": "what is the prompt",
    "response": "ab",
    "tokens": ["a", "b"],
    "rollout_logprobs": [-1.0, -2.0],
    "proximal_logprobs": [-1.5, -2.0],
    "experts_differ": [0, 1],
}


def serve(gateway: Gateway, *names: str) -> None:
    """Jobs of eight steps; each job's rewards are 0.1 above those of the job before."""
    found = [job(phase=Phase.SUCCEEDED, step=8, run=name) for name in names]
    gateway.jobs(*found)
    for number, one in enumerate(found):
        rows = [row(step, **{"reward/mean": 0.5 + number / 10}) for step in range(1, 9)]
        gateway.answers["GET", f"/v1/jobs/{one.id}/metrics"] = {"rows": rows, "evaluation": None}
        pages = iter([[SAMPLE], []])
        gateway.answers["GET", f"/v1/jobs/{one.id}/samples"] = lambda pages=pages: {
            "samples": next(pages)
        }


def folder(path: Path, **changes: Any) -> str:
    """What `keel run` leaves."""
    path.mkdir()
    rows = [row(step) for step in range(1, 9)]
    write_run(path, RunData(job(phase=Phase.SUCCEEDED, **changes).model_dump(mode="json"), rows))
    return str(path)


def test_report_is_written_with_metrics_and_samples(
    keel: Callable[..., Any], gateway: Gateway, tmp_path: Path
) -> None:
    serve(gateway, "first-abcdef")
    result = keel("report", "first", "--out", str(tmp_path / "r.html"), "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {
        "out": str(tmp_path / "r.html"),
        "job": "first-abcdef",
        "rows": 8,
        "samples": 1,
    }
    html = (tmp_path / "r.html").read_text()
    assert "mismatch/k3" in html
    assert "what is the prompt" in html


def test_report_of_a_folder_asks_no_gateway(
    keel: Callable[..., Any], gateway: Gateway, tmp_path: Path
) -> None:
    left = folder(tmp_path / "left")
    result = keel("report", left, "--out", str(tmp_path / "r.html"))
    assert (result.exit_code, gateway.asked) == (0, [])
    assert "mismatch/k3" in (tmp_path / "r.html").read_text()


def test_a_folder_that_is_no_run_is_told_in_a_sentence(
    keel: Callable[..., Any], tmp_path: Path
) -> None:
    result = keel("report", str(tmp_path / "nothing"), "--out", str(tmp_path / "r.html"))
    assert result.exit_code == 2
    assert "a folder left by `keel run`" in " ".join(result.complained.split())
    assert not (tmp_path / "r.html").exists()


def test_compare_a_job_and_a_folder(
    keel: Callable[..., Any], gateway: Gateway, tmp_path: Path
) -> None:
    serve(gateway, "first-abcdef")
    left = folder(tmp_path / "left", run="other-123456")
    result = keel("compare", "first", left, "--out", str(tmp_path / "c.html"))
    assert result.exit_code == 0, result.complained
    told = result.stdout.splitlines()
    assert any(line.split() == ["number", "first-abcdef", "other-123456"] for line in told)
    # rewards 0.1, 0.2, ... 0.8 have a mean of 0.45
    assert any(line.split()[-3:] == ["0.500", "0.450", "(-0.050)"] for line in told)
    assert "No key of the job files differs" in told
    assert "first-abcdef against other-123456" in (tmp_path / "c.html").read_text()


def test_compare_as_json(keel: Callable[..., Any], gateway: Gateway, tmp_path: Path) -> None:
    serve(gateway, "a-1", "b-2", "c-3")
    out = str(tmp_path / "c.html")
    result = keel("compare", "a-1", "b-2", "c-3", "--out", out, "--json")
    assert result.exit_code == 0, result.complained
    found = json.loads(result.stdout)
    assert (found["jobs"], found["last_step"]) == (["a-1", "b-2", "c-3"], 8)
    assert found["numbers"]["reward, last tenth"] == [0.5, 0.6, 0.7]
    assert found["differences"] == {}


def test_one_job_is_not_enough(keel: Callable[..., Any], tmp_path: Path) -> None:
    result = keel("compare", folder(tmp_path / "left"), "--out", str(tmp_path / "c.html"))
    assert result.exit_code == 2
    assert "two jobs or more" in result.complained


def test_a_report_that_cannot_be_written_is_told_in_a_sentence(
    keel: Callable[..., Any], gateway: Gateway, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "report.html"  # under a file, so that root cannot write it either
    gateway.jobs(job())
    result = keel("report", "--out", str(path))
    assert result.exit_code == 2
    assert result.complained.strip().endswith(("Not a directory", "File exists"))
