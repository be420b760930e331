"""The bytes of a version on their way in: nothing is applied that has not been verified."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import safetensors
import xxhash

from keel import codec
from keel.errors import IntegrityError, InvalidField, StateError
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.types.v1 import tensor_pb2
from keel.weights.v1 import manifest_pb2
from keel_rollout.engines.base import StagedTensor

FLOATS = (tensor_pb2.D_TYPE_FLOAT32, tensor_pb2.D_TYPE_BFLOAT16, tensor_pb2.D_TYPE_FLOAT16)
_SAFETENSORS = {"F32": FLOATS[0], "BF16": FLOATS[1], "F16": FLOATS[2]}


def check_manifest(
    manifest: manifest_pb2.WeightManifest, expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuses a manifest that is not a full version of the model, naming the first tensor at fault.

    Args:
        expected: shapes by name, as the engine wants them.
    """
    if manifest.HasField("base_version"):
        raise InvalidField("manifest.base_version", manifest.base_version, "unset: a full update")
    seen: set[str] = set()
    for entry in manifest.tensors:
        if entry.name not in expected:
            raise InvalidField("manifest.tensors.name", entry.name, "a tensor of the loaded model")
        if entry.name in seen:
            raise InvalidField("manifest.tensors.name", entry.name, "each name once")
        seen.add(entry.name)
        if tuple(entry.shape) != expected[entry.name]:
            raise InvalidField(
                f"manifest.tensors[{entry.name}].shape",
                list(entry.shape),
                str(list(expected[entry.name])),
            )
        if entry.dtype not in FLOATS:
            valid = ", ".join(tensor_pb2.DType.Name(code) for code in FLOATS)
            raise InvalidField(f"manifest.tensors[{entry.name}].dtype", entry.dtype, valid)
    missing = sorted(expected.keys() - seen)
    if missing:
        raise InvalidField(
            "manifest.tensors", f"{len(seen)} tensors without {missing[0]}", "every tensor"
        )
    computed = codec.fingerprint(manifest.tensors)
    if manifest.fingerprint != computed:
        raise IntegrityError(
            f"manifest.fingerprint: {manifest.fingerprint:#x} is not that of its tensors, "
            f"{computed:#x}"
        )


def check_number(manifest: manifest_pb2.WeightManifest, newest: tuple[int, int] | None) -> None:
    """Refuses a version that is lower than the newest one served, or the same with other bits.

    Args:
        newest: number and fingerprint of the last version served; None before the first.
    """
    if newest is None or manifest.policy_version > newest[0]:
        return
    number, fingerprint = newest
    if manifest.policy_version < number:
        raise StateError(
            f"manifest.policy_version: {manifest.policy_version} is lower than {number}, which "
            "this engine has served; versions only grow"
        )
    if manifest.fingerprint != fingerprint:
        raise StateError(
            f"manifest.policy_version: {number} was served with fingerprint {fingerprint:#x}; "
            "a number is never reused for other bits"
        )


class _Slot:
    """One tensor being filled, hashed as its bytes come."""

    def __init__(self, entry: manifest_pb2.TensorEntry) -> None:
        self.entry = entry
        self.size_bytes = math.prod(entry.shape) * codec.ITEMSIZE[entry.dtype]
        self.buffer = np.empty(self.size_bytes, np.uint8)
        self.filled_bytes = 0
        self.digest = xxhash.xxh3_64()

    def write(self, offset_bytes: int, data: bytes | memoryview) -> None:
        end_bytes = offset_bytes + len(data)
        if offset_bytes != self.filled_bytes:
            raise InvalidField(
                f"chunk[{self.entry.name}].offset_bytes", offset_bytes, str(self.filled_bytes)
            )
        if end_bytes > self.size_bytes:
            raise InvalidField(
                f"chunk[{self.entry.name}].data",
                f"{end_bytes} bytes in all",
                f"{self.size_bytes} bytes",
            )
        self.buffer[offset_bytes:end_bytes] = np.frombuffer(data, np.uint8)
        self.digest.update(data)
        self.filled_bytes = end_bytes


class Staging:
    """A version between BeginWeightUpdate and FinishWeightUpdate.

    The manifest has passed `check_manifest`.
    """

    def __init__(self, manifest: manifest_pb2.WeightManifest) -> None:
        self.policy_version = manifest.policy_version
        self.fingerprint = manifest.fingerprint
        self.transport = manifest.transport
        self.began_s = time.perf_counter()
        self._slots = {entry.name: _Slot(entry) for entry in manifest.tensors}

    @property
    def staged_bytes(self) -> int:
        """Bytes that have come so far."""
        return sum(slot.filled_bytes for slot in self._slots.values())

    def write(self, chunk: pb.TensorChunk) -> None:
        """Adds one piece; pieces of a tensor come in order, without gap or overlap."""
        slot = self._slots.get(chunk.name)
        if slot is None:
            raise InvalidField("chunk.name", chunk.name, "a tensor of the manifest")
        slot.write(chunk.offset_bytes, chunk.data)

    def read_safetensors(self, root: Path, relative: str) -> None:
        """Adds every tensor of a safetensors file under `root`. Blocks: call it off the loop."""
        path = resolve_inside(root, relative)
        try:
            tensors: Iterable[tuple[str, dict]] = safetensors.deserialize(path.read_bytes())
        except safetensors.SafetensorError as error:
            raise InvalidField(
                "safetensors_path", relative, f"a safetensors file ({error})"
            ) from error
        for name, tensor in tensors:
            slot = self._slots.get(name)
            if slot is None:
                raise InvalidField(
                    "safetensors_path", f"{relative}: {name}", "tensors of the manifest"
                )
            entry = slot.entry
            described = (_SAFETENSORS.get(tensor["dtype"]), list(tensor["shape"]))
            if described != (entry.dtype, list(entry.shape)):
                raise InvalidField(
                    f"safetensors_path[{name}]",
                    f"{tensor['dtype']} {list(tensor['shape'])}",
                    f"{tensor_pb2.DType.Name(entry.dtype)} {list(entry.shape)}",
                )
            slot.write(0, tensor["data"])

    def verified(self) -> dict[str, StagedTensor]:
        """Every tensor, or StateError for the first incomplete, IntegrityError for a wrong one."""
        for name, slot in self._slots.items():
            if slot.filled_bytes != slot.size_bytes:
                raise StateError(
                    f"version {self.policy_version} is not complete: {name} has "
                    f"{slot.filled_bytes} of {slot.size_bytes} bytes; send the rest, or begin again"
                )
        for name, slot in self._slots.items():
            if slot.digest.intdigest() != slot.entry.xxh3:
                raise IntegrityError(
                    f"{name}: xxh3 {slot.digest.intdigest():#x} of the bytes that came is not the "
                    f"manifest's {slot.entry.xxh3:#x}; the old version is kept"
                )
        return {
            name: StagedTensor(slot.entry.dtype, tuple(slot.entry.shape), slot.buffer.data)
            for name, slot in self._slots.items()
        }


def resolve_inside(root: Path, relative: str) -> Path:
    """The existing file `root/relative`; refuses what leads out of `root`, links included."""
    try:
        path = (root / relative).resolve()
        usable = path.is_relative_to(root.resolve()) and path.is_file()
    except (OSError, ValueError):  # a NUL byte, a name too long
        usable = False
    if not usable or Path(relative).is_absolute():
        raise InvalidField(
            "safetensors_path", relative, "an existing file, relative to the shared storage"
        )
    return path
