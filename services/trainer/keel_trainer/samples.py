"""Samples for people: which sequences of a run are shown, and what is told of them.

Chosen from the spec and the data alone, written after the lap's weights are published: neither the
numbers nor the next lap's start depend on it. At most MOST_LAPS x MOST_SEQUENCES samples a run,
each of its text and at most MOST_TOKENS tokens of some 40 bytes: 35 MB in Redis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from torch import Tensor

from keel.samples import Sample
from keel_trainer.batch import MicroBatch
from keel_trainer.sequences import TrainSequence
from keel_trainer.store import RunStore

MOST_LAPS = 50
MOST_SEQUENCES = 4
"""Of a lap, all of one group."""
MOST_TOKENS = 4096
"""Of a response, in the lists of a sample; its text is whole."""

_CHARACTER_TOKENS = 4
"""Most tokens of one character, its UTF-8 bytes; what is still none then, never will be."""


@dataclass(slots=True)
class Shown:
    """A sequence that is shown, and what the trainer made of it."""

    sequence: TrainSequence
    advantage: float
    place: tuple[int, int] | None
    """Its micro-batch and row; None: it is invalid and in none."""
    proximal_logprobs_R: npt.NDArray[np.float32] | None = None
    experts_differ_R: npt.NDArray[np.int64] | None = None


def sampled_laps(laps: int) -> frozenset[int]:
    """At most MOST_LAPS laps, evenly spaced, the first and the last among them.

    Example:
        sampled_laps(3) == {0, 1, 2}; sampled_laps(99) == {0, 2, 4, ..., 98}
    """
    return frozenset(i * (laps - 1) // (MOST_LAPS - 1) for i in range(MOST_LAPS))


def choose(
    groups: Sequence[Sequence[TrainSequence]], advantages_N: Sequence[float], cuts: Sequence[range]
) -> list[Shown]:
    """What is shown of a mini-batch: sequences of the group that teaches most, the first of such.

    Args:
        groups: in slot order; empty where a slot is VOID.
        advantages_N: of every sequence, in order.
        cuts: micro-batches, as ranges over the valid sequences.
    """
    advantages = iter(advantages_N)
    places = ((index, row) for index, cut in enumerate(cuts) for row in range(len(cut)))
    known = [
        [Shown(s, next(advantages), next(places) if s.valid else None) for s in group]
        for group in groups
    ]
    return _pick(max(known, key=interest, default=[]))


def interest(group: Sequence[Shown]) -> int:
    """How much a group teaches: 3 rewards differ, 2 it is trained on, 1 all invalid, 0 VOID."""
    rewards = {one.sequence.reward for one in group if one.sequence.valid}
    return min(len(rewards), 2) + 1 if rewards else int(bool(group))


def _pick(group: Sequence[Shown]) -> list[Shown]:
    """At most MOST_SEQUENCES, in sample order: the best and the worst of the valid."""
    ranked = sorted((o for o in group if o.sequence.valid), key=lambda o: -o.sequence.reward)
    if len(ranked) > MOST_SEQUENCES:
        half = MOST_SEQUENCES // 2
        ranked = ranked[:half] + ranked[-half:]
    picked = (ranked + [o for o in group if not o.sequence.valid])[:MOST_SEQUENCES]
    return sorted(picked, key=lambda o: o.sequence.sample)


def see(
    shown: Sequence[Shown],
    index: int,
    micro: MicroBatch,
    proximal_logprobs_NT: Tensor,
    live_NTLK: Tensor | None,
) -> None:
    """Notes what a pass of micro-batch `index` says of the sequences that are shown.

    Args:
        proximal_logprobs_NT: log pi_old; of the update at N = 1.
        live_NTLK: the router's own top-k in that pass.
    """
    for one in shown:
        if one.place is None or one.place[0] != index:
            continue
        row = one.place[1]
        response = slice(one.sequence.prompt_length - 1, one.sequence.fed_length)
        one.proximal_logprobs_R = proximal_logprobs_NT[row, response].cpu().numpy()
        if live_NTLK is not None and micro.engine_routes_NTLK is not None:
            ours_RLK = live_NTLK[row, response].sort(-1).values
            theirs_RLK = micro.engine_routes_NTLK[row, response].sort(-1).values
            one.experts_differ_R = (ours_RLK != theirs_RLK).any(-1).sum(-1).cpu().numpy()


class Sampler:
    """Writes the samples of one run."""

    def __init__(self, store: RunStore, artifact: Path, laps: int) -> None:
        self._store = store
        self._tokenizer = Tokenizer.from_file(str(artifact / "tokenizer.json"))
        self.laps = sampled_laps(laps)
        """Laps whose sequences are shown."""

    def write(self, attempt: int, lap: int, shown: Mapping[int, Sequence[Shown]]) -> None:
        """Writes samples of the lap's step that teaches most; written again, they replace
        themselves.

        Args:
            shown: by step, in order.
        """
        step = max(shown, key=lambda step: interest(shown[step]))
        self._store.write_samples(
            attempt, step, [self._sample(attempt, step, lap, one) for one in shown[step]]
        )

    def _sample(self, attempt: int, step: int, lap: int, shown: Shown) -> Sample:
        sequence = shown.sequence
        proximal_R, differ_R = shown.proximal_logprobs_R, shown.experts_differ_R
        prompt_ids_P, response_ids_R = np.split(sequence.token_ids_T, [sequence.prompt_length])
        return Sample(
            attempt=attempt,
            step=step,
            lap=lap,
            slot=sequence.slot,
            sample=sequence.sample,
            policy_version=int(sequence.policy_versions_R.max()),
            reward=_finite(sequence.reward),
            reward_parts={name: _finite(part) for name, part in sequence.reward_parts.items()},
            advantage=shown.advantage,
            truncated=sequence.truncated,
            valid=sequence.valid,
            invalid_reason=sequence.invalid_reason,
            prompt=self._tokenizer.decode(prompt_ids_P.tolist(), skip_special_tokens=False),
            response=self._tokenizer.decode(response_ids_R.tolist(), skip_special_tokens=False),
            tokens=token_texts(self._tokenizer, response_ids_R[:MOST_TOKENS].tolist()),
            rollout_logprobs=_logprobs(sequence.rollout_logprobs_R),
            proximal_logprobs=None if proximal_R is None else _logprobs(proximal_R),
            experts_differ=None if differ_R is None else differ_R[:MOST_TOKENS].tolist(),
        )


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text of each token, special tokens shown; joined they are the text of all.

    Decoded in its context, since a decoder may drop a token's leading space, or part of a
    character: that comes with the token that completes it.
    """
    texts: list[str] = []
    context = told = 0  # what stands before `told` has its text; decoding begins at `context`
    for end in range(1, len(ids) + 1):
        before = tokenizer.decode(ids[context:told], skip_special_tokens=False)
        text = tokenizer.decode(ids[context:end], skip_special_tokens=False)
        waits = text.endswith("\N{REPLACEMENT CHARACTER}") and end - told < _CHARACTER_TOKENS
        if waits and end < len(ids):
            texts.append("")
            continue
        texts.append(text[len(before) :])
        context, told = told, end
    return texts


def _logprobs(values_R: npt.NDArray[np.float32]) -> list[float | None]:
    return [_finite(round(value, 6)) for value in values_R[:MOST_TOKENS].tolist()]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
