"""A user's own model and data, from `keel init` to an exported model, by commands alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from userkit import TEMPLATE, user_data, user_model

from keel_gateway.init.model import PLAIN_TEMPLATE
from keel_gateway.stack import Stack


def keel(*arguments: str | Path) -> str:
    """What a command says on stdout, once it has ended with 0."""
    command = [Path(sys.executable).with_name("keel"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check_model(folder: Path, template: str) -> None:
    """transformers loads it, with this chat template, and it answers a chat."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == template
    assert (folder / "generation_config.json").is_file()
    batch = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 2 + 2?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    response = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert response.shape[1] > batch["input_ids"].shape[1]
    assert torch.isfinite(model(**batch).logits).all()


def test_init_run_export(tmp_path: Path) -> None:
    """Chat messages, the math verifier, 4 steps."""
    model, data = user_model(tmp_path / "mine"), user_data(tmp_path / "sums.jsonl")
    job, out = tmp_path / "job.toml", tmp_path / "out"
    keel("init", data, "--model", model, "--out", job, "--steps", "4")
    events = keel("run", job, "--out", out, "--json").splitlines()
    done = json.loads(events[-1])
    assert done["job"]["phase"] == "SUCCEEDED"
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert all(row["replay/rows_obeyed"] == row["replay/rows_requested"] > 0 for row in rows[1:])
    keel("export", out, "--out", tmp_path / "exported")
    check_model(tmp_path / "exported", TEMPLATE)
    keel("export", out, "--step", "4", "--out", tmp_path / "checkpoint")
    same = (tmp_path / name / "model.safetensors" for name in ("exported", "checkpoint"))
    assert len({path.read_bytes() for path in same}) == 1
    assert "What is" in keel("samples", out)


def test_init_submit_export(stack: Stack, tmp_path: Path) -> None:
    """The same through a gateway, for a model whose folder has no chat template."""
    model = user_model(tmp_path / "mine", template="")
    data = user_data(tmp_path / "sums.jsonl")
    job = tmp_path / "job.toml"
    keel("init", data, "--model", model, "--out", job, "--steps", "4")
    url = ("--url", stack.url)
    run = json.loads(keel("submit", job, "--json", *url))["id"]
    assert "SUCCEEDED" in keel("watch", run, *url)
    keel("export", run, "--out", tmp_path / "exported", *url)
    check_model(tmp_path / "exported", PLAIN_TEMPLATE)
    keel("export", run, "--step", "4", "--out", tmp_path / "checkpoint", *url)
    check_model(tmp_path / "checkpoint", PLAIN_TEMPLATE)
