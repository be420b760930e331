"""Checkpoints: whole or not at all, the one before when the newest is broken."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch

from keel.checkpoints import decode_checkpoints, encode_checkpoints
from keel_trainer.checkpoint import Checkpoints, Progress


def progress(step: int, cold: int = 10) -> Progress:
    return Progress(
        attempt=0,
        cold_start_step=cold,
        step=step,
        first_gaps={"torch": 0.01},
    )


def state(value: float) -> dict[str, torch.Tensor]:
    return {"master/w": torch.full((3, 2), value), "rng/cpu": torch.get_rng_state()}


def test_round_trip_is_exact_and_old_ones_go(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    assert checkpoints.load_latest() is None
    for step in (0, 4, 8):
        checkpoints.save(progress(step), state(step + 0.1))
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["step-00000004", "step-00000008"]
    loaded = checkpoints.load_latest()
    assert loaded is not None
    where, tensors = loaded
    assert where.step == 8
    assert where == progress(8)
    assert torch.equal(tensors["master/w"], torch.full((3, 2), 8.1))
    assert torch.equal(tensors["rng/cpu"], torch.get_rng_state())


def test_a_checkpoint_of_when_there_was_one_kind_of_engine_is_read(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    file = checkpoints.save(progress(4), state(1)) / "progress.json"
    for gap, gaps in ((0.02, {"torch": 0.02}), (None, {})):
        content = json.loads(file.read_text())
        content.pop("first_gaps", None)
        file.write_text(json.dumps(content | {"first_gap": gap}))
        loaded = checkpoints.load_latest()
        assert loaded is not None
        assert loaded[0].first_gaps == gaps


def test_those_that_exist_are_listed(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    assert checkpoints.existing(4, 10) == []
    began = datetime.now(UTC) - timedelta(seconds=1)
    for where in (progress(0, cold=7), progress(0), progress(4), progress(8)):
        checkpoints.save(where, state(1))
    found = checkpoints.existing(4, 10)
    assert [(c.step, c.cold_start_step, c.policy_version) for c in found] == [
        (0, 10, 0),
        (4, 10, 1),
        (8, 10, 2),
    ]
    for one in found:
        folder = Path(one.folder)
        assert one.size_bytes == sum(file.stat().st_size for file in folder.iterdir()) > 0
        assert began < one.created_at < datetime.now(UTC) + timedelta(seconds=1)
        assert (one.created_at - found[0].created_at).total_seconds() >= 0
    assert decode_checkpoints(encode_checkpoints(found)) == found
    (tmp_path / "step-00000004" / "progress.json").write_text("{")
    assert [one.step for one in checkpoints.existing(4, 10)] == [0, 8]
    checkpoints.save(progress(12, cold=3), state(1))
    assert checkpoints.existing(4, 10)[-1].policy_version is None


def test_cold_start_checkpoints_come_before_the_first_step(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=5)
    for cold in (128, 9, 256):
        checkpoints.save(progress(0, cold), state(cold))
    latest = checkpoints.load_latest()
    assert latest is not None
    assert latest[0].cold_start_step == 256
    checkpoints.save(progress(4, 256), state(1))
    latest = checkpoints.load_latest()
    assert latest is not None
    assert latest[0].step == 4


@pytest.mark.parametrize("damage", ["flip", "truncate", "no progress", "torn progress"])
def test_a_broken_checkpoint_is_passed_over(tmp_path: Path, damage: str) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    checkpoints.save(progress(4), state(4))
    newest = checkpoints.save(progress(8), state(8))
    tensors, where = newest / "state.safetensors", newest / "progress.json"
    match damage:
        case "flip":
            data = bytearray(tensors.read_bytes())
            data[-1] ^= 1
            tensors.write_bytes(data)
        case "truncate":
            tensors.write_bytes(tensors.read_bytes()[:-8])
        case "no progress":
            where.unlink()
        case "torn progress":
            where.write_text(json.dumps({"step": 8})[:-3])
    loaded = checkpoints.load_latest()
    assert loaded is not None
    assert loaded[0].step == 4


def test_a_half_written_folder_is_never_seen(tmp_path: Path) -> None:
    (tmp_path / ".step-00000012").mkdir()
    checkpoints = Checkpoints(tmp_path, keep=1)
    assert checkpoints.load_latest() is None
    checkpoints.save(progress(12), state(0))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000012"]
