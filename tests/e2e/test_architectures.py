"""A whole job on every preset: cold start, laps, replay, evaluation, final model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import SPARSE, tiny_model
from jobs import Jobs, job_spec
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PhimoeConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
)

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


def folder_of(model: PreTrainedModel, taught: dict[str, Any], folder: Path) -> dict[str, Any]:
    """[model] of a folder of one's own, with the presets' tokenizer."""
    model.config.eos_token_id, model.config.pad_token_id = 1, 0
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(taught["path"]).save_pretrained(folder)
    return {"path": str(folder)}


def test_a_deepseek_folder_with_selection_biases_trains_under_r3(
    jobs: Jobs, taught: dict[str, Any], tmp_path: Path
) -> None:
    """Latent queries; biases that decide who is chosen, and come out as they were put in."""
    model = folder_of(tiny_model(SPARSE["deepseek-v3-lora"]), taught, tmp_path)
    spec = job_spec(model=model, engine={"quantize": "none"}, recipe={"steps": 4})
    state = jobs.run(spec)
    for row in jobs.rows(state["id"])[1:]:
        assert row["replay/rows_obeyed"] == row["replay/rows_requested"] > 0
        # engine and trainer choose by the same biases
        assert row["routing/pair_disagree"] < 0.01
        assert row["mismatch/k3"] < 1e-6
    before = load_file(tmp_path / "model.safetensors")
    after = load_file(Path(state["model"]) / "model.safetensors")
    biases = [name for name in after if name.endswith("e_score_correction_bias")]
    assert len(biases) == 2
    assert all(torch.equal(after[name], before[name]) for name in biases)


_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "vocab_size": 64,
}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (PhimoeConfig(**_SMALL), ["PhimoeTopKRouter", "a rule that replay does not know"]),
        (Qwen2MoeConfig(**_SMALL), ["Qwen2MoeForCausalLM", "MixtralForCausalLM"]),
    ],
)
def test_what_trainer_or_engine_does_not_know_fails_its_run_with_words(
    jobs: Jobs, taught: dict[str, Any], tmp_path: Path, config: Any, words: list[str]
) -> None:
    """A router of another rule stops in the trainer, an architecture too many at the engine."""
    model = folder_of(AutoModelForCausalLM.from_config(config), taught, tmp_path)
    state = jobs.wait(jobs.submit(job_spec(model=model)))
    assert state["phase"] == "FAILED"
    assert all(word in state["error"] for word in words), state["error"]
