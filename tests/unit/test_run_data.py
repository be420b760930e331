"""A job's files together: what is trained on, in which order, what never is, what is evaluated."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from collector_peers import make_artifact, make_spec

from keel.codec import to_ndarray
from keel.errors import DatasetError, InvalidField
from keel.spec import RunSpec, load_spec
from keel_rollout.collector.data import RunData
from keel_rollout.collector.plan import Plan
from keel_rollout.collector.produce import evaluation_columns
from keel_rollout.collector.tasks.multiplication import is_held_out
from keel_rollout.collector.text import TextCodec


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def problems(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": f"{i}+1=", "answer": i + 1, "n": i} for i in range(first, first + count)]


def spec_of(tmp_path: Path, rows: list[dict[str, Any]], **sections: dict[str, Any]) -> RunSpec:
    """8 slots a lap, 2 laps."""
    task = {"dataset": write(tmp_path / "d.jsonl", rows), "verifier": "exact"}
    return make_spec(**{**sections, "task": task | sections.get("task", {})})


@pytest.fixture
def text(tmp_path: Path) -> TextCodec:
    return TextCodec.from_artifact(make_artifact(tmp_path / "base"), "{{ messages[-1].content }}")


def lap(spec: RunSpec, text: TextCodec, number: int, attempt: int = 0) -> list[int]:
    slots = Plan("r", spec, RunData(spec), text).lap_slots(attempt, number)
    return [slot.problem.fields["n"] for slot in slots]


def test_every_row_once_an_epoch_across_laps(tmp_path: Path, text: TextCodec) -> None:
    """12 rows, 8 slots a lap: three laps are two epochs, and lap 1 spans both."""
    spec = spec_of(tmp_path, problems(12), task={"held_out": 0})
    asked = [row for number in range(3) for row in lap(spec, text, number)]
    assert sorted(asked[:12]) == sorted(asked[12:]) == list(range(12))
    assert asked[:12] != asked[12:]


def test_a_resume_in_the_middle_asks_what_it_would_have_asked(
    tmp_path: Path, text: TextCodec
) -> None:
    """The cursor is a function of the place: a plan made anew at lap 5 needs no state. A new
    attempt goes on in the same order, with other seeds; another seed of the run has another."""
    spec = spec_of(tmp_path, problems(40), task={"held_out": 0})
    plan = Plan("r", spec, RunData(spec), text)
    through = [[s.problem.fields["n"] for s in plan.lap_slots(0, number)] for number in range(8)]
    assert lap(spec, text, 5) == through[5] == lap(spec, text, 5, attempt=1)
    first, second = (Plan("r", spec, RunData(spec), text).lap_slots(a, 5) for a in (0, 1))
    assert not {slot.seed for slot in first} & {slot.seed for slot in second}
    assert lap(spec.model_copy(update={"seed": 8}), text, 5) != through[5]


def test_held_out_prompts_are_never_trained_on(tmp_path: Path, text: TextCodec) -> None:
    spec = spec_of(tmp_path, problems(200), evaluation={"every": 2, "samples": 5})
    data = RunData(spec)
    plan = Plan("r", spec, data, text)
    trained = Counter(n for number in range(60) for n in lap(spec, text, number))
    (held_out,) = data.sets
    evaluated = {s.problem.fields["n"] for s in plan.evaluation_slots(held_out, 0, 1)}
    assert len(evaluated) == held_out.size == 5
    assert not evaluated & trained.keys()
    assert 185 <= len(trained) == data.rows <= 197


def test_several_sets_have_seeds_and_cohorts_of_their_own(tmp_path: Path, text: TextCodec) -> None:
    other = write(tmp_path / "hard.jsonl", problems(3, first=1000))
    spec = spec_of(
        tmp_path,
        problems(100),
        evaluation={
            "every": 2,
            "samples": 4,
            "k": 100,
            "temperature": 0.7,
            "sets": [
                {"name": "hard", "dataset": other, "verifier": "math"},
                {"name": "mine", "samples": 2},
            ],
        },
    )
    data = RunData(spec)
    plan = Plan("r", spec, data, text)
    hard, mine = data.sets
    assert [(s.name, s.size, s.verifiers[0].name) for s in data.sets] == [
        ("hard", 3, "math"),
        ("mine", 2, "exact"),
    ]
    slots = {s.name: plan.evaluation_slots(s, 0, 1) for s in data.sets}
    assert {s.problem.fields["n"] for s in slots["hard"]} == {1000, 1001, 1002}
    assert not {s.seed for s in slots["hard"]} & {s.seed for s in slots["mine"]}
    cohorts = plan.evaluation_cohorts(hard, 0, 1, slots["hard"])
    assert [(c.id, len(c.slots)) for c in cohorts] == [
        ("0/1/evaluation/hard/0", 2),  # 2 prompts of 100 responses: at most 256 sequences
        ("0/1/evaluation/hard/1", 1),
    ]
    assert plan.evaluation_cohorts(mine, 0, 1, slots["mine"])[0].id == "0/1/evaluation/mine/0"


def test_a_prompt_of_an_evaluation_file_is_not_trained_on(
    tmp_path: Path, text: TextCodec, caplog: pytest.LogCaptureFixture
) -> None:
    sets = [{"name": "s", "dataset": write(tmp_path / "s.jsonl", problems(4))}]
    spec = spec_of(tmp_path, problems(20), evaluation={"every": 2, "sets": sets})
    with caplog.at_level(logging.WARNING):
        assert RunData(spec).rows == 16
    assert "4 rows are not trained on, their prompts are in an evaluation set" in caplog.text
    spec = spec_of(tmp_path, problems(4), evaluation={"every": 2, "sets": sets})
    with pytest.raises(DatasetError, match="nothing to train on: every prompt is in an evaluation"):
        RunData(spec)


def test_demonstrations_from_a_file(tmp_path: Path, text: TextCodec) -> None:
    """6 rows in batches of 4: two epochs in three steps; each ends with the end token."""
    rows = [{"prompt": f"{i}+1=", "response": f"{i + 1}"} for i in range(6)]
    cold = {"steps": 3, "batch_size": 4, "dataset": write(tmp_path / "c.jsonl", rows)}
    spec = spec_of(tmp_path, problems(9), task={"held_out": 0}, cold_start=cold)
    plan = Plan("r", spec, RunData(spec), text)
    seen = Counter()
    for step in range(3):
        for demonstration in plan.demonstrations(0, step).demonstrations.demonstrations:
            ids_T = to_ndarray(demonstration.token_ids, "t", dtypes=("int32",), shape=(None,))
            seen[text.response_text(ids_T)] += 1
    assert seen == Counter({f"{i}+1={i + 1}<end>": 2 for i in range(6)})


def test_held_out_prompts_are_not_in_the_cold_start(
    tmp_path: Path, text: TextCodec, caplog: pytest.LogCaptureFixture
) -> None:
    """The demonstrations are of all 200 prompts, one as text and one as a chat message."""
    rows: list[dict[str, Any]] = []
    for row in problems(200):
        messages = [{"role": "user", "content": row["prompt"]}]
        rows += [{"prompt": prompt, "response": "1"} for prompt in (row["prompt"], messages)]
    cold = {"steps": 1, "batch_size": 400, "dataset": write(tmp_path / "c.jsonl", rows)}
    spec = spec_of(tmp_path, problems(200), task={"held_out": 0.1}, cold_start=cold)
    with caplog.at_level(logging.WARNING):
        data = RunData(spec)
    (held_out,) = data.sets
    kept = {text.prompt_ids(data.task.held_out_problem(0, i).prompt).tobytes() for i in range(23)}
    assert held_out.size == 23
    shown = [data.task.demonstration(0, index)[0] for index in range(400 - 46)]
    assert not {text.prompt_ids(prompt).tobytes() for prompt in shown} & kept
    assert "cold_start.dataset" in caplog.text
    assert "46 rows are not trained on" in caplog.text


def test_prompts_that_the_built_in_task_holds_out_are_not_in_the_cold_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """All pairs of 10..99 and 2..9, 720 in all, about a tenth of them held out."""
    pairs = [(a, b) for a in range(10, 100) for b in range(2, 10)]
    rows = [{"prompt": f"{a}*{b}=", "response": f"={a * b}"} for a, b in pairs]
    cold = {"steps": 1, "dataset": write(tmp_path / "c.jsonl", rows)}
    spec = spec_of(tmp_path, problems(9), task={"dataset": "multiplication"}, cold_start=cold)
    held = {f"{a}*{b}=" for a, b in pairs if is_held_out(a, b)}
    assert 36 < len(held) < 144
    with caplog.at_level(logging.WARNING):
        data = RunData(spec)
    left = len(rows) - len(held)
    shown = {str(data.task.demonstration(0, index)[0]) for index in range(left)}
    assert shown == {row["prompt"] for row in rows} - held
    assert f"{len(held)} rows are not trained on" in caplog.text


def test_a_demonstration_longer_than_the_model_is_refused_by_line(
    tmp_path: Path, text: TextCodec
) -> None:
    rows = [{"prompt": "1=", "response": "1"}, {"prompt": "2=", "response": "2" * 10}]
    cold = {"steps": 1, "batch_size": 2, "dataset": write(tmp_path / "c.jsonl", rows)}
    data = RunData(spec_of(tmp_path, problems(9), cold_start=cold))
    text.most_tokens = 13
    data.check(text)
    text.most_tokens = 12
    with pytest.raises(DatasetError) as raised:
        data.check(text)
    assert str(raised.value) == (
        f"cold_start.dataset: {tmp_path / 'c.jsonl'}: line 2: prompt and response have 13 tokens; "
        "valid: up to 12, the model's positions"
    )


def test_text_as_a_user_message_and_a_system_message_before(
    tmp_path: Path, text: TextCodec
) -> None:
    own = [{"role": "system", "content": "own"}, {"role": "user", "content": "x"}]
    rows = [{"prompt": "hi", "answer": 1}, {"prompt": own, "answer": 1}]
    how = {"chat": True, "system": "be brief", "held_out": 0}
    data = RunData(spec_of(tmp_path, rows, task=how))
    prompts = [data.task.training_problem(0, index).prompt for index in range(2)]
    assert own in prompts
    assert [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
    ] in prompts
    with pytest.raises(DatasetError, match=r"line 1, prompt: it is text, and task.system needs"):
        RunData(spec_of(tmp_path, rows, task={**how, "chat": False}))


def test_avg_and_pass_at_k() -> None:
    """Three prompts of four: none right, one, all; 0.7 + 0.2 + 0.1 counts as 1."""
    rewards_NK = np.array([[0, 0, 0.5, 0], [0, 0.7 + 0.2 + 0.1, 0, 0], [1, 1, 1, 1]])
    assert 0.7 + 0.2 + 0.1 < 1
    assert evaluation_columns("s", rewards_NK, 1.0) == {
        "eval/s/avg@4": pytest.approx(5.5 / 12),
        "eval/s/pass@4": pytest.approx(2 / 3),
    }
    assert evaluation_columns("s", rewards_NK, 0.5)["eval/s/pass@4"] == 1


def test_a_response_without_a_reward_is_never_right() -> None:
    """Also where right begins below 0; in the mean it is 0."""
    rewards_NK = np.array([[-1.0, np.nan], [1.0, np.nan], [np.nan, np.nan]])
    assert evaluation_columns("s", rewards_NK, 0.0) == {
        "eval/s/avg@2": 0.0,
        "eval/s/pass@2": 1 / 3,
    }


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"task": {"dataset": "/d"}}, "task.verifier: 'missing' is not valid; valid: one of exact"),
        ({"task": {"dataset": "d"}}, "task.dataset: 'd' is not valid; valid: \"multiplication\""),
        ({"task": {"verifier": "sum"}}, "task.verifier.0.name: 'sum' is not valid; valid: one of"),
        ({"task": {"verifier": "regex"}}, "task.verifier.pattern: None is not valid; valid: a reg"),
        (
            {"task": {"verifier": [{"name": "regex", "pattern": "("}]}},
            "task.verifier.0.pattern: '(' is not valid; valid: a Python regular expression",
        ),
        (
            {"task": {"verifier": [{"name": "exact"}, {"name": "exact"}]}},
            "is not valid; valid: a label of its own for each verifier; these are exact, exact",
        ),
        (
            {"task": {"dataset": "/d", "verifier": "math"}, "cold_start": {"steps": 3}},
            "cold_start.dataset: 'missing' is not valid; valid: a JSONL file of prompts and resp",
        ),
        (
            {
                "task": {"dataset": "/d", "verifier": "math", "held_out": 0},
                "evaluation": {"every": 2},
            },
            "task.held_out: 0 is not valid; valid: a JSONL file, or a task.held_out above 0",
        ),
        ({"evaluation": {"k": 4}}, "evaluation.temperature: 0.0 is not valid; valid: above 0 with"),
        (
            {"evaluation": {"sets": [{"name": "a"}, {"name": "a"}]}},
            "evaluation.sets: ['a', 'a'] is not valid; valid: a name of its own for each set",
        ),
        (
            {"model": {"chat_template": "x"}},
            "model.chat_template: 'x' is not valid; valid: a Jinja",
        ),
    ],
)
def test_a_job_that_does_not_fit_itself(sections: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidField) as raised:
        make_spec(**sections)
    assert told in str(raised.value)


def test_paths_in_a_job_file_are_relative_to_it(tmp_path: Path) -> None:
    """What they name becomes absolute; the template's file is read into the job."""
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    job = tmp_path / "job.toml"
    job.write_text(
        'name = "a"\n[model]\npath = "preset:tiny-qwen3-moe"\nchat_template = "t.jinja"\n'
        '[task]\ndataset = "data/../d.jsonl"\nverifier = "math"\n'
        '[cold_start]\ndataset = "/c.jsonl"\n[recipe]\nsteps = 1\n'
        '[[evaluation.sets]]\nname = "s"\ndataset = "s.jsonl"\n'
    )
    spec = load_spec(job)
    assert spec.model.chat_template == "{{ messages }}"
    assert spec.task.dataset == str(tmp_path / "d.jsonl")
    assert spec.cold_start.dataset == "/c.jsonl"
    assert spec.evaluation_sets[0].dataset == str(tmp_path / "s.jsonl")
    job.write_text(job.read_text().replace("t.jinja", "no.jinja"))
    with pytest.raises(InvalidField, match=r"model.chat_template: '.*no.jinja' is not valid"):
        load_spec(job)
