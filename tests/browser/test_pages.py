"""The reports and the comparison of recorded runs, as Chromium draws them."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from browserkit import Opened

from keel_gateway.compare import build_comparison
from keel_gateway.report import build_report
from keel_gateway.run_folder import RunData, read_run

RUNS = Path(__file__).parent / "runs"
R3, NONE, WORDS = (read_run(RUNS / name) for name in ("r3", "none", "words"))
MADE = datetime(2026, 11, 24, 9, 30, tzinfo=UTC)
PAGES = {
    "report": build_report(R3, made=MADE),
    "compare": build_comparison([R3, NONE], made=MADE),
    "report-words": build_report(WORDS, made=MADE),
}
Open = Callable[..., Opened]

DRAWN = """() => [...document.querySelectorAll(".plot")].map((plot) => [
  plot.closest(".card").querySelector("h3").textContent,
  [...plot.querySelectorAll(".scatterlayer path")].filter((path) => path.getTotalLength()).length +
    plot.querySelectorAll(".heatmaplayer image").length,
])"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", PAGES)
def test_draws_everything_asks_for_nothing_and_fits(
    open_page: Open, name: str, width: int, scheme: str
) -> None:
    opened = open_page(PAGES[name], width=width, scheme=scheme)
    for details in opened.page.locator("summary").all():
        details.click()
    opened.screenshot(f"{name}-{width}-{scheme}")
    assert opened.errors == []
    assert opened.requests == [opened.url]
    drawn = opened.page.evaluate(DRAWN)
    assert len(drawn) >= 14
    assert [title for title, marks in drawn if not marks] == []
    assert opened.page.evaluate("document.documentElement.scrollWidth") == width


def test_the_papers_panels_come_first(open_page: Open) -> None:
    page = open_page(PAGES["report"]).page
    titles = page.locator("h3").all_text_contents()
    assert titles[:4] == ["Benchmark score", "Training reward", "Entropy", "KL[mu_old || pi_old]"]
    tops = [card.bounding_box()["y"] for card in page.locator(".panels .card").all()]  # type: ignore[index]
    assert len(set(tops)) == 1, "in one row"


def test_parts_of_the_reward_and_held_out_sets_have_lines(open_page: Open) -> None:
    page = open_page(PAGES["report-words"]).page
    legends = " ".join(page.locator(".legend li").all_text_contents())
    for column in ("reward/part/math", "reward/part/sum_written"):
        assert column in legends
    for name in ("test", "held_out"):
        assert f"eval/{name}/avg@4" in legends
        assert f"eval/{name}/pass@4" in legends


def test_a_colour_a_run_in_every_picture(open_page: Open) -> None:
    page = open_page(PAGES["compare"]).page
    legends = page.evaluate(
        """() => [...document.querySelectorAll(".card")].map((card) =>
          [...card.querySelectorAll(".legend li")].map((li) =>
            [li.textContent.trim(), getComputedStyle(li.querySelector("i")).borderTopColor]))"""
    )
    colours = {tuple(line) for legend in legends for line in legend}
    assert {label for label, _ in colours} == {R3.label, NONE.label}
    assert len(colours) == 2


def test_follows_the_readers_scheme_while_open(open_page: Open) -> None:
    page = open_page(PAGES["report"]).page
    stroke = "getComputedStyle(document.querySelector('.plot .js-line')).stroke"
    before = page.evaluate(stroke)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"{stroke} !== '{before}'")


def test_structure_that_screen_readers_need(open_page: Open) -> None:
    for html in PAGES.values():
        page = open_page(html).page
        levels = page.evaluate(
            "[...document.querySelectorAll('h1,h2,h3,h4')].map((h) => +h.tagName[1])"
        )
        assert levels[0] == 1
        assert all(after - before <= 1 for before, after in pairwise(levels))
        assert levels.count(1) == 1
        ids = page.evaluate("[...document.querySelectorAll('[id]')].map((e) => e.id)")
        # plotly's own ids apart
        ids = [name for name in ids if not name.startswith(("clip", "topdefs", "defs", "cb", "g"))]
        assert len(ids) == len(set(ids))
        labels = page.evaluate("[...document.querySelectorAll('.plot')].map((e) => e.ariaLabel)")
        assert all(" at step " in label or "layer 0" in label for label in labels)
        unnamed = page.evaluate(
            "[...document.querySelectorAll('select')].filter((e) => !e.labels.length).length"
        )
        assert unnamed == 0


def sample(step: int, place: int) -> dict[str, Any]:
    """The sample shown at that place for a step."""
    of_step = [one for one in R3.samples if one["step"] == step]
    return dict(sorted(of_step, key=lambda one: (one["slot"], one["sample"]))[place])


def test_a_token_tells_what_it_is_when_focused(open_page: Open) -> None:
    opened = open_page(PAGES["report"])
    page = opened.page
    step = max(one["step"] for one in R3.samples)
    assert page.locator("#pick-step").input_value() == str(step)
    tip = page.get_by_role("tooltip")
    assert tip.is_hidden()
    first = page.get_by_role("listbox").first.locator(".token").first
    first.focus()
    page.keyboard.press("ArrowRight")
    shown = sample(step, 0)
    engine, trainer = shown["rollout_logprobs"][1], shown["proximal_logprobs"][1]
    told = tip.inner_text().replace("\N{MINUS SIGN}", "-").split("\n")
    numbers = dict(zip(told[::2], told[1::2], strict=True))
    assert json.loads(numbers["token"]) == shown["tokens"][1]
    assert float(numbers["engine log-prob"]) == pytest.approx(engine, rel=1e-3)
    assert float(numbers["trainer log-prob"]) == pytest.approx(trainer, rel=1e-3, abs=1e-4)
    assert float(numbers["gap"].removesuffix(" nats")) == pytest.approx(trainer - engine, rel=6e-3)
    assert int(numbers["MoE layers with other experts"]) == shown["experts_differ"][1]
    opened.screenshot("sample-token")
    page.keyboard.press("Escape")
    assert tip.is_hidden()
    page.keyboard.press("End")
    assert json.loads(tip.inner_text().split("\n")[1]) == shown["tokens"][-1]


def test_one_stop_for_tab_in_each_response(open_page: Open) -> None:
    page = open_page(PAGES["report"]).page
    boxes = page.get_by_role("listbox")
    boxes.first.locator(".token").nth(0).focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('[role=listbox]').ariaLabel") == boxes.nth(
        1
    ).get_attribute("aria-label")


@pytest.mark.parametrize("touch", [False, True])
def test_a_token_tells_what_it_is_when_pointed_at(open_page: Open, touch: bool) -> None:
    page = open_page(PAGES["report"], width=390, touch=touch).page
    token = page.locator(".tokens .token").nth(2)
    token.scroll_into_view_if_needed()
    if touch:
        token.tap()
    else:
        token.hover()
    tip = page.get_by_role("tooltip")
    assert "trainer log-prob" in tip.inner_text()
    box = tip.bounding_box()
    assert box is not None
    assert 0 <= box["x"] <= box["x"] + box["width"] <= 390


def test_tokens_whose_experts_differed_are_underlined_and_no_other(open_page: Open) -> None:
    page = open_page(PAGES["report"]).page
    wanted, seen = 0, 0
    for step in sorted({one["step"] for one in R3.samples}):
        page.locator("#pick-step").select_option(str(step))
        shown = sorted(
            (one for one in R3.samples if one["step"] == step),
            key=lambda one: (one["slot"], one["sample"]),
        )
        assert len({one["slot"] for one in shown}) == 1, "one prompt a step, so all are on the page"
        lines = page.evaluate(
            """() => [...document.querySelectorAll("[role=listbox]")].map((box) =>
              [...box.children].map((token) =>
                getComputedStyle(token).borderBottomColor !== "rgba(0, 0, 0, 0)"))"""
        )
        assert lines == [[layers > 0 for layers in one["experts_differ"]] for one in shown]
        wanted += sum(layers > 0 for one in shown for layers in one["experts_differ"])
        seen += sum(map(sum, lines))
    assert seen == wanted > 0


def test_the_background_is_the_gap(open_page: Open) -> None:
    page = open_page(PAGES["report"]).page
    colours = page.evaluate(
        """() => [...document.querySelectorAll("[role=option]")].map((token) =>
          [+token.dataset.gap, getComputedStyle(token).backgroundColor,
             token.style.getPropertyValue("--hue")])"""
    )
    alpha = {gap: colour for gap, colour, _ in colours}
    assert {hue for gap, _, hue in colours if gap < 0} == {"var(--below)"}
    assert {hue for gap, _, hue in colours if gap > 0} == {"var(--above)"}
    assert alpha[max(alpha)] != alpha[min(alpha)] != alpha[min(alpha, key=abs)]


def test_goes_through_prompts_and_steps(open_page: Open) -> None:
    page = open_page(PAGES["report"]).page
    steps = sorted({one["step"] for one in R3.samples})
    following, previous = (
        page.get_by_role("button", name="Next"),
        page.get_by_role("button", name="Previous"),
    )
    assert following.is_disabled()
    for step in reversed(steps[:-1]):
        previous.click()
        assert page.locator("#pick-step").input_value() == str(step)
        assert page.locator("#sample-prompt").text_content() == sample(step, 0)["prompt"]
    assert previous.is_disabled()


EVIL = '</script><script>alert(1)</script><img src="x" onerror="alert(2)">{{7*7}}<b>%{x}'


def test_what_users_wrote_stays_text(open_page: Open) -> None:
    one = dict(R3.samples[0])
    texts = {"prompt": EVIL, "response": EVIL, "tokens": [EVIL] * len(one["tokens"])}
    evil = one | texts | {"reward_parts": {EVIL: 1.0}, "invalid_reason": EVIL, "valid": False}
    rows = [dict(row) | {f"reward/part/{EVIL}": 0.5} for row in R3.rows]
    run = RunData(dict(R3.job) | {"name": EVIL, "id": EVIL, "error": EVIL}, rows, [evil])
    for html in (build_report(run), build_comparison([run, run])):
        opened = open_page(html)
        opened.page.mouse.move(300, 600)
        assert opened.errors == []
        assert opened.requests == [opened.url]
        assert opened.page.locator("img").count() == 0
        assert EVIL in (opened.page.text_content("h1") or "")
    page = open_page(build_report(run)).page
    assert page.text_content("#sample-prompt") == EVIL
    assert page.locator(".tokens .token").first.text_content() == EVIL


def test_a_job_that_has_only_begun(open_page: Open) -> None:
    opened = open_page(build_report(RunData(dict(R3.job) | {"phase": "QUEUED", "step": 0}, [])))
    assert opened.errors == []
    assert "while the job goes on: QUEUED" in opened.page.inner_text("header")
