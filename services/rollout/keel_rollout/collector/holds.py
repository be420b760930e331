"""Why a run is held back now, said once in the log and, as long as it lasts, in its record."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import redis.asyncio

from keel.queue import run_key
from keel_rollout.collector.backoff import insist
from keel_rollout.collector.record_write import tell
from keel_rollout.collector.telemetry import HELD_SECONDS

log = logging.getLogger(__name__)

Cause = Literal["queue", "redis", "blobs"]

_COUNT_S = 1.0
"""How often the seconds are counted."""
_END_S = 1.0
"""Longest wait for Redis when the last word is written."""


@dataclass(slots=True)
class _Hold:
    text: str
    began_s: float
    waiters: int = 0


class Holds:
    """The causes that hold a run back; its record's `queue_full` follows them.

    Example:
        with holds.because("blobs", "no space left on device"):
            await asyncio.sleep(1)  # the record says so, `keel status` shows it
    """

    def __init__(self, client: redis.asyncio.Redis, run: str, told: str) -> None:
        """
        Args:
            told: what the record says at the start: a collector that was killed may have left it.
        """
        self._redis, self._run = client, run
        self._told: str | None = told
        self._holds: dict[Cause, _Hold] = {}
        self._change = asyncio.Event()

    @contextlib.contextmanager
    def because(self, cause: Cause, text: str) -> Iterator[None]:
        """As long as this lasts the run is held back. Of several at once, the first text counts."""
        hold = self._holds.get(cause)
        if hold is None:
            hold = self._holds[cause] = _Hold(text, time.monotonic())
            log.warning("run %s is held back: %s", self._run, text)
            self._notify()
        hold.waiters += 1
        try:
            yield
        finally:
            hold.waiters -= 1
            if not hold.waiters:
                del self._holds[cause]
                held_s = time.monotonic() - hold.began_s
                log.info("run %s is no longer held back (%s): %.1f s", self._run, cause, held_s)
                self._notify()

    def doubt(self) -> None:
        """The record may no longer say what was told."""
        self._told = None
        self._notify()

    async def follow(self) -> None:
        """Keeps the record in step until cancelled."""
        counted_s = time.monotonic()
        while True:
            change, causes = self._change, list(self._holds)
            await self._tell()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_COUNT_S):
                    await change.wait()
            counted_s, before_s = time.monotonic(), counted_s
            for cause in causes:
                HELD_SECONDS.labels(cause).inc(counted_s - before_s)

    async def end(self) -> None:
        """Nobody waits any more: the record is cleared, if Redis answers soon."""
        self._holds = {}
        with contextlib.suppress(Exception):
            async with asyncio.timeout(_END_S):
                await self._tell()

    async def _tell(self) -> None:
        text = "; ".join(hold.text for hold in self._holds.values())
        if text == self._told:
            return
        if text:
            await tell(self._redis, self._run, queue_full=text)
        else:  # also in a full Redis
            await insist(
                f"run {self._run}", lambda: self._redis.hdel(run_key(self._run), "queue_full")
            )
        self._told = text

    def _notify(self) -> None:
        self._change.set()
        self._change = asyncio.Event()
