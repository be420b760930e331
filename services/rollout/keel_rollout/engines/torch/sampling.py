"""Draws tokens. A draw depends on (seed, sample, position) and the token's distribution alone.

The random number is counter-based, so that neither batch nor time changes it; the token is found
by inverting the cumulative distribution in float64.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64 (Steele, Lea and Flood 2014): one step and its finaliser."""
    z = z + _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def stream_keys(seed: int, samples: int) -> npt.NDArray[np.uint64]:
    """One key for each of a group's samples."""
    with np.errstate(over="ignore"):
        return _mix(_mix(np.full(samples, seed, np.uint64)) ^ np.arange(samples, dtype=np.uint64))


def uniforms(
    keys_B: npt.NDArray[np.uint64], positions_B: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Uniform in [0, 1), one for each (key, position).

    52 bits: the product with a total mass in float64 is then always below that total.
    """
    with np.errstate(over="ignore"):
        z_B = _mix(keys_B ^ _mix(positions_B.astype(np.uint64)))
    return (z_B >> np.uint64(12)).astype(np.float64) * 2.0**-52


class Temperatures:
    """Sampling parameters of the rows of a batch, as tensors on the model's device."""

    def __init__(
        self,
        temperature_B: npt.NDArray[np.float32],
        top_p_B: npt.NDArray[np.float32],
        top_k_B: npt.NDArray[np.int64],
        device: torch.device,
    ) -> None:
        greedy_B = temperature_B == 0
        divisor_B = np.where(greedy_B, np.float32(1), temperature_B)
        self.divisor_B1 = (
            None if (divisor_B == 1).all() else torch.from_numpy(divisor_B[:, None]).to(device)
        )
        self.greedy_B = torch.from_numpy(greedy_B).to(device) if greedy_B.any() else None
        truncated = bool(((top_p_B < 1) | (top_k_B > 0)).any())
        self.top_p_B1 = torch.from_numpy(top_p_B[:, None]).to(device) if truncated else None
        self.top_k_B1 = torch.from_numpy(top_k_B[:, None]).to(device) if truncated else None


def draw(
    logits_BV: torch.Tensor, uniform_B: torch.Tensor, how: Temperatures
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B] int64 and their log-probs [B] float32, natural.

    Log-probs are of softmax(logits / temperature) over the full vocabulary, truncation or not; at
    temperature 0 the token is the likeliest and the log-prob is at temperature 1.
    """
    logits_BV = logits_BV.float()
    if how.divisor_B1 is not None:
        logits_BV = logits_BV / how.divisor_B1
    logprobs_BV = torch.log_softmax(logits_BV, dim=-1)
    mass_BV = logprobs_BV.double().exp_()
    if how.top_p_B1 is not None and how.top_k_B1 is not None:
        mass_BV = _truncate(mass_BV, how.top_p_B1, how.top_k_B1)
    cumulative_BV = mass_BV.cumsum(-1)
    threshold_B1 = (uniform_B * cumulative_BV[:, -1]).unsqueeze(-1)
    # right=True: the first token whose cumulative mass exceeds the threshold, so never one of mass
    # 0. The clamp matters only where logits are not finite: such a rollout is data, not a crash.
    token_B = torch.searchsorted(cumulative_BV, threshold_B1, right=True).squeeze(-1)
    token_B = token_B.clamp_(max=logits_BV.shape[-1] - 1)
    if how.greedy_B is not None:
        token_B = torch.where(how.greedy_B, logits_BV.argmax(-1), token_B)
    return token_B, logprobs_BV.gather(-1, token_B.unsqueeze(-1)).squeeze(-1)


def _truncate(
    mass_BV: torch.Tensor, top_p_B1: torch.Tensor, top_k_B1: torch.Tensor
) -> torch.Tensor:
    """Mass of the k likeliest tokens, and of those the fewest whose share reaches top_p."""
    sorted_BV, order_BV = mass_BV.sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(mass_BV.shape[-1], device=mass_BV.device)
    sorted_BV = sorted_BV.masked_fill((top_k_B1 > 0) & (rank_V >= top_k_B1), 0)
    before_BV = sorted_BV.cumsum(-1) - sorted_BV
    nucleus_B1 = top_p_B1 * sorted_BV.sum(-1, keepdim=True)
    sorted_BV = sorted_BV.masked_fill((before_BV >= nucleus_B1) & (rank_V > 0), 0)
    return torch.zeros_like(mass_BV).scatter_(-1, order_BV, sorted_BV)
