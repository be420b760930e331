"""SlotReader on a real Redis: slot order, first entry wins, acknowledgement, restart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st
from rediskit import start_redis

from keel.errors import WireError
from keel.queue import CONSUMER_GROUP, groups_key, pack
from keel.types.v1 import sequence_pb2
from keel_trainer.consumer import SlotReader

KEY = groups_key("r")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> str:
    return start_redis(tmp_path_factory.mktemp("redis"))


@pytest.fixture
def client(server: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server) as client:
        client.flushall()
        yield client


def add(client: redis.Redis, lap: int, slot: int, reason: str = "", attempt: int = 0) -> bytes:
    envelope = sequence_pb2.Envelope(
        id=sequence_pb2.SlotId(run="r", attempt=attempt, lap=lap, slot=slot),
        void=sequence_pb2.VoidSlot(reason=reason or f"{lap}/{slot}"),
    )
    return client.xadd(KEY, pack(envelope))


def reader(client: redis.Redis, first_lap: int = 0) -> SlotReader:
    return SlotReader(client, client, KEY, run="r", attempt=0, first_lap=first_lap)


def never() -> None:
    raise AssertionError("waited for something that is there")


def pending(client: redis.Redis) -> int:
    return client.xpending(KEY, CONSUMER_GROUP)["pending"]


@settings(max_examples=25, deadline=None)
@given(st.permutations([(lap, slot) for lap in range(2) for slot in range(3)]))
def test_any_arrival_order_gives_slot_order(server: str, arrival: list[tuple[int, int]]) -> None:
    with redis.Redis.from_url(server) as client:
        client.flushall()
        for lap, slot in arrival:
            add(client, lap, slot)
        slots = reader(client)
        taken = [slots.take(lap, slot, never).void.reason for lap in range(2) for slot in range(3)]
        assert taken == ["0/0", "0/1", "0/2", "1/0", "1/1", "1/2"]
        assert slots.acknowledge() == 6
        assert client.xlen(KEY) == 0


def test_first_entry_of_a_slot_wins_and_the_second_goes_with_it(client: redis.Redis) -> None:
    add(client, 0, 0, "first")
    add(client, 0, 0, "second")
    slots = reader(client)
    assert slots.take(0, 0, never).void.reason == "first"
    assert slots.acknowledge() == 2
    # later than the acknowledgement: covered, and gone with the next one
    add(client, 0, 0, "third")
    add(client, 1, 0)
    assert slots.take(1, 0, never).void.reason == "1/0"
    assert slots.acknowledge() == 1
    assert client.xlen(KEY) == 0


def test_acknowledges_only_what_was_taken(client: redis.Redis) -> None:
    add(client, 0, 0)
    add(client, 0, 1)
    slots = reader(client)
    slots.take(0, 0, never)
    assert slots.acknowledge() == 1
    assert client.xlen(KEY) == 1
    assert pending(client) == 1


def test_a_restarted_reader_finds_what_it_had_not_acknowledged(client: redis.Redis) -> None:
    for slot in range(100):
        add(client, 0, slot)
    lost = reader(client)
    for slot in range(100):
        lost.take(0, slot, never)
    again = reader(client)
    add(client, 1, 0)
    assert [again.take(0, slot, never).void.reason for slot in (0, 99, 50)] == [
        "0/0",
        "0/99",
        "0/50",
    ]
    assert again.take(1, 0, never).void.reason == "1/0"


def test_what_the_checkpoint_covers_is_acknowledged_unread(client: redis.Redis) -> None:
    add(client, 0, 0)
    add(client, 1, 0, attempt=7)
    add(client, 1, 0)
    lost = reader(client)
    lost.take(0, 0, never)
    again = reader(client, first_lap=1)
    assert again.take(1, 0, never).void.reason == "1/0"
    assert client.xlen(KEY) == 1, "what the checkpoint covers is gone at once"
    assert again.acknowledge() == 1
    assert client.xlen(KEY) == 0


def test_check_is_called_while_waiting(client: redis.Redis) -> None:
    def stop() -> None:
        raise InterruptedError

    slots = reader(client)
    with pytest.raises(InterruptedError):
        slots.take(0, 0, stop)


class LosesReplies:
    """A client whose first XREADGROUP reaches Redis and whose reply is lost on the way back."""

    def __init__(self, client: redis.Redis) -> None:
        self._client, self.lost = client, 0

    def xreadgroup(self, *args: Any, **options: Any) -> Any:
        reply = self._client.xreadgroup(*args, **options)
        if options.get("block") is not None and reply and not self.lost:
            self.lost += 1
            raise redis.ConnectionError("the reply was lost")
        return reply


def test_a_lost_reply_loses_nothing(client: redis.Redis) -> None:
    add(client, 0, 1)
    lossy = LosesReplies(client)
    slots = SlotReader(client, lossy, KEY, run="r", attempt=0, first_lap=0)  # type: ignore[arg-type]
    assert slots.take(0, 1, lambda: None).void.reason == "0/1"
    assert lossy.lost == 1
    add(client, 0, 0)
    assert slots.take(0, 0, never).void.reason == "0/0"
    assert slots.acknowledge() == 2


def test_an_entry_that_is_no_envelope_is_an_error_that_says_so(client: redis.Redis) -> None:
    client.xadd(KEY, {b"slot": b"0/0/0", b"envelope": b"\xff\xff\xff"})
    with pytest.raises(WireError, match="no Envelope"):
        reader(client).take(0, 0, never)
