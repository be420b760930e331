"""A job watched through its events, with the gateway killed in the middle."""

from __future__ import annotations

import os
import signal
from typing import Any

from jobs import Jobs, job_spec

from keel_gateway.client import GatewayClient
from keel_gateway.stack import Stack


def test_each_row_and_evaluation_comes_once_whole_and_in_order(
    jobs: Jobs, stack: Stack, taught: dict[str, Any]
) -> None:
    job = jobs.submit(job_spec(model=taught, recipe={"steps": 24}))
    seen: dict[str, list[dict[str, Any]]] = {}
    with GatewayClient(stack.url) as client:
        for event in client.events(job):
            seen.setdefault(event.kind, []).append(event.data)
            if event.kind == "metrics" and event.data["step"] in (5, 17):
                pid = stack.pid("gateway")
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
    jobs.wait_up()  # where the last events were on their way, they came without it
    rows = jobs.rows(job)
    assert [row["step"] for row in seen["metrics"]] == list(range(1, 25))
    assert [row["step"] for row in seen["evaluation"]] == list(range(0, 25, 4))
    merged = {row["step"]: row for row in seen["evaluation"]}
    for row in seen["metrics"]:
        merged[row["step"]] = row | merged.get(row["step"], {})
    assert list(dict(sorted(merged.items())).values()) == rows
    phases = [state["phase"] for state in seen["job"]]
    assert phases[-1] == "SUCCEEDED"
    assert "TRAINING" in phases
    assert seen["end"] == [{"phase": "SUCCEEDED"}]
