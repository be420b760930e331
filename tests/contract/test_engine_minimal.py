"""`examples/engine_minimal` against the contract tests of the torch engine: what it claims holds.

Not here, as it does not claim it: cohorts, fp8 and fp4, weights by reference.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from contract.test_rollout_bad_input import (  # noqa: F401
    test_a_malformed_tensor_is_refused,
    test_a_probe_is_checked_before_anything_is_applied,
    test_load_needs_a_config_and_a_known_precision,
    test_the_longest_request_is_taken,
)
from contract.test_rollout_generate import (  # noqa: F401
    test_a_token_depends_on_seed_and_sample_alone,
    test_bfloat16_and_dense_models,
    test_cancel_frees_sequences_and_changes_no_others_bits,
    test_complete_tells_lengths_hash_versions_and_reason,
    test_joining_rows_get_valid_logprobs,
    test_logprobs_and_routes_equal_a_plain_forward,
    test_samples_follow_the_distribution,
    test_truncated_and_greedy_evaluation_report_full_logprobs,
)
from contract.test_rollout_pause import (  # noqa: F401
    serving,
    test_abort_ends_at_once_with_what_there_is,
    test_an_update_in_the_middle_splits_versions_exactly,
    test_resume_calls_off_a_pause_that_waits,
    test_wait_finishes_what_runs_and_holds_back_what_does_not,
)
from contract.test_rollout_weights import (  # noqa: F401
    test_a_faulty_update_names_the_tensor_and_keeps_the_old_version,
    test_a_manifest_that_lies_about_its_fingerprint_is_refused,
    test_a_stream_that_breaks_off_can_be_taken_up,
    test_a_version_is_a_number_and_a_fingerprint,
    test_an_engine_is_loaded_then_ready,
    test_another_model_replaces_the_one_loaded,
    test_fencing,
)
from enginekit import checkpoint, engine_client

from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.types.v1 import sequence_pb2

pytest_plugins = ["engine_fixtures"]

FOLDER = Path(__file__).parents[2] / "examples" / "engine_minimal"


@contextlib.contextmanager
def minimal_process() -> Iterator[tuple[str, subprocess.Popen]]:
    """The engine on a free port."""
    command = [sys.executable, str(FOLDER / "engine.py"), "--listen", "127.0.0.1:0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            found = re.fullmatch(r"listens on (\S+)\n", process.stdout.readline())
            assert found, "the engine did not start"
            yield found[1], process
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def engine_address() -> Iterator[str]:
    """In place of the torch engine's."""
    with minimal_process() as (address, _):
        yield address


def test_it_knows_nothing_of_keel_but_generated_code() -> None:
    """Every import of `keel` is a pb2 or pb2_grpc module; none is of keel_rollout and the like."""
    seen = set()
    for file in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                seen |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                seen |= {alias.name for alias in node.names}
    ours = {name for name in seen if name.startswith("keel")}
    assert len(ours) == 5
    assert all(re.fullmatch(r"keel\.\w+\.v1\.\w+_pb2(_grpc)?", name) for name in ours), ours


async def test_sigterm_ends_sequences_aborted_and_the_process_cleanly(model_a: Any) -> None:
    """Exit code 0; the caller gets a whole stream that says ABORTED."""
    with minimal_process() as (address, process):
        async with engine_client(address, "r", 1) as client:
            await client.load()
            await client.publish(0, checkpoint(model_a))
            running = asyncio.ensure_future(client.generate([5], num_samples=96, max_tokens=500))
            while await client.pause(pb.PAUSE_MODE_KEEP) == 0:
                await client.resume()
            process.send_signal(signal.SIGTERM)
            reasons = {s.complete.finish_reason for s in await running if s.complete}
            assert reasons == {sequence_pb2.FINISH_REASON_ABORTED}
        assert await asyncio.to_thread(process.wait, 10) == 0
