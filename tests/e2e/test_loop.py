"""The loop, whole: job in by REST, final model out, every metric on the way."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import redis
import torch
from jobs import Jobs, job_spec, model_bytes
from proxy import Proxy
from transformers import AutoModelForCausalLM, AutoTokenizer

from keel.metrics import COLUMNS
from keel.queue import demos_key, groups_key
from keel_gateway.stack import Stack


def test_every_step_has_a_row_with_every_metric(jobs: Jobs, undisturbed: dict[str, Any]) -> None:
    rows = jobs.rows(undisturbed["id"])
    assert [row["step"] for row in rows] == list(range(13))
    assert [row["step"] for row in rows if "accuracy/eval" in row] == [0, 4, 8, 12]
    for row in rows[1:]:
        by_layer = ["routing/layer/0", "routing/layer/1"]
        parts = {"reward/part/multiplication", "reward/part/multiplication/formed"}
        (engine,) = undisturbed["engines"]
        assert row[f"engine/groups/{engine}"] == 4
        assert row[f"engine/k3/{engine}"] == pytest.approx(row["mismatch/k3"], rel=1e-6)
        more = {f"engine/{what}/{engine}" for what in ("groups", "k3")}
        columns = row.keys() - {"eval/held_out/avg@1", "eval/held_out/pass@1"} - more
        assert columns | {"accuracy/eval"} == COLUMNS.keys() | set(by_layer) | parts
        assert row["reward/part/multiplication"] == row["reward/mean"]
        mean = sum(row[layer] for layer in by_layer) / 2
        assert row["routing/pair_disagree"] == pytest.approx(mean, rel=1e-12)
        assert all(isinstance(value, int | float) for value in row.values()), row
        assert row["lap"] == row["policy_version"] == (row["step"] - 1) // 4
        assert row["version_lag/max"] == 0
        assert row["tokens/trained"] == row["tokens/response"] > 0


def test_replay_is_requested_and_obeyed(jobs: Jobs, undisturbed: dict[str, Any]) -> None:
    for row in jobs.rows(undisturbed["id"])[1:]:
        # 2 MoE layers, a row for every token but each sequence's last
        tokens = row["tokens/prompt"] + row["tokens/response"] - 4 * 8
        assert row["replay/rows_obeyed"] == row["replay/rows_requested"] == 2 * tokens


def test_the_fp8_engine_differs_and_the_first_step_is_not_stale(
    jobs: Jobs, undisturbed: dict[str, Any]
) -> None:
    rows = jobs.rows(undisturbed["id"])[1:]
    assert sum(row["grad_norm"] > 0 for row in rows) >= 6
    for row in rows:
        assert 1e-6 < row["mismatch/k3"] < 0.1
        assert 0 < row["routing/pair_disagree"] < 0.2
        if (row["step"] - 1) % 4 == 0:
            # same weights, same micro-batches, same routes: pi_theta = pi_old to the last bit
            assert row["staleness/k3"] == 0
            assert row["staleness/ratio_max"] == 1
    assert max(row["staleness/k3"] for row in rows) > 1e-5


def test_an_fp4_engine_is_coarser_and_replay_still_obeyed(
    jobs: Jobs, undisturbed: dict[str, Any], taught: dict[str, Any]
) -> None:
    """One lap of the same prompts and weights as `undisturbed`, which has fp8."""
    spec = job_spec(model=taught, engine={"quantize": "fp4"}, recipe={"steps": 4})
    fp4 = jobs.rows(jobs.run(spec)["id"])[1:]
    fp8 = jobs.rows(undisturbed["id"])[1:5]
    for column in ("mismatch/k3", "routing/pair_disagree"):
        assert sum(row[column] for row in fp4) > 1.5 * sum(row[column] for row in fp8), column
    for row in fp4:
        assert 0 < row["mismatch/k3"] < 5
        assert row["replay/rows_obeyed"] == row["replay/rows_requested"] > 0


def test_everything_is_acknowledged(stack: Stack, undisturbed: dict[str, Any]) -> None:
    with redis.Redis.from_url(stack.redis_url) as client:
        assert client.xlen(groups_key(undisturbed["id"])) == 0
        assert client.xlen(demos_key(undisturbed["id"])) == 0


def test_the_final_model_loads_in_transformers(undisturbed: dict[str, Any]) -> None:
    folder = Path(undisturbed["model"])
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer("12*3=", return_tensors="pt")
    logits = model(input_ids=batch["input_ids"]).logits
    assert logits.shape == (1, 5, 64)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize(
    ("replay", "off_policiness", "rows_requested"),
    [("none", 4, False), ("R2", 2, True), ("auto", 1, False), ("R3", 1, True)],
)
def test_every_replay_runs(
    jobs: Jobs, replay: str, off_policiness: int, rows_requested: bool
) -> None:
    spec = job_spec(recipe={"replay": replay, "off_policiness": off_policiness, "steps": 4})
    state = jobs.run(spec)
    for row in jobs.rows(state["id"])[1:]:
        assert (row["replay/rows_requested"] > 0) == rows_requested
        assert row["replay/rows_obeyed"] == row["replay/rows_requested"]
        assert row["routing/pair_disagree"] > 0
        assert math.isfinite(row["mismatch/k1"])


def test_bfloat16_training_against_a_float32_engine(jobs: Jobs) -> None:
    spec = job_spec(model={"dtype": "bfloat16"}, engine={"quantize": "none"}, recipe={"steps": 4})
    state = jobs.run(spec)
    model = AutoModelForCausalLM.from_pretrained(state["model"])
    assert model.dtype == torch.bfloat16
    assert 0 < jobs.rows(state["id"])[1]["mismatch/logprob_abs_mean"] < 0.05


def test_same_spec_and_seed_give_the_same_bits_whatever_was_delayed(
    undisturbed: dict[str, Any], taught: dict[str, Any], tmp_path: Path
) -> None:
    """A second stack, with random delays between engine, collector, queue and trainer."""
    proxies: list[Proxy] = []

    def delayed(name: str, address: str) -> str:
        if name == "gateway":
            return address
        proxies.append(Proxy(address, seed=len(proxies), chance=0.3).__enter__())
        return proxies[-1].address

    try:
        with Stack(tmp_path, via=delayed) as stack:
            state = Jobs(stack.url).run(job_spec(model=taught))
        assert model_bytes(state) == model_bytes(undisturbed)
    finally:
        for proxy in proxies:
            proxy.__exit__(None, None, None)
    assert len(proxies) == 3, "Redis, engine and trainer"
    assert sum(proxy.delayed for proxy in proxies) > 100


def test_another_seed_gives_other_bits(
    jobs: Jobs, undisturbed: dict[str, Any], taught: dict[str, Any]
) -> None:
    assert model_bytes(jobs.run(job_spec(seed=4, model=taught))) != model_bytes(undisturbed)
