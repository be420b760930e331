"""Several runs over one another; what `keel run` leaves, read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from reportkit import JOB, SPEC, Page, figures, synthetic_rows

from keel.errors import InvalidField
from keel.spec import parse_spec
from keel_gateway.compare import ABSENT, build_comparison, compare
from keel_gateway.run_folder import RunData, is_run_path, read_run, write_run
from keel_gateway.summary import key_numbers

OTHER = parse_spec(
    SPEC.model_dump(mode="json", exclude_unset=True)
    | {"recipe": {"steps": 20, "off_policiness": 2, "learning_rate": 1e-4, "is_cap": None}}
)


def run(name: str = "a", steps: int = 40, **job: Any) -> RunData:
    return RunData(JOB | {"id": name, "name": name} | job, synthetic_rows(steps))


def test_numbers_and_their_difference_from_the_first() -> None:
    better = [row | {"reward/mean": 0.75} if "lap" in row else row for row in synthetic_rows()]
    found = compare([run("a"), RunData(JOB | {"id": "b"}, better), run("c")])
    cells = {one.name: one.cells for one in found.numbers}
    # the mean of 40 rewards from 0 to 1 in equal steps is 0.5
    assert cells["reward, all steps"] == ["0.500", "0.750 (+0.250)", "0.500 (+0.000)"]
    values = {one.name: one.values for one in found.numbers}
    assert values["reward, all steps"] == pytest.approx([0.5, 0.75, 0.5])
    assert cells["held-out accuracy, best"][0] == "0.650"
    assert cells["eval/gsm8k/avg@4, last"][0] == "0.400"
    assert found.labels == ["a", "b", "c"]


def test_runs_of_other_lengths_are_compared_over_the_steps_that_all_have() -> None:
    long = synthetic_rows(40)
    short = RunData(JOB | {"id": "short"}, long[:21])
    found = compare([RunData(JOB, long), short])
    assert found.last_step == 20
    assert "steps 1 to 20, which all runs that have begun have" in found.over
    for one in found.numbers:
        assert one.values[0] == one.values[1], one.name


def test_keys_that_differ_are_named_one_by_one() -> None:
    found = compare([run(), run("b", spec=OTHER.model_dump(mode="json"))])
    assert {one.name: one.cells for one in found.differences} == {
        "recipe.steps": ["40", "20"],
        "recipe.off_policiness": ["4", "2"],
        "recipe.learning_rate": [json.dumps(SPEC.recipe.learning_rate), "0.0001"],
    }


def test_a_key_of_another_version_of_keel_is_absent_not_null() -> None:
    older = {key: value for key, value in JOB["spec"].items() if key != "parallel"}
    found = compare([run(), run("b", spec=older)])
    names = [one.name for one in found.differences]
    assert names == [f"parallel.{key}" for key in sorted(JOB["spec"]["parallel"])]
    assert found.differences[0].cells == ["1", ABSENT]


def test_numbers_that_one_run_lacks() -> None:
    bare = RunData({"id": "b"}, [{"step": step, "lap": 0} for step in range(1, 41)])
    found = compare([run(), bare])
    cells = {one.name: one.cells for one in found.numbers}
    assert cells["clipped tokens, mean"] == ["6.10%", "-"]  # 2 x (0.01 + 20.5 / 1000)
    assert compare([bare, bare]).numbers == []


def test_a_colour_a_run_and_a_picture_a_column() -> None:
    html = build_comparison([run("a"), run("b"), run("c")])
    drawn = figures(html)
    lines = [figure for figure in drawn if figure["kind"] == "lines"]
    for figure in lines:
        colours = {
            trace["name"].removesuffix(", smooth"): trace["colour"] for trace in figure["traces"]
        }
        assert colours == {"a": 0, "b": 1, "c": 2}
        assert not any("stackgroup" in trace for trace in figure["traces"])
    titles = Page(html).text
    for title in ("Benchmark score: accuracy/eval", "KL[mu_old || pi_old]", "clip/low"):
        assert title in titles
    assert sum(figure["kind"] == "heat" for figure in drawn) == 3, "a heat map a run"


def test_heat_maps_of_several_runs_have_one_scale() -> None:
    more = [
        row | {"routing/layer/10": 0.7} if row["step"] == 9 else row for row in synthetic_rows()
    ]
    html = build_comparison([run("a"), RunData(JOB, more)])
    assert [figure["most"] for figure in figures(html) if figure["kind"] == "heat"] == [0.7, 0.7]


def test_two_runs_of_one_name_are_told_apart() -> None:
    assert compare([run("a"), run("a"), run("a")]).labels == ["a", "a (2)", "a (3)"]


def test_a_run_without_a_row_yet_is_no_error() -> None:
    found = compare([run("a"), RunData(JOB, [])])
    assert {one.cells[1] for one in found.numbers} == {"-"}
    assert "steps 1 to 40, which all runs that have begun have" in found.over
    for runs in ([run("a"), RunData(JOB, [])], [RunData(JOB, []), RunData({}, [])]):
        assert "What differs" in Page(build_comparison(runs)).text


def test_key_numbers_have_one_order() -> None:
    names = [one.name for one in key_numbers(synthetic_rows())]
    assert names == [one.name for one in key_numbers([])]
    assert len(names) == len(set(names))


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    # a line separator of Unicode inside a text ends no line of the file
    samples = [{"step": 1, "prompt": "a\u2028b"}]
    written = RunData(run().job, synthetic_rows(8), samples)
    write_run(tmp_path, written)
    assert read_run(tmp_path) == written
    assert read_run(tmp_path / "metrics.jsonl").rows == written.rows
    write_run(tmp_path, RunData(run().job, []))
    assert read_run(tmp_path) == RunData(run().job, [], []), "nothing of the earlier run is left"


def test_a_folder_with_metrics_alone(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 2}\n\n{"step": 1}\n')
    found = read_run(tmp_path)
    assert [row["step"] for row in found.rows] == [1, 2]
    assert found.label == str(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("metrics.jsonl", b'{"step": 1}\n{"step"', "metrics.jsonl, line 2"),
        ("metrics.jsonl", b"[1]\n", "a JSON object"),
        ("metrics.jsonl", b'{"lap": 1}\n', "a number in 'step'"),
        ("metrics.jsonl", b'{"a": "\xff"}\n', "UTF-8"),
        ("job.json", b"{", "job.json"),
    ],
)
def test_a_file_that_is_not_of_keel_run_is_named(
    tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidField, match=says):
        read_run(tmp_path)


def test_a_path_is_told_from_the_id_of_a_job(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, run())
    assert is_run_path(".")
    assert is_run_path("some/where")
    assert is_run_path("rows.jsonl")
    assert not is_run_path("first-abcdef")
    with pytest.raises(InvalidField, match="JOB: 'some/where'"):
        read_run(Path("some/where"))
