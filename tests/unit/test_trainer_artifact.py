"""The base artifact: a preset loads in transformers; what is no model folder is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from keel.errors import InvalidField, ModelError
from keel.presets import END, PAD
from keel.spec import RunSpec, parse_spec
from keel_trainer.artifact import check_model_folder, prepare_artifact


def spec(**changes: Any) -> RunSpec:
    data = {
        "name": "t",
        "model": {"path": "preset:tiny-qwen3-moe"},
        "recipe": {"steps": 1},
    }
    return parse_spec(data | changes)


def test_preset_folder_loads_in_transformers(tmp_path: Path) -> None:
    folder = prepare_artifact(spec(), tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.norm_topk_prob is True
    assert model.config.tie_word_embeddings is False
    attention = 2 * 128 * 128 + 2 * 128 * 64 + 2 * 32
    experts = 16 * 3 * 128 * 64 + 16 * 128
    expected = 2 * 64 * 128 + 2 * (attention + experts + 2 * 128) + 128
    assert sum(p.numel() for p in model.parameters()) == expected == 905_984
    ids = tokenizer("347*6=")["input_ids"]
    assert len(ids) == 6
    assert tokenizer.decode([*ids, tokenizer.eos_token_id]) == "347*6=" + END
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == (PAD, 0)


def test_the_seed_decides_every_bit(tmp_path: Path) -> None:
    def weights(name: str, seed: int) -> bytes:
        torch.manual_seed(len(name))
        folder = prepare_artifact(spec(seed=seed), tmp_path / name)
        return (folder / "model.safetensors").read_bytes()

    assert weights("a", 1) == weights("bb", 1) != weights("c", 2)


def test_what_is_no_model_folder_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.path: .*nowhere.* is not a folder"):
        check_model_folder(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"lacks config\.json, tokenizer\.json, \*\.safetensors"):
        check_model_folder(tmp_path)
    folder = prepare_artifact(spec(), tmp_path / "base")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"lacks tokenizer\.json;"):
        prepare_artifact(spec(model={"path": str(folder)}), tmp_path / "x")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "config.json").write_text('{"model_type": "no-such-architecture"}')
    with pytest.raises(ModelError, match="no-such-architecture"):
        check_model_folder(folder)


def test_responses_longer_than_the_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidField, match=r"rollout\.max_tokens: 512 .* below the model's 512"):
        prepare_artifact(spec(rollout={"max_tokens": 512}), tmp_path / "base")
