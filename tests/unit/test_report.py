"""The report: every curve there, nothing from the network, whatever the rows lack."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from keel.metrics import COLUMNS
from keel.spec import parse_spec
from keel_gateway.charts import CHARTS, smooth
from keel_gateway.report import MOST_POINTS, build_report, thinned, write_report
from keel_gateway.run_local import prepare
from keel_gateway.summary import Summary, duration, lap_maximum

SPEC = parse_spec(
    {
        "name": "first",
        "model": {"path": "preset:tiny-qwen3-moe"},
        "recipe": {"steps": 40, "off_policiness": 4, "is_cap": None},
    }
)
JOB: dict[str, Any] = {
    "id": "first-abcdef",
    "name": "first",
    "phase": "SUCCEEDED",
    "spec": SPEC.model_dump(mode="json"),
    "created_at": "2026-11-20T11:00:00Z",
    "started_at": "2026-11-20T11:00:05Z",
    "finished_at": "2026-11-20T11:03:25Z",
    "step": 40,
    "steps": 40,
    "error": "",
}


def synthetic_rows(steps: int = 40) -> list[dict[str, Any]]:
    """Every column in every row, an evaluation every ten steps, reward from 0 to 1."""
    rows: list[dict[str, Any]] = [{"step": 0, "accuracy/eval": 0.25}]
    for step in range(1, steps + 1):
        row: dict[str, Any] = dict.fromkeys(COLUMNS, 0.01 + step / 1000)
        row |= {"step": step, "lap": (step - 1) // 4, "policy_version": (step - 1) // 4}
        row |= {"reward/mean": (step - 1) / (steps - 1)}
        row |= {"replay/rows_requested": 100, "replay/rows_obeyed": 100}
        del row["accuracy/eval"]
        if step % 10 == 0:
            row["accuracy/eval"] = 0.25 + step / 100
        rows.append(row)
    return rows


class Page(HTMLParser):
    """What a browser would see: visible text, attributes that load something, scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.loads, self.scripts = "", [], []
        self.ids: list[str] = []
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action", "poster", "data"):
                self.loads.append(value)
            if name == "id" and value:
                self.ids.append(value)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data


def figures(html: str) -> list[dict[str, Any]]:
    return json.loads(Page(html).scripts[0])


def test_has_every_curve() -> None:
    drawn = {
        trace["name"]
        for figure in figures(build_report(JOB, synthetic_rows()))
        for trace in figure["traces"]
    }
    wanted = {
        "reward/mean",
        "reward/mean, smooth",
        "accuracy/eval",
        *(f"{factor}/{kind}" for factor in ("mismatch", "staleness") for kind in ("k1", "k3")),
        "routing/pair_disagree",
        "routing/token_disagree",
        "routing/overlap, complement",
        "entropy",
        "clip/high",
        "clip/low",
        "is/ess",
        "grad_norm",
        "response/length_mean",
        "time/update_s",
        "time/generate_s",
    }
    assert wanted <= drawn


def test_every_drawn_column_exists_and_is_explained_where_the_mouse_is() -> None:
    assert {line.name for chart in CHARTS for line in chart.lines} <= COLUMNS.keys()
    for figure in figures(build_report(JOB, synthetic_rows())):
        for trace in figure["traces"]:
            assert len(trace["x"]) == len(trace["y"]) > 0
            smoothed = trace["name"].endswith(", smooth")
            assert smoothed or "<i>" in trace["hovertemplate"]


def test_loads_nothing_and_forbids_itself_to() -> None:
    html = build_report(JOB, synthetic_rows())
    page = Page(html)
    assert page.loads == []
    assert "default-src 'none'" in html
    assert "<link" not in html
    assert "Plotly" in page.scripts[1], "plotly itself is inside"
    style = html[html.index("<style>") : html.index("</style>")]
    assert not re.search(r"url\(|@import", style)


def test_says_what_the_numbers_are() -> None:
    text = Page(build_report(JOB, synthetic_rows())).text
    # first and last four of 40 rewards from 0 to 1 in equal steps of 1/39
    assert "0.038 → 0.962" in text
    assert "0.250 → 0.650" in text
    assert "Replay was obeyed in every step: 4,000 of 4,000" in text
    assert "3 min 20 s" in text
    assert "# is_cap: none" in text
    assert "off_policiness = 4" in text


def test_a_step_that_disobeyed_is_named() -> None:
    rows = synthetic_rows()
    rows[7]["replay/rows_obeyed"] = 99
    html = build_report(JOB, rows)
    assert "NOT obeyed in 1 of 40 steps, first in step 7: 3,999 of 4,000" in html
    assert '<p class="bad">Replay was NOT' in html


def test_what_users_wrote_cannot_become_markup() -> None:
    evil = "</script><script>alert(1)</script><img src=http://evil/x>"
    job = JOB | {"name": evil, "error": evil, "spec": JOB["spec"] | {"name": evil}}
    page = Page(build_report(job, synthetic_rows()))
    assert page.loads == []
    assert len(page.scripts) == 3
    assert page.text.count(evil) >= 3


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"step": 0, "accuracy/eval": 0.25}],
        [{"step": 1, "reward/mean": None, "lap": 0}],
        [{"step": 1, "reward/mean": 0.5}],
        [{"step": step, "lap": 0, "staleness/k3": 0.0} for step in (1, 2)],
    ],
    ids=["none", "evaluation alone", "null", "one column", "zeros on a logarithm"],
)
def test_takes_what_there_is(rows: list[dict[str, Any]]) -> None:
    html = build_report(JOB, rows)
    page = Page(html)
    assert page.ids.count("charts") == 1
    assert ("No step has been taken yet." in page.text) is (not figures(html))


def test_a_job_that_has_only_begun() -> None:
    job = JOB | {"phase": "QUEUED", "started_at": None, "finished_at": None, "step": 0}
    assert "QUEUED" in Page(build_report(job, [])).text


def test_a_long_run_is_thinned_but_keeps_evaluations() -> None:
    rows = [{"step": step} for step in range(10 * MOST_POINTS)]
    rows[12_345]["accuracy/eval"] = 0.5
    thin = thinned(rows)
    assert len(thin) == MOST_POINTS + 1
    assert rows[12_345] in thin


def test_in_step_staleness_is_that_of_whole_laps_also_where_steps_are_thinned() -> None:
    rows = [  # off-policiness 2: the first step of a lap has no staleness, the second 0.5
        {"step": step, "lap": (step - 1) // 2, "staleness/k1": 0.0 if step % 2 else 0.5}
        for step in range(1, 2 * MOST_POINTS + 1)
    ]
    traces = {t["name"]: t for f in figures(build_report(JOB, rows)) for t in f["traces"]}
    assert len(traces["staleness/k1"]["y"]) == MOST_POINTS
    assert set(traces["staleness/k1, lap maximum"]["y"]) == {0.5}


def test_a_job_that_says_nothing_of_itself() -> None:
    assert "0 of -" in Page(build_report({}, [])).text


def test_zeros_are_left_out_of_a_logarithm_only() -> None:
    rows = [
        {"step": step, "lap": 0, "mismatch/k3": value, "entropy": value}
        for step, value in ((1, 0.0), (2, 0.1))
    ]
    by_name = {t["name"]: t["x"] for f in figures(build_report(JOB, rows)) for t in f["traces"]}
    assert by_name["mismatch/k3"] == [2]
    assert by_name["entropy"] == [1, 2]


def test_smoothing_and_lap_maximum() -> None:
    assert smooth([1.0, 2.0]) == [1.0, 2.0]
    assert smooth([float(i) for i in range(40)])[-1] == 38.5  # the last two of forty
    rows = [{"lap": 0, "a": 0.0}, {"lap": 0, "a": 0.1}, {"lap": 1, "a": None}, {"lap": 2, "a": 0.3}]
    assert lap_maximum(rows, "a") == [0.1, 0.1, None, 0.3]


def test_summary_of_nothing() -> None:
    found = Summary.of([])
    assert (found.steps, found.reward_first, found.tokens_per_s) == (0, None, None)
    assert found.replay == "No step yet."
    assert [duration(s) for s in (5, 200, 7500)] == ["5 s", "3 min 20 s", "2 h 05 min"]


def test_tokens_a_second_count_the_trainers_time_once() -> None:
    row = {"step": 1, "lap": 0, "tokens/response": 60}
    times = {"time/wait_s": 1.0, "time/update_s": 2.0, "time/generate_s": 9.0}
    assert Summary.of([row | times]).tokens_per_s == 20.0


def test_written_file_replaces_an_older_one(tmp_path: Path) -> None:
    for _ in range(2):
        write_report(tmp_path / "new" / "report.html", JOB, synthetic_rows())
    assert (tmp_path / "new" / "report.html").read_text().startswith("<!doctype html>")


def test_keel_run_empties_only_its_own_folder(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "precious").touch()
    with pytest.raises(ValueError, match="--out"):
        prepare(tmp_path)
    assert (tmp_path / "model" / "precious").exists()
    (tmp_path / "stack").mkdir()
    (tmp_path / "stack" / "stack.lock").touch()
    (tmp_path / "notes.txt").touch()
    prepare(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
