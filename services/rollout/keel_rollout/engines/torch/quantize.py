"""Emulates an engine of low precision: which numbers of a model are rounded, and when.

Weights of linear layers and experts are rounded once per version, as matrices of the checkpoint;
inputs at every step. Arithmetic between stays in the model's dtype. Embeddings, output layer and
norms are never rounded; routers only on request. This is how the paper's discrepancy between
engine and trainer arises on any machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from keel.rollout.v1 import rollout_service_pb2 as pb
from keel_rollout.engines.torch.rounding import FP4, FP8, Format
from keel_rollout.engines.torch.routers import RouterTap

FORMATS: dict[pb.Quantization, Format] = {pb.QUANTIZATION_FP8: FP8, pb.QUANTIZATION_FP4: FP4}
"""By `keel.rollout.v1.Quantization`."""


def quantized_weights(model: Any, tap: RouterTap, *, routers: bool) -> Iterator[str]:
    """Names of the parameters to round: linears, experts and, on request, routers."""
    output_layer = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not output_layer:
            yield f"{name}.weight"
        elif is_experts(module):
            yield f"{name}.gate_up_proj"
            yield f"{name}.down_proj"
        elif module in tap.routers and routers:
            yield f"{name}.weight"


def round_weight(form: Format, name: str, weight: torch.Tensor) -> torch.Tensor:
    """Rounds one parameter; gate and up, fused in the model, are two matrices on disk."""
    if name.endswith(".gate_up_proj"):
        return form.matrices(weight.unflatten(-2, (2, -1))).flatten(-3, -2)
    return form.matrices(weight)


def is_experts(module: nn.Module) -> bool:
    """True for transformers' fused experts: `gate_up_proj` [E, 2I, H], `down_proj` [E, H, I]."""
    return isinstance(getattr(module, "gate_up_proj", None), nn.Parameter)


def round_inputs(form: Format, model: Any, tap: RouterTap, *, routers: bool) -> None:
    """Makes every rounded layer see rounded inputs, from now on."""

    def round_first(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Any:
        return (form.rows(inputs[0]), *inputs[1:])

    output_layer = model.get_output_embeddings()
    for module in model.modules():
        shared = _SharedRounding(form)
        for child in module.children():
            if isinstance(child, nn.Linear) and child is not output_layer:
                child.register_forward_pre_hook(shared)
        if is_experts(module):
            module.register_forward_pre_hook(round_first)
            gate = module._apply_gate
            module._apply_gate = lambda x, gate=gate: form.rows(gate(x))
        elif module in tap.routers and routers:
            module.register_forward_pre_hook(round_first)


class _SharedRounding:
    """Rounds an input once for siblings that share it: q, k, v; gate, up."""

    def __init__(self, form: Format) -> None:
        self._form = form
        self._seen: torch.Tensor | None = None
        self._rounded: torch.Tensor | None = None

    def __call__(self, _module: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor | None:
        if inputs[0] is not self._seen:
            self._seen, self._rounded = inputs[0], self._form.rows(inputs[0])
        return self._rounded
