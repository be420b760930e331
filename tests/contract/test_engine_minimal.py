"""`examples/engine_minimal`: what it is made of, and what the conformance kit does not ask.

The kit itself is run over it in tests/conformance/test_minimal_conforms.py.
"""

from __future__ import annotations

import ast
import asyncio
import re
from collections.abc import Iterator
from typing import Any

import pytest
from contract.test_rollout_pause import (  # noqa: F401
    serving,
    test_resume_calls_off_a_pause_that_waits,
)
from contract.test_rollout_weights import test_another_model_replaces_the_one_loaded  # noqa: F401
from enginekit import checkpoint, engine_client
from minimalkit import FOLDER, minimal_process

from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.types.v1 import sequence_pb2

pytest_plugins = ["engine_fixtures"]


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
            process.terminate()
            reasons = {s.complete.finish_reason for s in await running if s.complete}
            assert reasons == {sequence_pb2.FINISH_REASON_ABORTED}
        assert await asyncio.to_thread(process.wait, 10) == 0
