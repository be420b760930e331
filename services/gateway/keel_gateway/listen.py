"""Server-sent events, read: lines into events."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a job's stream."""

    kind: str
    """"job", "metrics", "evaluation" or "end"."""
    data: dict[str, Any]
    """The job, the row, the evaluation, or {"phase": ...}."""
    id: str
    """Where to go on after it."""


def parse_events(lines: Iterable[str]) -> Iterator[Event]:
    """The events of a stream as the gateway writes it; comments and what was cut are left out.

    Example:
        list(parse_events(["event: end", 'data: {"phase": "FAILED"}', "id: 0:4:4:-:end", ""]))
        == [Event("end", {"phase": "FAILED"}, "0:4:4:-:end")]
    """
    fields: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(":")
            fields[name] = value.removeprefix(" ")
            continue
        if {"event", "data", "id"} <= fields.keys():
            yield Event(fields["event"], json.loads(fields["data"]), fields["id"])
        fields = {}
