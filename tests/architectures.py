"""A tiny model of every architecture, and its forward with forced experts, written out by hand."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from enginekit import random_model
from torch import Tensor, nn

from keel.presets import PRESETS

_QWEN3_MOE = PRESETS["tiny-qwen3-moe"].config
_DEEPSEEK = PRESETS["tiny-deepseek-v3"].config
_DENSE = {key: value for key, value in PRESETS["tiny-qwen3"].config.items() if key != "head_dim"}

SPARSE: dict[str, dict[str, Any]] = {
    "qwen3-moe": _QWEN3_MOE,
    # sparse would be layers 1, 3, 5; the others, and 3, are dense
    "qwen3-moe-mixed": {
        **(_QWEN3_MOE | {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]})
    },
    "qwen3-moe-open": _QWEN3_MOE | {"norm_topk_prob": False},
    "mixtral": PRESETS["tiny-mixtral"].config,
    "olmoe": PRESETS["tiny-olmoe"].config,
    "deepseek-v3": _DEEPSEEK,
    "deepseek-v3-lora": {
        **(_DEEPSEEK | {"q_lora_rank": 24, "norm_topk_prob": False, "rope_interleave": False})
    },
}
"""config.json of models with 2 MoE layers, 16 experts, top-2."""

MOE_LAYERS = dict.fromkeys(SPARSE, (0, 1)) | {
    "qwen3-moe-mixed": (1, 5),
    "deepseek-v3": (1, 2),
    "deepseek-v3-lora": (1, 2),
}
"""Their global layer numbers."""

DENSE: dict[str, dict[str, Any]] = {
    "qwen3": PRESETS["tiny-qwen3"].config,
    "qwen2": _DENSE | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "llama": _DENSE | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "mistral": _DENSE | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"},
}
"""config.json of models without experts."""


def tiny_model(config: Mapping[str, Any], seed: int = 0) -> Any:
    """A random float32 model with routes and distributions that are not flat.

    Selection biases are as wide as the sigmoid scores that they are added to.
    """
    model = random_model(config, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0, 0.3, generator=generator)
    return model


class ForcedBlock(nn.Module):
    """An MoE block whose experts are dictated: each token's computed one by one, no library."""

    def __init__(self, block: Any, ids_SK: Tensor, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.block, self.ids_SK, self.config = block, ids_SK, config

    def gate_weights(self, hidden_SH: Tensor) -> Tensor:
        """As the family's paper and its config have it."""
        logits_SE = hidden_SH @ self.block.gate.weight.T
        kind = self.config["model_type"]
        scores_SE = logits_SE.sigmoid() if kind == "deepseek_v3" else logits_SE.softmax(-1)
        chosen_SK = scores_SE.take_along_dim(self.ids_SK, -1)
        if kind == "mixtral" or self.config["norm_topk_prob"]:
            chosen_SK = chosen_SK / chosen_SK.sum(-1, keepdim=True)
        return chosen_SK * self.config.get("routed_scaling_factor", 1.0)

    def forward(self, hidden_NTH: Tensor) -> Tensor:
        hidden_SH = hidden_NTH.flatten(0, 1)
        weights_SK = self.gate_weights(hidden_SH)
        experts = self.block.experts
        out_SH = torch.zeros_like(hidden_SH)
        for k, ids_S in enumerate(self.ids_SK.unbind(-1)):
            both = torch.einsum("sih,sh->si", experts.gate_up_proj[ids_S], hidden_SH)
            gate, up = both.chunk(2, -1)
            inner_SI = nn.functional.silu(gate) * up
            down_SH = torch.einsum("shi,si->sh", experts.down_proj[ids_S], inner_SI)
            out_SH = out_SH + weights_SK[:, k, None] * down_SH
        if hasattr(self.block, "shared_experts"):
            out_SH = out_SH + self.block.shared_experts(hidden_SH)
        return out_SH.view_as(hidden_NTH)


def forced(model: Any, config: Mapping[str, Any], routes_NTLK: Tensor) -> Any:
    """A copy of a model whose experts are `routes_NTLK`, at every position."""
    model = copy.deepcopy(model)
    blocks = [layer for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    for place, layer in enumerate(blocks):
        ids_SK = routes_NTLK[:, :, place].flatten(0, 1).long()
        layer.mlp = ForcedBlock(layer.mlp, ids_SK, config)
    return model


def forced_gradients(model: Any) -> dict[str, Tensor]:
    """Gradients of a `forced` copy under the names of the model it was made from."""
    named = model.named_parameters()
    return {name.replace(".mlp.block.", ".mlp."): parameter.grad for name, parameter in named}
