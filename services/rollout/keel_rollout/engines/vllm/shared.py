"""A version's tensors in anonymous shared memory: no file, so nothing is left behind, ever."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from keel.types.v1 import tensor_pb2
from keel_rollout.engines.base import StagedTensor

ALIGNMENT = 64
_DTYPES = {
    tensor_pb2.D_TYPE_FLOAT32: torch.float32,
    tensor_pb2.D_TYPE_BFLOAT16: torch.bfloat16,
    tensor_pb2.D_TYPE_FLOAT16: torch.float16,
}


@contextmanager
def shared(tensors: Mapping[str, StagedTensor]) -> Iterator[dict[str, Any]]:
    """Copies tensors into shared memory; yields what `read` needs, as plain data.

    Only processes of the same user can read it, by way of /proc, and only until the block ends.
    """
    entries: list[list[Any]] = []
    size_bytes = 0
    for name, staged in tensors.items():
        entries.append([name, staged.dtype, list(staged.shape), size_bytes])
        size_bytes += -(-staged.data.nbytes // ALIGNMENT) * ALIGNMENT
    fd = os.memfd_create("keel-weights")
    try:
        os.ftruncate(fd, max(size_bytes, 1))
        with mmap.mmap(fd, max(size_bytes, 1)) as memory:
            for staged, (_, _, _, offset) in zip(tensors.values(), entries, strict=True):
                memory[offset : offset + staged.data.nbytes] = staged.data
        yield {"path": f"/proc/{os.getpid()}/fd/{fd}", "entries": entries}
    finally:
        os.close(fd)


def read(path: str, entries: list[list[Any]]) -> list[tuple[str, torch.Tensor]]:
    """The tensors, as views of the shared memory; writing to them changes nobody else's."""
    with Path(path).open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    named = []
    for name, code, shape, offset in entries:
        dtype = _DTYPES[code]
        count = torch.Size(shape).numel()
        flat = torch.frombuffer(memory, dtype=dtype, count=count, offset=offset)
        named.append((name, flat.reshape(shape)))
    return named
