"""The seam in transformers' MoE models: reads and replaces the experts that routers choose.

A router, any module whose type ends in TopKRouter, stands beside a module `experts` and returns
(router_logits, gate weights, expert ids). Replay swaps the ids and computes the gate weights anew
from the live scores at them, by the model's own rule, so gradient reaches the router. A
`RouterPass` lives for one forward and its backward; because it is looked up by layer and consumes
nothing, recomputed layers see the same routes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
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
        routers = find_routers(model)
        self.layer_numbers = tuple(_layer_number(name) for name in routers)
        asked = [ask(f"{type(model).__name__}.{name}", r) for name, r in routers.items()]
        shapes = {(answer.num_experts, answer.top_k) for answer in asked} or {(0, 0)}
        if len(shapes) > 1:
            raise ModelError(f"layers route (experts, K) = {sorted(shapes)}; valid: all alike")
        self.num_experts, self.top_k = shapes.pop()
        """0 for a dense model."""
        for layer, (name, router) in enumerate(routers.items()):
            experts = model.get_submodule(f"{name.rpartition('.')[0]}.experts")
            router.register_forward_hook(self._on_router(layer, asked[layer].rule))
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

    def _on_router(self, layer: int, rule: GateRule) -> Any:
        def hook(_router: nn.Module, _args: Any, output: tuple[Tensor, Tensor, Tensor]) -> Any:
            if self._pass is None:
                return None
            logits_SE, weights_SK, ids_SK = output
            # first come: a recomputed layer is not a pass of its own
            self._pass.natural.setdefault(layer, ids_SK.detach())
            if self._pass.routes_SLK is not None:
                assert self._pass.mask_S is not None
                wanted_SK = self._pass.routes_SLK[:, layer].to(ids_SK.dtype)
                ids_SK = torch.where(self._pass.mask_S[:, None], wanted_SK, ids_SK)
            # natural ids too: some routers leave theirs unsorted, and order changes rounding
            return logits_SE, *gate_weights(logits_SE, ids_SK, rule, weights_SK.dtype)

        return hook

    def _on_experts(self, layer: int) -> Any:
        def hook(_experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._pass is not None:
                ids_SK = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
                self._pass.dispatched.setdefault(layer, ids_SK.detach())

        return hook


@dataclass(frozen=True)
class GateRule:
    """How a model weighs chosen experts. Selection (bias, groups) plays no part in it."""

    scores: str
    """"softmax" over all experts, or "sigmoid" of each."""
    renormalise: bool
    """Whether the weights of the chosen are divided by their sum."""
    scale: float
    """Times this: DeepSeek's routed_scaling_factor."""


def gate_weights(
    logits_SE: Tensor, ids_SK: Tensor, rule: GateRule, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The model's rule at given experts: scores of all, gathered, renormalised if it does so.

    Returns weights and ids, best first: then equal sets give equal bits, whatever order the ids
    came in.
    """
    logits_SE = logits_SE.float()
    scores_SE = logits_SE.softmax(-1) if rule.scores == "softmax" else logits_SE.sigmoid()
    weights_SK, order_SK = scores_SE.gather(-1, ids_SK).sort(dim=-1, descending=True, stable=True)
    if rule.renormalise:
        # as DeepSeek does; elsewhere it changes no bit, unless all K scores have vanished
        weights_SK = weights_SK / (weights_SK.sum(dim=-1, keepdim=True) + 1e-20)
    if rule.scale != 1:
        weights_SK = weights_SK * rule.scale
    return weights_SK.to(dtype), ids_SK.gather(-1, order_SK)


def find_routers(model: nn.Module) -> dict[str, nn.Module]:
    """Routers by name, in depth order; ModelError for experts that no known router leads to."""
    modules = dict(model.named_modules())
    routers = {k: m for k, m in modules.items() if type(m).__name__.lower().endswith("topkrouter")}
    served = {name.rpartition(".")[0] for name in routers}
    blocks = {name.rpartition(".")[0] for name in modules if name.endswith(".experts")}
    for name in sorted(served ^ blocks):
        raise ModelError(
            f"{type(model).__name__}: {name} ({type(modules[name]).__name__}) cannot be replayed; "
            "valid: one router, of a type that ends in TopKRouter, beside one module `experts`"
        )
    return routers


def _layer_number(name: str) -> int:
    """The global layer number in a module's name, e.g. 7 in "model.layers.7.mlp.gate"."""
    return next(int(part) for part in name.split(".") if part.isdigit())


@dataclass(frozen=True)
class Asked:
    """What a router answered."""

    rule: GateRule
    num_experts: int
    top_k: int


@torch.no_grad()
def ask(name: str, router: nn.Module) -> Asked:
    """Finds a router's rule by asking it, with random weights and biases in place of its own
    (those may be zero, where rules coincide); ModelError if it follows none that replay knows.
    """
    generator = torch.Generator().manual_seed(0)
    state = dict(router.named_parameters()) | dict(router.named_buffers())
    hidden = next(router.parameters()).shape[-1]
    for key, own in state.items():
        state[key] = (torch.randn(own.shape, generator=generator) / hidden**0.5).to(own)
    hidden_SH = torch.randn(64, hidden, generator=generator).to(next(iter(state.values())))
    try:
        logits_SE, weights_SK, ids_SK = torch.func.functional_call(router, state, hidden_SH)
        shapes = logits_SE.shape, weights_SK.shape, ids_SK.shape
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ModelError(f"{name}: {type(router).__name__} cannot be replayed: {error}") from error
    scale = float(getattr(router, "routed_scaling_factor", 1.0))
    tolerance = 8 * torch.finfo(weights_SK.dtype).eps
    for scores, renormalise in product(("softmax", "sigmoid"), (True, False)):
        rule = GateRule(scores, renormalise, scale)
        expected_SK, _ = gate_weights(logits_SE, ids_SK, rule, weights_SK.dtype)
        ours_SK = weights_SK.sort(-1, descending=True).values
        if ours_SK.shape == expected_SK.shape and torch.allclose(
            ours_SK, expected_SK, rtol=tolerance, atol=0
        ):
            return Asked(rule, shapes[0][-1], shapes[2][-1])
    raise ModelError(
        f"{name}: {type(router).__name__} computes its gate weights by a rule that replay does not "
        "know; valid: softmax over all experts or sigmoid of each, at the chosen ones, "
        "renormalised or not, times routed_scaling_factor"
    )
