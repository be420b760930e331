"""Waiting between tries: doubling, bounded, and never giving up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

import redis.exceptions

from keel.queue import FULL_SIGNS

log = logging.getLogger(__name__)

FIRST_S, MOST_S = 0.1, 5.0
REDIS_TIMEOUT_S = 30.0
"""Seconds for one operation on Redis. Kept here and not by redis-py: its socket_timeout goes
through asyncio.wait_for, which on Python 3.11 may swallow a cancellation."""

_TROUBLE = (
    redis.exceptions.ConnectionError,  # down, restarting, loading
    redis.exceptions.TimeoutError,
    TimeoutError,
    redis.exceptions.OutOfMemoryError,  # noeviction: wait until the trainer has freed some
    redis.exceptions.ReadOnlyError,  # failover
)

Result = TypeVar("Result")


class Backoff:
    """Waits 0.1, 0.2, 0.4 ... 5 s, and says so in the log.

    Example:
        backoff = Backoff("engine 127.0.0.1:7001")
        while True:
            try:
                return await call()
            except EngineFailure as failure:
                await backoff.wait(failure)
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._wait_s = FIRST_S

    async def wait(self, reason: object) -> None:
        """Sleeps; longer each time."""
        log.warning("%s: %s; again in %.1f s", self._what, reason, self._wait_s)
        await asyncio.sleep(self._wait_s)
        self._wait_s = min(2 * self._wait_s, MOST_S)

    def reset(self) -> None:
        """It went well: the next trouble waits from the start again."""
        self._wait_s = FIRST_S


def passes(error: Exception) -> bool:
    """An operation on Redis failed for a reason that goes away by itself or by an operator."""
    return isinstance(error, _TROUBLE) or (
        isinstance(error, redis.exceptions.ResponseError)
        and any(sign in str(error) for sign in FULL_SIGNS)
    )


async def insist(what: str, operation: Callable[[], Awaitable[Result]]) -> Result:
    """The result of an operation on Redis that may be repeated, however long Redis is away."""
    backoff = Backoff(what)
    while True:
        try:
            async with asyncio.timeout(REDIS_TIMEOUT_S):
                return await operation()
        except Exception as error:
            if not passes(error):
                raise
            await backoff.wait(f"{type(error).__name__}: {error}")
