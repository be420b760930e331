"""The torch engine. Importing this package loads torch and transformers."""

from __future__ import annotations

from keel_rollout.engines.base import Engine
from keel_rollout.engines.torch.engine import TorchEngine


def create(device: str, threads: int) -> Engine:
    """An EMPTY torch engine. Called on a running event loop.

    Args:
        device: "cpu", "cuda" or "cuda:N".
        threads: CPU threads of the compute thread; the number changes rounding.
    """
    return TorchEngine(device, threads)
