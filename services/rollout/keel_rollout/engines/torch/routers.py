"""The router seam of transformers: where a model says which experts it took.

Some thirty MoE models have a module whose class name ends in `TopKRouter` and which returns
`(router_logits, router_scores, router_indices)`; the hook reads the third.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn


class RouterTap:
    """Keeps the expert ids of the last forward pass, for every MoE layer in depth order."""

    def __init__(self, model: nn.Module) -> None:
        found = [
            (_layer_number(name), module)
            for name, module in model.named_modules()
            if type(module).__name__.endswith("TopKRouter")
        ]
        found.sort(key=lambda item: item[0])
        self.layers = [layer for layer, _ in found]
        """Global numbers of the MoE layers; empty for a dense model."""
        self.routers = [router for _, router in found]
        self._indices: list[torch.Tensor] = [torch.empty(0)] * len(found)
        for place, router in enumerate(self.routers):
            router.register_forward_hook(self._hook(place))

    def _hook(self, place: int) -> Any:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self._indices[place] = output[2]

        return keep

    def last_NLK(self) -> torch.Tensor:
        """Expert ids of the N tokens of the last forward pass, batch-major. int64."""
        return torch.stack(self._indices, dim=1)


def _layer_number(name: str) -> int:
    numbers = re.findall(r"\.(\d+)\.", name)
    assert len(numbers) == 1, f"{name}: one layer number expected"
    return int(numbers[0])
