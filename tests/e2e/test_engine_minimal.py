"""A job on an engine that Keel does not know: `examples/engine_minimal` in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs import Jobs, job_spec
from minimalkit import minimal_process

from keel_gateway.stack import Stack


def test_a_job_runs_on_an_engine_of_ones_own_with_r3(tmp_path: Path) -> None:
    """Cold start, two laps of N = 4, evaluation. Its log-probs are the trainer's (k3 below 1e-6,
    both in float32), its experts too, and every update replays the rows it sent.
    """
    with (
        minimal_process() as (address, _),
        Stack(tmp_path / "stack", engines=[address]) as stack,
    ):
        jobs = Jobs(stack.url)
        engine: dict[str, Any] = {"kind": "minimal", "quantize": "none"}
        state = jobs.run(job_spec(engine=engine, recipe={"steps": 8}))
        rows = [row for row in jobs.rows(state["id"]) if "mismatch/k3" in row]
        (listed,) = jobs.http.get("/v1/engines").raise_for_status().json()["engines"]
    assert (listed["address"], listed["kind"]) == (address, "minimal")
    assert [row["step"] for row in rows] == list(range(1, 9))
    for row in rows:
        assert row["mismatch/k3"] < 1e-6
        assert row["routing/pair_disagree"] < 0.01
        assert row["replay/rows_obeyed"] == row["replay/rows_requested"] > 0
