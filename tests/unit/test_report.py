"""The report: every curve there, nothing from the network, whatever the rows lack."""

from __future__ import annotations

import re
import tomllib
from datetime import UTC, datetime
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from reportkit import JOB, Page, figures, report, synthetic_rows, traces

from keel.metrics import COLUMNS
from keel.spec import parse_spec
from keel_gateway.curves import MOST_POINTS, averaged, every_kth, smooth, thinned
from keel_gateway.page import write_page
from keel_gateway.panels import of_run
from keel_gateway.run_local import prepare
from keel_gateway.summary import Summary, duration, lap_maximum


def test_has_every_curve() -> None:
    drawn = traces(report(JOB, synthetic_rows())).keys()
    wanted = {
        "reward/mean",
        "reward/mean, smooth",
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
        "reward/part/format",
        "eval/gsm8k/avg@4",
        "eval/gsm8k/pass@4",
    }
    assert wanted <= drawn


def test_the_papers_four_panels_come_first() -> None:
    paper = of_run(synthetic_rows())[0]
    assert [card.title for card in paper.cards] == [
        "Benchmark score",
        "Training reward",
        "Entropy",
        "KL[mu_old || pi_old]",
    ]
    assert [[line.name for line in card.legend] for card in paper.cards] == [
        ["eval/gsm8k/avg@4"],
        ["reward/mean"],
        ["entropy"],
        ["mismatch/k1"],
    ]


def test_without_held_out_sets_the_benchmark_score_is_the_accuracy() -> None:
    card = of_run([{"step": 0, "accuracy/eval": 0.5}])[0].cards[0]
    assert (card.title, [line.name for line in card.legend]) == (
        "Benchmark score",
        ["accuracy/eval"],
    )


def test_every_drawn_column_exists_and_is_explained_where_the_mouse_is() -> None:
    rows = synthetic_rows()
    assert {
        line.name for part in of_run(rows) for card in part.cards for line in card.legend
    } <= COLUMNS.keys() | {"reward/part/format", "eval/gsm8k/avg@4", "eval/gsm8k/pass@4"}
    for name, trace in traces(report(JOB, rows)).items():
        assert len(trace["x"]) == len(trace["y"]) > 0
        assert name.endswith(", smooth") or name in trace["hovertemplate"]
        if name in COLUMNS:
            assert "<i>" in trace["hovertemplate"]


def test_a_picture_is_told_in_words_too() -> None:
    html = report(JOB, synthetic_rows())
    assert (
        'aria-label="Benchmark score, over steps: '
        'eval/gsm8k/avg@4 40.0% at step 10, 40.0% at step 40"'
    ) in html
    assert "means over all steps: layer 1 10.0%, layer 10 20.0%" in html


def test_layers_are_a_heat_map_in_their_order_whose_size_does_not_grow_with_the_steps() -> None:
    layers = (2, 10, 1)
    rows = [
        {"step": step, "lap": 0} | {f"routing/layer/{n}": n / 100 + step / 1e6 for n in layers}
        for step in range(1, 1001)
    ]
    rows[3]["routing/layer/10"] = None
    (figure,) = figures(report(JOB, rows))
    assert (figure["kind"], figure["y"]) == ("heat", ["1", "2", "10"])
    assert len(figure["x"]) == len(figure["steps"]) == 200, "five steps a bin"
    assert {len(line) for line in figure["z"]} == {200}
    assert figure["steps"][0] == "steps 1 to 5"
    assert figure["z"][0][0] == pytest.approx(0.01, abs=1e-4)
    # the mean of steps 1, 2, 3, 5: the fourth has none
    assert figure["z"][2][0] == pytest.approx(0.1 + 2.75e-6, abs=1e-3)


def test_loads_nothing_and_forbids_itself_to() -> None:
    html = report(JOB, synthetic_rows())
    page = Page(html)
    assert page.loads == []
    assert "default-src 'none'" in unescape(html)
    assert "<link" not in html
    assert "Plotly" in page.scripts[-2], "plotly itself is inside"
    style = html[html.index("<style>") : html.index("</style>")]
    assert not re.search(r"url\(|@import", style)


def served(rows: list[dict[str, Any]], **groups: range) -> list[dict[str, Any]]:
    """`rows` with four groups a step, shared by the engines whose range has the step."""
    for row in rows[1:]:
        there = [name for name, steps in groups.items() if row["step"] in steps]
        row |= {f"engine/groups/{name}:1": 4 / len(there) for name in there}
        row |= {f"engine/k3/{name}:1": 1e-3 for name in there}
    return rows


def test_says_who_served_what() -> None:
    """a all 40 steps, b the first 10, c the last 20: 160 groups, of which b 20 and c 40."""
    rows = served(synthetic_rows(), a=range(41), b=range(11), c=range(21, 41))
    kinds = {"a:1": "torch", "b:1": "vllm"}
    job = JOB | {"engines": ["a:1", "c:1"], "engine_states": {}, "engine_kinds": kinds}
    html = report(job, rows)
    assert "engines" in Page(html).ids
    lines = re.findall(r'<th scope="row">(\w:1)</th>((?:<td>[^<]*</td>)*)', html)
    assert [(name, *re.findall(r"<td>([^<]*)", cells)) for name, cells in lines] == [
        ("a:1", "torch", "1 to 40", "100", "62.5%", "1.00e-03", "there to the end"),
        ("b:1", "vllm", "1 to 10", "20", "12.5%", "1.00e-03", "has left"),
        ("c:1", "-", "21 to 40", "40", "25.0%", "1.00e-03", "there to the end"),
    ]
    lines_of = [figure for figure in figures(html) if figure["kind"] == "lines"]
    (stack,) = [one for one in lines_of if one["traces"][0].get("name") == "a:1" and not one["log"]]
    drawn = {trace["name"]: trace["y"] for trace in stack["traces"]}
    # steps 9 to 12 are a lap, and b was there in two of them
    assert drawn["b:1"] == [2] * 8 + [1] * 4 + [0] * 28
    assert [sum(step) for step in zip(*drawn.values(), strict=True)] == [4] * 40
    running = report(job | {"engine_states": {"a:1": "READY", "c:1": "DRAINING"}}, rows)
    assert "DRAINING" in Page(running).text


def test_one_engine_has_no_section_of_its_own() -> None:
    made = datetime(2026, 11, 24, tzinfo=UTC)
    plain = report(JOB, synthetic_rows(), made=made)
    assert report(JOB, served(synthetic_rows(), a=range(41)), made=made) == plain


def test_says_what_the_numbers_are() -> None:
    text = Page(report(JOB, synthetic_rows())).text
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
    html = report(JOB, rows)
    assert "NOT obeyed in 1 of 40 steps, first in step 7: 3,999 of 4,000" in html
    assert '<p class="bad">Replay was NOT' in html


def test_what_users_wrote_cannot_become_markup() -> None:
    evil = "</script><script>alert(1)</script><img src=http://evil/x>"
    job = JOB | {"name": evil, "error": evil, "spec": JOB["spec"] | {"name": evil}}
    html = report(job, synthetic_rows())
    page = Page(html)
    assert page.loads == []
    assert len(page.scripts) == len(figures(html)) + 2, "data of pictures, plotly, ours"
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
    html = report(JOB, rows)
    page = Page(html)
    assert page.scripts
    assert ("No step has been taken yet." in page.text) is (not figures(html))


def test_of_a_job_that_goes_on_it_says_so_and_when_it_was_made() -> None:
    made = datetime(2026, 11, 20, 11, 1, 2, tzinfo=UTC)
    running = JOB | {"phase": "TRAINING", "finished_at": None, "step": 12}
    text = Page(report(running, synthetic_rows(12), made=made)).text
    assert (
        "Report made 2026-11-20 11:01 UTC, while the job goes on: TRAINING, at step 12 of 40"
        in text
    )
    assert "keel report first-abcdef" in text
    taught = running | {"phase": "COLD_START", "cold_start_step": 7, "cold_start_steps": 90}
    assert "COLD_START, at step 7 of 90." in Page(report(taught, [])).text
    over = Page(report(JOB, synthetic_rows(), made=made)).text
    assert "Report made 2026-11-20 11:01 UTC.\n" in over
    assert "while the job" not in over


def test_a_job_that_has_only_begun() -> None:
    job = JOB | {"phase": "QUEUED", "started_at": None, "finished_at": None, "step": 0}
    assert "QUEUED" in Page(report(job, [])).text


def test_a_long_line_is_thinned_and_keeps_its_spikes() -> None:
    points = [(step, 0.0) for step in range(10 * MOST_POINTS)]
    points[5_432], points[5_433] = (5_432, 9.0), (5_433, -9.0)
    thin = thinned(points)
    assert len(thin) <= MOST_POINTS
    assert {(5_432, 9.0), (5_433, -9.0)} <= set(thin)
    assert thin == sorted(thin)
    assert thinned(points[:MOST_POINTS]) == points[:MOST_POINTS]
    assert len(every_kth(points)) <= MOST_POINTS


def test_what_is_stacked_is_averaged_so_that_it_still_adds_up() -> None:
    points = [(step, float(step % 2)) for step in range(2 * MOST_POINTS)]
    assert averaged(points)[:2] == [(1, 0.5), (3, 0.5)]
    rows = [
        {"step": step, "lap": 0, "time/wait_s": step % 2, "time/update_s": (step + 1) % 2}
        for step in range(1, 4 * MOST_POINTS)
    ]
    drawn = traces(report(JOB, rows))
    assert drawn["time/wait_s"]["x"] == drawn["time/update_s"]["x"]
    assert drawn["time/wait_s"]["stackgroup"] == drawn["time/update_s"]["stackgroup"]


def test_in_step_staleness_is_that_of_whole_laps_also_where_steps_are_thinned() -> None:
    rows = [  # off-policiness 2: the first step of a lap has no staleness, the second 0.5
        {"step": step, "lap": (step - 1) // 2, "staleness/k1": 0.0 if step % 2 else 0.5}
        for step in range(1, 2 * MOST_POINTS + 1)
    ]
    drawn = traces(report(JOB, rows))
    assert len(drawn["staleness/k1"]["y"]) <= MOST_POINTS
    assert set(drawn["staleness/k1, lap maximum"]["y"]) == {0.5}


def test_a_ninth_line_is_told_from_the_first_by_its_dashes() -> None:
    rows = [{"step": 1, "lap": 0} | {f"reward/part/p{n}": 0.1 for n in range(9)}]
    drawn = traces(report(JOB, rows))
    first, ninth = drawn["reward/part/p0"], drawn["reward/part/p8"]
    assert first["colour"] == ninth["colour"] == 0
    assert (first["line"]["dash"], ninth["line"]["dash"]) == ("solid", "dash")


def test_a_job_file_is_toml_again() -> None:
    verifier = [{"name": "math", "weight": 1.0, "limit": None}, {"name": 'ex"act', "weight": 0.5}]
    spec = JOB["spec"] | {"task": {"dataset": "data/ünï.jsonl", "verifier": verifier}}
    page = Page(report(JOB | {"spec": spec}, []))
    text = page.text[page.text.index("Job file, whole") + len("Job file, whole") :]
    read = tomllib.loads(text)
    assert read["task"]["verifier"] == [
        {"name": "math", "weight": 1.0},
        {"name": 'ex"act', "weight": 0.5},
    ]
    assert read["task"]["dataset"] == "data/ünï.jsonl"
    assert read["recipe"]["off_policiness"] == 4


def test_a_job_that_says_nothing_of_itself() -> None:
    assert "0 of -" in Page(report({}, [])).text


def test_zeros_are_left_out_of_a_logarithm_only() -> None:
    rows = [
        {"step": step, "lap": 0, "mismatch/k3": value, "entropy": value}
        for step, value in ((1, 0.0), (2, 0.1))
    ]
    by_name = {name: trace["x"] for name, trace in traces(report(JOB, rows)).items()}
    assert by_name["mismatch/k3"] == [2]
    assert by_name["entropy"] == [1, 2]


def test_smoothing_and_lap_maximum() -> None:
    assert smooth([(1, 1.0), (2, 2.0)]) == [(1, 1.0), (2, 2.0)]
    assert smooth([(i, float(i)) for i in range(40)])[-1] == (39, 38.5)  # the last two of forty
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
        write_page(tmp_path / "new" / "report.html", report(JOB, synthetic_rows()))
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


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ({}, "minirl"),
        ({"objective": "grpo"}, "grpo"),
        ({"is_cap": None}, "minirl with is_cap null"),
        (
            {"objective": "dppo", "divergence": "kl", "is_filter": "icepop"},
            'dppo with divergence "kl", divergence_threshold 0.05, is_filter "icepop", '
            "is_filter_low 0.5, is_filter_high 5.0",
        ),
    ],
)
def test_the_recipe_names_the_objective_and_what_was_set_against_it(recipe, says):
    spec = parse_spec({"name": "r", "model": JOB["spec"]["model"], "recipe": {"steps": 4} | recipe})
    page = report(JOB | {"spec": spec.model_dump(mode="json")}, [])
    assert f": {says}, replay auto" in unescape(page)
