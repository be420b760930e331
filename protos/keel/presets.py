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

    @property
    def experts(self) -> int:
        """Routed experts of an MoE layer, by whichever name its family has for them; 0: dense."""
        names = ("num_experts", "num_local_experts", "n_routed_experts")
        return next((self.config[name] for name in names if name in self.config), 0)


_ALPHABET = "0123456789+-*/=(),.:;?! abcdefghijklmnopqrstuvwxyz\n"

_COMMON: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 256,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 64,
}
_SPARSE: dict[str, Any] = {
    "num_experts_per_tok": 2,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.0,
}
_QWEN3: dict[str, Any] = {"head_dim": 32, "sliding_window": None, "use_sliding_window": False}

_CONFIGS: dict[str, dict[str, Any]] = {
    "tiny-qwen3-moe": {
        **(_COMMON | _SPARSE | _QWEN3),
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "num_experts": 16,
    },
    "tiny-mixtral": {
        **(_COMMON | _SPARSE),
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "head_dim": 32,
        "intermediate_size": 64,  # of an expert
        "num_local_experts": 16,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
    },
    "tiny-olmoe": {
        **(_COMMON | _SPARSE),
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "clip_qkv": None,
        "intermediate_size": 64,  # of an expert
        "norm_topk_prob": False,
        "num_experts": 16,
        "num_key_value_heads": 4,
    },
    "tiny-deepseek-v3": {
        **(_COMMON | _SPARSE),
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "first_k_dense_replace": 1,
        "kv_lora_rank": 32,
        "moe_intermediate_size": 64,
        "n_group": 4,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": None,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "rope_interleave": True,
        "routed_scaling_factor": 2.5,
        "topk_group": 2,
        "v_head_dim": 32,
    },
    "tiny-qwen3": {
        **(_COMMON | _QWEN3),
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
    },
}

PRESETS: dict[str, Preset] = {name: Preset(config, _ALPHABET) for name, config in _CONFIGS.items()}
assert all(len(p.alphabet) + 2 <= p.config["vocab_size"] for p in PRESETS.values())
