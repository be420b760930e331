"""A version of the weights on the host, ready to be sent as often as it takes."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from keel.codec import fingerprint, xxh3
from keel.types.v1 import tensor_pb2
from keel.weights.v1 import manifest_pb2

PROBE_TOKENS = 64
"""Length of the probe."""

_DTYPES = {
    torch.float32: tensor_pb2.D_TYPE_FLOAT32,
    torch.bfloat16: tensor_pb2.D_TYPE_BFLOAT16,
    torch.float16: tensor_pb2.D_TYPE_FLOAT16,
}
_TORCH_DTYPES = {code: dtype for dtype, code in _DTYPES.items()}


def probe_tokens(vocab_size: int) -> np.ndarray:
    """The fixed tokens of every probe: int32 [T], spread over the vocabulary."""
    return np.random.default_rng(0).integers(0, vocab_size, PROBE_TOKENS).astype(np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class Version:
    """A version of the weights. Its bytes are a copy: the model may be trained on meanwhile."""

    number: int
    tensors: dict[str, memoryview]
    """Raw bytes by Hugging Face name."""
    manifest: manifest_pb2.WeightManifest
    """As for a stream."""
    probe_logprobs: list[float]
    """The trainer's own log-probs of the probe tokens, [T - 1]."""

    @classmethod
    def build(
        cls, number: int, weights: Iterator[tuple[str, torch.Tensor]], probe_logprobs: list[float]
    ) -> Version:
        """Copies the weights to the host, hashes them, and names the result."""
        tensors, entries = {}, []
        for name, weight in weights:
            host = weight.detach().to("cpu", copy=True).contiguous()
            data = host.reshape(-1).view(torch.uint8).numpy().data
            tensors[name] = data
            entries.append(
                manifest_pb2.TensorEntry(
                    name=name, dtype=_DTYPES[weight.dtype], shape=weight.shape, xxh3=xxh3(data)
                )
            )
        manifest = manifest_pb2.WeightManifest(
            policy_version=number,
            fingerprint=fingerprint(entries),
            tensors=entries,
            transport=manifest_pb2.WEIGHT_TRANSPORT_STREAM,
        )
        return cls(number, tensors, manifest, probe_logprobs)

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(len(data) for data in self.tensors.values())


class SharedWeights:
    """Versions as files in a folder that engines share: one file a version, while it is read.

    DIR/weights/RUN/version-12.safetensors    the folder 0700, the file 0600

    Args:
        root: the engines' `--shared`; paths are relative to it.
    """

    def __init__(self, root: Path, run: str) -> None:
        self._root, self._folder = root, root / "weights" / run
        self._lock = threading.Lock()
        self._readers: dict[str, int] = {}
        shutil.rmtree(self._folder, ignore_errors=True)  # of a trainer that was killed
        self._folder.mkdir(mode=0o700, parents=True)

    @contextmanager
    def file(self, version: Version) -> Iterator[str]:
        """Path of the version's safetensors file, relative to the root.

        It is there while somebody is inside: the first writes it, the last removes it.
        """
        name = f"version-{version.number}.safetensors"
        path = self._folder / name
        with self._lock:
            if not self._readers.get(name):
                _write(path, version)
            self._readers[name] = self._readers.get(name, 0) + 1
        try:
            yield str(path.relative_to(self._root))
        finally:
            with self._lock:
                self._readers[name] -= 1
                if not self._readers[name]:
                    path.unlink(missing_ok=True)

    def close(self) -> None:
        """Removes the run's folder, unless another trainer of the run has something in it."""
        with suppress(OSError):
            self._folder.rmdir()


def _write(path: Path, version: Version) -> None:
    temporary = path.with_name(f".{path.name}")
    tensors = {
        entry.name: torch.frombuffer(
            version.tensors[entry.name], dtype=_TORCH_DTYPES[entry.dtype]
        ).view(tuple(entry.shape))
        for entry in version.manifest.tensors
    }
    try:
        save_file(tensors, temporary)
        temporary.chmod(0o600)
        temporary.rename(path)
    except SafetensorError as error:  # how a full disk shows
        temporary.unlink(missing_ok=True)
        raise OSError(f"{temporary}: {error}") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
