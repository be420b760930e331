"""SlotReader on a real Redis: slot order, acknowledgement, restart, dead letters, blobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st
from rediskit import start_redis

from keel.blobs import BlobStore
from keel.dead_letters import TRIES, parse_dead_letters
from keel.errors import FencedError, IntegrityError, WireError
from keel.queue import (
    CONSUMER_GROUP,
    SlotKey,
    bytes_key,
    dead_envelopes_key,
    dead_letters_key,
    failures_key,
    groups_key,
    pack,
    pack_blob,
    run_key,
)
from keel.record import Phase
from keel.types.v1 import sequence_pb2
from keel_trainer import consumer
from keel_trainer import store as store_module
from keel_trainer.consumer import SlotReader, Taken
from keel_trainer.store import RunLostError, RunStore

KEY = groups_key("r")


@pytest.fixture(autouse=True)
def slow_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine something that is there may take a while."""
    monkeypatch.setattr(consumer, "_CHECK_S", 30.0)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> str:
    return start_redis(tmp_path_factory.mktemp("redis"))


def empty(client: redis.Redis) -> None:
    client.flushall()
    client.hset(run_key("r"), "spec", "{}")


@pytest.fixture
def client(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[redis.Redis]:
    monkeypatch.setattr(consumer, "_RETRY_S", 0.0)
    monkeypatch.setattr(consumer, "_LOOK_S", 0.0)
    monkeypatch.setattr(consumer, "_STORAGE_RETRY_S", 0.0)
    with redis.Redis.from_url(server) as client:
        empty(client)
        yield client


def void(lap: int, slot: int, reason: str = "", attempt: int = 0) -> sequence_pb2.Envelope:
    return sequence_pb2.Envelope(
        id=sequence_pb2.SlotId(run="r", attempt=attempt, lap=lap, slot=slot),
        void=sequence_pb2.VoidSlot(reason=reason or f"{lap}/{slot}"),
    )


def add(client: redis.Redis, lap: int, slot: int, reason: str = "", attempt: int = 0) -> bytes:
    envelope = void(lap, slot, reason, attempt)
    client.hset(bytes_key(KEY), f"{attempt}/{lap}/{slot}", envelope.ByteSize())
    return client.xadd(KEY, pack(envelope))


class Reader(SlotReader):
    """Gives the reason of VOID slots."""

    def reason(self, lap: int, slot: int, check: Callable[[], None] | None = None) -> str:
        taken = self.take(lap, slot, lambda envelope: envelope.void.reason, check or never)
        assert taken.content is not None
        return taken.content


def reader(client: redis.Redis, first_lap: int = 0, **options: Any) -> Reader:
    options.setdefault("covered_lap", first_lap)
    reading = options.pop("reading", client)
    return Reader(
        RunStore(client, "r", 1), reading, "groups", attempt=0, first_lap=first_lap, **options
    )


def never() -> None:
    raise AssertionError("waited for something that is there")


def nothing() -> None:
    pass


def pending(client: redis.Redis) -> int:
    return client.xpending(KEY, CONSUMER_GROUP)["pending"]


def in_flight(client: redis.Redis) -> set[str]:
    return {slot.decode() for slot in client.hkeys(bytes_key(KEY))}


@settings(max_examples=25, deadline=None)
@given(st.permutations([(lap, slot) for lap in range(2) for slot in range(3)]))
def test_any_arrival_order_gives_slot_order(server: str, arrival: list[tuple[int, int]]) -> None:
    with redis.Redis.from_url(server) as client:
        empty(client)
        for lap, slot in arrival:
            add(client, lap, slot)
        slots = reader(client)
        taken = [slots.reason(lap, slot) for lap in range(2) for slot in range(3)]
        assert taken == ["0/0", "0/1", "0/2", "1/0", "1/1", "1/2"]
        assert slots.acknowledge(2) == 6
        assert client.xlen(KEY) == 0
        assert in_flight(client) == set()


def test_first_entry_of_a_slot_wins_and_the_second_goes_with_it(client: redis.Redis) -> None:
    add(client, 0, 0, "first")
    add(client, 0, 0, "second")
    slots = reader(client)
    assert slots.reason(0, 0) == "first"
    assert slots.acknowledge(1) == 2
    # later than the acknowledgement: goes at sight
    add(client, 0, 0, "third")
    add(client, 1, 0)
    assert slots.reason(1, 0) == "1/0"
    assert client.xlen(KEY) == 1
    assert slots.acknowledge(2) == 1
    assert client.xlen(KEY) == 0


def test_acknowledges_whole_laps_and_only_those_asked_for(client: redis.Redis) -> None:
    for lap in range(3):
        add(client, lap, 0)
    slots = reader(client)
    slots.reason(0, 0)
    slots.reason(1, 0)
    assert slots.holds(1)
    assert slots.acknowledge(1) == 1
    assert not slots.holds(1)
    assert slots.holds(2)
    assert (client.xlen(KEY), pending(client), in_flight(client)) == (2, 2, {"0/1/0", "0/2/0"})
    assert slots.reason(2, 0) == "2/0"


def test_a_restarted_reader_finds_what_it_had_not_acknowledged(client: redis.Redis) -> None:
    for slot in range(100):
        add(client, 0, slot)
    lost = reader(client)
    for slot in range(100):
        lost.reason(0, slot)
    again = reader(client)
    add(client, 1, 0)
    assert [again.reason(0, slot) for slot in (0, 99, 50)] == ["0/0", "0/99", "0/50"]
    assert again.reason(1, 0) == "1/0"


def test_a_checkpoint_s_laps_stay_until_they_are_let_go(client: redis.Redis) -> None:
    """The checkpoint in use covers laps 0 and 1, the one before it lap 0."""
    add(client, 0, 0)
    add(client, 1, 0)
    add(client, 1, 1, attempt=7)
    add(client, 2, 0)
    lost = reader(client)
    lost.reason(0, 0)
    again = reader(client, first_lap=2, covered_lap=1)
    assert again.reason(2, 0) == "2/0"
    assert client.xlen(KEY) == 2, "lap 0 and the other attempt's entry are gone at sight"
    assert in_flight(client) == {"0/1/0", "0/2/0"}
    # the checkpoint in use was broken after all: lap 1 is there still
    fallen_back = reader(client, first_lap=1)
    assert [fallen_back.reason(lap, 0) for lap in (1, 2)] == ["1/0", "2/0"]
    assert fallen_back.acknowledge(3) == 2
    assert (client.xlen(KEY), in_flight(client)) == (0, set())


@pytest.mark.parametrize("others_come", [False, True])
def test_check_is_called_while_waiting(
    client: redis.Redis, monkeypatch: pytest.MonkeyPatch, others_come: bool
) -> None:
    monkeypatch.setattr(consumer, "_CHECK_S", 0.0)
    checks = []

    def stop() -> None:
        checks.append(1)
        if len(checks) == 20:
            raise InterruptedError
        if others_come:
            add(client, 0, len(checks))

    slots = reader(client)
    with pytest.raises(InterruptedError):
        slots.reason(0, 0, stop)


def test_what_a_trainer_without_a_lease_takes_meanwhile_is_found(client: redis.Redis) -> None:
    """It reads on for a moment, under the same name: nobody else would ever be given that."""
    stopped, successor = reader(client), reader(client)
    add(client, 0, 0)
    assert (stopped.reason(0, 0), successor.reason(0, 0)) == ("0/0", "0/0")
    for slot in range(1, 200):
        add(client, 0, slot)
    stopped.reason(0, 199)
    for slot in range(1, 200):
        assert successor.reason(0, slot, nothing) == f"0/{slot}"
    assert successor.acknowledge(1) == 200


def test_a_stream_that_is_covered_whole_goes_unread(client: redis.Redis, tmp_path: Path) -> None:
    blobs = BlobStore(str(tmp_path))
    files = [add_blob(client, blobs, lap, 0) for lap in range(3)]
    slots = reader(client, blobs=blobs)
    assert slots.in_flight()
    assert not slots.holds(3), "it has not looked yet"
    slots.drop()
    slots.drop()
    assert not slots.in_flight()
    assert [client.exists(key) for key in (KEY, bytes_key(KEY))] == [0, 0]
    assert not any(file.exists() for file in files)


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
    slots = reader(client, reading=lossy)
    assert slots.reason(0, 1, nothing) == "0/1"
    assert lossy.lost == 1
    add(client, 0, 0)
    assert slots.reason(0, 0) == "0/0"
    assert slots.acknowledge(1) == 2


def test_more_entries_than_one_command_takes(client: redis.Redis) -> None:
    for slot in range(2500):
        add(client, 0, slot)
    slots = reader(client)
    assert slots.reason(0, 2499) == "0/2499"
    assert slots.acknowledge(1) == 2500
    assert (client.xlen(KEY), pending(client), in_flight(client)) == (0, 0, set())


def test_a_full_redis_takes_acknowledgements_and_readers_wait(
    client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its memory limit Redis refuses whole transactions: this is what makes room in it."""
    monkeypatch.setattr(store_module, "_FULL_RETRY_S", 0.0)
    for slot in range(3):
        add(client, 0, slot)
    slots = reader(client)
    slots.reason(0, 2)
    client.config_set("maxmemory", 1)
    try:
        with pytest.raises(redis.OutOfMemoryError):
            client.set("some", "thing")
        assert slots.acknowledge(1) == 3
        assert (client.xlen(KEY), in_flight(client)) == (0, set())
        refused = []

        def write() -> None:
            refused.append(1)
            if len(refused) == 3:
                client.config_set("maxmemory", 0)
            client.set("some", "thing")

        slots._store._insist(write)
        assert len(refused) == 3
    finally:
        client.config_set("maxmemory", 0)


class TakesNoWrites:
    """A client whose first XREADGROUPs are refused, as where Redis's disk is full."""

    def __init__(self, client: redis.Redis) -> None:
        self._client, self.refused = client, 0

    def xreadgroup(self, *args: Any, **options: Any) -> Any:
        if self.refused < 3:
            self.refused += 1
            raise redis.ResponseError("MISCONF Redis is configured to save RDB snapshots, but ...")
        return self._client.xreadgroup(*args, **options)


def test_a_redis_that_takes_no_writes_is_read_again(client: redis.Redis) -> None:
    add(client, 0, 0)
    refusing = TakesNoWrites(client)
    assert reader(client, reading=refusing).reason(0, 0, nothing) == "0/0"
    assert refusing.refused == 3


def test_a_run_is_ended_once_by_who_has_the_lease(client: redis.Redis) -> None:
    client.hset(run_key("r"), mapping={"fencing_token": 5, "phase": "TRAINING"})
    add(client, 0, 0)
    with pytest.raises(FencedError, match="lease 4 is over, 5 has it now"):
        RunStore(client, "r", 4).end(Phase.FAILED, error="late")
    assert (client.hget(run_key("r"), "phase"), client.xlen(KEY)) == (b"TRAINING", 1)
    RunStore(client, "r", 5).end(Phase.CANCELLED)
    assert client.hget(run_key("r"), "phase") == b"CANCELLED"
    assert [client.exists(key) for key in (KEY, bytes_key(KEY))] == [0, 0]
    RunStore(client, "r", 5).end(Phase.FAILED, error="too late")
    assert client.hget(run_key("r"), "phase") == b"CANCELLED"
    client.delete(run_key("r"))
    with pytest.raises(RunLostError):
        RunStore(client, "r", 5).end(Phase.FAILED)
    assert client.exists(run_key("r")) == 0


def test_a_stream_that_is_gone_ends_the_run(client: redis.Redis) -> None:
    slots = reader(client)
    client.delete(KEY)
    with pytest.raises(IntegrityError, match="keel:groups:r is gone from Redis"):
        slots.reason(0, 0, nothing)


def test_nothing_is_written_for_a_run_that_redis_has_lost(client: redis.Redis) -> None:
    store = RunStore(client, "r", 1)
    store.write(step=3)
    client.flushall()
    for write in (
        lambda: store.write(step=4),
        lambda: store.write_row(0, 4, {"step": 4}),
        lambda: store.tell("the disk is full"),
        store.read,
    ):
        with pytest.raises(RunLostError, match="Redis has lost its data"):
            write()
    assert client.keys() == []


# ---- entries that cannot be read


def take(slots: SlotReader, slot: int) -> Taken[str]:
    return slots.take(0, slot, lambda envelope: envelope.void.reason, nothing)


@pytest.mark.parametrize(
    ("envelope", "reason"),
    [
        (b"\xff\xff\xff", "no Envelope"),
        (void(0, 1).SerializeToString(), "envelope.id: 0/0/1 is not valid; valid: 0/0/0"),
        (b"", "envelope.id.run"),
    ],
)
def test_an_entry_that_cannot_be_read_is_a_dead_letter_after_three_tries(
    client: redis.Redis, envelope: bytes, reason: str
) -> None:
    entry = client.xadd(KEY, {b"slot": b"0/0/0", b"envelope": envelope})
    add(client, 0, 1)
    slots = reader(client)
    taken = take(slots, 0)
    assert taken.content is None
    assert reason in taken.reason
    (letter,) = parse_dead_letters(client.hgetall(dead_letters_key("r")))
    assert (letter.lap, letter.slot, letter.tries) == (0, 0, TRIES)
    assert (letter.entry, letter.size_bytes) == (entry.decode(), len(envelope))
    assert reason in letter.reason
    assert client.hget(dead_envelopes_key("r"), letter.field) == envelope
    assert slots.reason(0, 1) == "0/1", "the others go on"
    assert slots.acknowledge(1) == 2
    assert client.exists(failures_key(KEY)) == 0
    assert len(client.hkeys(dead_letters_key("r"))) == 1, "the letter stays"


def test_a_restart_is_no_failure_and_changes_no_verdict(client: redis.Redis) -> None:
    """Two failures, a restart, one more: dead. After the next restart it still is, unread."""
    client.xadd(KEY, {b"slot": b"0/0/0", b"envelope": void(0, 0).SerializeToString()})
    tries = []

    def failing(envelope: sequence_pb2.Envelope) -> str:
        tries.append(envelope)
        raise WireError("the routes are torn")

    class Killed(BaseException):
        pass

    def dies_at_the_second() -> None:
        if len(tries) == 2:
            raise Killed

    with pytest.raises(Killed):
        reader(client).take(0, 0, failing, dies_at_the_second)
    assert client.hlen(dead_letters_key("r")) == 0
    taken = reader(client).take(0, 0, failing, nothing)
    assert (taken.content, taken.reason, len(tries)) == (None, "the routes are torn", TRIES)
    after = reader(client).take(0, 0, lambda envelope: envelope.void.reason, nothing)
    assert (after.content, after.reason) == (None, "the routes are torn")


def test_a_failure_that_passes_leaves_no_letter(client: redis.Redis) -> None:
    add(client, 0, 0)
    tries = []

    def third_time_lucky(envelope: sequence_pb2.Envelope) -> str:
        tries.append(envelope)
        if len(tries) < TRIES:
            raise WireError("not yet")
        return "good"

    assert reader(client).take(0, 0, third_time_lucky, nothing).content == "good"
    assert client.hlen(dead_letters_key("r")) == 0
    assert client.exists(failures_key(KEY)) == 0, "after a restart they would count on"


def test_an_entry_of_nobody_is_a_dead_letter_at_once(client: redis.Redis) -> None:
    client.xadd(KEY, {b"what": b"ever"})
    add(client, 0, 0)
    slots = reader(client)
    assert slots.reason(0, 0) == "0/0"
    (letter,) = parse_dead_letters(client.hgetall(dead_letters_key("r")))
    assert (letter.lap, letter.slot, letter.tries) == (None, None, 1)
    assert "valid: b'slot'" in letter.reason
    assert client.xlen(KEY) == 1


# ---- envelopes in the blob store


def add_blob(client: redis.Redis, blobs: BlobStore, lap: int, slot: int) -> Path:
    data = void(lap, slot).SerializeToString()
    ref = blobs.put("r", "groups", SlotKey(0, lap, slot), data)
    client.hset(bytes_key(KEY), f"0/{lap}/{slot}", len(data))
    client.xadd(KEY, pack_blob(SlotKey(0, lap, slot), ref))
    return Path(blobs.root) / ref.uri


def test_blobs_are_read_and_go_with_the_acknowledgement(
    client: redis.Redis, tmp_path: Path
) -> None:
    blobs = BlobStore(str(tmp_path))
    files = [add_blob(client, blobs, lap, 0) for lap in range(3)]
    without_entry = blobs.put("r", "groups", SlotKey(0, 1, 0), b"of an earlier try")
    slots = reader(client, blobs=blobs)
    assert [slots.reason(lap, 0) for lap in range(3)] == ["0/0", "1/0", "2/0"]
    slots.acknowledge(2)
    assert [file.exists() for file in files] == [False, False, True]
    assert not (tmp_path / without_entry.uri).exists()


def test_what_a_crash_left_between_acknowledgement_and_removal_is_swept(
    client: redis.Redis, tmp_path: Path
) -> None:
    blobs = BlobStore(str(tmp_path))
    files = [add_blob(client, blobs, lap, 0) for lap in range(3)]
    reader(client, first_lap=2, covered_lap=1, blobs=blobs)
    assert [file.exists() for file in files] == [False, True, True]


def test_a_blob_that_vanished_makes_its_slot_void(client: redis.Redis, tmp_path: Path) -> None:
    blobs = BlobStore(str(tmp_path))
    add_blob(client, blobs, 0, 0).unlink()
    torn = add_blob(client, blobs, 0, 1)
    torn.write_bytes(torn.read_bytes()[:-1])
    add_blob(client, blobs, 0, 2)
    slots = reader(client, blobs=blobs)
    gone = take(slots, 0)
    assert (gone.content, "is not in" in gone.reason) == (None, True)
    broken = take(slots, 1)
    assert (broken.content, "its entry says" in broken.reason) == (None, True)
    assert slots.reason(0, 2) == "0/2"
    assert slots.acknowledge(1) == 3
    assert torn.exists(), "what a dead letter refers to stays to be looked at"
    assert client.hlen(dead_envelopes_key("r")) == 0


def test_a_blob_store_that_is_away_is_waited_for(
    client: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = BlobStore(str(tmp_path))
    add_blob(client, blobs, 0, 0)
    slots = reader(client, blobs=blobs)
    told = []

    def away(*_: object, **__: object) -> bytes:
        raise OSError(5, "Input/output error")

    def check() -> None:
        told.append(client.hget(run_key("r"), "trouble"))
        if len(told) == 5:
            monkeypatch.undo()

    monkeypatch.setattr(blobs, "get", away)
    assert slots.reason(0, 0, check) == "0/0"
    assert b"Input/output error" in told[-1]
    assert client.hget(run_key("r"), "trouble") == b""
    assert client.hlen(dead_letters_key("r")) == 0


def test_a_store_that_is_not_mounted_and_a_trainer_without_one_wait_and_say_so(
    client: redis.Redis, tmp_path: Path
) -> None:
    """A vanished blob costs its slot; these would cost every slot."""
    blobs = BlobStore(str(tmp_path / "blobs"))
    add_blob(client, blobs, 0, 0)
    told = []

    class Stopped(BaseException):
        pass

    def check() -> None:
        told.append(client.hget(run_key("r"), "trouble"))
        if len(told) == 2 * TRIES:
            raise Stopped

    with pytest.raises(Stopped):
        reader(client).reason(0, 0, check)
    assert b"start the trainer with --blobs" in told[-1]
    told.clear()
    (tmp_path / "blobs").rename(tmp_path / "elsewhere")
    with pytest.raises(Stopped):
        reader(client, blobs=blobs).reason(0, 0, check)
    assert b"has nothing of run r: is it mounted?" in told[-1]
    (tmp_path / "elsewhere").rename(tmp_path / "blobs")
    assert reader(client, blobs=blobs).reason(0, 0, nothing) == "0/0"
    assert client.hlen(dead_letters_key("r")) == 0


def test_blobs_that_cannot_be_removed_go_with_a_later_acknowledgement(
    client: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = BlobStore(str(tmp_path))
    files = [add_blob(client, blobs, lap, 0) for lap in range(3)]
    begun = tmp_path / "r" / ".groups-0-1-0-0123456789abcdef"
    begun.write_bytes(b"whoever wrote this was killed")
    slots = reader(client, blobs=blobs)
    assert [slots.reason(lap, 0) for lap in range(3)] == ["0/0", "1/0", "2/0"]

    def away(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(blobs, "remove", away)
        assert slots.acknowledge(1) == 1
    assert [file.exists() for file in files] == [True, True, True]
    assert slots.acknowledge(2) == 1
    assert [file.exists() for file in files] == [False, False, True]
    assert not begun.exists()
