"""`keel init`: what is chosen and why, and that the file is a job."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from userkit import user_data, user_model

from keel.spec import RunSpec, load_spec, parse_spec
from keel_gateway.init.choose import choose
from keel_gateway.init.data import look, looks_like_math
from keel_gateway.init.model import Model
from keel_gateway.init.write import job_file

pytest_plugins = ["cli_fixtures"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return user_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def init(keel: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Runs `keel init ARGUMENTS --out job.toml --json`: (what it says, the job)."""

    def run(*arguments: str) -> tuple[dict[str, Any], RunSpec]:
        out = tmp_path / "job.toml"
        result = keel("init", *arguments, "--out", str(out), "--json")
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout), load_spec(out)

    return run


def test_chat_messages_with_numbers_for_a_model_with_a_template(
    init: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    data = user_data(tmp_path / "My sums.jsonl")
    said, spec = init(str(data), "--model", str(model))
    assert said["warnings"] == ["prompts and 512 tokens of response do not fit: " + LONGEST]
    assert (spec.name, spec.model.path) == ("my-sums", str(model))
    assert spec.model.chat_template is None, "the model has its own"
    assert spec.task.file == str(data)
    assert [one.name for one in spec.task.verifiers] == ["math"]
    assert spec.task.chat is False, "prompts are messages already"
    assert spec.rollout.max_tokens == 512 - 32
    assert (spec.recipe.off_policiness, spec.recipe.replay) == (4, "auto")
    assert (spec.recipe.groups_per_minibatch, spec.recipe.steps) == (2, 40)
    assert spec.evaluation.every % 4 == spec.checkpoint.every % 4 == 0
    assert 'dataset = "My sums.jsonl"' in (tmp_path / "job.toml").read_text(), "they move together"


LONGEST = (
    "the longest prompt has 32 tokens, the model 512, which leaves 480; prompts that do not fit "
    "are left out of training (groups/void)"
)
"""<user>What is 10 + 3?<assistant>: 6 + 15 + 11 characters."""


def test_text_becomes_chat_for_a_model_with_a_template_and_not_for_one_without(
    init: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    data = user_data(tmp_path / "text.jsonl", chat=False)
    _, spec = init(str(data), "--model", str(model))
    assert spec.task.chat is True
    (tmp_path / "job.toml").unlink()
    bare = user_model(tmp_path / "bare", template="")
    _, spec = init(str(data), "--model", str(bare))
    assert spec.task.chat is False
    assert spec.model.chat_template is None


def test_chat_for_a_model_without_a_template_gets_a_plain_one(
    init: Callable[..., Any], tmp_path: Path
) -> None:
    bare = user_model(tmp_path / "bare", template="")
    said, spec = init(str(user_data(tmp_path / "chat.jsonl")), "--model", str(bare))
    assert spec.model.chat_template is not None
    assert "message['role']" in spec.model.chat_template
    assert (
        "put in the one that your model was trained with" in said["reasons"]["model.chat_template"]
    )


@pytest.mark.parametrize(
    ("answer", "flags", "verifier", "max_tokens"),
    [
        ("Paris", (), "exact", 32),
        ("\\frac{1}{2}", (), "math", 512),
        ("42", ("--verifier", "exact"), "exact", 32),
        ("a word of many letters " * 20, (), "exact", 512),
        ("x", ("--verifier", "my.module:judge"), "my.module:judge", 16),
    ],
)
def test_verifier_and_room_for_the_answer(
    init: Callable[..., Any],
    tmp_path: Path,
    answer: str,
    flags: tuple[str, ...],
    verifier: str,
    max_tokens: int,
) -> None:
    data = user_data(tmp_path / "data.jsonl", chat=False, answer=answer)
    _, spec = init(str(data), *flags)
    assert [one.name for one in spec.task.verifiers] == [verifier]
    assert spec.rollout.max_tokens == min(max_tokens, 512 - len("What is 10 + 3?"))


def test_without_a_model_it_says_what_that_is_good_for(
    init: Callable[..., Any], tmp_path: Path
) -> None:
    said, spec = init(str(user_data(tmp_path / "data.jsonl", chat=False)))
    assert spec.model.path == "preset:tiny-qwen3-moe"
    assert "learns nothing from rewards alone" in said["warnings"][0]
    assert "does not know 1 characters of yours: 'W'" in said["warnings"][0]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "an empty file"),
        ('{"prompt": "a", "answer": "1"}\n{"prompt": "b"}\n', "line 2, answer: missing"),
        ('{"prompt": "a", "answer": "1"}\n{"prompt": "b", "ans', "line 2"),
        ('{"prompt": 3, "answer": "1"}\n', "line 1, prompt: 3"),
    ],
)
def test_bad_data_is_one_clear_message_and_no_file(
    keel: Callable[..., Any], tmp_path: Path, content: str, says: str
) -> None:
    (tmp_path / "bad.jsonl").write_text(content)
    out = tmp_path / "job.toml"
    result = keel("init", str(tmp_path / "bad.jsonl"), "--out", str(out))
    assert result.exit_code == 2
    assert says in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--verifier", "maths"), "--verifier: 'maths' is not valid; valid: exact, math,"),
        (("--model", "nowhere"), "a Hugging Face folder on the trainer's disk"),
        (("--model", "."), "it lacks config.json, tokenizer.json, *.safetensors"),
    ],
)
def test_what_cannot_be_is_named(
    keel: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = keel("init", str(user_data(tmp_path / "data.jsonl")), *flags)
    assert result.exit_code == 2
    assert says in result.stderr
    assert not (tmp_path / "job.toml").exists()


def test_a_model_folder_that_transformers_does_not_read(
    keel: Callable[..., Any], tmp_path: Path, model: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "config.json").write_text('{"model_type": "no-such-family"}')
    data = str(user_data(tmp_path / "data.jsonl"))
    result = keel("init", data, "--model", str(broken), "--out", str(tmp_path / "j.toml"))
    assert result.exit_code == 2
    assert "a folder that transformers reads" in result.stderr


def test_nothing_is_overwritten(keel: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "job.toml"
    out.write_text("mine")
    result = keel("init", str(user_data(tmp_path / "data.jsonl")), "--out", str(out))
    assert result.exit_code == 2
    assert "this one exists" in result.stderr
    assert out.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "job.toml"]


def big(**changes: Any) -> Model:
    """An 8 B dense model, and changes."""
    values: dict[str, Any] = {
        "path": Path("/models/big"),
        "architecture": "Qwen3ForCausalLM",
        "parameters": 8_000_000_000,
        "experts": 0,
        "positions": 32768,
        "chat_template": True,
        "prompt_tokens": 200,
    }
    return Model(**(values | changes))


@pytest.mark.parametrize(
    ("rows", "model", "groups", "steps", "rate", "dtype"),
    [
        (4096, big(), 64, 64, 1e-6, "bfloat16"),
        (4096, big(experts=128), 64, 64, 1e-6, "bfloat16"),
        (100, big(parameters=500_000_000), 8, 12, 5e-6, "float32"),
    ],
)
def test_values_follow_rows_and_size(
    tmp_path: Path, rows: int, model: Model, groups: int, steps: int, rate: float, dtype: str
) -> None:
    data = look(user_data(tmp_path / "data.jsonl", rows), None)
    chosen = choose(data, model, None, None)
    assert (chosen.groups, chosen.steps) == (groups, steps)
    assert (chosen.learning_rate, chosen.dtype) == (rate, dtype)
    assert chosen.off_policiness == (4 if model.experts else 1)
    assert chosen.warnings == []


@pytest.mark.parametrize("experts", [0, 128])
@pytest.mark.parametrize("chat", [True, False])
def test_every_choice_has_a_reason_and_the_keys_to_try_are_keys(
    tmp_path: Path, experts: int, chat: bool
) -> None:
    """Each value that was chosen stands under a comment or beside one; the file with every `#>`
    line made a key is a job as well."""
    data = look(user_data(tmp_path / "data.jsonl", chat=chat), None)
    model = big(experts=experts, chat_template=not chat)
    text = job_file(data, model, choose(data, model, None, None), tmp_path / "job.toml")
    lines = text.splitlines()
    for before, line in pairwise(lines):
        key = line.partition(" =")[0]
        if " = " in line and not line.startswith("#") and key not in ("name", "dataset"):
            assert before.startswith("# ") or "  # " in line, line
        assert len(line) <= 100 or "chat_template" in line, line
    tried = re.sub("^#> ", "", text, flags=re.MULTILINE)
    assert tried.count("#>") == 1, "of the sentence that explains them"
    job = tomllib.loads(tried)
    job["task"]["dataset"] = str(data.path)
    spec = parse_spec(job)
    assert spec.engine.quantize == "fp8"
    assert spec.evaluation.k == 8


@pytest.mark.parametrize(
    ("answer", "is_math"),
    [
        *(
            (text, True)
            for text in ("5", "-3.5", "12,000", "1/2", "(1, 2)", "x = 4", "2^10", "50%")
        ),
        *((text, True) for text in ("\\frac{1}{2}", "$x$", "\\boxed{3}", "\\sqrt{2}", "3:15")),
        *((text, False) for text in ("Paris", "yes", "the 3 bears", "", "B", "route 66", "a b c")),
    ],
)
def test_what_looks_like_mathematics(answer: str, is_math: bool) -> None:
    assert looks_like_math(answer) is is_math
