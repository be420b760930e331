"""A checkpoint as a Hugging Face folder: the bits that training has, or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from keel.errors import IntegrityError, InvalidField
from keel.spec import RunSpec, parse_spec
from keel_trainer.artifact import prepare_artifact, save_model
from keel_trainer.backends.torch import TorchBackend
from keel_trainer.checkpoint import Checkpoints, Progress
from keel_trainer.export import export, main

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}="


def spec(dtype: str) -> RunSpec:
    return parse_spec(
        {
            "name": "small",
            "model": {"path": "preset:tiny-qwen3-moe", "dtype": dtype},
            "recipe": {"steps": 4},
        }
    )


def trained(tmp_path: Path, dtype: str) -> tuple[Path, Path, TorchBackend]:
    """A base with a chat template, a checkpoint of other weights, and the model that has them."""
    artifact = prepare_artifact(spec(dtype), tmp_path / "base")
    (artifact / "chat_template.jinja").write_text(TEMPLATE)
    backend = TorchBackend.from_pretrained(artifact, dtype=dtype)
    state = backend.state_dict()
    generator = torch.Generator().manual_seed(1)
    for name in [name for name in state if name.startswith("master/")]:
        state[name] += 0.01 * torch.randn(state[name].shape, generator=generator)
    backend.load_state_dict(state)
    progress = Progress(attempt=0, cold_start_step=0, step=4)
    return artifact, Checkpoints(tmp_path / "checkpoints", 1).save(progress, state), backend


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_exported_checkpoint_is_the_model_that_training_would_save(
    tmp_path: Path, dtype: str
) -> None:
    artifact, checkpoint, backend = trained(tmp_path, dtype)
    expected = save_model(backend, artifact, tmp_path / "expected")
    out = export(artifact, checkpoint, tmp_path / "deep" / "out", dtype=dtype)
    names = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in out.iterdir()) == names
    assert {"config.json", "generation_config.json", "tokenizer.json"} < set(names)
    for name in names:
        assert (out / name).read_bytes() == (expected / name).read_bytes(), name
    base = AutoModelForCausalLM.from_pretrained(artifact)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == getattr(torch, dtype)
    moved = (model.lm_head.weight.float() - base.lm_head.weight.float()).abs().mean()
    assert 0.005 < moved < 0.02
    tokenizer = AutoTokenizer.from_pretrained(out)
    messages = [{"role": "user", "content": "12*3"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "12*3="


def test_a_chat_template_of_the_job_goes_along(tmp_path: Path) -> None:
    artifact, checkpoint, _ = trained(tmp_path, "float32")
    own = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
    out = tmp_path / "out"
    paths = ["--artifact", str(artifact), "--checkpoint", str(checkpoint), "--out", str(out)]
    assert main([*paths, "--chat-template", own]) == 0
    messages = [{"role": "user", "content": "12*3"}]
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "[12*3]"


def test_an_empty_folder_is_taken_and_a_full_one_is_not(tmp_path: Path) -> None:
    artifact, checkpoint, _ = trained(tmp_path, "float32")
    (tmp_path / "out").mkdir()
    out = export(artifact, checkpoint, tmp_path / "out", dtype="float32")
    before = sorted(out.iterdir())
    with pytest.raises(InvalidField, match="--out"):
        export(artifact, checkpoint, out, dtype="float32")
    assert sorted(out.iterdir()) == before
    assert not list(tmp_path.glob(".*"))


def test_a_damaged_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    artifact, checkpoint, _ = trained(tmp_path, "float32")
    state = checkpoint / "state.safetensors"
    data = bytearray(state.read_bytes())
    data[-1] ^= 1
    state.write_bytes(data)
    with pytest.raises(IntegrityError, match="differs from its hash"):
        export(artifact, checkpoint, tmp_path / "out", dtype="float32")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["shape", "name"])
def test_a_checkpoint_of_another_model_leaves_nothing(tmp_path: Path, change: str) -> None:
    artifact, _, backend = trained(tmp_path, "float32")
    state = backend.state_dict()
    weight = state.pop("master/lm_head.weight")
    if change == "shape":
        state["master/lm_head.weight"] = weight[:-1].clone()
    progress = Progress(attempt=0, cold_start_step=0, step=8)
    checkpoint = Checkpoints(tmp_path / "others", 1).save(progress, state)
    with pytest.raises(IntegrityError, match="does not fit"):
        export(artifact, checkpoint, tmp_path / "out", dtype="float32")
    assert not (tmp_path / "out").exists()


def test_what_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--artifact", str(tmp_path), "--checkpoint", str(tmp_path), "--out"]
    assert main([*arguments, str(tmp_path / "out")]) == 2
    assert "progress.json" in capsys.readouterr().err
