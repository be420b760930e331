"""The torch engine in this process: what it does when computing fails, and with empty cohorts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import torch
from enginekit import CONFIG, FLOAT32, checkpoint, random_model

from keel.errors import StateError
from keel.types.v1 import tensor_pb2
from keel_rollout.engines.base import CohortKey, EngineFailed, GroupRequest, StagedTensor
from keel_rollout.engines.torch import batch as batch_module
from keel_rollout.engines.torch.engine import TorchEngine


@pytest.fixture
async def engine() -> AsyncIterator[TorchEngine]:
    """Serves version 0."""
    made = TorchEngine("cpu", 1)
    await made.load({"config.json": json.dumps(CONFIG).encode()}, FLOAT32)
    staged = {
        name: StagedTensor(
            tensor_pb2.D_TYPE_FLOAT32, tuple(t.shape), memoryview(bytearray(t.numpy().tobytes()))
        )
        for name, t in checkpoint(random_model()).items()
    }
    await made.apply(0, staged)
    yield made
    await made.close()


def group(slot: int = 0, cohort: CohortKey | None = None, **changes: Any) -> GroupRequest:
    values: dict[str, Any] = {
        "slot": slot,
        "prompt_P": np.array([5, 9, 2], np.int32),
        "num_samples": 2,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "max_tokens": 8,
        "stop_token_ids": (),
        "seed": slot,
        "cohort": cohort,
    }
    return GroupRequest(**(values | changes))


async def tokens(engine: TorchEngine, request: GroupRequest) -> int:
    """Tokens received."""
    pieces = [event async for event in engine.generate(request) if hasattr(event, "token_ids_T")]
    return sum(len(piece.token_ids_T) for piece in pieces)


@pytest.mark.parametrize("where", ["prefill", "draw"])
@pytest.mark.parametrize("key", [None, CohortKey("x", 2, 0)])
async def test_a_failing_computation_is_told_and_the_engine_lives(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch, where: str, key: CohortKey | None
) -> None:
    """While joining or stepping, alone or in a cohort: UNAVAILABLE to every caller, then fine."""

    def fail(*_: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("no memory")

    monkeypatch.setattr(batch_module, where, fail)
    calls = [tokens(engine, group(slot, key)) for slot in (0, 1)]
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(outcome, EngineFailed)
    monkeypatch.undo()
    assert await tokens(engine, group()) == 16
    again = CohortKey("x", 1, 1)
    assert await tokens(engine, group(0, again)) == 16


async def test_a_cohort_waits_for_its_last_group_and_forgets_one_that_hangs_up(
    engine: TorchEngine,
) -> None:
    """Nothing starts with 2 of 3; a member that left may be sent again under the same try."""
    key = CohortKey("x", 3, 0)
    calls = [asyncio.ensure_future(tokens(engine, group(slot, key))) for slot in (0, 1)]
    await asyncio.sleep(0.1)
    assert not any(call.done() for call in calls)
    calls[1].cancel()
    await asyncio.sleep(0.05)
    rest = [tokens(engine, group(slot, key)) for slot in (1, 2)]
    assert await asyncio.gather(calls[0], *rest) == [16, 16, 16]


async def test_require_policy_version_fails_a_whole_cohort(engine: TorchEngine) -> None:
    """One member asks for another version: nobody is left waiting."""
    key = CohortKey("x", 2, 0)
    calls = [
        tokens(engine, group(0, key)),
        tokens(engine, group(1, key, require_policy_version=5)),
    ]
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(outcome, StateError)


async def test_cancelling_everything_leaves_nothing_behind(engine: TorchEngine) -> None:
    """Stream and cohort, all callers gone: the thread is idle and takes new work at once."""
    calls = [
        asyncio.ensure_future(tokens(engine, group(slot, key, num_samples=200, max_tokens=500)))
        for slot, key in ((0, None), (0, CohortKey("x", 1, 0)), (0, CohortKey("y", 2, 0)))
    ]
    await asyncio.sleep(0.15)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    assert await tokens(engine, group()) == 16
    assert engine._worker._cohort is None
