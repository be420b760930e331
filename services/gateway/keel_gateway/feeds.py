"""Watchers of runs: one reader a run, however many watch it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

from fastapi.sse import KEEPALIVE_COMMENT
from redis.exceptions import RedisError

from keel.errors import KeelError
from keel_gateway.events import Cursor, Event

log = logging.getLogger(__name__)

POLL_S = 0.5
KEEPALIVE_S = 15.0
"""Without an event: what stands between may close a connection that is silent."""
_MOST_READS = 64
"""Kept for those who come to the same place."""

Read = Callable[[str, Cursor], Awaitable[list[Event]]]


class Feeds:
    """The runs that are watched now.

    Example:
        async for chunk in feeds.watch(run, cursor): await send(chunk)
    """

    def __init__(self, read: Read) -> None:
        """
        Args:
            read: the events of a run after a cursor: `keel_gateway.events.events_after`.
        """
        self._read = read
        self._feeds: dict[str, _Feed] = {}
        self._stopping = False

    async def watch(self, run: str, cursor: Cursor) -> AsyncIterator[bytes]:
        """Every event after `cursor` as it goes over the wire, and comments that keep it alive.

        Ends with the run, or when its record is gone. While Redis is away it waits.
        """
        if self._stopping:
            return
        feed = self._feeds.get(run)
        if feed is None:
            feed = self._feeds[run] = _Feed(run, self._read, self._feeds)
        feed.watchers += 1
        try:
            while not (cursor.ended or feed.stopping):
                changed = feed.changed
                try:
                    events = await feed.read(cursor)
                except RedisError as error:
                    log.warning("%s: Redis: %s", run, error)
                    await asyncio.sleep(POLL_S)
                    continue
                except KeelError as error:  # its record is gone, or is none
                    log.warning("a watcher leaves: %s", error)
                    return
                if events:
                    cursor = events[-1].cursor
                    yield b"".join(event.wire for event in events)
                    continue
                try:
                    async with asyncio.timeout(KEEPALIVE_S):
                        await changed.wait()
                except TimeoutError:
                    yield KEEPALIVE_COMMENT
        finally:
            feed.watchers -= 1

    async def stop(self) -> None:
        """Ends every stream; those who watched come back to the next gateway."""
        self._stopping = True
        feeds = list(self._feeds.values())
        for feed in feeds:
            feed.stopping = True
            feed.changed.set()
        await asyncio.gather(*(feed.task for feed in feeds))


class _Feed:
    """Reads one run on behalf of all its watchers, as long as it has any.

    Watchers who have everything are at the same cursor: what is read after it once is for all. So
    is what is read for one who catches up, for the next who comes that way.
    """

    def __init__(self, run: str, read: Read, feeds: dict[str, _Feed]) -> None:
        self._run, self._read, self._feeds = run, read, feeds
        self._head: Cursor | None = None  # nothing came after it when it was last looked at
        self._reads: dict[Cursor, asyncio.Task[list[Event]]] = {}
        self.changed = asyncio.Event()
        """Set, and replaced, when something new has come."""
        self.watchers = 0
        self.stopping = False
        self.task = asyncio.create_task(self._follow())

    async def read(self, cursor: Cursor) -> list[Event]:
        """The events after `cursor`, as of now or of when `changed` was last set."""
        task = self._reads.get(cursor)
        if task is None:
            if len(self._reads) >= _MOST_READS:
                self._reads.clear()
            task = self._reads[cursor] = asyncio.create_task(self._fetch(cursor))
        # a watcher who leaves takes only himself away
        return await asyncio.shield(task)

    async def _fetch(self, cursor: Cursor) -> list[Event]:
        try:
            events = await self._read(self._run, cursor)
        except BaseException:
            self._reads.pop(cursor, None)
            raise
        # only the reader moves the place it looks from: one who comes between two of its looks
        # would move it past what those who wait have not been told
        if not events and self._head is None:
            self._head = cursor
        return events

    async def _follow(self) -> None:
        while not self.stopping:
            await asyncio.sleep(POLL_S)
            # no await from here to the removal: nobody joins a feed that has stopped
            if not self.watchers:
                break
            try:
                await self._advance()
            except (RedisError, KeelError):  # its watchers see for themselves
                pass
            except Exception:  # a reader that ended would leave them waiting for good
                log.exception("%s: cannot be read", self._run)
        if self._feeds.get(self._run) is self:
            del self._feeds[self._run]

    async def _advance(self) -> None:
        if (head := self._head) is None:
            return
        task = asyncio.create_task(self._fetch(head))
        events = await task
        if not events:
            return
        self._reads = {head: task}
        self._head = events[-1].cursor
        self.changed.set()
        self.changed = asyncio.Event()
