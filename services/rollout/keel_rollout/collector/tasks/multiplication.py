"""Multiplication on paper: a number of 2 to `difficulty` digits times one digit, by characters.

    347*6=7642 4628 3620 =2082<end>

The scratchpad has a column for each digit of the first factor, from the right: the digit, the other
factor, and their product plus the carry, always in two digits. 7 6 42: 7*6 = 42; 4 6 28: 4*6 + 4;
3 6 20: 3*6 + 2. The tens are the next column's carry and the units the product's digits, so every
character follows from a few that stand near it, and the answer after the last "=" can be copied:
the last column's two digits, then the units from right to left. Nothing but the answer counts. A
direct guess leaves the scratchpad out: "=2082<end>". A response takes at most 6 * difficulty + 3
tokens.

Demonstrations are noisy on purpose. Imitating clean ones solves the task and leaves reinforcement
nothing to learn; imitating noise gives a model that knows the scratchpad and trusts it too little.
On the tiny preset, 400 steps of 64 leave 0.13 sampled and 0.27 greedy; 160 steps of 32 groups of 8
then bring 0.55.
"""

from __future__ import annotations

import re
from random import Random

from keel.presets import END
from keel.seeds import derive_seed
from keel_rollout.collector.tasks.base import Case, Problem, Prompt, Verdict

WRONG_DIGIT = 0.12
"""Chance that a demonstration writes another digit than it has computed. Copied digits are right,
and what follows is right given what is written (a wrong carry is carried on): the noise moves
probability to wrong digits, and the rule stays the likeliest."""
DIRECT_GUESS = 0.30
"""Share of demonstrations without scratchpad: a habit that rewards soon speak against. The answer's
digits are the product's, with the same noise."""
HELD_OUT_IN = 10
"""One pair of factors in this many is held out."""

_PAIR = re.compile(r"(?<!\d)(\d+)\*(\d)=", re.ASCII)
_ANSWER = re.compile(r"=(\d+)" + re.escape(END) + r"\Z", re.ASCII)


class Multiplication:
    """The task `multiplication`."""

    def __init__(self, difficulty: int) -> None:
        """
        Args:
            difficulty: most digits of the first factor, at least 2.
        """
        self._difficulty = difficulty

    def training_problem(self, seed: int, index: int) -> Problem:
        """A pair that is not held out; each number of digits is equally likely."""
        return _problem(*self._draw(Random(seed), held_out=False))

    def held_out_size(self) -> int | None:
        """As many as one likes."""
        return None

    def held_out_problem(self, seed: int, index: int) -> Problem:
        """A held-out pair; seeds may meet in the same one."""
        return _problem(*self._draw(Random(seed), held_out=True))

    def holds_out(self, prompt: Prompt) -> bool:
        """Whether it is the prompt of a held-out pair, alone or in a chat message."""
        texts = [prompt] if isinstance(prompt, str) else [str(each["content"]) for each in prompt]
        return any(
            is_held_out(int(pair[1]), int(pair[2]))
            for text in texts
            for pair in _PAIR.finditer(text)
        )

    def demonstration(self, seed: int, index: int) -> tuple[Prompt, str]:
        """A prompt and a noisy response."""
        random = Random(seed)
        a, b = self._draw(random, held_out=False)
        if random.random() < DIRECT_GUESS:
            response = "=" + "".join(_noisy(digit, random) for digit in str(a * b)) + END
        else:
            response = scratchpad(a, b, random)
        return _problem(a, b).prompt, response

    def _draw(self, random: Random, *, held_out: bool) -> tuple[int, int]:
        while True:
            digits = random.randint(2, self._difficulty)
            a, b = random.randrange(10 ** (digits - 1), 10**digits), random.randint(2, 9)
            if is_held_out(a, b) == held_out:
                return a, b


class MultiplicationVerifier:
    """Reward 1 if the response has ended and its answer is the product, else 0."""

    def verify(self, case: Case) -> Verdict:
        """Part: `formed`, 1 if there is an answer at all. Special tokens count as characters."""
        answer = _ANSWER.search(case.raw)
        correct = float(answer is not None and answer.group(1) == case.answer)
        return Verdict(correct, {"formed": float(answer is not None)})


def is_held_out(a: int, b: int) -> bool:
    """The split: a mixed hash of the pair, so that no digit and no sum of digits decides it."""
    return derive_seed(0, "multiplication", a, b) % HELD_OUT_IN == 0


def scratchpad(a: int, b: int, noise: Random | None = None) -> str:
    """The response for a * b.

    Args:
        noise: replaces digits of the sums; None writes it without a mistake.
    """
    columns: list[str] = []
    sums: list[str] = []
    carry = 0
    for digit in reversed(str(a)):
        written = f"{int(digit) * b + carry:02d}"
        if noise is not None:
            written = "".join(_noisy(character, noise) for character in written)
        sums.append(written)
        columns.append(f"{digit}{b}{written} ")
        carry = int(written[0])
    product = sums[-1] + "".join(written[1] for written in reversed(sums[:-1]))
    return "".join(columns) + f"={int(product)}{END}"


def _problem(a: int, b: int) -> Problem:
    return Problem(f"{a}*{b}=", str(a * b))


def _noisy(digit: str, random: Random) -> str:
    if random.random() >= WRONG_DIGIT:
        return digit
    return str((int(digit) + random.randint(1, 9)) % 10)
