"""Ledger and checkpoints on disks that fill up, break and tear: waited for, told, made good."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keel.errors import FencedError
from keel.ledger import FILE, Checkpointed, encode, read
from keel_trainer import storage
from keel_trainer.checkpoint import Checkpoints, Progress
from keel_trainer.ledger import Ledger
from keel_trainer.storage import StorageError, insist

LINES = [Checkpointed(step=step, cold_start_step=0) for step in range(3)]


@contextmanager
def full_disk(size_bytes: int) -> Iterator[None]:
    """No file may grow beyond this: a write fails half-way with an error, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize("room", [20, len(encode(LINES[1:2])) + 3])
def test_lines_come_whole_or_not_at_all(tmp_path: Path, room: int) -> None:
    """Also where the disk has taken one of two before it was full."""
    ledger = Ledger(tmp_path)
    ledger.append(LINES[:1])
    size = (tmp_path / FILE).stat().st_size
    with full_disk(size + room), pytest.raises(StorageError, match=f"cannot write to {tmp_path}"):
        ledger.append(LINES[1:])
    ledger.append(LINES[1:])
    assert read(tmp_path / FILE) == LINES


@given(st.data())
def test_a_torn_end_is_cut_off_before_the_next_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("run")
    whole = encode(LINES)
    cut = data.draw(st.integers(0, len(whole)))
    (folder / FILE).write_bytes(whole[:cut])
    there = read(folder / FILE)
    Ledger(folder).append(LINES[:1])
    assert read(folder / FILE) == [*there, LINES[0]]


def test_two_trainers_do_not_write_one_ledger(tmp_path: Path) -> None:
    first, second = Ledger(tmp_path), Ledger(tmp_path)
    first.append(LINES[:1])
    second.append(LINES[1:2])
    with pytest.raises(FencedError, match="another trainer has the run"):
        first.append(LINES[2:])
    assert read(tmp_path / FILE) == LINES[:2]


def test_a_checkpoint_that_does_not_fit_leaves_nothing_and_the_old_ones(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    state = {"w": torch.arange(1000.0)}
    old = checkpoints.save(Progress(attempt=0, cold_start_step=0, step=4), state)
    newer = Progress(attempt=0, cold_start_step=0, step=8)
    with full_disk(2000), pytest.raises(StorageError, match=r"about 4,000 bytes needed; .* free"):
        checkpoints.save(newer, state)
    assert list((tmp_path / "c").iterdir()) == [old]
    loaded = checkpoints.load_latest()
    assert loaded is not None
    assert loaded[0].step == 4
    checkpoints.save(newer, state)
    loaded = checkpoints.load_latest()
    assert loaded is not None
    assert loaded[0] == newer
    assert checkpoints.before(newer) == Progress(attempt=0, cold_start_step=0, step=4)


def test_a_broken_checkpoint_is_set_aside_and_takes_no_place(tmp_path: Path) -> None:
    """Not even the place of one that is kept, though its step is the highest."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    old, broken, new = (Progress(attempt=0, cold_start_step=0, step=step) for step in (4, 8, 6))
    Checkpoints(tmp_path, keep=2).save(old, {"w": torch.zeros(3)})
    folder = Checkpoints(tmp_path, keep=2).save(broken, {"w": torch.zeros(3)})
    (folder / "state.safetensors").write_bytes(b"torn")
    loaded = checkpoints.load_latest()
    assert loaded is not None
    assert loaded[0] == old
    checkpoints.save(new, {"w": torch.ones(3)})
    loaded = checkpoints.load_latest()
    assert loaded is not None
    assert loaded[0] == new
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "broken-step-00000008",
        "step-00000006",
    ]


def test_what_waits_for_room_says_so_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_RETRY_S", 0.0)
    told: list[str] = []
    checks: list[int] = []

    def write() -> str:
        if len(checks) < 3:
            raise StorageError(Path("/nowhere/at/all"), 12_345, OSError(28, "No space left"))
        return "written"

    def check() -> None:
        checks.append(len(told))

    assert insist("the ledger", write, tell=told.append, check=check) == "written"
    assert checks == [1, 1, 1], "what is free changes all the time; it is said once"
    assert told[-1] == ""
    for part in ("the ledger waits for room", "No space left", "12,345 bytes needed", "free"):
        assert part in told[0]


def test_waiting_for_room_ends_where_the_check_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_RETRY_S", 0.0)

    def write() -> None:
        raise StorageError(Path("/"), 1, OSError(28, "No space left"))

    def cancelled() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        insist("the ledger", write, tell=lambda _: None, check=cancelled)
