"""All rows, in the order in which they are tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from keel.errors import InvalidField
from keel_rollout.conformance import (
    rows_aborted,
    rows_engine,
    rows_midway,
    rows_numbers,
    rows_pause,
    rows_requests,
    rows_sampling,
    rows_update,
)
from keel_rollout.conformance.verdicts import Row, Stage

if TYPE_CHECKING:
    from keel_rollout.conformance.kit import Kit

SUITE = rows_numbers.SUITE


async def _as_it_is(kit: Kit) -> None:
    pass


async def _a_served(kit: Kit) -> None:
    await kit.serve(kit.model.a)


async def _b_served(kit: Kit) -> None:
    await kit.serve(kit.model.b)


def _pause(mode: str, row: Row) -> Stage:
    title = f"Pause with mode {mode}, and after it"
    return Stage(f"pause-{mode}", title, (row, *SUITE), _a_served)


STAGES = (
    Stage("engine", "The engine", rows_engine.ROWS, _as_it_is),
    Stage("first", "Version A, as first loaded", SUITE, _a_served),
    Stage("requests", "Requests", rows_requests.ROWS, _a_served),
    Stage("sampling", "Sampling", rows_sampling.ROWS, _a_served),
    Stage("aborted", "Updates that fail, and after them", (*rows_aborted.ROWS, *SUITE), _a_served),
    _pause("abort", rows_pause.ABORT),
    _pause("wait", rows_pause.WAIT),
    _pause("keep", rows_pause.KEEP),
    Stage("weights", "Updates that succeed", rows_update.ROWS, _a_served),
    Stage("update", "Version B, after updates", SUITE, _b_served),
    Stage(
        "midway",
        "An update in the middle of a generation, and after it",
        (rows_midway.MIDWAY, *SUITE),
        _b_served,
    ),
)


def names() -> Iterator[tuple[str, Row]]:
    """Every row under its full name, e.g. "update/logprobs"."""
    for stage in STAGES:
        for row in stage.rows:
            yield f"{stage.name}/{row.name}", row


def chosen(patterns: list[str]) -> Callable[[str], bool]:
    """Whether a row's full name fits one of the patterns; InvalidField for one that fits none.

    Example:
        chosen(["update/*", "first/probe"])
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name, _ in names()):
            raise InvalidField("--only", pattern, "a row of --list, or a pattern like 'update/*'")
    return lambda name: not patterns or any(fnmatchcase(name, p) for p in patterns)
