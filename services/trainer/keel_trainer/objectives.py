"""From a recipe to its loss: the one place that knows which objective takes which switches."""

from __future__ import annotations

from functools import partial
from typing import Protocol

from torch import Tensor

from keel.spec import RecipeSpec
from keel_trainer.algo.filters import IsFilter
from keel_trainer.algo.objective import Stats, minirl_loss
from keel_trainer.algo.variants import cispo_loss, dppo_loss, grpo_loss


class Objective(Protocol):
    """A loss with its switches set; arguments and returns as of `minirl_loss`."""

    def __call__(
        self,
        policy_logprobs_T: Tensor,
        proximal_logprobs_T: Tensor | None,
        rollout_logprobs_T: Tensor,
        advantages_T: Tensor,
        mask_T: Tensor,
        *,
        denominator: float,
        weights_T: Tensor | None = None,
    ) -> tuple[Tensor, Stats]: ...


def objective_of(recipe: RecipeSpec) -> Objective:
    """The loss that a recipe asks for; its two norms are in what the loss is called with."""
    match recipe.objective:
        case "minirl":
            loss = partial(
                minirl_loss,
                eps_low=recipe.eps_low,
                eps_high=recipe.eps_high,
                is_cap=recipe.is_cap,
            )
        case "grpo":
            loss = partial(
                grpo_loss,
                eps_low=recipe.eps_low,
                eps_high=recipe.eps_high,
                is_cap=recipe.is_cap,
            )
        case "cispo":
            loss = partial(cispo_loss, eps_low=recipe.eps_low, eps_high=recipe.eps_high)
        case "dppo":
            assert recipe.divergence_threshold is not None, "keel.objectives fills it in"
            loss = partial(
                dppo_loss,
                divergence=recipe.divergence,
                divergence_threshold=recipe.divergence_threshold,
                is_cap=recipe.is_cap,
            )
    return partial(
        loss,
        importance_sampling=recipe.importance_sampling,
        clip=recipe.clip,
        is_filter=_filter_of(recipe),
    )


def _filter_of(recipe: RecipeSpec) -> IsFilter | None:
    if recipe.is_filter == "none":
        return None
    assert recipe.is_filter_low is not None, "keel.objectives fills it in"
    assert recipe.is_filter_high is not None, "keel.objectives fills it in"
    return IsFilter(recipe.is_filter, recipe.is_filter_low, recipe.is_filter_high)
