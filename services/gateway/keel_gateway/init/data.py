"""What a user's file of prompts is like."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from pydantic import ValidationError

from keel.dataset import Dataset
from keel.errors import InvalidField
from keel.rows import Prompt, Row
from keel.spec import VerifierSpec, answers_for

FIELD = "DATA"
LOOKED_AT = 2000
"""Rows whose texts are looked at, evenly over the file; every line is checked."""
MATH_SHARE = 0.9
"""From this share of answers on that look like mathematics, math judges."""

_LATEX = re.compile(r"\\[A-Za-z]+|[{}$]")
_EXPRESSION = re.compile(r"[\d\s.,:+\-*/^=<>()\[\]%|!a-z√π∞°]+", re.IGNORECASE)
_WORD = re.compile(r"[A-Za-z]{3,}")


@dataclass(frozen=True, slots=True)
class Data:
    """A checked file."""

    path: Path
    rows: int
    size_bytes: int
    looked_at: int
    """Rows that the numbers below are of."""
    chat: bool
    """Prompts are chat messages, in some rows at least."""
    system: bool
    """Some of them begin with a system message."""
    math: float
    """Share of answers that look like mathematics."""
    prompt_characters: tuple[int, int]
    """Median and most."""
    answer_characters: tuple[int, int]
    """Median and most; of rows with an answer."""
    longest: tuple[Prompt, ...]
    """The longest prompts, to be counted in tokens."""
    characters: frozenset[str]
    """Every character of the prompts."""


def look(path: Path, verifier: str | None) -> Data:
    """Checks every line of the file, and looks at some.

    Args:
        verifier: one that needs answers makes a row without one a fault; so does None.

    Raises:
        InvalidField: there is no such verifier.
        DatasetError: the file is none, or has a bad line; one message.
    """
    answers = "verifier math or exact" if verifier is None else answers_of(verifier)
    dataset = Dataset.open(FIELD, path, answers=answers)
    try:
        step = max(1, len(dataset) // LOOKED_AT)
        rows = [dataset.row(number) for number in range(0, len(dataset), step)]
        answered = [row.answer for row in rows if row.answer]
        return _described(path, len(dataset), rows, answered)
    finally:
        dataset.close()


def answers_of(verifier: str) -> str:
    """What of a verifier needs answers, in words; empty if nothing. InvalidField if unknown."""
    try:
        return answers_for([VerifierSpec(name=verifier)])
    except ValidationError:  # of a table's field; the flag is what its user sees
        valid = "exact, math, or module:function; others are tables [[task.verifier]] in a job file"
        raise InvalidField("--verifier", verifier, valid) from None


def _described(path: Path, count: int, rows: list[Row], answered: list[str]) -> Data:
    ordered = sorted(rows, key=lambda row: len(text_of(row.prompt)))
    prompts = [len(text_of(row.prompt)) for row in ordered]
    answers = [len(answer) for answer in answered] or [0]
    chats = [row.prompt for row in rows if not isinstance(row.prompt, str)]
    return Data(
        path=path,
        rows=count,
        size_bytes=path.stat().st_size,
        looked_at=len(rows),
        chat=bool(chats),
        system=any(chat[0]["role"] in ("system", "developer") for chat in chats),
        math=float(np.mean([looks_like_math(a) for a in answered])) if answered else 0.0,
        prompt_characters=(int(median(prompts)), prompts[-1]),
        answer_characters=(int(median(answers)), max(answers)),
        longest=tuple(row.prompt for row in ordered[-8:]),
        characters=frozenset("".join(text_of(row.prompt) for row in rows)),
    )


def text_of(prompt: Prompt) -> str:
    """The text of a prompt, its messages one after the other."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(message["content"] for message in prompt)


def looks_like_math(answer: str) -> bool:
    """A number, a fraction, LaTeX, or an expression; not words.

    Example:
        "1/2", "-3.5", "12,000", "\\\\frac{1}{2}", "x = 4", "(1, 2)": yes; "Paris", "yes": no
    """
    text = answer.strip()
    if "\\" in text and _LATEX.search(text):
        return True
    plain = _LATEX.sub(" ", text)
    if not any(character.isdigit() for character in plain):
        return len(plain.strip()) == 1 and plain.strip().isalpha() and "$" in text
    return bool(_EXPRESSION.fullmatch(plain)) and not _WORD.search(plain)
