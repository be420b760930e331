"""Which engines are started on this machine, in which Python, and keys of a job as flags."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from clikit import Gateway, job

from keel.errors import InvalidField
from keel.spec import EngineSpec, RunSpec, load_spec
from keel_gateway import cli, doctor
from keel_gateway.engine_kinds import VLLM_PYTHON, engines_of, parse_engines
from keel_gateway.stack import Stack
from keel_gateway.supervisor import StackError

pytest_plugins = ["cli_fixtures"]


@pytest.mark.parametrize(
    ("text", "kinds", "found"),
    [
        ("1", ("torch",), ("torch",)),
        ("3", ("torch",), ("torch",) * 3),
        ("3", ("torch", "vllm"), ("torch", "vllm", "torch")),
        ("vllm", ("torch",), ("vllm",)),
        ("torch=2, vllm", ("torch",), ("torch", "torch", "vllm")),
        ("vllm=1,torch=1", ("torch",), ("vllm", "torch")),
        ("torch, gpu-7:50051,gpu-7:50052", ("torch",), ("torch", "gpu-7:50051", "gpu-7:50052")),
    ],
)
def test_engines_by_number_or_by_kind(
    text: str, kinds: tuple[str, ...], found: tuple[str, ...]
) -> None:
    assert parse_engines(text, kinds) == found


@pytest.mark.parametrize("text", ["gpu-7:", ":50051", "gpu-7:0", "gpu-7:65536", "torch,a:b"])
def test_an_address_is_a_host_and_a_port(text: str) -> None:
    with pytest.raises(InvalidField, match=r"--engines: .*HOST:PORT"):
        parse_engines(text)


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "65", "x", "torch=0", "torch=x", "torch,torch", "torch=40,vllm=40", ","]
)
def test_what_is_neither_is_refused(text: str) -> None:
    with pytest.raises(InvalidField, match=r"--engines: .* such as torch=1,vllm=1"):
        parse_engines(text)


def test_a_job_says_which_engines_it_wants() -> None:
    assert engines_of(EngineSpec()) == ("torch",)
    assert engines_of(EngineSpec(kind=("vllm", "torch"))) == ("vllm", "torch")
    assert engines_of(EngineSpec(kind=("torch", "vllm"), count=3)) == ("torch", "vllm", "torch")
    for ask in (engines_of, lambda asked: parse_engines("2", asked.kinds)):
        with pytest.raises(InvalidField, match=r"engine.kind: 'mine'.*torch, vllm"):
            ask(EngineSpec(kind="mine"))


def test_each_engine_runs_in_the_python_of_its_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.touch(mode=0o755)
    monkeypatch.setenv(VLLM_PYTHON, str(python))
    stack = Stack(tmp_path, engines=("torch", "vllm", "gpu-7:50051", "torch"))
    services = {service.name: service.argv for service in stack._services()}
    engines = {name: argv for name, argv in services.items() if name.startswith("engine-")}
    assert list(engines) == ["engine-0", "engine-1", "engine-2"]
    assert [argv[0] for argv in engines.values()] == [sys.executable, str(python), sys.executable]
    assert [argv[4] for argv in engines.values()] == ["torch", "vllm", "torch"]
    flags = services["gateway"]
    told = flags[list(flags).index("--engines") + 1].split(",")
    started = [f"127.0.0.1:{stack.ports[name]}" for name in engines]
    assert told == [*started, "gpu-7:50051"], "one that runs already is told of, not started"


def test_without_its_environment_vllm_is_not_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VLLM_PYTHON, raising=False)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    with (
        pytest.raises(StackError, match=rf"{tmp_path}/.venv-vllm/bin/python .*make engine-vllm"),
        Stack(tmp_path, engines=("vllm",)),
    ):
        pass
    assert not list(tmp_path.glob("logs/*")), "nothing was started"


def test_doctor_says_how_to_get_vllm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gateway: Gateway
) -> None:
    monkeypatch.setenv(VLLM_PYTHON, str(tmp_path / "python"))
    check = doctor._vllm()
    assert (check.state, "make engine-vllm" in check.remedy) == ("warn", True)
    assert str(tmp_path / "python") in check.found
    # a Python that has none of it: this one, without what is installed
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    (tmp_path / "python").chmod(0o755)
    check = doctor._vllm()
    assert (check.state, check.found) == (
        "warn",
        f"{tmp_path}/python cannot run it: vllm is not installed there",
    )


def test_settings_replace_keys_of_the_file(file: str) -> None:
    settings = [
        "name=second",
        "engine.kind=vllm",
        'engine.dtype="bfloat16"',
        "recipe.steps = 16",
        "recipe.learning_rate=1e-3",
        "recipe.clip=false",
        'evaluation.sets=[{name="a", dataset="rows.jsonl"}]',
    ]
    spec = load_spec(Path(file), settings)
    assert (spec.name, spec.engine.kind, spec.engine.dtype) == ("second", "vllm", "bfloat16")
    assert (spec.recipe.steps, spec.recipe.learning_rate, spec.recipe.clip) == (16, 1e-3, False)
    assert spec.evaluation.sets[0].dataset == str(Path(file).parent / "rows.jsonl")
    assert spec.recipe.off_policiness == 4, "what is not set stays"
    assert load_spec(Path(file), ['engine.kind=["torch","vllm"]']).engine.kinds == ("torch", "vllm")


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("engine", "--set: 'engine'"),
        ("=1", "--set: '=1'"),
        ("engine..kind=vllm", "--set: 'engine..kind=vllm'"),
        ("name.first=1", "name is none"),
        ("recipe.stepz=1", "recipe.stepz: 1 is not valid; valid: no such key"),
        ("recipe.steps=many", "recipe.steps: 'many'"),
        ("recipe.steps=[8", "recipe.steps: '[8'"),
        ("recipe.steps=8\nclip=false", "recipe.steps: '8\\nclip=false'"),
    ],
)
def test_settings_that_are_wrong_are_named(
    keel: Callable[..., Any], gateway: Gateway, file: str, setting: str, says: str
) -> None:
    result = keel("submit", file, "--set", setting)
    assert result.exit_code == 2
    assert says in result.complained
    assert gateway.asked == []


def test_submit_sends_what_was_set(keel: Callable[..., Any], gateway: Gateway, file: str) -> None:
    gateway.answers["POST", "/v1/jobs"] = (201, job().model_dump(mode="json"))
    assert keel("submit", file, "--set", "engine.count=2").exit_code == 0
    assert gateway.asked[0][2]["engine"] == {"count": 2}


@pytest.mark.parametrize(
    ("flags", "started"),
    [
        ((), ("torch", "vllm")),
        (("--engines", "3"), ("torch", "vllm", "torch")),
        (("--engines", "torch"), ("torch",)),
    ],
)
def test_run_starts_what_the_job_asks_for_unless_told(
    keel: Callable[..., Any],
    file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    started: tuple[str, ...],
) -> None:
    asked: list[tuple[RunSpec, Any]] = []

    def run_local(spec: RunSpec, *_: Any, engines: Any, **__: Any) -> Any:
        asked.append((spec, engines))
        return job(phase="SUCCEEDED")

    monkeypatch.setattr(cli, "run_local", run_local)
    setting = 'engine.kind=["torch","vllm"]'
    done = keel("run", file, "--out", str(tmp_path / "o"), "--set", setting, *flags, "--json")
    assert json.loads(done.stdout)["event"] == "done"
    assert asked[0][0].engine.kinds == ("torch", "vllm")
    assert asked[0][1] == started
