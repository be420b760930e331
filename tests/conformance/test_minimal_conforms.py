"""`examples/engine_minimal` keeps the contract: every row that it claims."""

from __future__ import annotations

import json
import re

import pytest
from minimalkit import minimal_process
from typer.testing import CliRunner

from keel_gateway.cli import app

UNCLAIMED = {
    *("sampling/cohort-bits", "sampling/cohort-resend", "sampling/cohort-limit"),
    "weights/safetensors",
}
"""It is not deterministic, and shares no storage."""


@pytest.mark.parametrize("preset", ["tiny-qwen3-moe", "tiny-qwen3"])
def test_every_row_that_it_claims_passes(preset: str) -> None:
    """Cohorts and weights by reference are NOT CLAIMED, and a dense model's routes; all else
    passes, malformed bytes too, which grpc.aio refuses with UNKNOWN by itself.
    """
    with minimal_process() as (address, _):
        done = CliRunner().invoke(
            app, ["conformance", address, "--model", f"preset:{preset}", "--json"]
        )
    assert done.exit_code == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    unclaimed = {row["row"] for row in found["rows"] if row["status"] == "NOT CLAIMED"}
    routes = {row["row"] for row in found["rows"] if re.search("/routes-", row["row"])}
    assert found["engine"]["kind"] == "minimal"
    assert (found["counts"]["FAIL"], found["counts"]["NOT RUN"]) == (0, 0)
    assert unclaimed == UNCLAIMED | (routes if preset == "tiny-qwen3" else set())
