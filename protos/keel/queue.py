"""Names in Redis, and envelopes as stream entries. Bytes only: each service brings its client.

A stream entry has one field, `envelope`: a serialized keel.types.v1.Envelope. Exactly one envelope
counts for each slot; where a lost reply made a producer add it twice, the first in stream order
wins.
"""

from __future__ import annotations

from collections.abc import Mapping

from google.protobuf.message import DecodeError

from keel.errors import WireError
from keel.types.v1 import sequence_pb2

ENVELOPE_FIELD = b"envelope"
CONSUMER_GROUP = "trainer"
"""The one consumer group of each stream."""

RUNS_KEY = "keel:runs"
"""Sorted set of run ids, scored by submission time in seconds."""
FENCING_KEY = "keel:fencing"
"""Counter of leases: INCR gives the next fencing token."""
DRAINED_KEY = "keel:engines:drained"
"""Set of addresses of engines that operators want empty: no run is leased one."""


def run_key(run: str) -> str:
    """Hash: the run record (`keel.record`)."""
    return f"keel:run:{run}"


def demos_key(run: str) -> str:
    """Stream: demonstrations of the cold start, one envelope an optimizer step."""
    return f"keel:demos:{run}"


def groups_key(run: str) -> str:
    """Stream: one envelope a slot."""
    return f"keel:groups:{run}"


def metrics_key(run: str) -> str:
    """Hash: metric rows (`keel.metrics`)."""
    return f"keel:metrics:{run}"


def samples_key(run: str) -> str:
    """Hash: samples, JSON (`keel.samples`)."""
    return f"keel:samples:{run}"


def checkpoints_key(run: str) -> str:
    """String: the checkpoints that exist, JSON (`keel.checkpoints`)."""
    return f"keel:checkpoints:{run}"


def versions_key(run: str) -> str:
    """Hash: policy version to weights fingerprint, 16 hexadecimal digits."""
    return f"keel:versions:{run}"


def data_key(run: str) -> str:
    """Hash: data file to its xxh3 when the run began, by key of the job (task.dataset)."""
    return f"keel:data:{run}"


def pack(envelope: sequence_pb2.Envelope) -> dict[bytes, bytes]:
    """An envelope as the fields of a stream entry."""
    return {ENVELOPE_FIELD: envelope.SerializeToString()}


def unpack(fields: Mapping[bytes, bytes], *, run: str) -> sequence_pb2.Envelope:
    """The envelope of a stream entry, or WireError if it is not one of `run`'s."""
    data = fields.get(ENVELOPE_FIELD)
    if data is None:
        raise WireError(f"stream entry has fields {sorted(fields)}; valid: {ENVELOPE_FIELD!r}")
    try:
        envelope = sequence_pb2.Envelope.FromString(data)
    except DecodeError as error:
        raise WireError(f"stream entry of {len(data)} bytes is no Envelope: {error}") from error
    if envelope.id.run != run:
        raise WireError(f"envelope.id.run: {envelope.id.run!r} is not valid; valid: {run!r}")
    if envelope.WhichOneof("payload") is None:
        raise WireError("envelope.payload: unset; valid: group, void or demonstrations")
    return envelope
