"""ndarray <-> Tensor, and the hashes of the contract.

Decoding is zero-copy: the array is a read-only view of the message's bytes.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import xxhash

from keel.errors import WireError
from keel.types.v1 import tensor_pb2
from keel.weights.v1 import manifest_pb2

assert sys.byteorder == "little", "Keel's wire format is little-endian and is not converted"

DType = tensor_pb2.DType

ITEMSIZE: dict[int, int] = {
    tensor_pb2.D_TYPE_FLOAT32: 4,
    tensor_pb2.D_TYPE_BFLOAT16: 2,
    tensor_pb2.D_TYPE_FLOAT16: 2,
    tensor_pb2.D_TYPE_UINT8: 1,
    tensor_pb2.D_TYPE_UINT16: 2,
    tensor_pb2.D_TYPE_INT32: 4,
    tensor_pb2.D_TYPE_INT64: 8,
}
"""Bytes of one element, by DType."""

_TO_NUMPY: dict[int, np.dtype] = {
    tensor_pb2.D_TYPE_FLOAT32: np.dtype("<f4"),
    tensor_pb2.D_TYPE_FLOAT16: np.dtype("<f2"),
    tensor_pb2.D_TYPE_UINT8: np.dtype("u1"),
    tensor_pb2.D_TYPE_UINT16: np.dtype("<u2"),
    tensor_pb2.D_TYPE_INT32: np.dtype("<i4"),
    tensor_pb2.D_TYPE_INT64: np.dtype("<i8"),
}
_FROM_NUMPY = {dtype: code for code, dtype in _TO_NUMPY.items()}


def fill(tensor: tensor_pb2.Tensor, array: npt.NDArray) -> None:
    """Packs an array of float32, float16, uint8, uint16, int32 or int64 into `tensor`.

    Filled in place inside its message, a tensor is copied once; a Tensor handed to a constructor is
    copied again at every level of nesting.

    Example:
        fill(sequence.routes.inline, routes_TLK)
    """
    code = _FROM_NUMPY.get(array.dtype)
    if code is None:
        valid = ", ".join(str(dtype) for dtype in _FROM_NUMPY)
        raise WireError(f"dtype {array.dtype} has no wire type; valid: {valid}")
    tensor.dtype = code  # type: ignore[assignment]
    tensor.shape[:] = array.shape
    tensor.data = array.tobytes()


def to_tensor(array: npt.NDArray) -> tensor_pb2.Tensor:
    """A Tensor of its own; see `fill`."""
    tensor = tensor_pb2.Tensor()
    fill(tensor, array)
    return tensor


def to_ndarray(
    tensor: tensor_pb2.Tensor, field: str, *, dtypes: Sequence[str], shape: Sequence[int | None]
) -> npt.NDArray:
    """Unpacks `tensor` as a read-only view, or raises WireError naming `field`.

    Args:
        field: name for the error message, e.g. "prompt_token_ids".
        dtypes: allowed numpy names, e.g. ("int32",).
        shape: expected extents; None matches any.
    """
    dtype = _TO_NUMPY.get(tensor.dtype)
    if dtype is None or dtype.name not in dtypes:
        got = dtype.name if dtype is not None else f"code {tensor.dtype}"
        raise WireError(f"{field}.dtype: {got} is not valid; valid: {', '.join(dtypes)}")
    extents = tuple(tensor.shape)
    if len(extents) != len(shape) or any(
        got < 0 or (want is not None and got != want)
        for got, want in zip(extents, shape, strict=True)
    ):
        want_text = ", ".join("any" if want is None else str(want) for want in shape)
        raise WireError(f"{field}.shape: {list(extents)} is not valid; valid: [{want_text}]")
    expected = math.prod(extents) * dtype.itemsize
    if len(tensor.data) != expected:
        raise WireError(
            f"{field}.data: {len(tensor.data)} bytes is not valid; "
            f"valid: {expected} bytes for shape {list(extents)} of {dtype.name}"
        )
    return np.frombuffer(tensor.data, dtype=dtype).reshape(extents)


def routes_dtype(num_experts: int) -> np.dtype:
    """uint8 up to 256 experts, uint16 above."""
    return np.dtype("u1") if num_experts <= 256 else np.dtype("<u2")


def xxh3(data: bytes | bytearray | memoryview | npt.NDArray) -> int:
    """xxh3-64 of raw bytes, as every hash in the contract."""
    if isinstance(data, np.ndarray):
        data = np.ascontiguousarray(data).view(np.uint8).reshape(-1).data
    return xxhash.xxh3_64_intdigest(data)


def fingerprint(entries: Iterable[manifest_pb2.TensorEntry]) -> int:
    """One number for a whole version: xxh3-64 over (name, dtype, shape, hash) in name order."""
    digest = xxhash.xxh3_64()
    for entry in sorted(entries, key=lambda entry: entry.name):
        shape = ",".join(str(extent) for extent in entry.shape)
        digest.update(f"{entry.name}|{entry.dtype}|{shape}|{entry.xxh3:016x}\n".encode())
    return digest.intdigest()


_CONFIG_NOISE = frozenset({"_name_or_path", "transformers_version", "torch_dtype", "dtype"})


def config_hash(config_json: bytes) -> int:
    """xxh3-64 of a config.json, keys sorted, without what does not change the architecture."""
    try:
        config = json.loads(config_json)
    except ValueError as error:
        raise WireError(f"config.json is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise WireError(f"config.json: {type(config).__name__} is not valid; valid: an object")
    kept = {key: value for key, value in config.items() if key not in _CONFIG_NOISE}
    return xxh3(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode())
