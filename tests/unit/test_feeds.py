"""Watchers that share a reader: none is left behind."""

from __future__ import annotations

import asyncio

import pytest

from keel_gateway import feeds as feeds_module
from keel_gateway.events import Cursor, Event
from keel_gateway.feeds import Feeds


class History:
    """Steps 1 to `last`."""

    def __init__(self) -> None:
        self.last = 1
        self.fails = False

    async def read(self, run: str, cursor: Cursor) -> list[Event]:
        if self.fails:
            self.fails = False
            raise ValueError("a row that nobody can read")
        steps = range(cursor.step + 1, self.last + 1)
        return [Event(Cursor(step=step), b"%d" % step) for step in steps]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds_module, "POLL_S", 0.1)


async def _told(feeds: Feeds, into: list[bytes]) -> None:
    async for chunk in feeds.watch("run", Cursor()):
        into.append(chunk)


async def test_one_who_comes_between_two_looks_takes_nothing_from_those_who_wait() -> None:
    history = History()
    feeds = Feeds(history.read)
    first: list[bytes] = []
    second: list[bytes] = []
    watchers = [asyncio.create_task(_told(feeds, first))]
    await asyncio.sleep(0.05)
    history.last = 2
    await asyncio.sleep(0.2)
    assert first == [b"1", b"2"]
    history.last = 3
    watchers.append(asyncio.create_task(_told(feeds, second)))  # sees 3 before the reader looks
    await asyncio.sleep(0.4)
    await feeds.stop()
    await asyncio.gather(*watchers)
    assert second == [b"123"]
    assert first == [b"1", b"2", b"3"]


async def test_a_look_that_fails_unforeseen_does_not_end_the_reader() -> None:
    history = History()
    feeds = Feeds(history.read)
    told: list[bytes] = []
    watcher = asyncio.create_task(_told(feeds, told))
    await asyncio.sleep(0.05)
    history.fails = True  # the next who reads is the reader
    await asyncio.sleep(0.2)
    history.last = 2
    await asyncio.sleep(0.3)
    await feeds.stop()
    await watcher
    assert told == [b"1", b"2"]
