"""Every architecture in the torch engine, over real gRPC, against a plain transformers forward."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from architectures import DENSE, MOE_LAYERS, SPARSE, tiny_model
from enginekit import (
    FP8,
    EngineClient,
    checkpoint,
    engine_client,
    forward,
    forward_routes,
)
from safetensors.torch import load_file

from keel.errors import ModelError
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.types.v1 import tensor_pb2
from keel_rollout.engines.base import StagedTensor
from keel_rollout.engines.torch.model import Model
from keel_rollout.engines.torch.routers import RouterTap

pytest_plugins = ["engine_fixtures"]

PROBE = [3, 4, 5, 6, 50, 51]
PROMPTS = [[5, 9, 2], [7], [3, 4, 5, 6, 7, 8, 9], [11, 12]]
EVERY = SPARSE | DENSE


@pytest.mark.parametrize("name", EVERY)
async def test_it_is_found_loaded_updated_and_sampled_from(
    client: EngineClient, tmp_path: Path, name: str
) -> None:
    """Capabilities name its MoE layers; the checkpoint's own names pass the update path, hashes
    and all; after two versions the probe, each log-prob and each set of experts are a plain
    forward's.
    """
    config, sparse = EVERY[name], name in SPARSE
    loaded = await client.load(config)
    told = await client.stub.GetCapabilities(pb.GetCapabilitiesRequest())
    assert told.loaded == loaded
    assert loaded.architecture == config["architectures"][0] in told.can.architectures
    assert tuple(loaded.moe_layers) == MOE_LAYERS.get(name, ())
    assert (loaded.num_experts, loaded.experts_per_token) == ((16, 2) if sparse else (0, 0))

    for version in (0, 1):
        model = tiny_model(config, seed=version)
        model.save_pretrained(tmp_path)
        probe = await client.publish(version, load_file(tmp_path / "model.safetensors"), PROBE)
        np.testing.assert_allclose(probe, forward(model, PROBE), atol=1e-5)

    groups = await asyncio.gather(
        *(
            client.generate(p, num_samples=3, slot=i, seed=i, with_routes=sparse)
            for i, p in enumerate(PROMPTS)
        )
    )
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for sequence in group:
            expected = forward(model, sequence.everything)[len(prompt) - 1 :]
            np.testing.assert_allclose(sequence.logprobs, expected, atol=2e-5)
            assert (len(sequence.routes) > 0) == sparse
            if sparse:
                experts = forward_routes(model, sequence.everything)
                assert (np.sort(sequence.routes_TLK, -1) == experts).all()


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "deepseek-v3", "llama"])
async def test_fp8_cohorts_repeat_bit_for_bit(
    engine_address: str, next_token: Callable[[], int], name: str
) -> None:
    """Coarse: the probe is off by 1e-4 to 0.5 nats; and still the same bits twice."""
    model, bits, probes = tiny_model(EVERY[name], seed=3), [], []
    for _ in range(2):
        token = next_token()
        async with engine_client(engine_address, f"run-{token}", token) as client:
            await client.load(EVERY[name], FP8)
            probes.append(await client.publish(0, checkpoint(model), PROBE))
            groups = await asyncio.gather(
                *(
                    client.generate(
                        p,
                        num_samples=2,
                        slot=i,
                        cohort=("c", len(PROMPTS), 0),
                        with_routes=name in SPARSE,
                    )
                    for i, p in enumerate(PROMPTS)
                )
            )
            bits.append([sequence.bits() for group in groups for sequence in group])
    assert bits[0] == bits[1]
    assert 1e-4 < np.abs(probes[0] - forward(model, PROBE)).max() < 0.5


def test_experts_that_no_known_router_leads_to_are_refused() -> None:
    """Taken for dense, such a model would report no routes and nobody would know why."""
    model = tiny_model(SPARSE["mixtral"])
    model.model.layers[1].mlp.gate = torch.nn.Linear(128, 16)
    with pytest.raises(ModelError, match=r"MixtralForCausalLM: model\.layers\.1\.mlp .*TopKRouter"):
        RouterTap(model)


async def test_a_sliding_window_is_refused(client: EngineClient) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="sliding_window: 16"):
        await client.load(DENSE["mistral"] | {"sliding_window": 16})


def test_the_selection_bias_stays_float32_in_a_bfloat16_engine() -> None:
    """Rounded to 8 bits it would choose other experts than the trainer, whose bias is float32."""
    config = SPARSE["deepseek-v3"]
    precision = pb.EnginePrecision(dtype=tensor_pb2.D_TYPE_BFLOAT16)
    files = {"config.json": json.dumps(config).encode()}
    model = Model(files, precision, torch.device("cpu"))
    sent = checkpoint(tiny_model(config))
    staged = {
        key: StagedTensor(
            tensor_pb2.D_TYPE_FLOAT32, tuple(t.shape), memoryview(t.numpy()).cast("B")
        )
        for key, t in sent.items()
    }
    model.apply(model.convert(staged))
    gate = "model.layers.1.mlp.gate"
    served = model.net.state_dict()
    assert torch.equal(
        served[f"{gate}.e_score_correction_bias"], sent[f"{gate}.e_score_correction_bias"]
    )
    assert torch.equal(served[f"{gate}.weight"], sent[f"{gate}.weight"].bfloat16())
