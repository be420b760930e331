"""Loads a version into vLLM's worker process, from shared memory. Runs in that process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from keel_rollout.engines.vllm.shared import read


@dataclass
class NoInit(WeightTransferInitInfo):
    """There is nothing to agree on."""


@dataclass
class SharedVersion(WeightTransferUpdateInfo):
    """A whole version, as `shared` describes it."""

    path: str
    entries: list


class SharedMemoryTransfer(WeightTransferEngine[NoInit, SharedVersion]):
    """Registered with vLLM by `plugin.register`."""

    init_info_cls = NoInit
    update_info_cls = SharedVersion
    supports_draft_weight_update = False

    def init_transfer_engine(self, init_info: NoInit) -> None:
        """Nothing to do."""

    def start_weight_update(self) -> None:
        """Nothing to do: `receive_weights` is the whole update, so that it fails as a whole."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Loads a version."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)

    def receive_weights(self, update_info: SharedVersion) -> None:
        """Loads every tensor, then brings the layers into the form that their kernels want."""
        initialize_layerwise_reload(self.model)
        self.model.load_weights(read(update_info.path, update_info.entries))
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            self._pack_experts()

    def _pack_experts(self) -> None:
        """Packs the experts as the first load does.

        vLLM's reload leaves them unpacked on a CPU, and outputs are then wrong without an error.
        """
        for module in self.model.modules():
            kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
            if kernel is not None:
                kernel.fused_experts.process_weights_after_loading(module)

    def finish_weight_update(self) -> None:
        """Nothing to do."""

    def shutdown(self) -> None:
        """Nothing to do."""
