"""AdamW on float32 master weights, whatever the model's own precision."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from keel.errors import IntegrityError

_ADAMW_KEYS = ("step", "exp_avg", "exp_avg_sq")


class MasterAdamW:
    """Gradients add up in float32, AdamW steps in float32, the model gets the rounded result.

    For a float32 model the masters are its own parameters. Weight decay falls on matrices only, not
    on norms, as is usual. State is exact and flat: see `state_dict`.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        grad_clip: float | None,
    ) -> None:
        self._parameters = parameters
        self._masters = {
            name: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())
            for name, p in parameters.items()
        }
        self._grad_clip = grad_clip
        masters = list(self._masters.values())
        self._adamw = torch.optim.AdamW(
            [
                {"params": [m for m in masters if m.dim() >= 2], "weight_decay": weight_decay},
                {"params": [m for m in masters if m.dim() < 2], "weight_decay": 0.0},
            ],
            betas=betas,
            eps=eps,
            fused=True,
        )

    def collect_gradients(self) -> None:
        """Moves the model's gradients into the masters; call after every backward."""
        for name, parameter in self._parameters.items():
            master = self._masters[name]
            if master is parameter or parameter.grad is None:
                continue
            gradient = parameter.grad.float()
            master.grad = gradient if master.grad is None else master.grad + gradient
            parameter.grad = None

    def step(self, learning_rate: float) -> float:
        """Clips, steps, drops the gradients; returns the norm before clipping.

        A norm that is not finite changes nothing else.
        """
        gradients = [m.grad for m in self._masters.values() if m.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if math.isfinite(norm.item()):
            if self._grad_clip is not None:
                torch.nn.utils.clip_grads_with_norm_(self._masters.values(), self._grad_clip, norm)
            for group in self._adamw.param_groups:
                group["lr"] = learning_rate
            self._adamw.step()
            self._publish()
        self._adamw.zero_grad(set_to_none=True)
        return norm.item()

    def reset(self) -> None:
        """Forgets moments and step count, as before the first step; the weights stay."""
        self._adamw.state.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """`master/NAME`, and from the first step on `exp_avg/NAME`, `exp_avg_sq/NAME`, `step/NAME`.

        Copies: later steps do not change them.
        """
        state: dict[str, Tensor] = {}
        for name, master in self._masters.items():
            state[f"master/{name}"] = master.detach().clone()
            for key in _ADAMW_KEYS:
                if key in self._adamw.state[master]:
                    state[f"{key}/{name}"] = self._adamw.state[master][key].clone()
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Goes back to `state` bit for bit; IntegrityError, and no change, if it does not fit."""
        if misfits := self._misfits(state):
            raise IntegrityError(f"training state does not fit this model: {misfits[:5]}")
        self._adamw.zero_grad(set_to_none=True)
        for name, master in self._masters.items():
            master.copy_(state[f"master/{name}"])
            self._adamw.state[master] = {
                key: state[f"{key}/{name}"].to(master.device, copy=True)
                for key in _ADAMW_KEYS
                if f"{key}/{name}" in state
            }
        self._publish()

    def _misfits(self, state: dict[str, Tensor]) -> list[str]:
        """Keys that are missing, unknown, or of another shape or precision."""
        shapes: dict[str, torch.Size] = {}
        for name, master in self._masters.items():
            shapes[f"master/{name}"] = master.shape
            if any(f"{key}/{name}" in state for key in _ADAMW_KEYS):
                shapes[f"step/{name}"] = torch.Size()
                shapes[f"exp_avg/{name}"] = shapes[f"exp_avg_sq/{name}"] = master.shape
        return sorted(
            key
            for key in shapes.keys() | state.keys()
            if key not in shapes
            or key not in state
            or state[key].shape != shapes[key]
            or state[key].dtype != torch.float32
        )

    @torch.no_grad()
    def _publish(self) -> None:
        """Rounds the masters into the model."""
        for name, parameter in self._parameters.items():
            if self._masters[name] is not parameter:
                parameter.copy_(self._masters[name])
