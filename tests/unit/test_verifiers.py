"""The verifiers one by one, their weighted sum, and the operator's own, in real workers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from keel.errors import InvalidField
from keel.spec import VerifierSpec, answers_for
from keel_rollout.collector.tasks.base import Case
from keel_rollout.collector.verifiers import build
from keel_rollout.collector.verify import Judgement, VerifierPool

OWN = """
import json

def plain(response, answer):
    return len(response) / 10

def parts(response, finished, row, level):
    return (1 if finished else -1), {"rows": len(row), "level": level}

def named(**everything):
    return {"reward": 0.5, "seen": len(everything)}

def prompt_of(prompt):
    return prompt[0]["role"] == "user"

def broken(response):
    raise KeyError("tests")

def no_number(response):
    return None

def nan_part(response):
    return 1.0, {"x": float("nan")}

def lacks(tests):
    return 1
"""


def judged(spec: dict[str, Any], response: str, answer: str = "") -> dict[str, float]:
    """Parts of one verifier's verdict."""
    verifier = VerifierSpec(**spec)
    verdict = build([{**verifier.model_dump(), "part": verifier.part}]).verify(
        Case("", response, answer=answer)
    )
    assert verdict.reward == verdict.parts[verifier.part]
    return dict(verdict.parts)


@pytest.mark.parametrize(
    ("options", "response", "right"),
    [
        ({}, "forty  two\n", 1),
        ({}, "Forty two", 0),
        ({"ignore_case": True}, "FORTY two", 1),
        ({"ignore_space": False}, "forty two\n", 0),
        ({}, "it is forty two", 0),
        ({}, "", 0),
    ],
)
def test_exact(options: dict[str, Any], response: str, right: int) -> None:
    assert judged({"name": "exact", **options}, response, "forty two") == {"exact": right}


@pytest.mark.parametrize(
    ("answer", "response", "right", "found"),
    [
        ("42", "So the answer is \\boxed{42}.", 1, 1),
        ("42", "She has 42 apples", 1, 1),
        ("42", "She has 41 apples", 0, 1),
        ("1/2", "\\boxed{\\frac{1}{2}}", 1, 1),
        ("\\frac{1}{2}", "0.5", 1, 1),
        ("\\{1, 2\\}", "$\\{2, 1\\}$", 1, 1),
        ("$[1, 2)$", "it lies in $[1, 2)$", 1, 1),
        ("1,234", "$1234$", 1, 1),
        ("x + 1", "$1 + x$", 1, 1),
        ("$10", "It costs $10 in all", 1, 1),
        ("7", "no idea", 0, 0),
        ("7", "", 0, 0),
    ],
)
def test_math(answer: str, response: str, right: int, found: int) -> None:
    assert judged({"name": "math"}, response, answer) == {"math": right, "math/found": found}


@pytest.mark.parametrize(
    ("pattern", "response", "parts"),
    [
        ("<think>.+</think>", "<think>so</think> 7", {"regex": 1}),
        ("<think>.+</think>", "7", {"regex": 0}),
        (r"####\s*(?P<answer>\S+)", "#### 6 or #### 7", {"regex": 1, "regex/found": 1}),
        (r"####\s*(?P<answer>\S+)", "#### 7 or #### 6", {"regex": 0, "regex/found": 1}),
        (r"####\s*(?P<answer>\S+)", "7", {"regex": 0, "regex/found": 0}),
        (r"(?P<answer>\d)?x", "x", {"regex": 0, "regex/found": 1}),
    ],
)
def test_regex(pattern: str, response: str, parts: dict[str, float]) -> None:
    assert judged({"name": "regex", "pattern": pattern}, response, "7") == parts


def test_which_verifiers_need_an_answer() -> None:
    form = VerifierSpec(name="regex", pattern="x")
    group = VerifierSpec(name="regex", pattern="(?P<answer>x)")
    own = VerifierSpec(name="my.rewards:score")
    assert answers_for([form, own]) == ""
    assert answers_for([form, group, VerifierSpec(name="math")]) == "verifier regex and math"
    assert (own.part, own.custom, form.custom) == ("score", True, False)


@pytest.fixture
async def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[VerifierPool]:
    (tmp_path / "own_rewards.py").write_text(OWN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    names = ["plain", "parts", "named", "prompt_of", "broken", "no_number", "nan_part", "lacks"]
    pool = VerifierPool(
        allowed=[f"own_rewards:{name}" for name in [*names, "absent"]] + ["no_module:f"]
    )
    yield pool
    await pool.close()


def own(name: str, **options: Any) -> VerifierSpec:
    return VerifierSpec(name=f"own_rewards:{name}", **options)


CASE = Case(
    [{"role": "user", "content": "?"}],
    "12345",
    answer="5",
    finished=False,
    raw="12345",
    fields={"level": 3, "topic": "sums"},
)


async def test_several_are_summed_by_weight_and_each_is_a_part(pool: VerifierPool) -> None:
    """0.5 * 0.5 (five characters of ten) + 2 * -1 (cut off) - 0.25 * 1."""
    judges = [
        own("plain", weight=0.5, label="length"),
        own("parts", weight=2),
        own("prompt_of", weight=-0.25),
    ]
    await pool.load("task.verifier", judges)
    assert await pool.verify(judges, [CASE]) == [
        Judgement(
            -2.0,
            {
                "length": 0.5,
                "parts": -1.0,
                "parts/rows": 2.0,
                "parts/level": 3.0,
                "prompt_of": 1.0,
            },
        )
    ]


async def test_a_sum_that_is_no_number_is_a_fault(pool: VerifierPool) -> None:
    judges = [own("prompt_of", weight=1e308, label=label) for label in ("one", "two")]
    (judgement,) = await pool.verify(judges, [CASE])
    assert "the weighted sum of" in judgement.fault
    assert "is inf" in judgement.fault


async def test_a_function_gets_what_it_names(pool: VerifierPool) -> None:
    """All of it: prompt, response, answer, finished, row, level, topic."""
    (judgement,) = await pool.verify([own("named")], [CASE])
    assert judgement == Judgement(0.5, {"named": 0.5, "named/seen": 7.0})


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("broken", "verifier broken raised KeyError: 'tests'"),
        ("no_number", "verifier no_number raised TypeError: float() argument must be"),
        ("nan_part", "verifier nan_part raised ValueError: nan_part/x is nan"),
        (
            "lacks",
            "verifier lacks raised TypeError: lacks() missing 1 required positional argument",
        ),
    ],
)
async def test_a_function_that_fails_costs_its_response(
    pool: VerifierPool, name: str, fault: str
) -> None:
    (judgement,) = await pool.verify([own("plain"), own(name)], [CASE])
    assert judgement.fault.startswith(fault)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            "os:system",
            "a built-in verifier, or one that the operator allowed (no_module:f, own_rew",
        ),
        ("no_module:f", "loading it raised ModuleNotFoundError: No module named 'no_module'"),
        ("own_rewards:absent", "loading it raised AttributeError: module 'own_rewards' has no"),
    ],
)
async def test_what_is_not_allowed_or_not_there_is_refused_before_training(
    pool: VerifierPool, name: str, told: str
) -> None:
    with pytest.raises(InvalidField) as raised:
        await pool.load("task.verifier", [VerifierSpec(name=name)])
    assert str(raised.value).startswith(f"task.verifier: {name!r} is not valid; valid: ")
    assert told in str(raised.value)


async def test_math_in_a_worker_is_stopped_by_our_clock_not_its_own() -> None:
    """A tower of powers would take it for ever; the next response is judged as ever."""
    pool = VerifierPool(cpu_limit_s=1.0)
    judges = [VerifierSpec(name="math")]
    cases = [Case("", text, answer="5") for text in ("5", "$9^{9^{9^{9}}}$ ", "10/2")]
    first, tower, last = await pool.verify(judges, cases)
    await pool.close()
    assert first == last == Judgement(1.0, {"math": 1.0, "math/found": 1.0})
    assert tower.fault in ("", "verifier math used more than 1 s of CPU time")
    assert tower.reward == 0


async def test_a_pattern_that_never_ends_costs_its_response() -> None:
    pool = VerifierPool(cpu_limit_s=0.3)
    judges = [VerifierSpec(name="regex", pattern="(a+)+$")]
    judgements = await pool.verify(judges, [Case("", "a" * 40 + "b"), Case("", "a")])
    await pool.close()
    assert [judgement.fault for judgement in judgements] == [
        "verifier regex used more than 0.3 s of CPU time",
        "",
    ]
