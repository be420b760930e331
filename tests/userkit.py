"""What a user of Keel brings: a model folder with a chat template, and a file of prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def user_model(folder: Path, *, positions: int = 512, template: str = TEMPLATE) -> Path:
    """A Hugging Face folder: a random MoE of two layers, a token for each printable character."""
    characters = ["<pad>", "<end>", *(chr(code) for code in range(32, 127)), "\n"]
    vocabulary = {token: index for index, token in enumerate(characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<pad>", "<end>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    fast.chat_template = template or None
    fast.save_pretrained(folder)
    config = Qwen3MoeConfig(
        hidden_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_hidden_layers=2,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        vocab_size=128,
        max_position_embeddings=positions,
        eos_token_id=1,
        pad_token_id=0,
    )
    config.architectures = ["Qwen3MoeForCausalLM"]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def user_data(file: Path, rows: int = 24, *, chat: bool = True, **changes: Any) -> Path:
    """Sums as chat messages or text, with an id and a field of the user's own."""
    with file.open("w") as lines:
        for number in range(rows):
            text = f"What is {number} + {number % 7}?"
            row = {
                "prompt": [{"role": "user", "content": text}] if chat else text,
                "answer": str(number + number % 7),
                "id": f"sum-{number}",
                "level": number % 3,
            }
            lines.write(json.dumps(row | changes) + "\n")
    return file
