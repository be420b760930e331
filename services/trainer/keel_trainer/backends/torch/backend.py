"""TorchBackend: forward, backward, AdamW and exact state, one process, CPU or one CUDA device.

One thread, same inputs: same bits. Scoring and update run the same kernels on the same shapes, so
equal weights and equal routes give equal log-probs to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging as transformers_logging

from keel.errors import IntegrityError, ModelError
from keel_trainer.backends.base import LossFn, ModelInfo, ScoreOutput, UpdateOutput
from keel_trainer.backends.torch.optimizer import MasterAdamW
from keel_trainer.batch import MicroBatch
from keel_trainer.router_seam import RouterSeam

transformers_logging.disable_progress_bar()  # a service's output is its log

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Experts run as transformers' `grouped_mm`, its default wherever a model can. Forward + backward of
# the preset, float32, one thread, 128 x 40 tokens, in thousand tokens/s: grouped_mm 41, eager 38,
# batched_mm 1.4.


class TorchBackend:
    """See `Backend`. Any causal model of transformers whose routers, if any, the seam knows.

    Example:
        backend = TorchBackend.from_pretrained(folder, dtype="float32")
        scored = backend.score(micro, temperature=1.0)
        backend.update(micro, loss_fn, temperature=1.0, routes_NTLK=scored.natural_NTLK)
        grad_norm = backend.step(learning_rate=1e-6)
    """

    def __init__(
        self,
        model: Any,
        *,
        device: str = "cpu",
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        grad_clip: float | None = 1.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        self.device = torch.device(device)
        self.model = model.to(self.device)
        # noise would make pi_old and pi_theta differ at equal weights; checkpointing asks for
        # train mode, so it is switched off module by module
        for module in self.model.modules():
            dropout = "p" if isinstance(module, nn.Dropout) else "attention_dropout"
            for noise in (dropout, "jitter_noise"):
                if hasattr(module, noise):
                    setattr(module, noise, 0.0)
        self.model.train(gradient_checkpointing)
        if gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self._seam = RouterSeam(self.model)
        self._optimizer = MasterAdamW(
            dict(self.model.named_parameters()),
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            grad_clip=grad_clip,
        )
        self.info = _model_info(self.model, self._seam)
        self._routes_dtype = torch.uint8 if self.info.num_experts <= 256 else torch.int16

    @classmethod
    def from_pretrained(
        cls, folder: Path | str, *, dtype: str = "float32", **options: Any
    ) -> TorchBackend:
        """Loads a local Hugging Face folder; never the network.

        Args:
            dtype: "float32", or "bfloat16" with float32 masters.
            options: keywords of the constructor.

        Raises:
            ModelError: no such folder, not a model, or routers that cannot be replayed.
        """
        if dtype not in DTYPES:
            raise ModelError(f"dtype: {dtype!r} is not valid; valid: {', '.join(DTYPES)}")
        if not (Path(folder) / "config.json").is_file():
            raise ModelError(f"{folder}: no config.json; valid: a Hugging Face model folder")
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=DTYPES[dtype],
                local_files_only=True,
                use_safetensors=True,  # never a pickle
                attn_implementation="sdpa",
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ModelError(f"{folder}: transformers cannot load it: {error}") from error
        return cls(model, **options)

    @torch.no_grad()
    def score(
        self, micro: MicroBatch, *, temperature: float, routes_NTLK: Tensor | None = None
    ) -> ScoreOutput:
        """See `Backend.score`."""
        with self._seam.routing(routes_NTLK, micro.routes_mask_NT) as routed:
            logits_SV = self._logits(micro, temperature)
        logprobs_S = _target_logprobs(logits_SV, micro.targets_NT[micro.mask_NT])
        return ScoreOutput(
            logprobs_NT=_scatter(logprobs_S, micro.mask_NT),
            natural_NTLK=self._stack(routed.natural, micro),
        )

    def update(
        self,
        micro: MicroBatch,
        loss_fn: LossFn,
        *,
        temperature: float,
        routes_NTLK: Tensor | None = None,
    ) -> UpdateOutput:
        """See `Backend.update`."""
        # the backward is inside: recomputed layers must find the same routes
        with self._seam.routing(routes_NTLK, micro.routes_mask_NT) as routed:
            logits_SV = self._logits(micro, temperature)
            logprobs_S = _target_logprobs(logits_SV, micro.targets_NT[micro.mask_NT])
            policy_logprobs_NT = _scatter(logprobs_S, micro.mask_NT)
            loss, stats = loss_fn(policy_logprobs_NT)
            loss.backward()
        self._optimizer.collect_gradients()
        return UpdateOutput(
            loss=loss.item(),
            stats=stats,
            policy_logprobs_NT=policy_logprobs_NT.detach(),
            entropy_NT=_scatter(_entropy(logits_SV.detach()), micro.mask_NT),
            natural_NTLK=self._stack(routed.natural, micro),
            dispatched_NTLK=self._stack(routed.dispatched, micro),
        )

    def step(self, learning_rate: float) -> float:
        """See `Backend.step`."""
        return self._optimizer.step(learning_rate)

    def reset_optimizer(self) -> None:
        """See `Backend.reset_optimizer`."""
        self._optimizer.reset()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `Backend.weights`. A tied weight comes once, under the name that is saved."""
        unique = {name for name, _ in self.model.named_parameters()}
        unique |= {name for name, _ in self.model.named_buffers()}
        state = {name: t.detach() for name, t in self.model.state_dict().items() if name in unique}
        yield from revert_weight_conversion(self.model, state).items()

    def state_dict(self) -> dict[str, Tensor]:
        """See `Backend.state_dict`."""
        state = self._optimizer.state_dict() | {"rng/cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["rng/cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See `Backend.load_state_dict`."""
        state = dict(state)
        try:
            rng = state.pop("rng/cpu")
            rng_cuda = state.pop("rng/cuda") if self.device.type == "cuda" else None
        except KeyError as error:
            raise IntegrityError(f"training state: {error} is missing") from error
        self._optimizer.load_state_dict(state)
        torch.set_rng_state(rng.cpu())
        if rng_cuda is not None:
            torch.cuda.set_rng_state(rng_cuda.cpu(), self.device)

    def save_pretrained(self, folder: Path) -> None:
        """See `Backend.save_pretrained`."""
        self.model.save_pretrained(folder)

    @torch.no_grad()
    def probe_logprobs(self, token_ids_T: Sequence[int]) -> list[float]:
        """See `Backend.probe_logprobs`."""
        ids_T = torch.tensor(token_ids_T, device=self.device)
        logits_TV = self.model(input_ids=ids_T[None, :-1], use_cache=False).logits[0].float()
        logprobs: list[float] = _target_logprobs(logits_TV, ids_T[1:]).tolist()
        return logprobs

    def _logits(self, micro: MicroBatch, temperature: float) -> Tensor:
        """float32 logits / temperature [S, V] at the S positions of micro.mask_NT.

        No attention mask is needed: padding is on the right, and attention is causal.
        """
        wanted = micro.mask_NT.any(0).nonzero()
        # columns before the first wanted one are prompt in every row: no logits for them
        first = int(wanted[0]) if len(wanted) else micro.mask_NT.shape[1] - 1
        logits_NTV = self.model(
            input_ids=micro.input_ids_NT,
            use_cache=False,
            logits_to_keep=micro.mask_NT.shape[1] - first,
        ).logits
        logits_SV: Tensor = logits_NTV[micro.mask_NT[:, first:]].float() / temperature
        return logits_SV

    def _stack(self, by_layer: dict[int, Tensor], micro: MicroBatch) -> Tensor | None:
        """[S, K] of each layer -> [N, T, L, K], compact."""
        if not self.info.is_moe:
            return None
        routes_SLK = torch.stack([by_layer[layer] for layer in range(len(by_layer))], dim=1)
        return routes_SLK.to(self._routes_dtype).unflatten(0, micro.mask_NT.shape)


def _model_info(model: Any, seam: RouterSeam) -> ModelInfo:
    text_config = model.config.get_text_config()
    return ModelInfo(
        model_type=model.config.model_type,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        vocab_size=text_config.vocab_size,
        max_positions=text_config.max_position_embeddings,
        moe_layer_numbers=seam.layer_numbers,
        num_experts=seam.num_experts,
        top_k=seam.top_k,
    )


def _target_logprobs(logits_SV: Tensor, targets_S: Tensor) -> Tensor:
    chosen_S = logits_SV.gather(-1, targets_S[:, None]).squeeze(-1)
    return chosen_S - torch.logsumexp(logits_SV, dim=-1)


def _entropy(logits_SV: Tensor) -> Tensor:
    """Nats, over the full vocabulary."""
    probs_SV = torch.softmax(logits_SV, dim=-1)
    return torch.logsumexp(logits_SV, dim=-1) - (probs_SV * logits_SV).sum(-1)


def _scatter(values_S: Tensor, mask_NT: Tensor) -> Tensor:
    """Puts values where the mask holds, 0 elsewhere; differentiable."""
    return values_S.new_zeros(mask_NT.shape).masked_scatter(mask_NT, values_S)
