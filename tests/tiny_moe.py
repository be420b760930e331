"""The preset model, an fp8-like engine and a small world for it, for tests of the trainer.

The engine is emulated here and not taken from keel_rollout: trainer tests know no other service.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from keel_trainer.algo.objective import sft_loss
from keel_trainer.backends.torch import TorchBackend
from keel_trainer.batch import collate
from keel_trainer.router_seam import RouterSeam
from keel_trainer.sequences import TrainSequence

VOCAB, LAYERS, EXPERTS, TOP_K = 64, 2, 16, 2


def config(**changes: object) -> Qwen3MoeConfig:
    """The preset tiny-qwen3-moe."""
    values: dict[str, object] = {
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_hidden_layers": LAYERS,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
        "max_position_embeddings": 512,
    }
    return Qwen3MoeConfig(**(values | changes))


def save_model(folder: Path, seed: int = 0) -> Path:
    """A random model of the preset, written as a Hugging Face folder."""
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config()).save_pretrained(folder)
    return folder


def sequence(
    token_ids: list[int] | np.ndarray,
    prompt_length: int,
    *,
    rollout_logprobs: np.ndarray | None = None,
    routes: np.ndarray | None = None,
    reward: float = 0.0,
    valid: bool = True,
) -> TrainSequence:
    """A TrainSequence with the fields that a test does not care about filled in."""
    token_ids_T = np.asarray(token_ids, np.int32)
    response = len(token_ids_T) - prompt_length
    if rollout_logprobs is None:
        rollout_logprobs = np.full(response, -4.0)
    return TrainSequence(
        token_ids_T=token_ids_T,
        prompt_length=prompt_length,
        rollout_logprobs_R=rollout_logprobs.astype(np.float32),
        routes_TLK=routes,
        policy_versions_R=np.zeros(response, np.int64),
        reward_parts={},
        reward=reward,
        truncated=False,
        valid=valid,
        invalid_reason="" if valid else "a test says so",
        slot=0,
        sample=0,
    )


def random_sequences(count: int, seed: int = 0, *, routes: bool = True) -> list[TrainSequence]:
    """Ragged sequences of 9 to 24 random tokens with random routes."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        length, prompt = int(rng.integers(9, 25)), int(rng.integers(2, 7))
        ids = np.stack(
            [rng.permutation(EXPERTS)[:TOP_K] for _ in range((length - 1) * LAYERS)]
        ).reshape(length - 1, LAYERS, TOP_K)
        made.append(
            sequence(
                rng.integers(0, VOCAB, length),
                prompt,
                rollout_logprobs=-4.0 + 0.1 * rng.standard_normal(length - prompt),
                routes=ids.astype(np.uint8) if routes else None,
            )
        )
    return made


def _e4m3(values: Tensor) -> Tensor:
    """Round trip through e4m3 with one scale a row."""
    scale = values.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
    return (values / scale).to(torch.float8_e4m3fn).to(values.dtype) * scale


def fp8_model(model: torch.nn.Module) -> torch.nn.Module:
    """A copy that computes as an fp8 engine would: every matrix, and what enters it, coarse."""
    coarse = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in coarse.parameters():
            if parameter.dim() >= 2:
                parameter.copy_(_e4m3(parameter))
    for module in coarse.modules():
        if isinstance(module, torch.nn.Linear) or type(module).__name__.endswith(
            ("TopKRouter", "Experts")
        ):
            module.register_forward_pre_hook(lambda _, args: (_e4m3(args[0]), *args[1:]))
    return coarse


class Engine:
    """Samples from a frozen, coarse copy of a backend's model, and keeps log-probs and routes."""

    def __init__(self, backend: TorchBackend) -> None:
        # a fresh copy: the hooks of the backend's own seam stay inert in it
        self.model = fp8_model(backend.model)
        self._seam = RouterSeam(self.model)

    @torch.no_grad()
    def sample(self, prompts_NP: Tensor, new_tokens: int, seed: int) -> list[TrainSequence]:
        """One response of exactly `new_tokens` to each prompt, at temperature 1."""
        generator = torch.Generator().manual_seed(seed)
        ids_NT, fed, cache = prompts_NP, prompts_NP, None
        for _ in range(new_tokens):
            output = self.model(input_ids=fed, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            probs_NV = output.logits[:, -1].float().softmax(-1)
            fed = torch.multinomial(probs_NV, 1, generator=generator)
            ids_NT = torch.cat([ids_NT, fed], dim=1)
        # log-probs and routes of one pass over the whole: each row belongs to its log-prob
        with self._seam.routing() as routed:
            logits = self.model(input_ids=ids_NT[:, :-1], use_cache=False).logits.float()
        logprobs = logits.log_softmax(-1).gather(-1, ids_NT[:, 1:, None]).squeeze(-1)
        routes = torch.stack([routed.natural[layer] for layer in range(LAYERS)], 1)
        routes = routes.to(torch.uint8).unflatten(0, (len(ids_NT), -1))
        prompt = prompts_NP.shape[1]
        return [
            sequence(
                ids_NT[row].numpy(),
                prompt,
                rollout_logprobs=logprobs[row, prompt - 1 :].numpy(),
                routes=routes[row].numpy(),
            )
            for row in range(len(ids_NT))
        ]


def cold_start(backend: TorchBackend, demonstrations: list[TrainSequence], steps: int) -> None:
    """SFT for `steps` batches of 64, cycling through the demonstrations."""
    for step in range(steps):
        begin = step * 64 % len(demonstrations)
        micro = collate(demonstrations[begin : begin + 64])
        tokens = float(micro.tokens)
        backend.update(
            micro,
            lambda policy, micro=micro, tokens=tokens: sft_loss(
                policy, micro.mask_NT, denominator=tokens
            ),
            temperature=1.0,
        )
        backend.step(1e-3)
