"""The contract, byte for byte: what was written yesterday must be readable tomorrow."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from keel import codec, queue
from keel.errors import WireError
from keel.types.v1 import sequence_pb2, tensor_pb2
from keel.weights.v1 import manifest_pb2


def test_tensor_golden_bytes() -> None:
    tensor = codec.to_tensor(np.array([[1, 2], [3, 258]], dtype="<i4"))
    # 08 06: dtype INT32; 12 02 02 02: shape [2, 2]; 1a 10: 16 bytes, little-endian
    assert tensor.SerializeToString(deterministic=True).hex() == (
        "080612020202" + "1a10" + "01000000020000000300000002010000"
    )


def test_envelope_golden_bytes() -> None:
    slot = sequence_pb2.SlotId(run="r", attempt=1, lap=2, slot=3)
    sequence = sequence_pb2.Sequence(
        id=sequence_pb2.SequenceId(slot=slot, sample=4),
        token_ids=codec.to_tensor(np.array([5, 6], "<i4")),
        prompt_length=1,
        trainable=[sequence_pb2.Span(begin=1, end=2)],
        rollout_logprobs=codec.to_tensor(np.array([-0.5], "<f4")),
        sampling=sequence_pb2.SamplingParams(temperature=1.0, max_tokens=8, stop_token_ids=[1]),
        routes=sequence_pb2.Routes(
            codec=sequence_pb2.ROUTE_CODEC_DENSE,
            inline=codec.to_tensor(np.array([[[7, 9]]], "u1")),
        ),
        routes_valid=True,
        routes_xxh3=codec.xxh3(b"\x07\x09"),
        policy_versions=[
            sequence_pb2.VersionSpan(span=sequence_pb2.Span(begin=1, end=2), policy_version=2)
        ],
        finish_reason=sequence_pb2.FINISH_REASON_STOP,
        reward=1.0,
    )
    envelope = sequence_pb2.Envelope(
        id=slot, group=sequence_pb2.Group(sequences=[sequence], generate_s=0.25, engine="e:1")
    )
    data = envelope.SerializeToString(deterministic=True)
    assert data.hex() == GOLDEN_ENVELOPE
    assert sequence_pb2.Envelope.FromString(bytes.fromhex(GOLDEN_ENVELOPE)) == envelope


GOLDEN_ENVELOPE = (
    "0a090a01721001180220031282010a720a0d0a090a01721001180220031004120f08061201021a08"
    "050000000600000018012204080110022a0b08011201011a04000000bf320a0d0000803f20082a01"
    "013a0f0801120b080412030101021a020709400149cb6ca764a41bf56452080a0408011002100258"
    "0161000000000000f03f11000000000000d03f1a03653a31"
)


def test_hashes_are_fixed() -> None:
    assert codec.xxh3(b"keel") == codec.xxh3(np.frombuffer(b"keel", "u1"))
    entries = [
        manifest_pb2.TensorEntry(name=name, dtype=tensor_pb2.D_TYPE_FLOAT32, shape=[2, 3], xxh3=7)
        for name in ("b", "a")
    ]
    assert codec.fingerprint(entries) == codec.fingerprint(reversed(entries))
    assert f"{codec.xxh3(b'keel'):016x}" == "3eb9b16dea10e914"
    assert f"{codec.fingerprint(entries):016x}" == "d3db6375386dab7f"
    assert codec.config_hash(b'{"b": 1, "a": 2, "transformers_version": "5"}') == (
        codec.config_hash(b'{"a":2,"b":1}')
    )


@given(
    npst.arrays(
        dtype=st.sampled_from(["<f4", "<f2", "u1", "<u2", "<i4", "<i8"]),
        shape=npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
    )
)
def test_arrays_survive_the_wire(array: np.ndarray) -> None:
    tensor = tensor_pb2.Tensor.FromString(codec.to_tensor(array).SerializeToString())
    back = codec.to_ndarray(tensor, "x", dtypes=(array.dtype.name,), shape=[None] * array.ndim)
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (tensor_pb2.Tensor(), "x.dtype: code 0"),
        (tensor_pb2.Tensor(dtype=tensor_pb2.D_TYPE_FLOAT32, shape=[1], data=b"1234"), "x.dtype"),
        (tensor_pb2.Tensor(dtype=tensor_pb2.D_TYPE_INT32, shape=[2], data=b"1234"), "x.data: 4"),
        (tensor_pb2.Tensor(dtype=tensor_pb2.D_TYPE_INT32, shape=[-1], data=b""), "x.shape"),
        (tensor_pb2.Tensor(dtype=tensor_pb2.D_TYPE_INT32, shape=[1, 1], data=b"1234"), "x.shape"),
        (tensor_pb2.Tensor(dtype=99, shape=[1], data=b"1"), "x.dtype: code 99"),
    ],
)
def test_malformed_tensors_name_the_field(tensor: tensor_pb2.Tensor, message: str) -> None:
    with pytest.raises(WireError, match=message):
        codec.to_ndarray(tensor, "x", dtypes=("int32",), shape=(None,))


def test_stream_entries() -> None:
    envelope = sequence_pb2.Envelope(
        id=sequence_pb2.SlotId(run="r"), void=sequence_pb2.VoidSlot(reason="none")
    )
    fields = queue.pack(envelope)
    assert fields == {b"slot": b"0/0/0", b"envelope": bytes.fromhex("0a030a01721a060a046e6f6e65")}
    assert queue.unpack(fields, run="r") == envelope
    with pytest.raises(WireError, match="valid: 'other'"):
        queue.unpack(fields, run="other")
    with pytest.raises(WireError, match="fields"):
        queue.unpack({b"x": b""}, run="r")
    with pytest.raises(WireError, match="valid: attempt/lap/slot"):
        queue.slot_of(fields | {queue.SLOT_FIELD: b"0/01/0"})
    with pytest.raises(WireError, match="0/0/0 is not valid; valid: 0/1/0"):
        queue.unpack(fields | {queue.SLOT_FIELD: b"0/1/0"}, run="r")
    with pytest.raises(WireError, match="no Envelope"):
        queue.unpack(fields | {queue.ENVELOPE_FIELD: b"\xff\xff"}, run="r")
    with pytest.raises(WireError, match="payload: unset"):
        queue.unpack(queue.pack(sequence_pb2.Envelope(id=sequence_pb2.SlotId(run="r"))), run="r")


def test_stream_entries_by_reference() -> None:
    envelope = sequence_pb2.Envelope(
        id=sequence_pb2.SlotId(run="r", lap=3, slot=1), void=sequence_pb2.VoidSlot(reason="none")
    )
    data = envelope.SerializeToString()
    ref = sequence_pb2.BlobRef(uri="r/groups-0-3-1-00", size_bytes=len(data), xxh3=7)
    fields = queue.pack_blob(queue.SlotKey(0, 3, 1), ref)
    assert fields[b"slot"] == b"0/3/1"
    asked = []

    def read(ref: sequence_pb2.BlobRef) -> bytes:
        asked.append(ref)
        return data

    assert queue.unpack(fields, run="r", read=read) == envelope
    assert asked == [ref]
    with pytest.raises(WireError, match="no blob store"):
        queue.unpack(fields, run="r")
    with pytest.raises(WireError, match="no BlobRef"):
        queue.unpack(fields | {queue.BLOB_FIELD: b"\xff\xff"}, run="r", read=read)
