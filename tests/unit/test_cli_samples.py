"""`keel samples`: which are shown, and what a reader sees of them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from clikit import Gateway, job, sample
from rich.console import Console

from keel.record import Phase
from keel.samples import Sample
from keel_gateway.cli_samples import coloured, gap_style, legend, print_sample
from keel_gateway.run_folder import RunData, write_run

pytest_plugins = ["cli_fixtures"]

SAMPLES = [
    sample(4, slot=0, reward=1.0),
    sample(4, slot=1, reward=0.0, proximal_logprobs=[-2.1, -0.2]),
    sample(8, slot=0, reward=0.5, experts_differ=[1, 2]),
    sample(8, slot=1, reward=0.25, proximal_logprobs=None, experts_differ=None),
]


@pytest.fixture
def shown(keel: Callable[..., Any], gateway: Gateway) -> Callable[..., Any]:
    """`keel samples first ARGUMENTS --json`: (step, slot) of each."""
    gateway.jobs(job(phase=Phase.SUCCEEDED, step=8))
    pages = {"-1": SAMPLES}

    def answer() -> dict[str, Any]:
        after = gateway.asked[-1][1].partition("after=")[2].partition("&")[0]
        return {"samples": pages.get(after, [])}

    gateway.answers["GET", "/v1/jobs/first-abcdef/samples"] = answer

    def show(*arguments: str) -> list[tuple[int, int]]:
        result = keel("samples", "first", "--json", *arguments)
        assert result.exit_code == 0, result.stderr
        return [(one["step"], one["slot"]) for one in json.loads(result.stdout)["samples"]]

    return show


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), [(8, 0), (8, 1)]),
        (("--step", "4"), [(4, 0), (4, 1)]),
        (("--worst", "gap"), [(4, 1), (4, 0), (8, 0), (8, 1)]),
        (("--worst", "experts"), [(8, 0), (4, 0), (4, 1), (8, 1)]),
        (("--worst", "reward", "--limit", "2"), [(4, 1), (8, 1)]),
        (("--worst", "reward", "--step", "8"), [(8, 1), (8, 0)]),
    ],
)
def test_which_are_shown(
    shown: Callable[..., Any], arguments: tuple[str, ...], expected: list[tuple[int, int]]
) -> None:
    assert shown(*arguments) == expected


def test_json_is_whole(shown: Callable[..., Any], keel: Callable[..., Any]) -> None:
    found = json.loads(keel("samples", "first", "--step", "4", "--json").stdout)["samples"]
    assert found == SAMPLES[:2]


def test_a_step_without_samples_names_those_that_have_some(
    shown: Callable[..., Any], keel: Callable[..., Any]
) -> None:
    result = keel("samples", "first", "--step", "5")
    assert result.exit_code == 2
    assert "one of 4, 8" in result.stderr


def test_text(shown: Callable[..., Any], keel: Callable[..., Any]) -> None:
    said = keel("samples", "first", "--step", "4", "--limit", "1").stdout
    first, prompt, response, *_ = said.splitlines()
    assert first == (
        "step 4 slot 0 sample 0  reward 1, format 0.5, advantage +0.250, "
        "gap mean 0.1750 max 0.3000 nats, 1 of 2 tokens with differing experts"
    )
    assert (prompt, response) == ("12*3=", "36")
    assert "\x1b" not in said, "no colours where nobody sees them"


def test_samples_of_a_folder_of_keel_run(keel: Callable[..., Any], tmp_path: Path) -> None:
    found = job(phase=Phase.SUCCEEDED, step=8).model_dump(mode="json")
    write_run(tmp_path, RunData(found, [], SAMPLES))
    result = keel("samples", str(tmp_path), "--worst", "reward", "--limit", "1", "--json")
    assert json.loads(result.stdout) == {"samples": [SAMPLES[1]]}


def styled(text: Any, **options: Any) -> str:
    console = Console(file=io.StringIO(), force_terminal=True, width=200, **options)
    console.print(text)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_tokens_are_coloured_by_gap_and_underlined_where_experts_differ() -> None:
    """Gaps of just less than 0.05, and 0.3; experts differ at the second token."""
    one = Sample.model_validate(sample(4))
    text = coloured(one)
    assert text.plain == "36"
    assert [(span.start, span.end, span.style) for span in text.spans] == [
        (0, 1, "light_goldenrod1"),
        (1, 2, "dark_orange underline"),
    ]
    assert "38;5;" in styled(text, color_system="256")
    assert ";5;" not in styled(text, color_system="256", no_color=True)
    assert "\x1b[4m6" in styled(text, color_system="256", no_color=True)


def test_no_color_of_the_environment_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    console = Console(file=io.StringIO(), force_terminal=True)
    print_sample(Sample.model_validate(sample(4)), console)
    console.print(legend())
    assert "38;" not in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("gap", "style"),
    [
        (None, ""),
        (0.005, ""),
        (0.01, "light_sky_blue1"),
        (-0.07, "gold1"),
        (0.3, "deep_sky_blue1"),
        (-4.0, "bright_red"),
    ],
)
def test_colours(gap: float | None, style: str) -> None:
    assert gap_style(gap) == style


def test_a_response_longer_than_its_tokens_is_shown_whole() -> None:
    one = Sample.model_validate(sample(4, response="36 and more"))
    assert coloured(one).plain == "36 and more"


def test_brackets_in_a_response_are_no_markup() -> None:
    one = Sample.model_validate(sample(4, tokens=["[red]", "x"], response="[red]x"))
    console = Console(file=io.StringIO(), width=200)
    print_sample(one, console)
    assert "[red]x" in console.file.getvalue()  # type: ignore[attr-defined]
