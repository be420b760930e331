"""The verifiers, and the weighted sum of several. They run in worker processes (`verify_worker`).

    exact            the response is the answer, white space aside
    math             the response's last mathematical expression equals the answer (math-verify)
    regex            a pattern is found; its group `answer`, if it has one, is the answer
    multiplication   the built-in task's own
    module:function  the operator's

A response that was cut off at max_tokens is judged like any other, as is usual in the field: a
verifier of one's own may ask for `finished`. Light: what is heavy is imported when it is needed.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import math
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from keel_rollout.collector.tasks.base import Case, Verdict, Verifier
from keel_rollout.collector.tasks.multiplication import MultiplicationVerifier

Options = Mapping[str, Any]
"""A `keel.spec.VerifierSpec` as JSON, with `part`, the name of its reward part."""


class Exact:
    """1 if the response is the answer, else 0."""

    def __init__(self, options: Options) -> None:
        self._plain = _plainer(options)

    def verify(self, case: Case) -> Verdict:
        """The verdict on one response."""
        return Verdict(float(self._plain(case.response) == self._plain(case.answer)))


class Regex:
    """1 if the pattern's last match fits, else 0."""

    def __init__(self, options: Options) -> None:
        self._plain = _plainer(options)
        flags = re.IGNORECASE if options["ignore_case"] else 0
        self._pattern = re.compile(options["pattern"], flags)
        self._compares = "answer" in self._pattern.groupindex

    def verify(self, case: Case) -> Verdict:
        """Part where there is an answer to compare: `found`, 1 if the pattern matches at all."""
        found = deque(self._pattern.finditer(case.response), maxlen=1)
        last = found[0] if found else None
        if not self._compares:
            return Verdict(float(last is not None))
        answer = last.group("answer") if last else None
        right = answer is not None and self._plain(answer) == self._plain(case.answer)
        return Verdict(float(right), {"found": float(last is not None)})


class Math:
    """1 if the response's answer equals the row's as mathematics, else 0 (math-verify)."""

    def __init__(self, options: Options) -> None:
        # a second of imports, here and not within the first response's CPU time
        from math_verify import parse, verify

        self._parse, self._verify = parse, verify
        logging.getLogger("math_verify").setLevel(
            logging.ERROR
        )  # it warns that no time limit is on

    def verify(self, case: Case) -> Verdict:
        """Part: `found`, 1 if the response has an expression. Its own time limits, by SIGALRM, are
        off: they count the clock, and ours the CPU."""
        gold = self._parsed(_as_latex(case.answer))
        if not gold:
            raise ValueError(f"the row's answer {case.answer[:80]!r} is no mathematical expression")
        found = self._parsed(case.response)
        right = bool(found) and self._verify(gold, found, timeout_seconds=None)
        return Verdict(float(right), {"found": float(bool(found))})

    def _parsed(self, text: str) -> list[Any]:
        found: list[Any] = self._parse(text, parsing_timeout=None)
        return found


class Custom:
    """A function of the operator's: it is given what its parameters name."""

    _OURS = ("prompt", "response", "answer", "finished")

    def __init__(self, options: Options) -> None:
        module, _, name = options["name"].partition(":")
        self._function: Callable[..., Any] = getattr(importlib.import_module(module), name)
        parameters = inspect.signature(self._function).parameters.values()
        self._all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        self._names = {p.name for p in parameters}

    def verify(self, case: Case) -> Verdict:
        """A number; (number, parts); or an object with `reward` and parts."""
        offered = {**case.fields, **{name: getattr(case, name) for name in self._OURS}}
        offered["row"] = case.fields
        given = {n: v for n, v in offered.items() if self._all or n in self._names}
        result = self._function(**given)
        if isinstance(result, Mapping):
            return Verdict(result["reward"], {k: v for k, v in result.items() if k != "reward"})
        if isinstance(result, tuple):
            reward, parts = result
            return Verdict(reward, parts)
        return Verdict(result)


class Weighted:
    """The weighted sum of verifiers. Each one's value is a part by its name, before weighting; what
    it counts besides is NAME/PART."""

    def __init__(self, verifiers: Sequence[tuple[str, float, Verifier]]) -> None:
        self._verifiers = verifiers

    def verify(self, case: Case) -> Verdict:
        """The sum; an error of one is an error of the whole."""
        total, parts = 0.0, {}
        for part, weight, verifier in self._verifiers:
            try:
                verdict = verifier.verify(case)
                value = _number(part, verdict.reward)
                total += weight * value
                parts[part] = value
                for name, number in verdict.parts.items():
                    parts[f"{part}/{name}"] = _number(f"{part}/{name}", number)
            except (Exception, SystemExit) as error:
                raise VerifierFault(f"{part} raised {type(error).__name__}: {error}") from error
        if not math.isfinite(total):
            raise VerifierFault(f"the weighted sum of {parts} is {total}")
        return Verdict(total, parts)


class VerifierFault(Exception):
    """A verifier failed on a response; the message names it."""


BUILT_IN: Mapping[str, Callable[[Options], Verifier]] = {
    "exact": Exact,
    "math": Math,
    "multiplication": lambda options: MultiplicationVerifier(),
    "regex": Regex,
}
"""By name; what has a colon is `Custom`."""


def build(
    verifiers: Sequence[Options], built_in: Mapping[str, Callable[[Options], Verifier]] = BUILT_IN
) -> Verifier:
    """What a job asks for; raises whatever an import raises."""
    made = []
    for options in verifiers:
        maker = Custom if ":" in options["name"] else built_in[options["name"]]
        made.append((options["part"], options["weight"], maker(options)))
    return Weighted(made)


def _plainer(options: Options) -> Callable[[str], str]:
    def plain(text: str) -> str:
        text = " ".join(text.split()) if options["ignore_space"] else text
        return text.casefold() if options["ignore_case"] else text

    return plain


def _as_latex(answer: str) -> str:
    """An answer is an expression as a whole; text around it must not be searched for one."""
    if answer.count("$") > 1 or any(mark in answer for mark in ("\\boxed", "\\(", "\\[")):
        return answer
    return f"${answer.replace('$', '')}$"  # a single one is a currency


def _number(name: str, value: object) -> float:
    number = float(value)  # type: ignore[arg-type]  # says what is wrong by itself
    if not math.isfinite(number):
        raise ValueError(f"{name} is {number}")
    return number
