"""A job on files of one's own, through the whole stack: chat messages, math, two sets, k = 4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jobs import Jobs
from transformers import AutoTokenizer

from keel.spec import load_spec

EXAMPLE = Path(__file__).parents[2] / "examples" / "word-problems"


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    """The example, shortened to two laps."""
    spec = load_spec(EXAMPLE / "job.toml").model_dump(mode="json")
    spec["cold_start"] |= {"steps": 40, "batch_size": 16}
    spec["recipe"] |= {"steps": 4, "groups_per_minibatch": 4}
    spec["evaluation"] |= {"every": 2, "samples": 6}
    return spec


def test_every_verifier_and_every_set_has_its_columns(jobs: Jobs, spec: dict[str, Any]) -> None:
    state = jobs.run(spec)
    rows = jobs.rows(state["id"])
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    for row in rows[1:]:
        summed = row["reward/part/math"] + 0.1 * row["reward/part/sum_written"]
        assert row["reward/mean"] == pytest.approx(summed, abs=1e-6)
        assert 0 < row["reward/part/math/found"] <= 1
    for row in rows[::2]:
        assert row["accuracy/eval"] == row["eval/test/avg@4"]
        for name in ("test", "held_out"):
            assert 0 <= row[f"eval/{name}/pass@4"] <= 1
            assert row[f"eval/{name}/avg@4"] <= 1.1
    samples = jobs.http.get(f"/v1/jobs/{state['id']}/samples").json()["samples"]
    assert samples[0]["prompt"].startswith("system: write the sum, then its result.\nuser: ")
    assert samples[0]["prompt"].endswith("\nassistant: ")
    assert {"math", "sum_written"} <= samples[0]["reward_parts"].keys()
    tokenizer = AutoTokenizer.from_pretrained(state["model"])
    messages = json.loads((EXAMPLE / "test.jsonl").read_text().splitlines()[0])["prompt"]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.startswith("system: write the sum")


def test_a_fault_beyond_the_gateways_look_fails_the_job_before_training(
    jobs: Jobs, spec: dict[str, Any], tmp_path: Path
) -> None:
    """Line 1,500 of 2,000 has no answer."""
    rows = [{"prompt": f"{i}+1=", "answer": i + 1} for i in range(2000)]
    del rows[1499]["answer"]
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"dataset": str(file), "verifier": "math"}
    state = jobs.wait(jobs.submit(spec | {"task": task}))
    assert (state["phase"], state["step"]) == ("FAILED", 0)
    assert state["error"].startswith(
        f"task.dataset: {file}: 1 of 2,000 lines cannot be used: line 1500, answer: missing"
    )
