"""Routing replay, eq (6): which routes each pass uses, and how sets of experts compare.

R2 replays in every update the routes that the scoring pass recorded (e^pi_old). R3 replays the
engine's routes (e^mu_old) in the scoring pass and in every update. Evaluation, reference and SFT
passes never replay. Backends only obey, through an argument.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

MODES = ("auto", "none", "R2", "R3")
"""What a recipe may ask for."""


class RouteSource(Enum):
    """Where the expert sets of one pass come from."""

    NATURAL = "natural"
    """The router's own top-k, live."""
    RECORDED = "recorded"
    """The natural routes of this lap's scoring pass: e^pi_old."""
    ENGINE = "engine"
    """The routes that came with the rollout: e^mu_old."""


@dataclass(frozen=True)
class ReplayPlan:
    """Which routes each pass of a lap uses.

    Example:
        replay_plan("auto", off_policiness=4, moe=True)
        -> ReplayPlan(mode="R3", scoring=RouteSource.ENGINE, update=RouteSource.ENGINE)
    """

    mode: str
    """One of "none", "R2", "R3": what "auto" came to."""
    scoring: RouteSource | None
    """Of the scoring pass; None where there is none (N = 1: pi_old = sg[pi_theta])."""
    update: RouteSource
    """Of every update of the lap."""

    @property
    def needs_engine_routes(self) -> bool:
        """Whether rollouts without valid routes are of no use."""
        return self.update is RouteSource.ENGINE

    def select(
        self, source: RouteSource, *, recorded: Tensor | None, engine: Tensor | None
    ) -> Tensor | None:
        """The routes to hand to a backend for `source`; None means natural routes."""
        if source is RouteSource.NATURAL:
            return None
        routes = recorded if source is RouteSource.RECORDED else engine
        assert routes is not None, f"{source.value} routes are needed and were not given"
        return routes


def resolve_replay(replay: str, *, off_policiness: int, moe: bool) -> str:
    """Returns "none", "R2" or "R3".

    "auto" is the paper's finding: none for N = 1 or a dense model, R2 for N = 2 and 3, R3 from
    N = 4 on. R2 at N = 1 is none: there the recorded routes are the natural ones.

    Raises:
        ValueError: an unknown mode, N < 1, or R2 or R3 asked of a dense model.
    """
    if replay not in MODES:
        raise ValueError(f"replay: {replay!r} is not valid; valid: {', '.join(MODES)}")
    if off_policiness < 1:
        raise ValueError(f"off_policiness: {off_policiness} is not valid; valid: 1 and above")
    if replay == "auto":
        if not moe or off_policiness == 1:
            return "none"
        return "R2" if off_policiness < 4 else "R3"
    if replay != "none" and not moe:
        raise ValueError(f"replay: {replay!r} is not valid for a dense model; valid: auto, none")
    if replay == "R2" and off_policiness == 1:
        return "none"
    return replay


def replay_plan(replay: str, *, off_policiness: int, moe: bool) -> ReplayPlan:
    """The plan for one run; see `resolve_replay` for the arguments and errors."""
    mode = resolve_replay(replay, off_policiness=off_policiness, moe=moe)
    scoring, update = {
        "none": (RouteSource.NATURAL, RouteSource.NATURAL),
        "R2": (RouteSource.NATURAL, RouteSource.RECORDED),
        "R3": (RouteSource.ENGINE, RouteSource.ENGINE),
    }[mode]
    return ReplayPlan(mode, scoring if off_policiness > 1 else None, update)


@dataclass(frozen=True)
class RouteComparison:
    """Counts of agreement between two sets of routes; they add up over micro-batches."""

    pairs: Tensor
    """(token, layer) pairs compared."""
    pairs_equal: Tensor
    """Pairs with equal expert sets."""
    pairs_equal_L: Tensor
    """The same, layer by layer."""
    tokens: Tensor
    """Tokens compared."""
    tokens_equal: Tensor
    """Tokens with equal sets in every layer."""
    experts_shared: Tensor
    """Sum over pairs of |intersection|; overlap is this / (pairs * K)."""
    experts: Tensor
    """pairs * K."""


def compare_routes(a_NTLK: Tensor, b_NTLK: Tensor, mask_NT: Tensor) -> RouteComparison:
    """Compares expert *sets* where the mask holds; the order of the K ids plays no part.

    Args:
        a_NTLK, b_NTLK: distinct expert ids, same shape; any integer dtype.
        mask_NT: bool; which positions to compare.
    """
    a_SLK, b_SLK = a_NTLK[mask_NT].long(), b_NTLK[mask_NT].long()
    shared_SL = (a_SLK[..., :, None] == b_SLK[..., None, :]).any(-1).sum(-1)
    top_k = a_SLK.shape[-1]
    equal_SL = shared_SL == top_k
    pairs = torch.tensor(float(equal_SL.numel()), dtype=torch.float64)
    pairs_equal_L = equal_SL.sum(0).double()
    return RouteComparison(
        pairs=pairs,
        pairs_equal=pairs_equal_L.sum(),
        pairs_equal_L=pairs_equal_L,
        tokens=torch.tensor(float(equal_SL.shape[0]), dtype=torch.float64),
        tokens_equal=equal_SL.all(-1).sum().double(),
        experts_shared=shared_SL.sum().double(),
        experts=pairs * top_k,
    )
