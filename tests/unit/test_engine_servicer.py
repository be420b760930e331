"""The servicer over a torch engine that takes its time to load."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import grpc
import pytest
from enginekit import CONFIG, EngineClient, checkpoint, engine_client, random_model

from keel import rpc
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.rollout.v1 import rollout_service_pb2_grpc as pb_grpc
from keel_rollout.engines.torch.engine import TorchEngine
from keel_rollout.servicer import RolloutServicer


class SlowEngine(TorchEngine):
    """Has taken (or refused) a model, and waits for `go` before it says so."""

    def __init__(self) -> None:
        super().__init__("cpu", 1)
        self.go = asyncio.Event()
        self.go.set()

    async def load(
        self, files: Mapping[str, bytes], precision: pb.EnginePrecision
    ) -> pb.ModelSignature:
        try:
            return await super().load(files, precision)
        finally:
            await self.go.wait()


async def refused_soon(client: EngineClient) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(5):
            await client.generate([5, 9], version=0)
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION


async def test_no_request_for_one_model_meets_another() -> None:
    """While a model is loaded, requests are refused; if that fails, the old one serves again."""
    engine = SlowEngine()
    server, port = await rpc.serve(
        "127.0.0.1:0",
        ["keel.rollout.v1.RolloutService"],
        lambda s: pb_grpc.add_RolloutServiceServicer_to_server(RolloutServicer(engine, None), s),
    )
    try:
        async with engine_client(f"127.0.0.1:{port}", "r", 1) as client:
            await client.load()
            await client.publish(0, checkpoint(random_model()))
            for width, status in ((-5, grpc.StatusCode.INVALID_ARGUMENT), (64, None)):
                engine.go.clear()
                config = {**CONFIG, "hidden_size": width}
                loading = asyncio.ensure_future(client.load(config))
                await asyncio.sleep(0.5)
                await refused_soon(client)
                engine.go.set()
                if status is None:
                    await loading
                else:
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await loading
                    assert caught.value.code() == status
                    assert len(await client.generate([5, 9], version=0)) == 1
    finally:
        await engine.close()
        await server.stop(0)
