"""Whether Redis still has what it had: a marker there, and in memory the runs that were seen.

    start --> marker set, unless it is there --> ... --> marker gone or another: LOST
                                                             | told once; new marker
                                                             '--> goes on with Redis as it is

A Redis that was restarted without its data, or emptied, looks like one in which no run ever was.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import NamedTuple

from redis.asyncio import Redis

from keel.errors import NotFound
from keel.queue import DEPLOYMENT_KEY, run_key
from keel.record import Phase, RunRecord

log = logging.getLogger(__name__)

MOST_NAMED = 5
"""Runs that a note names."""


class Lost(NotFound):
    """A run that was there, before Redis lost its data."""


class Seen(NamedTuple):
    """A run as its record last stood: little, as it is kept for every run."""

    phase: Phase
    step: int
    folder: str


class Continuity:
    """Notices a loss, and remembers it until the gateway ends."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._marker: bytes | str | None = None
        self._checking = asyncio.Lock()
        self._known: dict[str, Seen | None] = {}
        self._lost: dict[str, str] = {}
        self.notes: list[str] = []
        """A sentence for each loss."""

    def saw(self, runs: Iterable[str]) -> None:
        """Remembers that these runs are in Redis."""
        for run in runs:
            self._known.setdefault(run, None)

    def saw_records(self, records: Iterable[RunRecord]) -> None:
        """Remembers how these runs stand."""
        self._known |= {r.run: Seen(r.phase, r.step, r.folder) for r in records}

    def missing(self, run: str) -> NotFound:
        """Why there is no such run."""
        if told := self._lost.get(run):
            return Lost(told)
        return NotFound(f"no run {run!r}; GET /v1/jobs lists them")

    async def check(self) -> None:
        """Looks whether Redis is the one that it was. Redis's errors pass through."""
        async with self._checking:
            found = await self._redis.get(DEPLOYMENT_KEY)
            if found is not None and found == self._marker:
                return
            if self._marker is not None:
                await self._note_loss()
            await self._redis.set(DEPLOYMENT_KEY, secrets.token_hex(8), nx=True)
            self._marker = await self._redis.get(DEPLOYMENT_KEY)

    async def _note_loss(self) -> None:
        runs = list(self._known)
        async with self._redis.pipeline(transaction=False) as pipe:
            for run in runs:
                pipe.hexists(run_key(run), "spec")
            there = await pipe.execute() if runs else []
        gone = {run: self._known.pop(run) for run, n in zip(runs, there, strict=True) if not n}
        when = f"at about {datetime.fromtimestamp(time.time(), UTC):%H:%M} UTC"
        self._lost |= {run: _told(run, seen, when) for run, seen in gone.items()}
        stopped = [run for run, seen in gone.items() if seen and not seen.phase.final]
        names = ", ".join(stopped[:MOST_NAMED]) + (", ..." if len(stopped) > MOST_NAMED else "")
        note = (
            f"Redis was restarted without its data (or emptied) {when}: the records of {len(gone)} "
            f"jobs are lost, {len(stopped)} of them unfinished{f' ({names})' if names else ''}; "
            "checkpoints and models are still in the runs folder"
        )
        self.notes.append(note)
        log.error("%s", note)


def _told(run: str, seen: Seen | None, when: str) -> str:
    lost = f"run {run!r} is lost: Redis was restarted without its data (or emptied) {when}, "
    folder = (seen and seen.folder) or "its runs folder, on its trainer's disk"
    if seen is None or seen.phase.final:
        ended = f" It had ended ({seen.phase})." if seen else ""
        return f"{lost}and its record with it.{ended} Checkpoints and model are still in {folder}"
    if seen.phase is Phase.QUEUED:
        return f"{lost}and its record with it. It had not begun: submit it again"
    return (
        f"{lost}and its record with it. The run was stopped after step {seen.step} or a little "
        f"later. Its checkpoints are still in {folder}; submit it again to run it anew"
    )
