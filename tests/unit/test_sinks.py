"""TensorBoard and W&B: what is written is read back with their own formats, and is the rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clikit import Gateway, job, row, sample
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from keel.record import Phase
from keel_gateway.client import GatewayClient
from keel_gateway.follow import View
from keel_gateway.sinks import tensorboard, wandb
from keel_gateway.sinks.base import logged, settled_step
from keel_gateway.sinks.tensorboard import TensorBoard
from keel_gateway.sinks.wandb import WeightsAndBiases

pytest_plugins = ["cli_fixtures"]

RUN = "first-abcdef"
ROWS = [
    {"step": 0, "accuracy/eval": 0.25},
    *(row(step, **{"mismatch/k3": step / 1000, "routing/layer/1": 0.5}) for step in range(1, 9)),
]
ROWS[4] |= {"accuracy/eval": 0.375, "entropy": None}


def serve(gateway: Gateway, phase: Phase, step: int) -> None:
    """A run at `step`, with every row up to it."""
    gateway.jobs(job(phase=phase, step=step))
    gateway.answers["GET", f"/v1/jobs/{RUN}/metrics"] = {
        "rows": [one for one in ROWS if one["step"] <= step],
        "evaluation": None,
    }
    pages = {"samples": [sample(4), sample(4, sample=1)]}

    def samples() -> dict[str, Any]:
        after = int(gateway.asked[-1][1].partition("after=")[2].partition("&")[0])
        return pages if after < 4 else {"samples": []}

    gateway.answers["GET", f"/v1/jobs/{RUN}/samples"] = samples


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Values by tag and step, by TensorBoard's own reader. A step that is there twice fails."""
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    tags: dict[str, dict[int, float]] = {}
    for tag in found.Tags()["scalars"]:
        events = found.Scalars(tag)
        tags[tag] = {event.step: event.value for event in events}
        assert len(tags[tag]) == len(events), f"{tag}: a step twice"
    return tags


def texts(folder: Path, tag: str) -> dict[int, list[str]]:
    found = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    found.Reload()
    return {
        event.step: [text.decode() for text in event.tensor_proto.string_val]
        for event in found.Tensors(tag)
    }


def expected(last: int) -> dict[str, dict[int, float]]:
    """The rows up to a step, by column and step; nulls are left out."""
    tags: dict[str, dict[int, float]] = {}
    for one in ROWS[: last + 1]:
        for name, value in one.items():
            if name != "step" and value is not None:
                tags.setdefault(name, {})[one["step"]] = float(value)
    return tags


def as_float32(tags: dict[str, dict[int, float]]) -> dict[str, dict[int, float]]:
    return {
        tag: {step: float(np.float32(value)) for step, value in values.items()}
        for tag, values in tags.items()
    }


def test_a_job_that_is_over_is_logged_into_tensorboard(
    keel: Callable[..., Any], gateway: Gateway, tmp_path: Path
) -> None:
    serve(gateway, Phase.SUCCEEDED, 8)
    result = keel("log", "first", "--tensorboard", str(tmp_path))
    assert result.exit_code == 0
    assert f"tensorboard --logdir {tmp_path}" in result.stdout
    assert scalars(tmp_path / RUN) == as_float32(expected(8))
    (spec,) = texts(tmp_path / RUN, "spec")[0]
    assert '"name": "first"' in spec
    first, second = texts(tmp_path / RUN, "samples")[4]
    assert "12*3=" in first
    assert "format 0.5" in first
    assert "gap mean 0.1750 max 0.3000 nats" in first
    assert "1 of 2 tokens with differing experts" in second


def test_a_running_job_is_logged_up_to_what_grows_no_more_and_later_what_is_missing(
    gateway: Gateway, tmp_path: Path
) -> None:
    """Laps of 4: at step 7 lap 0 is over and lap 1 is not, so that even lap 0 may grow."""
    folder = tmp_path / RUN
    with GatewayClient(gateway.url) as client:
        for phase, step, there in (
            (Phase.TRAINING, 3, -1),
            (Phase.TRAINING, 7, 0),
            (Phase.TRAINING, 8, 4),
            (Phase.SUCCEEDED, 8, 8),
            (Phase.SUCCEEDED, 8, 8),
        ):
            serve(gateway, phase, step)
            now = client.job(RUN)
            sink = TensorBoard(tmp_path, now)
            views = [View(now, client.metrics(RUN).rows, None)]
            assert list(logged(client, views, [sink])) == views
            assert sink.last_step == there
            sink.close()
            assert scalars(folder) == as_float32(expected(there) if there >= 0 else {})
    assert len(texts(folder, "samples")[4]) == 2


@pytest.mark.parametrize(("step", "settled"), [(0, -4), (4, 0), (7, 0), (8, 4)])
def test_settled_steps_of_a_running_job(step: int, settled: int) -> None:
    assert settled_step(job(phase=Phase.TRAINING, step=step)) == settled


def test_a_killed_writer_leaves_whole_rows(gateway: Gateway, tmp_path: Path) -> None:
    """Its file is cut in the middle of the last row: that row comes again, the others do not."""
    serve(gateway, Phase.SUCCEEDED, 8)
    with GatewayClient(gateway.url) as client:
        now = client.job(RUN)
        views = [View(now, ROWS, None)]
        sink = TensorBoard(tmp_path, now)
        list(logged(client, views, [sink]))
        sink.close()
        (file,) = (tmp_path / RUN).iterdir()
        file.write_bytes(file.read_bytes()[:-10])
        assert tensorboard.last_step(tmp_path / RUN) == 7
        sink = TensorBoard(tmp_path, now)
        list(logged(client, views, [sink]))
        sink.close()
    assert tensorboard.last_step(tmp_path / RUN) == 8
    assert scalars(tmp_path / RUN) == as_float32(expected(8))


def offline_rows(folder: Path) -> dict[str, dict[int, float]]:
    """Numbers by name and step of every offline run of W&B in a folder."""
    tags: dict[str, dict[int, float]] = {}
    for file in sorted(folder.glob(f"wandb/*-{RUN}/run-{RUN}.wandb")):
        for record in wandb.history(file):
            for item in record.history.item:
                name = item.key or "/".join(item.nested_key)
                value = json.loads(item.value_json)
                if isinstance(value, int | float) and not name.startswith(("_", "samples/")):
                    values = tags.setdefault(name, {})
                    assert record.history.step.num not in values, "a step twice"
                    values[record.history.step.num] = value
    return tags


def test_wandb_offline_has_the_rows_and_the_next_run_adds_what_is_missing(
    keel: Callable[..., Any], gateway: Gateway, tmp_path: Path
) -> None:
    """Float64: the numbers are the rows', to the last bit."""
    serve(gateway, Phase.TRAINING, 8)
    with GatewayClient(gateway.url) as client:
        now = client.job(RUN)
        sink = WeightsAndBiases("project", tmp_path, now, offline=True)
        list(logged(client, [View(now, client.metrics(RUN).rows, None)], [sink]))
        sink.close()
    assert offline_rows(tmp_path) == expected(4)
    serve(gateway, Phase.SUCCEEDED, 8)
    flags = ["--wandb", "project", "--wandb-dir", str(tmp_path), "--offline", "--json"]
    result = keel("log", "first", *flags)
    assert result.exit_code == 0, result.stderr
    (told,) = json.loads(result.stdout)["sinks"]
    assert (told["first_step"], told["last_step"]) == (5, 8)
    assert told["place"].startswith(f"wandb sync {tmp_path}")
    assert offline_rows(tmp_path) == expected(8)
    (table,) = tmp_path.glob("wandb/*/files/media/table/samples*.json")
    content = json.loads(table.read_text())
    assert content["columns"] == list(wandb.COLUMNS)
    prompt, response, reward, advantage, gap_mean, gap_max, differ = content["data"][0]
    assert (prompt, response, reward, advantage, differ) == ("12*3=", "36", 1.0, 0.25, 1)
    assert (gap_mean, gap_max) == (pytest.approx(0.175), pytest.approx(0.3))


def test_a_wandb_file_of_many_blocks_and_a_torn_end(gateway: Gateway, tmp_path: Path) -> None:
    """32 KiB blocks: a row of 300 long names goes over several; a cut file ends at a whole row."""
    now = job(phase=Phase.SUCCEEDED, step=8)
    sink = WeightsAndBiases("project", tmp_path, now, offline=True)
    names = [f"reward/part/{'x' * 200}{number}" for number in range(300)]
    for step in range(5):
        sink.write({"step": step} | dict.fromkeys(names, step + 0.5), [])
    sink.close()
    found = offline_rows(tmp_path)
    assert found == {name: {step: step + 0.5 for step in range(5)} for name in names}
    (file,) = tmp_path.glob(f"wandb/*-{RUN}/run-{RUN}.wandb")
    whole = file.read_bytes()
    assert len(whole) > 3 * 32768
    seen = set()
    for end in (*range(7, len(whole), 9973), len(whole)):
        file.write_bytes(whole[:end])
        seen.add(wandb.last_step(file))
    assert seen == {-1, 0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("flags", "extra"),
    [(["--tensorboard", "tb"], "tensorboard"), (["--wandb", "p"], "wandb")],
)
def test_a_missing_extra_is_named(
    keel: Callable[..., Any],
    gateway: Gateway,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    extra: str,
) -> None:
    serve(gateway, Phase.SUCCEEDED, 8)

    def missing(module: str) -> Any:
        raise ImportError(f"No module named {module!r}")

    monkeypatch.setattr("keel_gateway.sinks.base.import_module", missing)
    result = keel("log", "first", *flags)
    assert result.exit_code == 1
    assert f"pip install 'keel-gateway[{extra}]'" in result.stderr


def test_log_without_a_sink_is_refused(keel: Callable[..., Any], gateway: Gateway) -> None:
    serve(gateway, Phase.SUCCEEDED, 8)
    result = keel("log", "first")
    assert result.exit_code == 2
    assert "--tensorboard" in result.stderr
    assert "--wandb" in result.stderr
