"""Filters: which tokens or sequences engine and trainer disagree on too much to learn from.

Both look at pi_old / mu_old alone, the discrepancy factor of eq (5), and drop; neither weighs.
They stand beside the objective's own mask: a token counts if both keep it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class IsFilter:
    """Keeps what has pi_old / mu_old in [low, high], bounds included.

    icepop: token by token. IcePop (Ring-1T, arXiv 2510.18855): [0.5, 5].
    sequence: the geometric mean over a response decides on all of it, whatever its length.
    Geo-Mask (Liu and Li, "When Speed Kills Stability", 2025, part 3): [0.999, 1.001].

    Example:
        IsFilter("icepop", 0.5, 5.0).dropped_T(proximal_NT, rollout_NT, mask_NT)
    """

    kind: Literal["icepop", "sequence"]
    low: float
    """0 for no bound below."""
    high: float
    """math.inf for no bound above."""

    def dropped_T(self, proximal_T: Tensor, rollout_T: Tensor, mask_T: Tensor) -> Tensor:
        """Bool: the valid tokens to leave out. The last dimension runs along one sequence."""
        gap_T = (proximal_T.double() - rollout_T.double()).masked_fill(~mask_T, 0.0)
        if self.kind == "sequence":
            lengths = mask_T.sum(-1, keepdim=True).clamp(min=1)
            gap_T = (gap_T.sum(-1, keepdim=True) / lengths).expand_as(mask_T)
        low = math.log(self.low) if self.low > 0 else -math.inf
        return mask_T & ~((gap_T >= low) & (gap_T <= math.log(self.high)))
