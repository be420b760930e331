"""A whole job on every preset: cold start, laps, replay, evaluation, final model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from jobs import Jobs, job_spec
from transformers import AutoModelForCausalLM

from keel.presets import PRESETS

MOE_LAYERS = {
    "tiny-qwen3-moe": [0, 1],
    "tiny-mixtral": [0, 1],
    "tiny-olmoe": [0, 1],
    "tiny-deepseek-v3": [1, 2],
    "tiny-qwen3": [],
}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_goes_through_the_loop(jobs: Jobs, preset: str) -> None:
    """Four steps at N = 4: R3 where there are experts, in every update row obeyed; a dense model
    needs no replay, and `auto` knows.
    """
    layers = MOE_LAYERS[preset]
    recipe: dict[str, Any] = {"replay": "R3" if layers else "auto", "steps": 4}
    state = jobs.run(job_spec(model={"path": f"preset:{preset}"}, recipe=recipe))
    for row in jobs.rows(state["id"])[1:]:
        tokens = row["tokens/prompt"] + row["tokens/response"] - 4 * 8
        assert row["replay/rows_obeyed"] == row["replay/rows_requested"] == len(layers) * tokens
        assert {key for key in row if key.startswith("routing/layer/")} == {
            f"routing/layer/{layer}" for layer in layers
        }
        assert 1e-7 < row["mismatch/k3"] < 0.1
    model = AutoModelForCausalLM.from_pretrained(state["model"])
    assert type(model).__name__ == PRESETS[preset].config["architectures"][0]
    assert torch.isfinite(model(input_ids=torch.tensor([[2, 3, 4]])).logits).all()

    loaded = {}
    while loaded.get("architecture") != type(model).__name__:  # the registry polls
        (engine,) = jobs.http.get("/v1/engines").raise_for_status().json()["engines"]
        loaded = engine["capabilities"]["loaded"]
    assert loaded.get("moe_layers", []) == layers
    assert (loaded.get("num_experts", 0), loaded.get("experts_per_token", 0)) == (
        (16, 2) if layers else (0, 0)
    )
