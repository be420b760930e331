"""One line of a JSONL file: a row, or what is wrong with it, in which field.

{"prompt": "2 + 3 =", "answer": 5, "id": "a1", "level": "easy"}
{"prompt": [{"role": "user", "content": "What is 2 + 3?"}], "answer": "5"}
{"prompt": "2 + 3 =", "response": "5"}                                  a demonstration
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

Message = Mapping[str, Any]
Prompt = str | list[Message]
Kind = Literal["problems", "demonstrations"]

ROLES = ("system", "developer", "user", "assistant", "tool")
_OWN = ("prompt", "answer", "id")
_SHOWN_CHARACTERS = 80


class RowFault(ValueError):
    """A line that is no row: which field, what it holds, what would be valid."""

    def __init__(self, field: str, value: object, valid: str, *, whole: bool = True) -> None:
        shown = repr(value) if whole else str(value)
        if len(shown) > _SHOWN_CHARACTERS:
            shown = shown[:_SHOWN_CHARACTERS] + "..."
        super().__init__(f"{field}: {shown} is not valid; valid: {valid}")


@dataclass(frozen=True, slots=True)
class Row:
    """A row, checked."""

    prompt: Prompt
    """Text, or chat messages."""
    answer: str
    """Empty if it has none."""
    id: str
    """Empty if it has none."""
    response: str
    """Of a demonstration; else empty."""
    fields: Mapping[str, Any]
    """Every further field, for verifiers."""


def parse_row(line: bytes, *, kind: Kind, answers: str = "") -> Row:
    """The row of a line, or RowFault.

    Args:
        answers: what needs an answer in every row, for the message; empty if nothing does.
    """
    data = _decode(line)
    prompt = _prompt(_present(data, "prompt", "text, or a list of chat messages"))
    response = answer = ""
    if kind == "demonstrations":
        response = _text(_present(data, "response", "the text to imitate"), "response")
    else:
        answer = _answer(data, answers)
    fields = {key: value for key, value in data.items() if key not in _OWN}
    return Row(prompt, answer, _id(data), response, fields)


def _decode(line: bytes) -> dict[str, Any]:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowFault(
            f"byte {error.start + 1}", f"0x{line[error.start]:02x}", "UTF-8", whole=False
        ) from error
    try:
        data = json.loads(text, parse_constant=_no_constant)
    except RowFault:
        raise
    except (ValueError, RecursionError) as error:
        if not line.endswith(b"\n"):
            valid = "a whole JSON object: the file ends within this line, it was cut off"
        else:
            valid = f"a JSON object on one line ({error})"
        raise RowFault("line", text.strip(), valid) from error
    if not isinstance(data, dict):
        raise RowFault("line", data, "a JSON object with a prompt")
    return data


def _no_constant(name: str) -> NoReturn:
    raise RowFault("line", name, "numbers that JSON has: no NaN, no Infinity", whole=False)


def _present(data: Mapping[str, Any], field: str, valid: str) -> Any:
    if field not in data:
        raise RowFault(field, "missing", valid, whole=False)
    return data[field]


def _prompt(prompt: Any) -> Prompt:
    if isinstance(prompt, str):
        return _text(prompt, "prompt")
    if not isinstance(prompt, list):
        raise RowFault("prompt", prompt, "text, or a list of chat messages")
    if not prompt:
        raise RowFault("prompt", prompt, "at least one chat message")
    for index, message in enumerate(prompt):
        _check_message(message, f"prompt[{index}]")
    if prompt[-1]["role"] == "assistant":
        raise RowFault(
            f"prompt[{len(prompt) - 1}].role", "assistant", "user or tool: the model answers last"
        )
    return prompt


def _check_message(message: Any, field: str) -> None:
    if not isinstance(message, dict):
        raise RowFault(field, message, "an object with role and content")
    role = message.get("role", "missing")
    if role not in ROLES:
        raise RowFault(f"{field}.role", role, ", ".join(ROLES))
    if not isinstance(message.get("content"), str):
        raise RowFault(f"{field}.content", message.get("content", "missing"), "text")
    _unicode(message["content"], f"{field}.content")


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise RowFault(field, value, "text")
    if not value.strip():
        raise RowFault(field, value, "text that is not empty")
    _unicode(value, field)
    return value


def _unicode(value: str, field: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowFault(field, value, "Unicode text: it has half of a surrogate pair") from error


def _answer(data: Mapping[str, Any], answers: str) -> str:
    answer = data.get("answer")
    if answer is None:
        if answers:
            valid = f"text or a number, which {answers} compares with"
            raise RowFault("answer", "null" if "answer" in data else "missing", valid, whole=False)
        return ""
    number = isinstance(answer, int | float) and not isinstance(answer, bool)
    if not isinstance(answer, str) and not (number and math.isfinite(answer)):
        raise RowFault("answer", answer, "text or a number")
    if isinstance(answer, str):
        return _text(answer, "answer")
    return str(answer)


def _id(data: Mapping[str, Any]) -> str:
    value = data.get("id")
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise RowFault("id", value, "text or a whole number, or leave it out")
    return str(value)
