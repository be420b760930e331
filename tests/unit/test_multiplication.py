"""The task: its language, its noise, its split."""

from __future__ import annotations

import re
from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keel.presets import END, PRESETS
from keel_rollout.collector.tasks.base import Case, Verdict
from keel_rollout.collector.tasks.multiplication import (
    DIRECT_GUESS,
    WRONG_DIGIT,
    Multiplication,
    MultiplicationVerifier,
    is_held_out,
    scratchpad,
)


def verify(prompt: str, response: str, answer: str) -> Verdict:
    return MultiplicationVerifier().verify(Case(prompt, "", answer=answer, raw=response))


quick = settings(max_examples=50, deadline=None)
first_factors = st.integers(10, 999_999)
second_factors = st.integers(2, 9)
seeds = st.integers(0, 2**64 - 1)


def test_the_scratchpad_by_hand() -> None:
    """347 * 6: 7*6 = 42, 4*6 + 4 = 28, 3*6 + 2 = 20. 12 * 3 has no carry and loses its zero."""
    assert scratchpad(347, 6) == "7642 4628 3620 =2082<end>"
    assert scratchpad(12, 3) == "2306 1303 =36<end>"


@quick
@given(a=first_factors, b=second_factors)
def test_a_clean_scratchpad_verifies_and_fits(a: int, b: int) -> None:
    response = scratchpad(a, b)
    verdict = verify(f"{a}*{b}=", response, str(a * b))
    assert verdict.reward == 1.0
    assert verdict.parts == {"formed": 1.0}
    assert len(response.removesuffix(END)) + 1 <= 6 * len(str(a)) + 3
    assert set(response.removesuffix(END)) <= set(PRESETS["tiny-qwen3-moe"].alphabet)


def test_three_digits_fit_24_tokens() -> None:
    assert len(scratchpad(999, 9).removesuffix(END)) + 1 == 21


@pytest.mark.parametrize(
    ("response", "reward", "formed"),
    [
        ("=2082<end>", 1, 1),
        ("anything =2082<end>", 1, 1),
        ("=2083<end>", 0, 1),
        ("=02082<end>", 0, 1),  # a number has one writing
        ("=2082", 0, 0),  # truncated
        ("2082<end>", 0, 0),  # no answer
        ("=2082<end>=1<end>", 0, 1),  # the last one counts
        ("=20 82<end>", 0, 0),
        ("=\u0662\u0660\u0668\u0662<end>", 0, 0),  # digits, but not ours
        ("=2082<end>\n", 0, 0),
        ("", 0, 0),
    ],
)
def test_what_counts_as_an_answer(response: str, reward: float, formed: float) -> None:
    verdict = verify("347*6=", response, "2082")
    assert (verdict.reward, verdict.parts["formed"]) == (reward, formed)


@quick
@given(text=st.text())
def test_no_text_breaks_the_verifier(text: str) -> None:
    assert verify("347*6=", text, "2082").reward in (0.0, 1.0)


@quick
@given(seed=seeds, difficulty=st.integers(2, 6))
def test_problems_and_demonstrations_keep_to_their_side_of_the_split(
    seed: int, difficulty: int
) -> None:
    task = Multiplication(difficulty)
    prompt, _ = task.demonstration(seed, 0)
    for text, held_out in (
        (task.training_problem(seed, 0).prompt, False),
        (prompt, False),
        (task.held_out_problem(seed, 0).prompt, True),
    ):
        a, b = (int(number) for number in text.rstrip("=").split("*"))
        assert is_held_out(a, b) is held_out
        assert 2 <= len(str(a)) <= difficulty
        assert 2 <= b <= 9


@quick
@given(seed=seeds)
def test_the_same_seed_gives_the_same(seed: int) -> None:
    one, other = Multiplication(4), Multiplication(4)
    assert one.training_problem(seed, 0) == other.training_problem(seed, 0)
    assert one.held_out_problem(seed, 0) == other.held_out_problem(seed, 0)
    assert one.demonstration(seed, 0) == other.demonstration(seed, 0)


def test_the_split_holds_a_tenth_and_favours_no_digit() -> None:
    """7,920 pairs. The trap: (a*1009 + b*7919) % 10 would pick exactly a + b = 0 mod 10."""
    pairs = [(a, b) for a in range(10, 1000) for b in range(2, 10)]
    held = [pair for pair in pairs if is_held_out(*pair)]
    assert len(held) / len(pairs) == pytest.approx(0.1, abs=0.01)
    for property_of in (
        lambda a, b: (a + b) % 10,
        lambda a, b: a % 10,
        lambda a, b: a // 10 % 10,
        lambda a, b: b,
        lambda a, b: a * b % 10,
    ):
        everywhere = Counter(property_of(a, b) for a, b in pairs)
        chosen = Counter(property_of(a, b) for a, b in held)
        for value, count in everywhere.items():
            # five standard deviations of a binomial share
            slack = 5 * (0.09 / count) ** 0.5
            assert chosen[value] / count == pytest.approx(0.1, abs=slack)


def test_lengths_are_equally_likely() -> None:
    task = Multiplication(4)
    lengths = Counter(len(task.training_problem(seed, 0).prompt) for seed in range(3000))
    assert lengths.keys() == {5, 6, 7}
    assert all(900 < count < 1100 for count in lengths.values())


def test_demonstrations_are_as_noisy_as_promised() -> None:
    """Over 3,000: the share of direct guesses, and the share of sums that are not the rule's given
    what is written before (12 % a digit: 22.6 % of the two-digit sums)."""
    task = Multiplication(3)
    guesses = wrong = sums = right = 0
    for seed in range(3000):
        prompt, response = task.demonstration(seed, 0)
        a, b = (int(number) for number in prompt.rstrip("=").split("*"))
        right += verify(prompt, response, str(a * b)).reward
        if response.startswith("="):
            guesses += 1
            continue
        carry = 0
        for digit, column in zip(reversed(str(a)), response.split(" "), strict=False):
            assert column[:2] == f"{digit}{b}"
            wrong += int(column[2:]) != int(digit) * b + carry
            carry = int(column[2])
            sums += 1
    assert guesses / 3000 == pytest.approx(DIRECT_GUESS, abs=0.03)
    assert wrong / sums == pytest.approx(1 - (1 - WRONG_DIGIT) ** 2, abs=0.02)
    assert 0.4 < right / 3000 < 0.7


@quick
@given(a=first_factors, b=second_factors, seed=seeds)
def test_the_answer_is_always_copied_from_the_columns(a: int, b: int, seed: int) -> None:
    response = scratchpad(a, b, Random(seed))
    *columns, answer = response.removesuffix(END).split(" ")
    assert re.fullmatch(r"=\d+", answer)
    units = "".join(column[3] for column in reversed(columns))
    assert int(answer[1:]) == int(columns[-1][2] + units)
