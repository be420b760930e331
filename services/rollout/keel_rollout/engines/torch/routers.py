"""The router seam of transformers: where a model says which experts it took.

A router, any module whose type ends in TopKRouter, stands beside a module `experts` and returns
`(router_logits, gate weights, expert ids)`; the hook reads the third.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from keel.errors import ModelError


class RouterTap:
    """Keeps the expert ids of the last forward pass, for every MoE layer in depth order."""

    def __init__(self, model: nn.Module) -> None:
        found = find_routers(model)
        self.layers = [_layer_number(name) for name in found]
        """Global numbers of the MoE layers; empty for a dense model."""
        self.routers: list[Any] = list(found.values())
        self.num_experts = self.routers[0].num_experts if found else 0
        self.top_k = self.routers[0].top_k if found else 0
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


def find_routers(model: nn.Module) -> dict[str, nn.Module]:
    """Routers by name, in depth order; ModelError for experts that no known router leads to."""
    modules = dict(model.named_modules())
    routers = {k: m for k, m in modules.items() if type(m).__name__.lower().endswith("topkrouter")}
    served = {name.rpartition(".")[0] for name in routers}
    blocks = {name.rpartition(".")[0] for name in modules if name.endswith(".experts")}
    for name in sorted(served ^ blocks):
        raise ModelError(
            f"{type(model).__name__}: {name} ({type(modules[name]).__name__}) tells no routes; "
            "valid: one router, of a type that ends in TopKRouter, beside one module `experts`"
        )
    return routers


def _layer_number(name: str) -> int:
    numbers = re.findall(r"\.(\d+)\.", name)
    assert len(numbers) == 1, f"{name}: one layer number expected"
    return int(numbers[0])
