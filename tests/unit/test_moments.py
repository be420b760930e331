"""The named moments of the fault table: they are where the code is, and each is dealt."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from disturbed import FAULTS, MEANING, MOMENTS, NAMED
from faults import OPENING, hands

CHECK = """
import importlib, sitecustomize
for point in sitecustomize.POINTS:
    place = importlib.import_module(point.module)
    for name in point.function.split("."):
        place = getattr(place, name)
    assert place.__wrapped__, point
    print(point.name)
"""


def python(code: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """A process with the moments on its path."""
    path = os.pathsep.join(filter(None, (str(MOMENTS), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path, "KEEL_MOMENTS": str(folder), **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_every_moment_is_a_function_that_is_there(tmp_path: Path) -> None:
    ended = python(CHECK, tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert set(ended.stdout.split()) == NAMED.keys() == MEANING.keys()


PUT = """
from keel.blobs import BlobStore
from keel.queue import SlotKey
BlobStore({root!r}).put("r", "groups", SlotKey(0, 0, 0), b"x")
print("lives")
"""


def test_a_process_dies_of_an_armed_moment_and_the_next_one_lives(tmp_path: Path) -> None:
    """After what it has done: the blob is there."""
    moments, blobs = tmp_path / "moments", tmp_path / "blobs"
    moments.mkdir()
    code = PUT.format(root=str(blobs))
    assert python(code, moments).stdout == "lives\n"
    (moments / "blob-entry").touch()
    (blobs / "r").rename(tmp_path / "before")
    died = python(code, moments)
    assert (died.returncode, died.stdout) == (-9, "")
    assert len(list((blobs / "r").iterdir())) == 1
    assert not list(moments.iterdir())
    assert python(code, moments).stdout == "lives\n"


@pytest.mark.parametrize("offset_s", [86_400, -86_400])
def test_a_clock_that_lies(offset_s: int, tmp_path: Path) -> None:
    code = "import time; print(time.time(), time.clock_gettime(time.CLOCK_REALTIME))"
    (tmp_path / "clock").write_text(str(offset_s))
    told, true = map(float, python(code, tmp_path, KEEL_CLOCK="clock").stdout.split())
    assert told - true == pytest.approx(offset_s, abs=5)


def test_ten_hands_deal_every_fault_at_least_twice() -> None:
    dealt = hands(10, 11, random.Random(0))
    counts = Counter(fault for hand in dealt for fault in hand)
    assert set(counts) == set(FAULTS)
    assert min(counts.values()) >= 2
    assert [len(hand) for hand in dealt] == [11] * 10
    for hand in dealt:
        assert [fault.kind for fault in hand].count(OPENING) <= 1
