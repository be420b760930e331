"""Emulates an fp8 engine: numbers round-tripped through e4m3 with block scales.

Weights of linear layers and experts are rounded in blocks of 128 x 128 of the matrix as the
checkpoint has it, once per version; inputs in blocks of 1 x 128, at every step. Arithmetic between
stays in the model's dtype. Embeddings, output layer and norms are never rounded; routers only on
request. This is how the paper's discrepancy between engine and trainer arises on any machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from keel_rollout.engines.torch.routers import RouterTap

BLOCK = 128
E4M3_MAX = 448.0
_SMALLEST_NORMAL = 2.0**-6
_EXPONENT_BITS = 0x7F800000
_MAGIC = 1.5 * 2.0**20
"""Adding and taking away 1.5 * 2^20 * 2^e rounds a float32 to a multiple of 2^(e-3): 3 bits."""


def round_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Equals `x.to(torch.float8_e4m3fn).float()` bit for bit for float32 |x| <= 448.

    Five vectorised passes; torch's cast back from fp8 is a scalar loop on a CPU, 4 times slower.
    """
    exponent = x.abs().clamp_(min=_SMALLEST_NORMAL).view(torch.int32)
    magic = exponent.bitwise_and_(_EXPONENT_BITS).view(torch.float32).mul_(_MAGIC)
    return torch.add(x, magic).sub_(magic)


def round_rows(x: torch.Tensor) -> torch.Tensor:
    """Rounds activations in blocks of 1 x 128 along the last dimension, scale = absmax / 448."""
    width = x.shape[-1]
    blocks = functional.pad(x, (0, -width % BLOCK)) if width > BLOCK else x
    blocks = blocks.float().unflatten(-1, (-1, min(BLOCK, width)))
    scale = _scale(blocks.abs().amax(-1, keepdim=True))
    rounded = round_e4m3(blocks / scale).mul_(scale).flatten(-2)
    return rounded[..., :width].to(x.dtype)


def round_matrices(w: torch.Tensor) -> torch.Tensor:
    """Rounds matrices [..., rows, columns] in blocks of 128 x 128, scale = absmax / 448."""
    rows, columns = w.shape[-2:]
    padded = functional.pad(w.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    scale = _scale(blocks.abs().amax((-3, -1), keepdim=True))
    rounded = (round_e4m3(blocks / scale) * scale).flatten(-2).flatten(-3, -2)
    return rounded[..., :rows, :columns].to(w.dtype)


def _scale(absmax: torch.Tensor) -> torch.Tensor:
    return absmax.div_(E4M3_MAX).clamp_(min=torch.finfo(torch.float32).tiny)


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


def round_weight(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Rounds one parameter; gate and up, fused in the model, are two matrices on disk."""
    if name.endswith(".gate_up_proj"):
        return round_matrices(weight.unflatten(-2, (2, -1))).flatten(-3, -2)
    return round_matrices(weight)


def is_experts(module: nn.Module) -> bool:
    """True for transformers' fused experts: `gate_up_proj` [E, 2I, H], `down_proj` [E, H, I]."""
    return isinstance(getattr(module, "gate_up_proj", None), nn.Parameter)


def round_inputs(model: Any, tap: RouterTap, *, routers: bool) -> None:
    """Makes every rounded layer see rounded inputs, from now on."""
    output_layer = model.get_output_embeddings()
    for module in model.modules():
        linears = [
            child
            for child in module.children()
            if isinstance(child, nn.Linear) and child is not output_layer
        ]
        shared = _SharedRounding()
        for linear in linears:
            linear.register_forward_pre_hook(shared)
        if is_experts(module):
            module.register_forward_pre_hook(_round_first)
            gate = module._apply_gate
            module._apply_gate = lambda x, gate=gate: round_rows(gate(x))
        elif module in tap.routers and routers:
            module.register_forward_pre_hook(_round_first)


def _round_first(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (round_rows(inputs[0]), *inputs[1:])


class _SharedRounding:
    """Rounds an input once for siblings that share it: q, k, v; gate, up."""

    def __init__(self) -> None:
        self._seen: torch.Tensor | None = None
        self._rounded: torch.Tensor | None = None

    def __call__(self, _module: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor | None:
        if inputs[0] is not self._seen:
            self._seen, self._rounded = inputs[0], round_rows(inputs[0])
        return self._rounded
