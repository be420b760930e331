"""The algorithm's section of a run: [recipe]. Part of `keel.spec`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from keel import objectives
from keel.spec_base import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    across,
)

Replay = Literal["auto", "none", "R2", "R3"]


class RecipeSpec(Section):
    """[recipe]: the algorithm."""

    objective: Literal["minirl", "grpo", "cispo", "dppo"] = "minirl"
    """What is maximised, and the defaults of the switches below: docs/objectives.md. minirl is
    eq (7) of the paper. The defaults in this table are minirl's; explicit keys win."""
    replay: Replay = "auto"
    """Routing replay. auto is the paper's finding: none at N = 1, R2 at 2 and 3, R3 from 4 on."""
    off_policiness: PositiveInt = 1
    """Mini-batches (optimizer steps) a lap, N. The paper: 1, 2, 4, 8."""
    groups_per_minibatch: PositiveInt = 64
    """Prompts of one mini-batch, B. The paper: 64."""
    steps: PositiveInt
    """Optimizer steps of the whole run; a multiple of off_policiness."""
    learning_rate: PositiveFloat = 1e-6
    """Peak learning rate of AdamW. Not stated in the paper; 1e-6 is usual for 30 B models, and
    5e-4 suits the tiny preset."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up; constant afterwards."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's decoupled weight decay."""
    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.99,
    )
    """AdamW's betas."""
    adam_eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    grad_clip: PositiveFloat = 1.0
    """Largest gradient norm."""
    eps_low: Annotated[float, Field(gt=0, le=1)] = 0.2
    """A < 0: masked where pi_theta / pi_old < 1 - eps_low. The paper: 0.2. grpo: 0.2, of the clip.
    cispo: the weight is at least 1 - eps_low; 1, no bound. dppo: not used."""
    eps_high: PositiveFloat = 0.27
    """A > 0: masked where pi_theta / pi_old > 1 + eps_high. The paper: 0.27. grpo: 0.2, of the
    clip. cispo: 4, the weight is at most 1 + eps_high. dppo: not used."""
    is_cap: PositiveFloat | None = 5.0
    """The weight pi_theta / mu_old is truncated above here. The paper: 5. In JSON, null for no
    truncation. dppo: none. grpo: none, and with importance_sampling it caps pi_old / mu_old alone.
    cispo: not used."""
    importance_sampling: bool = True
    """False: ablation; the weight is pi_theta / pi_old instead. grpo and cispo: false, as in their
    papers; true brings in pi_old / mu_old."""
    clip: bool = True
    """False: ablation; nothing is masked, and cispo clips no weight."""
    divergence: Literal["tv", "kl"] = "tv"
    """dppo only: what is measured between mu_old and pi_theta, both reduced to the sampled token
    against all others. Total variation, or KL in nats."""
    divergence_threshold: PositiveFloat | None = None
    """dppo only: masked above it, if the update leads further away. Default: 0.15 with tv, 0.05
    with kl."""
    length_norm: bool = False
    """True: each response is divided by its length. An ablation of minirl; grpo: true."""
    std_norm: bool = False
    """True: advantages are divided by the group's standard deviation. An ablation of minirl; grpo
    and cispo: true."""
    is_filter: Literal["none", "icepop", "sequence"] = "none"
    """Also drops what engine and trainer disagree on, with every objective: tokens by
    pi_old / mu_old (icepop), or whole responses by its geometric mean (sequence)."""
    is_filter_low: NonNegativeFloat | None = None
    """Least ratio that is_filter keeps. Default: 0.5 with icepop, 0.999 with sequence."""
    is_filter_high: PositiveFloat | None = None
    """Largest ratio that is_filter keeps. Default: 5 with icepop, 1.001 with sequence."""

    @model_validator(mode="before")
    @classmethod
    def _objective_defaults(cls, given: Any) -> Any:
        return objectives.resolve(given) if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _switches_fit(self) -> Self:
        for key, value, valid in objectives.misfits(self):
            raise across(f"recipe.{key}", value, valid)
        return self

    @model_validator(mode="after")
    def _whole_laps(self) -> Self:
        if self.steps % self.off_policiness:
            raise across(
                "recipe.steps",
                self.steps,
                f"a multiple of recipe.off_policiness = {self.off_policiness}, such as "
                f"{self.steps + -self.steps % self.off_policiness}",
            )
        return self
