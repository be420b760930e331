"""What the loop needs of a training backend, and nothing about how it is done.

A backend never decides anything about the algorithm: which routes to replay, what the loss is and
when to step all come as arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from keel_trainer.batch import MicroBatch
from keel_trainer.sequences import RouteShape

LossFn = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]
"""policy_logprobs_NT (float32, with gradient, 0 outside the fed mask) -> (loss, stats)."""


@dataclass(frozen=True)
class ModelInfo:
    """What a backend has loaded."""

    model_type: str  # as in config.json, e.g. "qwen3_moe"
    parameters: int
    vocab_size: int
    max_positions: int
    moe_layer_numbers: tuple[int, ...]  # global layer numbers, in depth order; empty: dense
    num_experts: int  # 0: dense
    top_k: int  # 0: dense

    @property
    def is_moe(self) -> bool:
        """Whether there is anything to replay."""
        return bool(self.moe_layer_numbers)

    @property
    def route_shape(self) -> RouteShape | None:
        """For `decode_sequence`; None for a dense model."""
        if not self.is_moe:
            return None
        return RouteShape(len(self.moe_layer_numbers), self.top_k, self.num_experts)


@dataclass(frozen=True)
class ScoreOutput:
    """A forward pass without gradient."""

    logprobs_NT: Tensor  # float32; 0 where the target is no response token
    natural_NTLK: Tensor | None  # the router's own top-k, live; uint8 or int16; None: dense


@dataclass(frozen=True)
class UpdateOutput:
    """A forward and backward pass, its gradients added to those before."""

    loss: float
    stats: dict[str, Tensor]  # as the loss function returned them
    policy_logprobs_NT: Tensor  # float32, detached; 0 where the target is no response token
    entropy_NT: Tensor  # float32, nats, over the full vocabulary; 0 where no response token
    natural_NTLK: Tensor | None  # the router's own top-k, live, under this pass's lower layers
    dispatched_NTLK: Tensor | None  # what arrived at the experts: the proof of obedience


class Backend(Protocol):
    """One model in training. All log-probs are float32, of softmax(logits / temperature)."""

    info: ModelInfo
    device: torch.device
    """Where micro-batches and routes must lie: `collate(..., device=backend.device)`."""

    def score(
        self, micro: MicroBatch, *, temperature: float, routes_NTLK: Tensor | None = None
    ) -> ScoreOutput:
        """Log-probs of the targets under the present weights, without gradient.

        Args:
            routes_NTLK: expert sets to use where `micro.routes_mask_NT`; elsewhere, and with None
                everywhere, the router's own. Gate weights always come from the live scores.
        """
        ...

    def update(
        self,
        micro: MicroBatch,
        loss_fn: LossFn,
        *,
        temperature: float,
        routes_NTLK: Tensor | None = None,
    ) -> UpdateOutput:
        """Forward under `routes_NTLK` (as in `score`), `loss_fn`, backward; adds up gradients."""
        ...

    def step(self, learning_rate: float) -> float:
        """One optimizer step on the gradients added up; returns their norm before clipping.

        A norm that is not finite leaves weights and optimizer untouched; gradients are dropped.
        """
        ...

    def reset_optimizer(self) -> None:
        """Forgets the optimizer's moments and step count: between cold start and recipe."""
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of a Hugging Face checkpoint, in the model's dtype, as on disk.

        The tensors may share memory with the model: copy before the next step.
        """
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """All that an exact resume needs, flat, every value a tensor: master weights, moments,
        step count, random state. Gradients are not part of it.
        """
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Goes back to `state` bit for bit; IntegrityError if it is of another model."""
        ...

    def save_pretrained(self, folder: Path) -> None:
        """Writes a folder that transformers loads: config and safetensors; no tokenizer."""
        ...

    def probe_logprobs(self, token_ids_T: Sequence[int]) -> list[float]:
        """Log-probs of tokens[1:], natural routes, temperature 1: [T - 1], to hold against an
        engine's.
        """
        ...
