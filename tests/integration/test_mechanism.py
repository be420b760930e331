"""The paper's mechanism on the tiny model: replaying routes cuts staleness."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product

import numpy as np
import toy_rl

SEEDS, MODES = (0, 1, 2), ("none", "R2", "R3")


def test_replay_cuts_in_step_staleness_five_fold(tmp_path):
    """N = 8, learning rate 1e-3, 20 laps, 3 seeds, an engine in e4m3, real samples and updates.

    Without replay a lap's median is about twice that of R2 or R3, and now and then an expert that
    flips between two steps makes a token's ratio explode: the mean is what those laps make of it.
    Means by seed: none 2.63, 4.57, 1.25; R2 0.51, 0.31, 0.44; R3 0.33, 0.34, 0.39. Over the seeds
    that is 6.6 and 8.0 times less; the five-fold claim is about that mean. One seed alone does not
    always show it (seed 2: 2.8 and 3.2), which is why each is held only to a factor of two.
    Every run is a process of one thread, so that the numbers do not depend on how many run at once.
    """
    workers = min(os.cpu_count() or 1, 9)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        starts = dict(
            zip(SEEDS, pool.map(partial(toy_rl.cold_started, tmp_path), SEEDS), strict=True)
        )
        runs = {
            (mode, seed): pool.submit(
                toy_rl.staleness_by_lap,
                starts[seed],
                mode,
                seed,
                off_policiness=8,
                laps=20,
                learning_rate=1e-3,
            )
            for seed, mode in product(SEEDS, MODES)
        }
        mean = {key: float(np.mean(run.result())) for key, run in runs.items()}
    over_seeds = {mode: np.mean([mean[mode, seed] for seed in SEEDS]) for mode in MODES}
    assert over_seeds["none"] >= 5 * over_seeds["R2"], mean
    assert over_seeds["none"] >= 5 * over_seeds["R3"], mean
    for seed, mode in product(SEEDS, ("R2", "R3")):
        assert mean["none", seed] > 2 * mean[mode, seed], mean
