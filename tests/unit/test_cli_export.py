"""`keel export`: where a job's files are, and what is said where they are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from clikit import Gateway, job

from keel.record import Phase

pytest_plugins = ["cli_fixtures"]


def model(folder: Path) -> Path:
    """A folder with something in it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def serve(gateway: Gateway, steps: tuple[int, ...] = (), **changes: Any) -> None:
    gateway.jobs(job(**changes))
    checkpoints = [
        {
            "attempt": 0,
            "step": step,
            "cold_start_step": 10,
            "policy_version": step // 4,
            "created_at": datetime(2026, 1, 1, tzinfo=UTC).isoformat(),
            "size_bytes": 1,
            "folder": f"/nowhere/step-{step:08d}",
        }
        for step in steps
    ]
    gateway.answers["GET", "/v1/jobs/first-abcdef/checkpoints"] = {"checkpoints": checkpoints}


def test_the_final_model_is_copied(
    keel: Callable[..., Any], gateway: Gateway, tmp_path: Path
) -> None:
    serve(gateway, phase=Phase.SUCCEEDED, model=str(model(tmp_path / "model")))
    result = keel("export", "first", "--out", str(tmp_path / "deep" / "out"), "--json")
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    assert said == {"job": "first-abcdef", "step": None, "out": str(tmp_path / "deep" / "out")}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert (tmp_path / "deep" / "out" / "config.json").read_text() == "{}"


def test_a_folder_with_something_in_it_is_refused(
    keel: Callable[..., Any], gateway: Gateway, tmp_path: Path
) -> None:
    serve(gateway, phase=Phase.SUCCEEDED, model=str(model(tmp_path / "model")))
    mine = model(tmp_path / "mine")
    result = keel("export", "first", "--out", str(mine))
    assert result.exit_code == 2
    assert "a new or empty folder" in result.stderr
    assert gateway.asked == []


@pytest.mark.parametrize(
    ("steps", "arguments", "says"),
    [
        ((4, 8), ("--step", "5"), "one of 4, 8"),
        ((4, 8), (), "one of 4, 8; the job is TRAINING and has no final model"),
        ((), ("--step", "4"), "no checkpoint ([checkpoint] every writes some on the way)"),
    ],
)
def test_a_step_without_checkpoint_names_those_that_there_are(
    keel: Callable[..., Any],
    gateway: Gateway,
    tmp_path: Path,
    steps: tuple[int, ...],
    arguments: tuple[str, ...],
    says: str,
) -> None:
    serve(gateway, steps, phase=Phase.TRAINING, step=8)
    result = keel("export", "first", "--out", str(tmp_path / "out"), *arguments)
    assert result.exit_code == 2
    assert says in result.stderr


def test_checkpoints_are_listed(keel: Callable[..., Any], gateway: Gateway) -> None:
    serve(gateway, (4, 8), phase=Phase.TRAINING, step=9)
    found = json.loads(keel("checkpoints", "--json").stdout)["checkpoints"]
    assert [one["step"] for one in found] == [4, 8]
    said = keel("checkpoints", "first").stdout
    assert "/nowhere/step-00000008" in said
    assert said.splitlines()[1].split()[:2] == ["4", "1"]
    serve(gateway, (), phase=Phase.TRAINING)
    assert keel("checkpoints").stdout.strip() == "No checkpoint yet"


@pytest.mark.parametrize("arguments", [(), ("--step", "4")])
def test_files_on_another_machine(
    keel: Callable[..., Any], gateway: Gateway, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    serve(gateway, (4,), phase=Phase.SUCCEEDED, model="/nowhere/model")
    result = keel("export", "first", "--out", str(tmp_path / "out"), *arguments)
    assert result.exit_code == 1
    assert "run keel export where the trainer runs" in result.stderr
    assert not (tmp_path / "out").exists()


def test_what_the_trainer_says_is_told(
    keel: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of keel run, moved since, whose checkpoint is none."""
    run = tmp_path / "moved"
    checkpoint = run / "stack" / "jobs" / "first-abcdef" / "checkpoints" / "step-00000004"
    checkpoint.mkdir(parents=True)
    found = job(phase=Phase.SUCCEEDED, model="/where/it/was")
    (run / "job.json").write_text(found.model_dump_json())
    model(run / "model")
    assert keel("export", str(run), "--out", str(tmp_path / "out")).exit_code == 0
    result = keel("export", str(run), "--out", str(tmp_path / "other"), "--step", "4")
    assert result.exit_code == 1
    assert "progress.json" in result.stderr
    assert not (tmp_path / "other").exists()
