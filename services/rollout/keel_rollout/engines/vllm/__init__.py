"""The vLLM engine. Importing this package imports nothing of vLLM; `create` does."""

from __future__ import annotations

import atexit
import gc

from keel_rollout.engines.base import Engine


def create(device: str, threads: int) -> Engine:
    """An EMPTY vLLM engine. Called on a running event loop.

    Args:
        device: "cpu", or "cuda" where the GPU build of vLLM is installed.
        threads: CPU threads of the worker process; on a GPU it changes nothing.
    """
    from keel_rollout.engines.vllm.processes import make_scratch
    from keel_rollout.engines.vllm.settings import prepare_environment

    prepare_environment(device, threads)  # vLLM reads it when it is imported
    make_scratch()
    from keel_rollout.engines.vllm.engine import VllmEngine

    atexit.register(gc.freeze)  # or Python collects vLLM's million objects for seconds at its end
    return VllmEngine(device)
