"""What Keel adds to vLLM, in every process that vLLM starts (entry point `vllm.general_plugins`).

Importing this module imports nothing of vLLM: the entry point is harmless where vLLM is absent.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from typing import Any

from keel_rollout.engines.vllm.processes import end_self
from keel_rollout.engines.vllm.settings import BACKEND, PARENT

_registered = False


def register() -> None:
    """Called by vLLM at the start of each of its processes, perhaps twice."""
    global _registered
    if _registered or PARENT not in os.environ:  # a vLLM that serves somebody else
        return
    _registered = True
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.v1.sample.sampler import Sampler

    WeightTransferEngineFactory.register_engine(
        BACKEND, "keel_rollout.engines.vllm.transfer", "SharedMemoryTransfer"
    )
    _keep_full_logprobs(Sampler)
    if os.getpid() != int(os.environ[PARENT]):
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends an orphan: vLLM's processes outlive a parent that was killed, be it before this call."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "vLLM spawns its processes by multiprocessing"
    parent.join()
    end_self()


def _keep_full_logprobs(sampler: Any) -> None:
    """Log-probs of truncated sampling are over the full vocabulary, as the contract has them.

    vLLM gives those after top-k and top-p. Greedy tokens get theirs at temperature 1 both ways.
    """
    original = sampler.sample

    def sample(self: Any, logits: Any, metadata: Any, *rest: Any, **options: Any) -> Any:
        if metadata.all_greedy or (metadata.top_k is None and metadata.top_p is None):
            return original(self, logits, metadata, *rest, **options)
        heat_B = metadata.temperature.where(metadata.temperature > 1e-5, 1.0)
        full_BV = (logits.float() / heat_B[:, None]).log_softmax(-1)  # the original works in place
        sampled_B, processed_BV = original(self, logits, metadata, *rest, **options)
        return sampled_B, None if processed_BV is None else full_BV

    sampler.sample = sample
