"""Peers of the gateway for its tests: real gRPC servers that answer as the contract says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc

from keel import rpc
from keel.errors import NotFound
from keel.rollout.v1 import rollout_service_pb2 as rollout
from keel.rollout.v1 import rollout_service_pb2_grpc
from keel.samples import Sample, sample_field
from keel.trainer.v1 import trainer_service_pb2 as trainer
from keel.trainer.v1 import trainer_service_pb2_grpc
from keel.types.v1 import tensor_pb2

SPEC: dict[str, Any] = {
    "name": "first",
    "model": {"path": "preset:tiny-qwen3-moe"},
    "rollout": {"group_size": 8},
    "recipe": {"off_policiness": 4, "groups_per_minibatch": 2, "steps": 8},
    "evaluation": {"every": 4},
}


def abilities(**changes: Any) -> rollout.EngineAbilities:
    """What the torch engine can do, changed where the test says so."""
    can: dict[str, Any] = {
        "kind": "torch",
        "architectures": ["Qwen3MoeForCausalLM"],
        "routes": True,
        "deterministic": True,
        "dtypes": [tensor_pb2.D_TYPE_FLOAT32, tensor_pb2.D_TYPE_BFLOAT16],
        "quantizations": [rollout.QUANTIZATION_NONE, rollout.QUANTIZATION_FP8],
        "max_cohort_sequences": 1024,
        "max_group_size": 64,
    }
    return rollout.EngineAbilities(**can | changes)


def sample_hash(step: int) -> dict[str, str]:
    """Three samples of a step as the trainer leaves them, N = 4."""
    return {
        sample_field(0, step, index): Sample(
            attempt=0,
            step=step,
            lap=(step - 1) // 4,
            slot=2,
            sample=index,
            policy_version=0,
            reward=float(index == 1),
            reward_parts={},
            advantage=index - 1.0,
            truncated=False,
            valid=True,
            invalid_reason="",
            prompt="12*3=",
            response="36",
            tokens=["3", "6"],
            rollout_logprobs=[-0.5, -0.25],
            proximal_logprobs=[-0.5, -0.5],
            experts_differ=[0, 1],
        ).model_dump_json()
        for index in range(3)
    }


class EnginePeer(rollout_service_pb2_grpc.RolloutServiceServicer):
    """Says what it can do."""

    def __init__(self, can: rollout.EngineAbilities) -> None:
        self.can = can

    async def GetCapabilities(self, request: Any, context: Any) -> rollout.GetCapabilitiesResponse:
        return rollout.GetCapabilitiesResponse(can=self.can, state=rollout.ENGINE_STATE_EMPTY)


class TrainerPeer(trainer_service_pb2_grpc.TrainerServiceServicer):
    """Remembers its calls; a run runs from StartRun until the test says otherwise."""

    def __init__(self) -> None:
        self.started: list[tuple[str, int]] = []
        self.cancelled: list[tuple[str, int]] = []
        self.running: set[str] = set()
        self.refusal: Exception | None = None

    def _run(self, run: str) -> trainer.Run:
        return trainer.Run(run=run, running=run in self.running)

    async def StartRun(self, request: Any, context: Any) -> trainer.StartRunResponse:
        self.started.append((request.run, request.fencing_token))
        if self.refusal is not None:
            raise self.refusal
        self.running.add(request.run)
        return trainer.StartRunResponse(run=self._run(request.run))

    async def CancelRun(self, request: Any, context: Any) -> trainer.CancelRunResponse:
        self.cancelled.append((request.run, request.fencing_token))
        if request.run not in self.running:
            raise NotFound(f"no run {request.run!r}")
        return trainer.CancelRunResponse(run=self._run(request.run))

    async def GetRun(self, request: Any, context: Any) -> trainer.GetRunResponse:
        return trainer.GetRunResponse(run=self._run(request.run))


@asynccontextmanager
async def serve(peer: EnginePeer | TrainerPeer, address: str = "127.0.0.1:0") -> AsyncIterator[str]:
    """Serves a peer; yields its address."""

    def add(server: grpc.aio.Server) -> None:
        if isinstance(peer, EnginePeer):
            rollout_service_pb2_grpc.add_RolloutServiceServicer_to_server(peer, server)
        else:
            trainer_service_pb2_grpc.add_TrainerServiceServicer_to_server(peer, server)

    server, port = await rpc.serve(address, [], add)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def eventually(check: Callable[[], Any], *, timeout_s: float = 20.0) -> Any:
    """What `check` returns, awaited where it must be, once it is true."""
    async with asyncio.timeout(timeout_s):
        while True:
            found = check()
            if isinstance(found, Awaitable):
                found = await found
            if found:
                return found
            await asyncio.sleep(0.02)
