"""The torch engine keeps the contract: every row that it claims, for several kinds of model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from enginekit import CONFIG, engine_process, random_model
from kitruns import failed, told, tried
from typer.testing import CliRunner, Result

from keel_gateway.cli import app
from keel_rollout.conformance.reference import Model
from keel_rollout.conformance.verdicts import Status
from keel_rollout.engines.torch import create

RUNNER = CliRunner()


@pytest.mark.parametrize(
    ("preset", "dtype"),
    [
        ("tiny-qwen3-moe", "bfloat16"),
        ("tiny-deepseek-v3", "float32"),
        ("tiny-qwen3", "float32"),
    ],
)
def test_every_row_that_it_claims_passes(preset: str, dtype: str, tmp_path: Path) -> None:
    """A dense model's route rows are NOT CLAIMED; everything else passes, nothing is left out."""
    model = Model(f"preset:{preset}", dtype)
    outcomes = tried(lambda: create("cpu", 1), model, shared=tmp_path)
    assert not failed(outcomes), told(outcomes)
    unclaimed = {n for n, o in outcomes.items() if o.status is Status.NOT_CLAIMED}
    routes = {n for n in outcomes if n.rpartition("/")[2].startswith("routes-")}
    assert len(routes) == 14
    assert unclaimed == (set() if model.sparse else routes)
    assert not [n for n, o in outcomes.items() if o.status is Status.NOT_RUN]
    assert not list(tmp_path.iterdir()), "files of the update by reference are removed"


def keel(*arguments: str) -> Result:
    """`keel conformance`, in this process."""
    return RUNNER.invoke(app, ["conformance", *arguments])


def test_the_command_on_a_folder(tmp_path: Path) -> None:
    """JSON, exit status 0; without --shared the row by reference is NOT RUN, which is no pass.

    A folder that is none, a dtype that it lacks, an engine held by another run (until --force), a
    token that is too low: refused with 2, by name.
    """
    folder = tmp_path / "model"
    random_model(CONFIG, seed=3).save_pretrained(folder)
    with engine_process() as (address, _):
        for arguments, words in (  # before the engine loses its model
            (["--model", str(tmp_path)], "config.json and *.safetensors"),
            (["--model", "preset:none"], "tiny-qwen3-moe"),
            (["--dtype", "float16"], "--dtype: 'float16' is not valid; valid: float32, bfloat16"),
        ):
            done = keel(address, *arguments)
            assert done.exit_code == 2
            assert words in done.stderr
        command = ("--model", str(folder), "--only", "weights/*", "--only", "first/probe")
        done = keel(address, *command, "--json", "--run", "mine", "--token", "5")
        assert done.exit_code == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["ok"]
        assert found["engine"]["kind"] == "torch"
        assert found["counts"] == {"PASS": 5, "FAIL": 0, "NOT CLAIMED": 0, "NOT RUN": 1}
        by_name = {row["row"]: row for row in found["rows"]}
        assert "--shared" in by_name["weights/safetensors"]["note"]
        assert by_name["first/probe"]["numbers"][0]["value"] < 1e-5

        done = keel(address, *command)
        assert done.exit_code == 2
        assert "'mine' holds this one" in done.stderr
        done = keel(address, *command, "--force")
        assert done.exit_code == 2
        assert "--token: 1 is not valid; valid: a higher one" in done.stderr
        done = keel(address, *command, "--force", "--token", "6")
        assert done.exit_code == 0, done.stdout
        assert "PASS" in done.stdout
        assert "weights/only-grow: a lower number" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["127.0.0.1:9"], "the address of a running engine (UNAVAILABLE"),
        ([], "HOST:PORT"),
        (["127.0.0.1:9", "--only", "no/such"], "--only: 'no/such'"),
    ],
)
def test_what_cannot_be_run_ends_with_2(arguments: list[str], words: str) -> None:
    done = keel(*arguments)
    assert done.exit_code == 2
    assert words in done.stderr


def test_the_list_names_every_row() -> None:
    """78 rows, each with the sentence of the contract that it proves."""
    rows = json.loads(keel("--list", "--json").stdout)["rows"]
    assert len({row["row"] for row in rows}) == len(rows) == 78
    assert all(row["proves"] and row["contract"] for row in rows)
