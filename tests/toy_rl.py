"""A whole lap in one function: engine, scoring pass, N updates. For tests of the mechanism.

The task: digits in, their running sums modulo 10 out; reward is the share of right digits. Demos
have 12 % wrong digits, so that the cold start leaves something to learn.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tiny_moe
import torch

from keel_trainer.algo.advantage import group_advantages
from keel_trainer.algo.objective import loss_denominator, minirl_loss
from keel_trainer.algo.replay import replay_plan
from keel_trainer.backends.torch import TorchBackend
from keel_trainer.batch import collate
from keel_trainer.diagnostics import metrics, replay_stats

DIGITS, EQUALS = 4, 10
GROUPS, GROUP_SIZE = 32, 8  # mini-batch of 256 responses


def problems(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts [count, DIGITS + 1] and right answers [count, DIGITS]."""
    digits = rng.integers(0, 10, (count, DIGITS))
    prompts = np.concatenate([digits, np.full((count, 1), EQUALS)], axis=1)
    return prompts, np.cumsum(digits, axis=1) % 10


def cold_started(folder: Path, seed: int) -> Path:
    """Trains a random preset model for 400 batches of 64 demonstrations; returns its folder."""
    torch.set_num_threads(1)
    backend = TorchBackend.from_pretrained(tiny_moe.save_model(folder / f"random-{seed}", seed))
    rng = np.random.default_rng(seed)
    prompts, answers = problems(rng, 64 * 400)
    wrong = rng.random(answers.shape) < 0.12
    answers = np.where(wrong, rng.integers(0, 10, answers.shape), answers)
    whole = np.concatenate([prompts, answers], axis=1)
    tiny_moe.cold_start(backend, [tiny_moe.sequence(row, DIGITS + 1) for row in whole], steps=400)
    backend.save_pretrained(folder / f"started-{seed}")
    return folder / f"started-{seed}"


def staleness_by_lap(
    start: Path, replay: str, seed: int, *, off_policiness: int, laps: int, learning_rate: float
) -> list[float]:
    """In-step staleness/k3 of each lap: the maximum over its steps."""
    torch.set_num_threads(1)
    backend = TorchBackend.from_pretrained(start)
    plan = replay_plan(replay, off_policiness=off_policiness, moe=True)
    rng = np.random.default_rng(1000 + seed)
    denominator = loss_denominator(groups=GROUPS, group_size=GROUP_SIZE, max_tokens=DIGITS)
    mini_batch = GROUPS * GROUP_SIZE
    steps, maxima = 0, []
    for lap in range(laps):
        prompts, answers = (
            np.repeat(rows, GROUP_SIZE, axis=0) for rows in problems(rng, off_policiness * GROUPS)
        )
        sequences = tiny_moe.Engine(backend).sample(
            torch.from_numpy(prompts), DIGITS, seed * 1000 + lap
        )
        sampled = np.stack([sequence.token_ids_T[-DIGITS:] for sequence in sequences])
        advantages = group_advantages(
            torch.from_numpy((sampled == answers).mean(1)),
            torch.arange(off_policiness * GROUPS).repeat_interleave(GROUP_SIZE),
        )
        micros = [
            collate(sequences[begin : begin + mini_batch], advantages[begin : begin + mini_batch])
            for begin in range(0, len(sequences), mini_batch)
        ]
        scored = [
            backend.score(
                micro,
                temperature=1.0,
                routes_NTLK=plan.select(
                    plan.scoring, recorded=None, engine=micro.engine_routes_NTLK
                ),
            )
            for micro in micros
        ]
        staleness = []
        for micro, score in zip(micros, scored, strict=True):
            routes = plan.select(
                plan.update, recorded=score.natural_NTLK, engine=micro.engine_routes_NTLK
            )
            output = backend.update(
                micro,
                lambda policy, micro=micro, score=score: minirl_loss(
                    policy,
                    score.logprobs_NT,
                    micro.rollout_logprobs_NT,
                    micro.advantages_NT,
                    micro.mask_NT,
                    denominator=denominator,
                ),
                temperature=1.0,
                routes_NTLK=routes,
            )
            steps += 1
            backend.step(learning_rate * min(1.0, steps / 10))
            staleness.append(metrics(output.stats)["staleness/k3"])
            if routes is not None:
                row = metrics(replay_stats(routes, output.dispatched_NTLK, micro.routes_mask_NT))
                assert row["replay/rows_obeyed"] == row["replay/rows_requested"] > 0
        maxima.append(max(staleness))
    return maxima
