"""The trainer's side of Redis: run record, metric rows, samples, versions, acknowledgement.

What belongs to a run is written only while its record is there: where Redis has lost it, nothing
may look as if the run went on.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from keel.checkpoints import CheckpointInfo, encode_checkpoints
from keel.dead_letters import DeadLetter
from keel.errors import FencedError, IntegrityError, NotFound
from keel.metrics import encode_row, evaluation_field, row_field
from keel.queue import (
    CONSUMER_GROUP,
    FULL_SIGNS,
    IF_KNOWN,
    SlotKey,
    Stream,
    bytes_key,
    checkpoints_key,
    dead_envelopes_key,
    dead_letters_key,
    failures_key,
    metrics_key,
    queue_keys,
    run_key,
    samples_key,
    stream_key,
    versions_key,
)
from keel.record import Phase, RunRecord, pack_fields
from keel.samples import Sample, sample_field

log = logging.getLogger(__name__)

UNREACHABLE = (
    redis.ConnectionError,
    redis.TimeoutError,
    redis.exceptions.BusyLoadingError,
)
"""Redis is away or not up yet: to be tried again."""


def connect(url: str, *, retries: int = 20) -> redis.Redis:
    """A client that tries again, by default for about a minute: for commands that may repeat."""
    retry = Retry(ExponentialBackoff(cap=5.0, base=0.1), retries=retries)
    return redis.Redis.from_url(url, retry=retry, retry_on_error=list(UNREACHABLE))


_FULL_RETRY_S = 2.0
_PAGE = 1000
# a script, since a full Redis refuses every transaction, and this is what makes room in it
_ACKNOWLEDGE = """
local ids, slots = cjson.decode(ARGV[2]), cjson.decode(ARGV[3])
redis.call("XACK", KEYS[1], ARGV[1], unpack(ids))
redis.call("HDEL", KEYS[2], unpack(ids))
if #slots > 0 then redis.call("HDEL", KEYS[3], unpack(slots)) end
return redis.call("XDEL", KEYS[1], unpack(ids))
"""
_END = """
local token = redis.call("HGET", KEYS[1], "fencing_token")
local phase = redis.call("HGET", KEYS[1], "phase")
if redis.call("EXISTS", KEYS[1]) == 0 then return "lost" end
if token and tonumber(token) > tonumber(ARGV[1]) then return token end
redis.call("DEL", unpack(KEYS, 2))
local count = tonumber(ARGV[2])
for index = 3, count + 2 do
  if ARGV[index] == phase then return "over" end
end
redis.call("HSET", KEYS[1], unpack(ARGV, count + 3))
return "ended"
"""

Result = TypeVar("Result")


def takes_no_writes(error: redis.ResponseError) -> bool:
    """Redis is full, say: the same command may succeed later."""
    # redis-py has a class for some of these, and takes the sign out of their text
    known = (redis.exceptions.OutOfMemoryError, redis.exceptions.ReadOnlyError)
    return isinstance(error, known) or any(sign in str(error) for sign in FULL_SIGNS)


class RunLostError(NotFound):
    """Redis does not know the run."""


class RunStore:
    """One run in Redis. Reading the record checks the lease that the caller holds."""

    def __init__(self, client: redis.Redis, run: str, fencing_token: int) -> None:
        self.redis, self.run, self.token = client, run, fencing_token
        self._if_known = client.register_script(IF_KNOWN)
        self._acknowledge = client.register_script(_ACKNOWLEDGE)
        self._end = client.register_script(_END)
        self._told = ""

    def read(self) -> RunRecord:
        """The record now. Raises RunLostError, or FencedError if another trainer has the lease."""
        raw: Mapping[bytes, bytes] = self.redis.hgetall(run_key(self.run))  # type: ignore[assignment]
        if not raw:
            raise self._lost()
        record = RunRecord.from_hash(self.run, raw)
        if record.fencing_token > self.token:
            raise self._fenced(record.fencing_token)
        return record

    def write(self, **fields: object) -> None:
        """Sets fields of the record (`keel.record.pack_fields`). RunLostError if there is none."""
        self._hset(run_key(self.run), pack_fields(**fields))

    def tell(self, trouble: str) -> None:
        """Says in the record, and in the log, why the run stands still; empty: it goes on."""
        if trouble == self._told:
            return
        log.warning("%s", trouble or f"over: {self._told}")
        self.write(trouble=trouble)
        self._told = trouble

    def write_row(self, attempt: int, step: int, row: Mapping[str, float | int | None]) -> None:
        """Writes the row of a step; written again, it replaces itself."""
        self._hset(metrics_key(self.run), {row_field(attempt, step): encode_row(row)})

    def write_samples(self, attempt: int, step: int, samples: Sequence[Sample]) -> None:
        """Writes the samples of a step, all at once; written again, they replace themselves."""
        mapping: Mapping[Any, Any] = {
            sample_field(attempt, step, index): sample.model_dump_json()
            for index, sample in enumerate(samples)
        }
        if mapping:
            self._hset(samples_key(self.run), mapping)

    def write_checkpoints(self, checkpoints: Sequence[CheckpointInfo]) -> None:
        """Replaces the list of checkpoints that exist."""
        self._write("SET", checkpoints_key(self.run), encode_checkpoints(checkpoints))

    def evaluated(self, attempt: int, step: int) -> bool:
        """The collector's evaluation after `step` is there."""
        return bool(self.redis.hexists(metrics_key(self.run), evaluation_field(attempt, step)))

    def end(self, phase: Phase, *, error: str = "") -> None:
        """Writes the final phase, and what is left in the run's streams goes; both or neither.

        A run that is over stays as it is. Raises RunLostError, or FencedError as `read`.
        """
        final = [str(one) for one in Phase if one.final]
        fields = pack_fields(phase=phase, error=error, trouble="", finished_s=time.time())
        pairs = [part for pair in fields.items() for part in pair]
        keys = [run_key(self.run), *queue_keys(self.run)]
        args: list[str | int] = [self.token, len(final), *final, *pairs]
        found = self._insist(lambda: self._end(keys=keys, args=args))
        if found == b"lost":
            raise self._lost()
        if found not in (b"over", b"ended"):
            raise self._fenced(int(found))

    def drop_stream(self, stream: str) -> None:
        """Removes a stream that nobody will add to or read any more."""
        keys = (stream, bytes_key(stream), failures_key(stream))
        self._insist(lambda: self.redis.delete(*keys))

    def make_stream(self, stream: str) -> None:
        """Makes a stream with its consumer group, unless they are there."""
        try:
            self._insist(
                lambda: self.redis.xgroup_create(stream, CONSUMER_GROUP, id="0", mkstream=True)
            )
        except redis.ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise

    def acknowledge(self, stream: str, entries: Sequence[tuple[bytes, SlotKey | None]]) -> None:
        """Acknowledges and deletes entries, with what is kept about them, all at once."""
        ids = [entry_id.decode() for entry_id, _ in entries]
        slots = sorted({str(slot) for _, slot in entries if slot is not None})
        if ids:
            keys = [stream, failures_key(stream), bytes_key(stream)]
            args = [CONSUMER_GROUP, json.dumps(ids), json.dumps(slots)]
            self._insist(lambda: self._acknowledge(keys=keys, args=args))

    def in_flight(self, stream: str) -> dict[bytes, bytes]:
        """Bytes by slot of what is not acknowledged."""
        return self.redis.hgetall(bytes_key(stream))  # type: ignore[return-value]

    def pending(self, stream: str) -> Iterator[bytes]:
        """Ids of all entries that were delivered and are not acknowledged, in order."""
        begin = "-"
        while True:
            page: Any = self.redis.xpending_range(stream, CONSUMER_GROUP, begin, "+", _PAGE)
            for item in page:
                yield item["message_id"]
            if len(page) < _PAGE:
                return
            begin = f"({page[-1]['message_id'].decode()}"

    def entry(self, stream: str, entry_id: bytes) -> dict[bytes, bytes] | None:
        """The fields of an entry; None if it is not there."""
        found: Any = self.redis.xrange(stream, min=entry_id, max=entry_id)
        return found[0][1] if found else None

    def count_failure(self, stream: Stream, entry: str) -> int:
        """Counts one more failure to read an entry; returns how many there were."""
        key = failures_key(stream_key(self.run, stream))
        return int(self._write("HINCRBY", key, entry, 1))

    def forget_failures(self, stream: Stream, entry: str) -> None:
        """The entry could be read after all."""
        self._write("HDEL", failures_key(stream_key(self.run, stream)), entry)

    def dead_letters(self) -> Mapping[bytes, bytes]:
        """See `keel.dead_letters`."""
        return self.redis.hgetall(dead_letters_key(self.run))  # type: ignore[return-value]

    def write_dead_letter(self, letter: DeadLetter, envelope: bytes | None) -> None:
        """Keeps what is known of an entry that was given up, and its bytes if it held them."""
        if envelope is not None:
            self._hset(dead_envelopes_key(self.run), {letter.field: envelope})
        self._hset(dead_letters_key(self.run), {letter.field: letter.model_dump_json()})

    def newest_version(self) -> int:
        """The highest version that was ever made; -1 before the first."""
        return max((int(number) for number in self.redis.hkeys(versions_key(self.run))), default=-1)

    def record_version(self, version: int, fingerprint: int) -> None:
        """Ties a version number to its bits, for ever.

        Raises:
            IntegrityError: the number was used for other bits.
        """
        text = f"{fingerprint:016x}"
        key = versions_key(self.run)
        if self._write("HSETNX", key, str(version), text):
            return
        known = self.redis.hget(key, str(version))
        if known != text.encode():
            raise IntegrityError(
                f"version {version} was published as {known!r} and has come out as {text} now: "
                "this machine does not repeat its numbers (other CPU type or thread count?)"
            )

    def _hset(self, key: str, mapping: Mapping[Any, Any]) -> None:
        self._write("HSET", key, *(part for pair in mapping.items() for part in pair))

    def _write(self, command: str, key: str, *rest: Any) -> Any:
        """The command's reply, however long Redis takes no writes. RunLostError: see `IF_KNOWN`."""
        keys, args = [run_key(self.run), key], [command, *rest]
        found = self._insist(lambda: self._if_known(keys=keys, args=args))
        if found == -1:
            raise self._lost()
        return found

    def _fenced(self, token: int) -> FencedError:
        return FencedError(f"run {self.run!r}: lease {self.token} is over, {token} has it now")

    def _lost(self) -> RunLostError:
        return RunLostError(
            f"run {self.run!r} has no record in Redis: Redis has lost its data (restarted without "
            "its append-only file?), or the run was removed"
        )

    def _insist(self, operation: Callable[[], Result]) -> Result:
        """The result of a write that may repeat, however long Redis takes none."""
        while True:
            try:
                return operation()
            except redis.ResponseError as error:
                if not takes_no_writes(error):
                    raise
                log.warning("Redis takes no writes, again in %.0f s: %s", _FULL_RETRY_S, error)
                time.sleep(_FULL_RETRY_S)
