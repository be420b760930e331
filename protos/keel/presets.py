"""Small models as data: a Hugging Face config and an alphabet. The trainer gives them weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PAD, END = "<pad>", "<end>"
"""Special tokens of every preset's tokenizer: ids 0 and 1. Padding is never trained on."""


@dataclass(frozen=True)
class Preset:
    """A model to be made from nothing."""

    config: dict[str, Any]
    """config.json."""
    alphabet: str
    """Characters of the character-level tokenizer, in id order from 2."""


_ALPHABET = "0123456789+-*/=(),.:;?! abcdefghijklmnopqrstuvwxyz\n"

PRESETS: dict[str, Preset] = {
    "tiny-qwen3-moe": Preset(
        config={
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": None,
            "decoder_sparse_step": 1,
            "eos_token_id": 1,
            "head_dim": 32,
            "hidden_act": "silu",
            "hidden_size": 128,
            "initializer_range": 0.02,
            "intermediate_size": 256,
            "max_position_embeddings": 512,
            "mlp_only_layers": [],
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
            "num_attention_heads": 4,
            "num_experts": 16,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "output_router_logits": False,
            "pad_token_id": 0,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
            "router_aux_loss_coef": 0.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": 64,
        },
        alphabet=_ALPHABET,
    ),
}
assert all(len(p.alphabet) + 2 <= p.config["vocab_size"] for p in PRESETS.values())
