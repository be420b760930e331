"""The trainer's side of Redis: run record, metric rows, samples, fingerprints of versions."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from keel.checkpoints import CheckpointInfo, encode_checkpoints
from keel.errors import FencedError, IntegrityError, NotFound
from keel.metrics import encode_row, evaluation_field, row_field
from keel.queue import (
    checkpoints_key,
    demos_key,
    groups_key,
    metrics_key,
    run_key,
    samples_key,
    versions_key,
)
from keel.record import Phase, RunRecord, pack_fields
from keel.samples import Sample, sample_field

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


class RunStore:
    """One run in Redis. Reading the record checks the lease that the caller holds."""

    def __init__(self, client: redis.Redis, run: str, fencing_token: int) -> None:
        self.redis, self.run, self._token = client, run, fencing_token

    def read(self) -> RunRecord:
        """The record now. Raises NotFound, or FencedError if another trainer has the lease."""
        raw: Mapping[bytes, bytes] = self.redis.hgetall(run_key(self.run))  # type: ignore[assignment]
        if not raw:
            raise NotFound(f"run {self.run!r} has no record in Redis")
        record = RunRecord.from_hash(self.run, raw)
        if record.fencing_token > self._token:
            raise FencedError(
                f"run {self.run!r}: lease {self._token} is over, {record.fencing_token} has it now"
            )
        return record

    def write(self, **fields: object) -> None:
        """Sets fields of the record (`keel.record.pack_fields`)."""
        mapping: Mapping[Any, Any] = pack_fields(**fields)
        self.redis.hset(run_key(self.run), mapping=mapping)

    def write_row(self, attempt: int, step: int, row: Mapping[str, float | int | None]) -> None:
        """Writes the row of a step; written again, it replaces itself."""
        self.redis.hset(metrics_key(self.run), row_field(attempt, step), encode_row(row))

    def write_samples(self, attempt: int, step: int, samples: Sequence[Sample]) -> None:
        """Writes the samples of a step, all at once; written again, they replace themselves."""
        mapping: Mapping[Any, Any] = {
            sample_field(attempt, step, index): sample.model_dump_json()
            for index, sample in enumerate(samples)
        }
        if mapping:
            self.redis.hset(samples_key(self.run), mapping=mapping)

    def write_checkpoints(self, checkpoints: Sequence[CheckpointInfo]) -> None:
        """Replaces the list of checkpoints that exist."""
        self.redis.set(checkpoints_key(self.run), encode_checkpoints(checkpoints))

    def evaluated(self, attempt: int, step: int) -> bool:
        """The collector's evaluation after `step` is there."""
        return bool(self.redis.hexists(metrics_key(self.run), evaluation_field(attempt, step)))

    def end(self, phase: Phase, *, error: str = "") -> None:
        """Writes the final phase; what is left in the run's streams goes."""
        self.write(phase=phase, error=error, finished_s=time.time())
        self.drop_streams()

    def drop_streams(self) -> None:
        """Removes demonstrations and groups: nobody will train on them."""
        self.redis.delete(demos_key(self.run), groups_key(self.run))

    def newest_version(self) -> int:
        """The highest version that was ever made; -1 before the first."""
        return max((int(number) for number in self.redis.hkeys(versions_key(self.run))), default=-1)

    def record_version(self, version: int, fingerprint: int) -> None:
        """Ties a version number to its bits, for ever.

        Raises:
            IntegrityError: the number was used for other bits.
        """
        text = f"{fingerprint:016x}"
        if self.redis.hsetnx(versions_key(self.run), str(version), text):
            return
        known = self.redis.hget(versions_key(self.run), str(version))
        if known != text.encode():
            raise IntegrityError(
                f"version {version} was published as {known!r} and has come out as {text} now: "
                "this machine does not repeat its numbers (other CPU type or thread count?)"
            )
