"""The seam in transformers' MoE models: reads and replaces the experts that routers choose.

A router, any module whose type ends in TopKRouter, returns (router_logits, gate weights, expert
ids). Replay swaps the ids and computes the gate weights anew from the live full softmax at them, so
gradient reaches the router. A `RouterPass` lives for one forward and its backward; because it is
looked up by layer and consumes nothing, recomputed layers see the same routes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from keel.errors import ModelError


class RouterPass:
    """What one forward pass was asked to route, and what it did, by MoE layer. S = N * T."""

    def __init__(self, routes_SLK: Tensor | None, mask_S: Tensor | None) -> None:
        self.routes_SLK = routes_SLK  # expert sets to use where mask_S holds
        self.mask_S = mask_S
        self.natural: dict[int, Tensor] = {}  # layer -> [S, K], the router's own top-k
        self.dispatched: dict[int, Tensor] = {}  # layer -> [S, K], as the experts received them


class RouterSeam:
    """Hooks on every router and experts module of a model; inert outside `routing`."""

    def __init__(self, model: nn.Module) -> None:
        self._pass: RouterPass | None = None
        routers = [
            (name, module)
            for name, module in model.named_modules()
            if type(module).__name__.endswith("TopKRouter")
        ]
        self.layer_numbers = tuple(_layer_number(name) for name, _ in routers)
        for layer, (name, router) in enumerate(routers):
            experts = getattr(model.get_submodule(name.rpartition(".")[0]), "experts", None)
            if experts is None:
                raise ModelError(f"{name}: no module `experts` beside this router")
            router.register_forward_hook(self._on_router(layer, _renormalises(name, router)))
            experts.register_forward_pre_hook(self._on_experts(layer), with_kwargs=True)

    @contextmanager
    def routing(
        self, routes_NTLK: Tensor | None = None, mask_NT: Tensor | None = None
    ) -> Iterator[RouterPass]:
        """Routes for the forward *and* backward inside; None: natural ones, only recorded."""
        assert self._pass is None, "passes do not nest"
        self._pass = RouterPass(
            None if routes_NTLK is None else routes_NTLK.flatten(0, 1),
            None if mask_NT is None else mask_NT.flatten(),
        )
        try:
            yield self._pass
        finally:
            self._pass = None

    def _on_router(self, layer: int, renormalise: bool) -> Any:
        def hook(_router: nn.Module, _args: Any, output: tuple[Tensor, Tensor, Tensor]) -> Any:
            if self._pass is None:
                return None
            logits_SE, weights_SK, natural_SK = output
            # first come: a recomputed layer is not a pass of its own
            self._pass.natural.setdefault(layer, natural_SK.detach())
            if self._pass.routes_SLK is None:
                return None
            assert self._pass.mask_S is not None
            wanted_SK = self._pass.routes_SLK[:, layer].to(natural_SK.dtype)
            ids_SK = torch.where(self._pass.mask_S[:, None], wanted_SK, natural_SK)
            weights_SK, ids_SK = gate_weights(logits_SE, ids_SK, renormalise, weights_SK.dtype)
            return logits_SE, weights_SK, ids_SK

        return hook

    def _on_experts(self, layer: int) -> Any:
        def hook(_experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._pass is not None:
                ids_SK = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
                self._pass.dispatched.setdefault(layer, ids_SK.detach())

        return hook


def gate_weights(
    logits_SE: Tensor, ids_SK: Tensor, renormalise: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The model's rule at given experts: softmax over all, gathered, renormalised if it does so.

    Returns weights and ids, best first as top-k gives them: then equal sets give equal bits,
    whatever order the ids came in.
    """
    probs_SE = torch.softmax(logits_SE, dim=-1, dtype=torch.float32)
    weights_SK, order_SK = probs_SE.gather(-1, ids_SK).sort(dim=-1, descending=True, stable=True)
    if renormalise:
        weights_SK = weights_SK / weights_SK.sum(dim=-1, keepdim=True)
    return weights_SK.to(dtype), ids_SK.gather(-1, order_SK)


def _layer_number(name: str) -> int:
    """The global layer number in a module's name, e.g. 7 in "model.layers.7.mlp.gate"."""
    return next(int(part) for part in name.split(".") if part.isdigit())


@torch.no_grad()
def _renormalises(name: str, router: nn.Module) -> bool:
    """Finds out by asking the router, and refuses one that follows neither rule."""
    weight = next(router.parameters())
    generator = torch.Generator().manual_seed(0)
    hidden_SH = torch.randn(64, weight.shape[-1], generator=generator).to(weight)
    try:
        logits_SE, weights_SK, ids_SK = router(hidden_SH)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{name}: {type(router).__name__} cannot be replayed: {error}") from error
    for renormalise in (True, False):
        expected_SK, _ = gate_weights(logits_SE, ids_SK, renormalise, weights_SK.dtype)
        if torch.equal(expected_SK, weights_SK):
            return renormalise
    raise ModelError(
        f"{name}: {type(router).__name__} computes its gate weights by a rule that replay does not "
        "know; valid: softmax over all experts, top-k, renormalised or not"
    )
