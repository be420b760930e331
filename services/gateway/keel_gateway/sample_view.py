"""Samples as the report shows them: by step and prompt, rounded, and not too many."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

Sample = Mapping[str, Any]

MOST_TOKENS = 60_000
"""Of all samples in a report together (about 25 bytes each)."""
MOST_TOKENS_A_RESPONSE = 2000
_LEAST_SCALE = 1e-3
"""nats: a smaller gap is float rounding, and stays pale."""


def sample_view(samples: Sequence[Sample]) -> dict[str, Any] | None:
    """What the page's script draws; None without samples.

    {scale, left_out, groups: [{step, attempt, slot, prompt, responses: [...]}]}; a response has
    tokens, their rollout log-probs `r`, gaps `g` = proximal - rollout (null: not scored) and `e`
    (layers whose experts differed; null: not recorded), all for the tokens that are shown, of
    `length` that there are; `longer`: the trainer kept only the first. Whole groups are left out
    where there are too many, evenly over the steps; the last one stays.
    """
    groups = [list(group) for _, group in groupby(sorted(samples, key=_place), key=_group)]
    if not groups:
        return None
    kept = groups
    stride = 1
    while sum(map(_tokens, kept)) > MOST_TOKENS and len(kept) > 1:
        stride *= 2
        kept = groups[::-1][::stride][::-1]
    return {
        "scale": _scale([gap for group in kept for one in group for gap in _gaps(one) or ()]),
        "left_out": len(groups) - len(kept),
        "groups": [
            {
                **{key: group[0].get(key) for key in ("step", "attempt", "slot", "prompt")},
                "responses": [_response(one) for one in group],
            }
            for group in kept
        ],
    }


def _response(one: Sample) -> dict[str, Any]:
    shown = slice(MOST_TOKENS_A_RESPONSE)
    gaps, differ = _gaps(one), one.get("experts_differ")
    return {
        **{key: one.get(key) for key in ("sample", "reward", "advantage", "policy_version")},
        "parts": one.get("reward_parts") or {},
        "truncated": bool(one.get("truncated")),
        "invalid": "" if one.get("valid", True) else str(one.get("invalid_reason") or "invalid"),
        "length": len(one["tokens"]),
        "longer": len(one.get("response") or "") > sum(map(len, one["tokens"])),
        "tokens": one["tokens"][shown],
        "r": [_rounded(value) for value in one["rollout_logprobs"][shown]],
        "g": gaps and [_rounded(value) for value in gaps[shown]],
        "e": differ and differ[shown],
    }


def _gaps(one: Sample) -> list[float | None] | None:
    """Proximal - rollout of each token; None where one of the two is not a number."""
    proximal = one.get("proximal_logprobs")
    if proximal is None:
        return None
    pairs = zip(proximal, one["rollout_logprobs"], strict=True)
    return [
        None if trainer is None or engine is None else trainer - engine for trainer, engine in pairs
    ]


def _scale(gaps: Sequence[float | None]) -> float:
    """A round number of nats that 99 of 100 gaps stay below: there the colour is full."""
    sizes = sorted(abs(gap) for gap in gaps if gap is not None and math.isfinite(gap))
    wanted = max(_LEAST_SCALE, sizes[int(0.99 * (len(sizes) - 1))] if sizes else 0.0)
    decade = 10.0 ** math.floor(math.log10(wanted))
    return next(float(f"{n * decade:g}") for n in (1, 2, 5, 10) if n * decade >= wanted * 0.999)


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def _tokens(group: Sequence[Sample]) -> int:
    return sum(min(len(one["tokens"]), MOST_TOKENS_A_RESPONSE) for one in group)


def _group(one: Sample) -> tuple[int, ...]:
    return one.get("step") or 0, one.get("attempt") or 0, one.get("lap") or 0, one.get("slot") or 0


def _place(one: Sample) -> tuple[int, ...]:
    return (*_group(one), one.get("sample") or 0)
