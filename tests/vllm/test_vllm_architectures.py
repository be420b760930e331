"""Each architecture that the vLLM engine claims, against a plain transformers forward.

A load takes 20 s, so a plain run takes the one that differs most from the preset;
KEEL_VLLM_ARCHITECTURES=all takes every one.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import pytest
import torch
from architectures import DENSE, MOE_LAYERS, SPARSE, forced, tiny_model
from enginekit import EngineClient, checkpoint, forward, forward_routes

from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.types.v1 import tensor_pb2

EVERY = SPARSE | DENSE | {"olmoe": SPARSE["olmoe"] | {"rms_norm_eps": 1e-5}}
for _name in ("deepseek-v3", "deepseek-v3-lora"):  # vLLM's MLA on CPUs takes no heads this small
    del EVERY[_name]
SHORT = ("qwen3-moe-mixed",)
CHOSEN = EVERY if os.environ.get("KEEL_VLLM_ARCHITECTURES") == "all" else SHORT
PROBE = [3, 4, 5, 6, 50, 51]


@pytest.mark.parametrize("name", CHOSEN)
async def test_it_is_loaded_updated_and_sampled_from(
    client: EngineClient, next_version: Callable[[], int], name: str
) -> None:
    """In float32, at temperatures 1 and 0.7, after each of three versions: every log-prob within
    1e-5 nats, every set of experts equal.
    """
    config, sparse = EVERY[name], name in SPARSE
    loaded = await client.load(config)
    assert tuple(loaded.moe_layers) == MOE_LAYERS.get(name, ())
    models = [tiny_model(config, seed) for seed in (1, 2)]
    for count in range(3):
        model = models[count % 2]
        told = await client.publish(next_version(), checkpoint(model), PROBE)
        np.testing.assert_allclose(told, forward(model, PROBE), atol=1e-5)
        for heat in (1.0, 0.7):
            for s in await client.generate(
                [5, 9, 2], num_samples=3, max_tokens=20, temperature=heat, with_routes=sparse
            ):
                expected = forward(model, s.everything, heat)[2:]
                np.testing.assert_allclose(s.logprobs, expected, atol=1e-5)
                assert bool(s.routes) == sparse
                if sparse:
                    experts = forward_routes(model, s.everything)
                    assert (np.sort(s.routes_TLK, -1) == experts).all()


async def test_bfloat16_is_close_and_its_routes_explain_the_gap(
    client: EngineClient, next_version: Callable[[], int]
) -> None:
    """Mean gap below 0.01 nats to a float32 forward. With the engine's experts forced, the tokens
    whose experts differ come closer; with those of the row before, everything is far off.
    """
    config = EVERY["qwen3-moe"]
    await client.load(config, pb.EnginePrecision(dtype=tensor_pb2.D_TYPE_BFLOAT16))
    model = tiny_model(config, 1)
    told = await client.publish(next_version(), checkpoint(model), PROBE)
    assert np.abs(told - forward(model, PROBE)).max() < 0.1
    gaps: dict[str, list[float]] = {"plain": [], "replayed": [], "shifted": []}
    for s in await client.generate([5, 9, 2], num_samples=16, max_tokens=100):
        rows_NTLK = torch.from_numpy(s.routes_TLK.astype(np.int64))[None]
        last = torch.zeros_like(rows_NTLK[:, :1])
        last[..., 1] = 1  # the last token's experts matter to nothing
        shifted_NTLK = rows_NTLK.roll(1, dims=1)
        for name, replaying in (
            ("plain", model),
            ("replayed", forced(model, config, torch.cat([rows_NTLK, last], 1))),
            ("shifted", forced(model, config, torch.cat([shifted_NTLK, last], 1))),
        ):
            gaps[name] += np.abs(forward(replaying, s.everything)[2:] - s.logprobs).tolist()
    plain, replayed, shifted = (float(np.mean(gaps[name])) for name in gaps)
    assert replayed <= plain < 0.01 * 5
    assert replayed < 0.01
    assert shifted > 10 * replayed
