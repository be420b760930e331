"""`keel export` of a job that ran: the final model, and checkpoints of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from jobs import model_bytes
from transformers import AutoModelForCausalLM, AutoTokenizer

from keel_gateway.stack import Stack


def test_the_last_checkpoint_is_the_final_model_and_an_earlier_one_loads(
    stack: Stack, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    def export(name: str, *flags: str) -> Path:
        keel = Path(sys.executable).with_name("keel")
        out = tmp_path / name
        command = [keel, "export", undisturbed["id"], "--out", out, "--url", stack.url, *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert str(out) in done.stdout
        return out

    final, last, before = export("final"), export("last", "--step", "12"), export("8", "--step=8")
    for folder in (final, last):
        assert (folder / "model.safetensors").read_bytes() == model_bytes(undisturbed)
    assert (before / "model.safetensors").read_bytes() != model_bytes(undisturbed)
    model = AutoModelForCausalLM.from_pretrained(before)
    batch = AutoTokenizer.from_pretrained(before)("12*3=", return_tensors="pt")
    assert torch.isfinite(model(input_ids=batch["input_ids"]).logits).all()
