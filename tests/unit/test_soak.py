"""The soak's verdict: what grows is seen, what only moves about is not."""

from __future__ import annotations

import importlib.util
import random
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MIB = 2**20


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("soak", BENCHMARKS / "soak.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["soak"] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(BENCHMARKS))


def series(soak: ModuleType, per_minute_mib: float, jump_mib: float = 0.0) -> dict:
    """Ten minutes of a process of 300 MiB that grows in its first two minutes, as all do."""
    rng = random.Random(0)
    memory, steps = soak.Series("bytes"), soak.Series("steps")
    for at_s in range(0, 600, 2):
        warm_mib = min(at_s, 120) * 0.5
        grown_mib = per_minute_mib * at_s / 60 + (jump_mib if rng.random() < 0.1 else 0)
        memory.add(at_s, (300 + warm_mib + grown_mib + rng.uniform(-1, 1)) * MIB)
        steps.add(at_s, at_s * 4)
    return {"engine-0": memory, "steps": steps}


@pytest.mark.parametrize(
    ("per_minute_mib", "jump_mib", "flat"),
    [(0.0, 0.0, True), (0.0, 40.0, True), (0.3, 0.0, True), (3.0, 0.0, False), (3.0, 40.0, False)],
)
def test_growth_is_seen_through_what_comes_and_goes(
    soak: ModuleType, per_minute_mib: float, jump_mib: float, flat: bool
) -> None:
    """Of 450 s judged: 3 MiB a minute are 22.5, and the bound 3 % of 360, 10.8."""
    (row,) = soak.verdicts(series(soak, per_minute_mib, jump_mib), 10)
    assert row["flat"] is flat
    assert row["growth_mib"] == pytest.approx(7.5 * per_minute_mib, abs=1)
    assert row["bound_mib"] == pytest.approx(10.8, abs=0.6)


def test_a_figure_has_a_line_for_each_process(soak: ModuleType) -> None:
    one = series(soak, 1.0)["engine-0"]
    text = soak.figure({"a & b": (one.at_s, one.values), "c": (one.at_s, one.values)}, warm_up_s=90)
    root = ET.fromstring(text)
    lines = [node for node in root.iter() if node.tag.endswith("polyline")]
    assert len(lines) == 2
    assert {node.text for node in root.iter() if node.tag.endswith("text")} >= {"a & b", "c", "0"}
