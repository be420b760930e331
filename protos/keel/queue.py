"""Names in Redis, and envelopes as stream entries. Bytes only: each service brings its client.

A stream entry names its slot, and holds a serialized keel.types.v1.Envelope or says where it is:

    slot = "attempt/lap/slot"    envelope = bytes
    slot = "attempt/lap/slot"    blob = a serialized BlobRef (`keel.blobs`)

Exactly one envelope counts for each slot; where a lost reply made a producer add it twice, the
first in stream order wins. An envelope that cannot be read still has a slot, and makes it VOID.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, Self

from google.protobuf.message import DecodeError

from keel.errors import WireError
from keel.types.v1 import sequence_pb2

SLOT_FIELD, ENVELOPE_FIELD, BLOB_FIELD = b"slot", b"envelope", b"blob"
Stream = Literal["demos", "groups"]
CONSUMER_GROUP = "trainer"
"""The one consumer group of each stream."""

IF_KNOWN = """
if redis.call("EXISTS", KEYS[1]) == 0 then return -1 end
return redis.call(ARGV[1], KEYS[2], unpack(ARGV, 2))
"""
"""Script for writes into a run: KEYS run_key and the key to write, ARGV a command and what follows
the key in it. -1 where there is no record: one that Redis has lost gets nothing half back."""
FULL_SIGNS = ("OOM command not allowed", "MISCONF", "READONLY")
"""In the text of an error: Redis is up and takes no writes (its memory or its disk is full, or it
is a replica), and may take the same one later."""

RUNS_KEY = "keel:runs"
"""Sorted set of run ids, scored by submission time in seconds; a later one always higher."""
FENCING_KEY = "keel:fencing"
"""Counter of leases: INCR gives the next fencing token. Where it is missing it begins at the Unix
time in seconds: above the tokens that engines remember of a Redis that has lost its data."""
DEPLOYMENT_KEY = "keel:deployment"
"""String: a random id. Gone or another, Redis is not the one that it was."""
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


def stream_key(run: str, stream: Stream) -> str:
    """One of the two above."""
    return demos_key(run) if stream == "demos" else groups_key(run)


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


def tries_key(run: str) -> str:
    """Counter: number of the last try of a cohort at an engine."""
    return f"keel:tries:{run}"


def data_key(run: str) -> str:
    """Hash: data file to its xxh3 when the run began, by key of the job (task.dataset)."""
    return f"keel:data:{run}"


def bytes_key(stream: str) -> str:
    """Hash: slot to bytes of its envelope, of those of `stream` that are not acknowledged.

    The producer writes it with the entry, the trainer removes it with the acknowledgement.
    """
    return f"{stream}:bytes"


def failures_key(stream: str) -> str:
    """Hash: entry id to how often the trainer failed to read that entry of `stream`."""
    return f"{stream}:failures"


def queue_keys(run: str) -> list[str]:
    """Both streams of a run and what is kept about their entries: all that goes when it is over."""
    streams = (demos_key(run), groups_key(run))
    return [*streams, *(of(stream) for stream in streams for of in (bytes_key, failures_key))]


def dead_letters_key(run: str) -> str:
    """Hash: entries that were given up, JSON (`keel.dead_letters`)."""
    return f"keel:dead-letters:{run}"


def dead_envelopes_key(run: str) -> str:
    """Hash: the bytes of those that came in the entry itself, under the same fields."""
    return f"keel:dead-letters:{run}:envelopes"


_SLOT = re.compile(rb"(0|[1-9]\d{0,9})/(0|[1-9]\d{0,9})/(0|[1-9]\d{0,9})")


class SlotKey(NamedTuple):
    """A slot within its run."""

    attempt: int
    lap: int
    slot: int

    @classmethod
    def of(cls, place: sequence_pb2.SlotId) -> Self:
        """The slot that a message names."""
        return cls(place.attempt, place.lap, place.slot)

    @classmethod
    def parse(cls, text: bytes) -> Self:
        """From "attempt/lap/slot", or WireError."""
        match = _SLOT.fullmatch(text)
        if match is None:
            raise WireError(f"slot: {text[:80]!r} is not valid; valid: attempt/lap/slot")
        return cls(*map(int, match.groups()))

    def __str__(self) -> str:
        return f"{self.attempt}/{self.lap}/{self.slot}"


def pack_bytes(slot: SlotKey, data: bytes) -> dict[bytes, bytes]:
    """A serialized envelope as the fields of a stream entry."""
    return {SLOT_FIELD: str(slot).encode(), ENVELOPE_FIELD: data}


def pack(envelope: sequence_pb2.Envelope) -> dict[bytes, bytes]:
    """An envelope as the fields of a stream entry."""
    return pack_bytes(SlotKey.of(envelope.id), envelope.SerializeToString())


def pack_blob(slot: SlotKey, blob: sequence_pb2.BlobRef) -> dict[bytes, bytes]:
    """The fields of a stream entry whose envelope lies in the blob store."""
    return {SLOT_FIELD: str(slot).encode(), BLOB_FIELD: blob.SerializeToString()}


def slot_of(fields: Mapping[bytes, bytes]) -> SlotKey:
    """The slot of a stream entry, without a look at its envelope; WireError if it names none."""
    text = fields.get(SLOT_FIELD)
    if text is None:
        raise WireError(f"stream entry has fields {sorted(fields)}; valid: {SLOT_FIELD!r} and more")
    return SlotKey.parse(text)


def envelope_bytes(
    fields: Mapping[bytes, bytes], read: Callable[[sequence_pb2.BlobRef], bytes] | None = None
) -> bytes:
    """The serialized envelope of a stream entry.

    Args:
        read: gets the bytes of a blob; raises where it cannot.
    """
    data = fields.get(ENVELOPE_FIELD)
    if data is not None:
        return data
    if (blob := fields.get(BLOB_FIELD)) is None:
        valid = f"{ENVELOPE_FIELD!r} or {BLOB_FIELD!r}"
        raise WireError(f"stream entry has fields {sorted(fields)}; valid: {valid}")
    try:
        ref = sequence_pb2.BlobRef.FromString(blob)
    except DecodeError as error:
        raise WireError(f"stream entry, blob: {len(blob)} bytes are no BlobRef: {error}") from error
    if read is None:
        raise WireError(f"stream entry refers to blob {ref.uri!r}, and there is no blob store here")
    return read(ref)


def parse_envelope(data: bytes, slot: SlotKey, *, run: str) -> sequence_pb2.Envelope:
    """The envelope in `data`, or WireError if it is not that of `slot` in `run`."""
    try:
        envelope = sequence_pb2.Envelope.FromString(data)
    except DecodeError as error:
        raise WireError(f"stream entry of {len(data)} bytes is no Envelope: {error}") from error
    if envelope.id.run != run:
        raise WireError(f"envelope.id.run: {envelope.id.run!r} is not valid; valid: {run!r}")
    if (named := SlotKey.of(envelope.id)) != slot:
        raise WireError(f"envelope.id: {named} is not valid; valid: {slot}, as the entry says")
    if envelope.WhichOneof("payload") is None:
        raise WireError("envelope.payload: unset; valid: group, void or demonstrations")
    return envelope


def unpack(
    fields: Mapping[bytes, bytes],
    *,
    run: str,
    read: Callable[[sequence_pb2.BlobRef], bytes] | None = None,
) -> sequence_pb2.Envelope:
    """The envelope of a stream entry, or WireError if it is not one of `run`'s.

    Args:
        read: see `envelope_bytes`.
    """
    return parse_envelope(envelope_bytes(fields, read), slot_of(fields), run=run)
