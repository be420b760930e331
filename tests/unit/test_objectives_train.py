"""Every objective and filter trains the preset through `steps.update`, off-policy, under R2."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_moe
import torch
from objective_forms import draw, gradient, same

from keel.spec import RecipeSpec
from keel_trainer import steps
from keel_trainer.algo.advantage import group_advantages
from keel_trainer.algo.filters import IsFilter
from keel_trainer.algo.objective import loss_denominator, minirl_loss
from keel_trainer.algo.replay import replay_plan
from keel_trainer.algo.variants import cispo_loss, dppo_loss, grpo_loss
from keel_trainer.backends.torch import TorchBackend
from keel_trainer.batch import collate
from keel_trainer.objectives import objective_of

N, GROUPS, GROUP_SIZE, RESPONSE = 2, 4, 8, 6
WANTED = 8
"""Tokens with ids below this are rewarded: 1 in 8 at first."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_moe.save_model(tmp_path_factory.mktemp("model"))


def recipe_with(**switches: object) -> RecipeSpec:
    return RecipeSpec.model_validate(
        {"steps": 2 * N, "off_policiness": N, "groups_per_minibatch": GROUPS, "learning_rate": 2e-3}
        | switches
    )


def sample_lap(
    backend: TorchBackend, recipe: RecipeSpec, seed: int
) -> tuple[float, list[steps.MiniBatch]]:
    """Samples N mini-batches from a coarse copy of the model; returns mean reward and them."""
    prompts = np.random.default_rng(seed).integers(0, 64, (N * GROUPS, 3)).repeat(GROUP_SIZE, 0)
    sampled = tiny_moe.Engine(backend).sample(torch.from_numpy(prompts), RESPONSE, seed)
    rewards = torch.tensor(
        [(sequence.token_ids_T[-RESPONSE:] < WANTED).mean() for sequence in sampled]
    )
    groups = torch.arange(N * GROUPS).repeat_interleave(GROUP_SIZE)
    advantages = group_advantages(rewards, groups, std_norm=recipe.std_norm)
    size = GROUPS * GROUP_SIZE
    minibatches = [
        steps.MiniBatch(
            micros=[
                collate(sampled[i : i + size // 2], advantages[i : i + size // 2])
                for i in (begin, begin + size // 2)
            ],
            denominator=loss_denominator(
                groups=GROUPS,
                group_size=GROUP_SIZE,
                max_tokens=RESPONSE,
                length_norm=recipe.length_norm,
            ),
            temperature=1.0,
            engines=[[""] * (size // 2)] * 2,
            row={},
            generate_s=0.0,
        )
        for begin in range(0, N * size, size)
    ]
    return rewards.mean().item(), minibatches


def train(folder: Path, recipe: RecipeSpec, laps: int) -> tuple[list[float], list[steps.Row]]:
    torch.set_num_threads(1)
    backend = TorchBackend.from_pretrained(folder)
    plan = replay_plan(recipe.replay, off_policiness=N, moe=True)
    rewards, rows, step = [], [], 0
    for number in range(laps):
        reward, minibatches = sample_lap(backend, recipe, seed=number)
        rewards.append(reward)
        for minibatch in minibatches:
            steps.score(backend, minibatch, plan)
        for minibatch in minibatches:
            rows.append(steps.update(backend, minibatch, plan, recipe, step=step))
            step += 1
    return rewards, rows


@pytest.mark.parametrize(
    "switches",
    [
        {"objective": "minirl"},
        {"objective": "grpo"},
        {"objective": "cispo"},
        {"objective": "dppo"},
        {"objective": "dppo", "divergence": "kl"},
        {"objective": "grpo", "importance_sampling": True, "is_filter": "icepop"},
        {"is_filter": "sequence", "is_filter_low": 0.995, "is_filter_high": 1.005},
    ],
    ids=lambda switches: " ".join(str(value) for value in switches.values()),
)
def test_it_learns(folder, switches):
    """From 0.1 to 0.45 and more in 8 laps."""
    rewards, rows = train(folder, recipe_with(**switches), laps=8)
    assert rewards[0] == pytest.approx(0.125, abs=0.03)
    assert rewards[-1] > 0.4
    assert all(row["grad_norm"] > 0 and row["tokens/trained"] == 192 for row in rows)
    dropped = [key for key in rows[0] if key.startswith("is/dropped/")]
    assert dropped == [f"is/dropped/{switches[key]}" for key in switches if key == "is_filter"]
    if switches.get("is_filter") == "sequence":
        assert 0 < max(row["is/dropped/sequence"] for row in rows) < 1


BOUNDS = {"is_filter_low": 0.9, "is_filter_high": 1.2}


@pytest.mark.parametrize(
    ("switches", "loss_fn", "keywords"),
    [
        ({}, minirl_loss, {}),
        (
            {"eps_low": 0.1, "eps_high": 0.3, "is_cap": 1.1, "clip": False},
            minirl_loss,
            {"eps_low": 0.1, "eps_high": 0.3, "is_cap": 1.1, "clip": False},
        ),
        (
            {"importance_sampling": False, "is_filter": "icepop"} | BOUNDS,
            minirl_loss,
            {"importance_sampling": False, "is_filter": IsFilter("icepop", 0.9, 1.2)},
        ),
        ({"objective": "grpo"}, grpo_loss, {}),
        (
            {"objective": "grpo", "importance_sampling": True, "is_cap": 1.1, "eps_low": 0.1},
            grpo_loss,
            {"importance_sampling": True, "is_cap": 1.1, "eps_low": 0.1},
        ),
        ({"objective": "cispo"}, cispo_loss, {}),
        (
            {"objective": "cispo", "eps_low": 0.1, "eps_high": 0.1, "importance_sampling": True},
            cispo_loss,
            {"eps_low": 0.1, "eps_high": 0.1, "importance_sampling": True},
        ),
        ({"objective": "dppo"}, dppo_loss, {}),
        (
            {"objective": "dppo", "divergence": "kl", "is_cap": 1.1},
            dppo_loss,
            {"divergence": "kl", "divergence_threshold": 0.05, "is_cap": 1.1},
        ),
        (
            {"objective": "dppo", "divergence_threshold": 0.01, "is_filter": "sequence"} | BOUNDS,
            dppo_loss,
            {"divergence_threshold": 0.01, "is_filter": IsFilter("sequence", 0.9, 1.2)},
        ),
    ],
)
def test_every_switch_of_a_recipe_reaches_its_loss(switches, loss_fn, keywords):
    policy, *rest = draw(4)
    weights = torch.rand(policy.shape)
    ours = gradient(objective_of(recipe_with(**switches)), policy, *rest, weights_T=weights)
    same(ours, gradient(loss_fn, policy, *rest, weights_T=weights, **keywords))
