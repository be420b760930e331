"""From sums and counts to the row of metrics: exact, however a step was split."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from keel_trainer.algo.replay import compare_routes

Stats = dict[str, Tensor]
"""Float64 scalars that add up; keys ending in `_max` take the maximum."""


_LAYER = "routing/layer/"
"""Begins the columns of single MoE layers, and the keys of their differing pairs."""

_ENGINE, _ENGINE_TOKENS = "engine/k3/", "engine_tokens/"
"""Begin the columns of single engines, and the keys of their tokens."""

_DROPPED = "is/dropped/"
"""Begins the column of the filter in use, and the key of the tokens that it dropped."""


def merge(parts: Iterable[Stats]) -> Stats:
    """The stats of a step from those of its micro-batches."""
    total: Stats = {}
    for part in parts:
        for key, value in part.items():
            if key not in total:
                total[key] = value
            elif key.endswith("_max"):
                total[key] = total[key].maximum(value)
            else:
                total[key] = total[key] + value
    return total


def entropy_stats(entropy_NT: Tensor, mask_NT: Tensor) -> Stats:
    """Sum over valid response tokens; their count is the loss's `tokens`."""
    return {"entropy": entropy_NT[mask_NT].double().sum()}


def routing_stats(
    engine_NTLK: Tensor, live_NTLK: Tensor, mask_NT: Tensor, *, layers: Sequence[int]
) -> Stats:
    """Engine's routes against the trainer's live top-k, over every real position.

    `live_NTLK` comes from the scoring pass, or from the update at N = 1. Under R3 it is conditional
    on replayed lower layers. `layers`: global number of each of the L layers.
    """
    counts = compare_routes(engine_NTLK, live_NTLK, mask_NT)
    differ_L = counts.tokens - counts.pairs_equal_L
    by_layer = {f"{_LAYER}{n}": differ for n, differ in zip(layers, differ_L, strict=True)}
    return by_layer | {
        "routing_pairs": counts.pairs,
        "routing_pairs_differ": counts.pairs - counts.pairs_equal,
        "routing_tokens": counts.tokens,
        "routing_tokens_differ": counts.tokens - counts.tokens_equal,
        "routing_experts": counts.experts,
        "routing_experts_shared": counts.experts_shared,
    }


def replay_stats(requested_NTLK: Tensor, dispatched_NTLK: Tensor, mask_NT: Tensor) -> Stats:
    """(token, layer) pairs whose experts were asked for, and those that got exactly that set.

    Of update forwards only; mask_NT is `MicroBatch.routes_mask_NT`.
    """
    counts = compare_routes(requested_NTLK, dispatched_NTLK, mask_NT)
    return {"replay_rows_requested": counts.pairs, "replay_rows_obeyed": counts.pairs_equal}


def engine_stats(
    engines: Sequence[str], proximal_NT: Tensor, rollout_NT: Tensor, mask_NT: Tensor
) -> Stats:
    """`mismatch/k3` and its tokens, by the engine that sampled each row.

    Args:
        engines: address by row; empty where it is not known.
    """
    mismatch_NT = (proximal_NT.double() - rollout_NT.double()).masked_fill(~mask_NT, 0.0)
    k3_N = (mismatch_NT.expm1() - mismatch_NT).sum(-1)
    tokens_N = mask_NT.sum(-1).double()
    return merge(
        {f"{_ENGINE}{engine}": k3_N[row], f"{_ENGINE_TOKENS}{engine}": tokens_N[row]}
        for row, engine in enumerate(engines)
        if engine
    )


def metrics(stats: Stats) -> dict[str, float | None]:
    """The algorithm's columns of a row, from merged stats.

    Without a valid token every mean and maximum is None. `routing/*` appear only where routes were
    compared (`routing/layer/N` averages to `routing/pair_disagree`); `replay/*` always do.
    """
    sums = {key: float(value) for key, value in stats.items()}
    tokens = sums.get("tokens", 0.0)

    def mean(key: str, count: float = tokens) -> float | None:
        return sums.get(key, 0.0) / count if count else None

    def largest(key: str) -> float | None:
        return sums.get(key) if tokens else None

    squared = sums.get("is_squared", 0.0)
    row: dict[str, float | None] = {
        "mismatch/k1": mean("mismatch_k1"),
        "mismatch/k3": mean("mismatch_k3"),
        "mismatch/logprob_abs_mean": mean("mismatch_abs"),
        "mismatch/logprob_abs_max": largest("mismatch_abs_max"),
        "mismatch/f2": mean("mismatch_f2"),
        "staleness/k1": mean("staleness_k1"),
        "staleness/k3": mean("staleness_k3"),
        "staleness/ratio_max": largest("staleness_ratio_max"),
        "is/mean": mean("is"),
        "is/max": largest("is_max"),
        # 1 / mean((w / mean w)^2): the share of tokens that count
        "is/ess": sums["is"] ** 2 / (tokens * squared) if tokens and squared else None,
        "is/truncated": mean("is_truncated"),
        "clip/high": mean("clip_high"),
        "clip/low": mean("clip_low"),
        "entropy": mean("entropy"),
        "replay/rows_requested": sums.get("replay_rows_requested", 0.0),
        "replay/rows_obeyed": sums.get("replay_rows_obeyed", 0.0),
        "tokens/trained": tokens,
    }
    if sums.get("routing_pairs"):
        row |= {
            "routing/pair_disagree": mean("routing_pairs_differ", sums["routing_pairs"]),
            "routing/token_disagree": mean("routing_tokens_differ", sums["routing_tokens"]),
            "routing/overlap": mean("routing_experts_shared", sums["routing_experts"]),
        }
        # every token has one pair in each layer
        row |= {k: mean(k, sums["routing_tokens"]) for k in sums if k.startswith(_LAYER)}
    for key in sums:
        if key.startswith(_ENGINE):
            row[key] = mean(key, sums[_ENGINE_TOKENS + key.removeprefix(_ENGINE)])
    return row | {key: mean(key) for key in sums if key.startswith(_DROPPED)}
