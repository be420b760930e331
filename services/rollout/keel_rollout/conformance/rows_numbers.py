"""Log-probs and routes against the reference: the rows that come again after every change."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from keel import codec
from keel_rollout.conformance.kit import COOLER, GREEDY, Batch, Kit
from keel_rollout.conformance.reference import (
    FLOORS,
    Routes,
    gap_numbers,
    gaps,
    mean_gap,
    replay_limit,
)
from keel_rollout.conformance.verdicts import Found, NotRun, Number, Row, Unmet

TELLING = 3.0
"""Routes a row late must be this times worse than the ones used, and than the limit for these."""
WORSE = 1.25
"""Replayed, the gap may be this times the unreplayed one: both are rounding."""


async def logprobs(kit: Kit) -> Found:
    """At temperature 1."""
    batch = await kit.batch(1.0)
    return [*batch.numbers(), batch.worst_place()]


async def cooler(kit: Kit) -> Found:
    """At 0.7; the gap to log-probs at temperature 1 tells which ones they are."""
    batch = await kit.batch(COOLER)
    raw = Batch(batch.sequences, 1.0, batch.reference).plain
    to_raw = mean_gap(batch.logprobs, raw)
    return [*batch.numbers(), batch.worst_place(), f"to those at temperature 1: {to_raw:.2g}"]


async def greedy(kit: Kit) -> Found:
    """At temperature 0: the likeliest tokens, their log-probs at temperature 1."""
    batch = await kit.batch(GREEDY)
    behind = []
    for row_TV, sequence in zip(
        batch.reference.logits(batch.everything).log_softmax(-1).numpy(),
        batch.sequences,
        strict=True,
    ):
        begin = len(sequence.prompt) - 1
        best_T = row_TV[begin : begin + len(sequence.tokens)].max(-1)
        taken_T = row_TV[np.arange(begin, begin + len(sequence.tokens)), sequence.tokens]
        behind.append(best_T - taken_T)
    regret = Number(
        "mean behind the likeliest", float(np.concatenate(behind).mean()), batch.limit()
    )
    return [*batch.numbers(), regret]


async def probe(kit: Kit) -> Found:
    """32 random tokens, by FinishWeightUpdate."""
    tokens = kit.prompt(32, seed=1)
    if len(tokens) < 2:
        raise NotRun("the model takes too few tokens for a probe")
    got = [await kit.probed(tokens)]
    expected = kit.reference.logprobs([tokens])
    noise = gaps(kit.reference.logprobs([tokens], rounded=True), expected)
    return gap_numbers(kit.reference.dtype, gaps(got, expected), noise)


async def routes_shape(kit: Kit) -> Found:
    """Every row, its dtype, its range, its K distinct experts."""
    reference = kit.model.a
    dtype = codec.routes_dtype(reference.num_experts)
    rows = 0
    for temperature in (1.0, COOLER):
        for sequence in (await kit.batch(temperature)).sequences:
            routes_TLK = sequence.routes_TLK
            shape = (len(sequence.everything) - 1, len(reference.layers), reference.top_k)
            if routes_TLK.shape != shape:
                raise Unmet(
                    f"routes {list(routes_TLK.shape)} of {len(sequence.prompt)} + "
                    f"{len(sequence.tokens)} tokens",
                    f"{list(shape)}: a row for each position but the last, MoE layers only",
                )
            if routes_TLK.dtype != dtype:
                raise Unmet(str(routes_TLK.dtype), f"{dtype} for {reference.num_experts} experts")
            if routes_TLK.max() >= reference.num_experts:
                raise Unmet(f"expert {routes_TLK.max()}", f"0 to {reference.num_experts - 1}")
            ordered = np.sort(routes_TLK, -1)
            same = (ordered[..., 1:] == ordered[..., :-1]).any(-1)
            if same.any():
                t, layer = (int(axis[0]) for axis in np.nonzero(same))
                raise Unmet(
                    f"row {t}, MoE layer {layer}: experts {routes_TLK[t, layer].tolist()}",
                    "K distinct experts",
                )
            if not sequence.complete.routes_valid:
                raise Unmet("routes_valid = false on an undisturbed sequence", "true")
            rows += len(routes_TLK)
    return [f"{rows} rows of {len(reference.layers)} layers, {dtype}"]


async def routes_used(kit: Kit) -> Found:
    """They are those of the forward pass that gave the log-probs: replaying them explains these."""
    if f"{kit.stage}/routes-shape" in kit.failed:
        raise NotRun("routes-shape has failed")
    batch = await kit.batch(1.0)
    reference, everything = batch.reference, batch.everything
    routes = [s.routes_TLK for s in batch.sequences]
    # the reference rounded to the engine's dtype, as if it were an engine: what one may look like
    rounded = reference.natural_routes(everything, rounded=True)
    noise = gaps(batch.rounded, batch.expected(routes=rounded))
    limit = replay_limit(reference.dtype, noise)
    natural = reference.natural_routes(everything)
    if mean_gap(batch.expected(routes=late(natural)), batch.plain) < 2 * TELLING * limit:
        raise NotRun("this model's log-probs hardly depend on its routes")
    unreplayed = mean_gap(batch.logprobs, batch.plain)
    replayed = mean_gap(batch.logprobs, batch.expected(routes=routes))
    shifted = mean_gap(batch.logprobs, batch.expected(routes=late(routes)))
    differ = [
        (np.sort(rows, -1) != np.sort(own, -1)).any(-1)
        for rows, own in zip(routes, natural, strict=True)
    ]
    share = float(np.concatenate(differ).mean())
    return [
        Number("replayed", replayed, min(limit, WORSE * unreplayed + FLOORS["float32"])),
        Number("a row late", shifted, TELLING * max(replayed, limit), at_least=True),
        f"unreplayed {unreplayed:.2g}; {share:.1%} of cells differ from the reference's own",
    ]


def late(routes: Sequence[Routes]) -> list[Routes]:
    """Routes shifted by a row."""
    return [np.roll(rows, 1, axis=0) for rows in routes]


def claims_routes(kit: Kit) -> str:
    """Of route rows."""
    if not kit.model.sparse:
        return "the model is dense"
    return "" if kit.can.routes else "can.routes is false"


TEMPERATURE = "SamplingParams.temperature: every log-prob is of softmax(logits / temperature)"
ROUTES = "Routes: [T - 1, L, K], L counts MoE layers only; the K ids of a cell are distinct"
USED = "SequenceComplete.routes_valid: each row belongs to the forward pass that gave the log-prob"

SUITE = (
    Row("logprobs", "log-probs are the model's, at temperature 1", TEMPERATURE, logprobs),
    Row(
        "logprobs-0.7", "at temperature 0.7 they are of softmax(logits / 0.7)", TEMPERATURE, cooler
    ),
    Row(
        "logprobs-greedy",
        "greedy takes the likeliest token; its log-prob is at temperature 1",
        "SamplingParams.temperature: 0 means greedy decoding; log-probs are then at temperature 1",
        greedy,
    ),
    Row(
        "probe",
        "the probe's log-probs are the model's; the version served needs no second update",
        "FinishWeightUpdateResponse.probe_logprobs; BeginWeightUpdateResponse.already_served",
        probe,
    ),
    Row(
        "routes-shape",
        "a row for each position but the last: MoE layers only, K distinct experts",
        ROUTES,
        routes_shape,
        claims_routes,
    ),
    Row(
        "routes-used",
        "the routes are the ones used: replayed they explain the log-probs, a row late they do not",
        USED,
        routes_used,
        claims_routes,
    ),
)
"""Tried at first load, and again after every kind of change."""
