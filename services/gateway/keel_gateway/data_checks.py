"""A first look at a job's data files, where the gateway sees them: a wrong one is refused at once.

The collector reads them whole before anything is trained; here a beginning is enough.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

from keel.dataset import check_head
from keel.errors import DatasetError, InvalidField
from keel.rows import Kind
from keel.spec import RunSpec, answers_for

PATIENCE_S = 5.0
"""Longest that a submission waits for a slow disk."""


async def data_lacks(spec: RunSpec) -> list[InvalidField]:
    """What is wrong with the first lines of the files that a spec names.

    A file whose folder is not there either may lie where only the collector sees it: it is passed.
    """
    looking = asyncio.to_thread(lambda: list(_faults(spec)))
    try:
        return await asyncio.wait_for(looking, PATIENCE_S)
    except TimeoutError:
        return []


def _faults(spec: RunSpec) -> Iterator[InvalidField]:
    for field, path, kind, answers in _files(spec):
        if not path.parent.is_dir():
            continue
        try:
            check_head(field, path, kind=kind, answers=answers)
        except DatasetError as error:
            yield error


def _files(spec: RunSpec) -> Iterator[tuple[str, Path, Kind, str]]:
    if spec.task.file:
        yield "task.dataset", Path(spec.task.file), "problems", answers_for(spec.task.verifiers)
    if spec.cold_start.dataset is not None:
        yield "cold_start.dataset", Path(spec.cold_start.dataset), "demonstrations", ""
    for index, each in enumerate(spec.evaluation_sets):
        if each.dataset is not None:
            answers = answers_for(spec.verifiers_of(each))
            yield f"evaluation.sets.{index}.dataset", Path(each.dataset), "problems", answers
