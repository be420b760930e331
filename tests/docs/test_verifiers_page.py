"""What docs/verifiers.md says that the math verifier lets through."""

from __future__ import annotations

from pathlib import Path

import pytest

from keel_rollout.collector.tasks.base import Case
from keel_rollout.collector.verifiers import Math

PAGE = Path(__file__).parents[2] / "docs" / "verifiers.md"


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("7 + 5", 1.0),
        ("7 + 5 =", 1.0),
        ("7 + 5 = +3", 1.0),
        ("7 + 5 = 13", 0.0),
        ("so 13", 0.0),
    ],
)
def test_an_unsolved_sum_counts_as_its_value(response: str, reward: float) -> None:
    assert f"`{response}`" in PAGE.read_text(encoding="utf-8")
    assert Math({}).verify(Case(prompt="", response=response, answer="12")).reward == reward
