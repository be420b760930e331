"""Samples as the report shows them; colours that people can read."""

from __future__ import annotations

import re
from importlib.resources import files
from typing import Any

import pytest

from keel_gateway import sample_view as module
from keel_gateway.sample_view import sample_view


def sample(
    step: int, slot: int = 0, place: int = 0, tokens: int = 3, **more: Any
) -> dict[str, Any]:
    return {
        "attempt": 0,
        "step": step,
        "lap": step // 2,
        "slot": slot,
        "sample": place,
        "policy_version": 0,
        "reward": 1.0,
        "reward_parts": {"correct": 1.0},
        "advantage": 0.5,
        "truncated": False,
        "valid": True,
        "invalid_reason": "",
        "prompt": f"prompt {slot}",
        "response": "a" * tokens,
        "tokens": ["a"] * tokens,
        "rollout_logprobs": [-1.0] * tokens,
        "proximal_logprobs": [-1.125] * tokens,
        "experts_differ": [0] * tokens,
    } | more


def test_nothing_without_samples() -> None:
    assert sample_view([]) is None


def test_groups_are_in_the_order_of_steps_and_their_responses_in_that_of_samples() -> None:
    view = sample_view([sample(4, 1, 1), sample(4, 1, 0), sample(2, 3), sample(4, 0)])
    assert view is not None
    assert [(group["step"], group["slot"]) for group in view["groups"]] == [(2, 3), (4, 0), (4, 1)]
    assert [one["sample"] for one in view["groups"][2]["responses"]] == [0, 1]
    assert view["groups"][0]["responses"][0]["g"] == [-0.125, -0.125, -0.125]
    assert view["left_out"] == 0


def test_what_was_not_measured_is_null() -> None:
    one = sample(1, proximal_logprobs=None, experts_differ=None)
    two = sample(1, place=1, rollout_logprobs=[None, -1.0, -1.0])
    view = sample_view([one, two])
    assert view is not None
    first, second = view["groups"][0]["responses"]
    assert (first["g"], first["e"]) == (None, None)
    assert (second["r"][0], second["g"][0]) == (None, None)


@pytest.mark.parametrize(
    ("gap", "scale"), [(0.0, 0.001), (0.0009, 0.001), (0.03, 0.05), (0.05, 0.05), (7.0, 10.0)]
)
def test_the_scale_is_a_round_number_above_the_gaps(gap: float, scale: float) -> None:
    view = sample_view([sample(1, proximal_logprobs=[-1.0 - gap] * 3)])
    assert view is not None
    assert view["scale"] == pytest.approx(scale)


def test_one_wild_token_of_many_does_not_bleach_the_rest() -> None:
    proximal = [-1.01] * 999 + [-20.0]
    view = sample_view([sample(1, tokens=1000, proximal_logprobs=proximal)])
    assert view is not None
    assert view["scale"] == pytest.approx(0.01)


def test_too_many_are_left_out_by_whole_groups_evenly_and_the_last_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MOST_TOKENS", 12)
    view = sample_view([sample(step, place=place) for step in range(1, 8) for place in (0, 1)])
    assert view is not None
    assert [group["step"] for group in view["groups"]] == [3, 7]
    assert [len(group["responses"]) for group in view["groups"]] == [2, 2]
    assert view["left_out"] == 5


def test_a_long_response_is_cut_and_says_how_long_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_TOKENS_A_RESPONSE", 2)
    view = sample_view([sample(1, tokens=5)])
    assert view is not None
    (one,) = view["groups"][0]["responses"]
    assert [len(one[key]) for key in ("tokens", "r", "g", "e")] == [2, 2, 2, 2]
    assert (one["length"], one["longer"]) == (5, False)


def test_of_a_response_whose_first_tokens_alone_were_kept_it_is_said() -> None:
    view = sample_view([sample(1, tokens=3, response="aaaa")])
    assert view is not None
    assert view["groups"][0]["responses"][0]["longer"]


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb, as WCAG 2 has it."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, two: str) -> float:
    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_enough_in_both_schemes(scheme: str) -> None:
    css = files("keel_gateway").joinpath("assets", "page.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    values = dict(re.findall(r"--(\w+): (#\w{6});", blocks[scheme == "dark"]))
    for text in ("text", "soft", "bad", "link"):
        for ground in ("page", "card"):
            assert contrast(values[text], values[ground]) >= 4.5, (text, ground)
    for ground in ("below", "above"):  # a token at full colour
        assert contrast(values["text"], values[ground]) >= 4.5, ground
    for place in range(8):  # lines
        assert contrast(values[f"c{place}"], values["card"]) >= 3, place
