"""A batch of rows that join, grow, move to new weights and leave, against plain forwards."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from enginekit import CONFIG, FLOAT32, forward, random_model

from keel_rollout.engines.base import Finished, GroupRequest, Piece
from keel_rollout.engines.torch.batch import Batch, Job
from keel_rollout.engines.torch.model import Model


def loaded(model: Any) -> Model:
    """An engine's model with the weights of a plain one."""
    made = Model({"config.json": json.dumps(CONFIG).encode()}, FLOAT32, torch.device("cpu"))
    made.apply(model.state_dict())
    return made


def job(seed: int, prompt: list[int], *, samples: int = 2, max_tokens: int = 30) -> Job:
    request = GroupRequest(
        slot=seed,
        prompt_P=np.array(prompt, np.int32),
        num_samples=samples,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_tokens=max_tokens,
        stop_token_ids=(1, 2),
        seed=seed,
        with_routes=True,
    )
    return Job(request, sink=None)


def test_rows_that_come_and_go_for_long_stay_right() -> None:
    """70 joins at odd moments, prompts of 1 to 120 tokens: padding is trimmed, rows reused."""
    plain = random_model(seed=1)
    rng = np.random.default_rng(0)
    found: dict[tuple[int, int], list[Piece]] = {}
    prompts: dict[int, list[int]] = {}
    longest = 0
    with torch.inference_mode():
        batch = Batch(loaded(plain), version=0)
        seed = 0
        while seed < 70 or len(batch):
            if seed < 70 and (not len(batch) or rng.random() < 0.3):
                prompts[seed] = rng.integers(3, 64, rng.choice([1, 2, 9, 120])).tolist()
                batch.add([job(seed, prompts[seed])])
                seed += 1
            for owner, event in batch.step():
                if isinstance(event, Piece):
                    found.setdefault((owner.request.seed, event.sample), []).append(event)
                else:
                    assert isinstance(event, Finished)
            longest = max(longest, batch.cache.length)
    assert longest < 300, "common padding must be dropped"
    assert len(found) == 140
    for (owner_seed, _), (piece,) in found.items():
        prompt = prompts[owner_seed]
        expected = forward(plain, prompt + piece.token_ids_T.tolist())[len(prompt) - 1 :]
        np.testing.assert_allclose(piece.rollout_logprobs_T, expected, atol=1e-5)
        assert piece.routes_RLK is not None
        assert len(piece.routes_RLK) == len(prompt) + len(piece.token_ids_T) - 1


def test_a_batch_depends_on_its_rows_and_their_order_alone() -> None:
    """Twice the same: equal bits, though the second follows other work in the same process."""
    model = loaded(random_model(seed=1))

    def bits() -> list[bytes]:
        with torch.inference_mode():
            batch = Batch(model, version=0)
            batch.add([job(s, [3 + s] * (1 + s % 4), samples=4) for s in range(9)])
            out = []
            while len(batch):
                for _, event in batch.step():
                    if isinstance(event, Piece):
                        assert event.routes_RLK is not None
                        out.append(event.rollout_logprobs_T.tobytes() + event.routes_RLK.tobytes())
            return out

    first = bits()
    torch.randn(1000, 1000) @ torch.randn(1000, 1000)
    assert bits() == first
    assert len(first) == 36


def test_updates_before_any_token_leave_one_version_span() -> None:
    """Frozen at once, updated twice: spans of no tokens are not reported."""
    with torch.inference_mode():
        batch = Batch(loaded(random_model(seed=1)), version=0)
        batch.add([job(0, [5, 9], samples=1, max_tokens=4)])
        batch.recompute(1)
        batch.recompute(2)
        events: list[Any] = []
        while len(batch):
            events += [event for _, event in batch.step()]
    (finished,) = [event for event in events if isinstance(event, Finished)]
    (run,) = finished.versions
    assert (run.begin, run.policy_version) == (2, 2)
