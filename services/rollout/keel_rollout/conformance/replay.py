"""Replays routes in a transformers model: the routers' choice is replaced, their weights are not.

The gate weights at the replayed experts follow the router's own rule, which is read off what the
router answers in the same forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from keel.errors import ModelError
from keel_rollout.engines.torch.routers import RouterTap


class Replay:
    """Hooks on every router of a model; they record, and inside `of` they replace."""

    def __init__(self, model: nn.Module) -> None:
        # its hooks come first, so they keep the routers' own choice
        self.tap = RouterTap(model)
        self._routes_SLK: Tensor | None = None
        self._mask_S = torch.empty(0)
        for place, router in enumerate(self.tap.routers):
            router.register_forward_hook(self._hook(place, router))

    @contextmanager
    def of(self, routes_NTLK: Tensor, mask_NT: Tensor) -> Iterator[None]:
        """Forward passes inside use these expert ids where the mask holds."""
        self._routes_SLK, self._mask_S = routes_NTLK.flatten(0, 1), mask_NT.flatten()
        try:
            yield
        finally:
            self._routes_SLK = None

    def _hook(self, place: int, router: nn.Module) -> Any:
        scale = float(getattr(router, "routed_scaling_factor", 1.0))

        def replace(_router: nn.Module, _args: Any, output: tuple[Tensor, Tensor, Tensor]) -> Any:
            if self._routes_SLK is None:
                return None
            logits_SE, weights_SK, ids_SK = output
            wanted_SK = self._routes_SLK[:, place].to(ids_SK)
            wanted_SK = torch.where(self._mask_S[:, None], wanted_SK, ids_SK)
            rule = _rule(logits_SE, weights_SK, ids_SK, scale)
            return logits_SE, _weights(logits_SE, wanted_SK, *rule).to(weights_SK), wanted_SK

        return replace


def _weights(logits_SE: Tensor, ids_SK: Tensor, sigmoid: bool, whole: bool, scale: float) -> Tensor:
    scores_SE = logits_SE.float().sigmoid() if sigmoid else logits_SE.float().softmax(-1)
    chosen_SK = scores_SE.gather(-1, ids_SK)
    if whole:
        chosen_SK = chosen_SK / (chosen_SK.sum(-1, keepdim=True) + 1e-20)
    return chosen_SK * scale


def _rule(
    logits_SE: Tensor, weights_SK: Tensor, ids_SK: Tensor, scale: float
) -> tuple[bool, bool, float]:
    """(sigmoid rather than softmax, divided by the sum of the chosen, factor) of a router."""
    for sigmoid, whole in product((False, True), (True, False)):
        ours_SK = _weights(logits_SE, ids_SK, sigmoid, whole, scale)
        if torch.allclose(ours_SK, weights_SK.float(), rtol=1e-3, atol=1e-5):
            return sigmoid, whole, scale
    raise ModelError(
        "a router weighs its experts by a rule that the kit does not know; valid: softmax over all "
        "experts or sigmoid of each, at the chosen ones, divided by their sum or not"
    )
