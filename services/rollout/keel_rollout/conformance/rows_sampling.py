"""What is drawn: the distribution, seeds, and the bits of cohorts where they are claimed."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import grpc
import numpy as np

from keel_rollout.conformance.client import EVALUATION, Sampled, refused
from keel_rollout.conformance.kit import Batch, Kit
from keel_rollout.conformance.reference import MEAN_FACTOR
from keel_rollout.conformance.verdicts import Found, NotRun, Number, Row, Unmet

DRAWS = 512
DEVIATIONS = 5.0
"""A mean of 512 draws lies this many standard errors off once in two million times."""
MEMBERS = 6
ABORTED = (grpc.StatusCode.ABORTED,)


async def samples(kit: Kit) -> Found:
    """Eight samples of a group, and those of another seed."""
    await kit.serving()
    wanted, count = kit.tokens(16), kit.samples(8)
    one, other = [
        await kit.client.generate(kit.prompt(3), samples=count, max_tokens=wanted, seed=seed)
        for seed in (11, 12)
    ]
    texts = [tuple(s.tokens) for s in (*one, *other)]
    if len(set(texts)) < len(texts):
        raise Unmet(
            f"{len(set(texts))} different responses in {count} samples of each of 2 seeds",
            f"{len(texts)}: the draw depends on seed and sample",
        )
    return [f"{len(texts)} responses, all different"]


async def distribution(kit: Kit) -> Found:
    """Mean log-prob of 512 first tokens, against what the reference expects of it."""
    await kit.serving()
    count, numbers = kit.samples(64), []
    for temperature in (1.0, 0.7):
        # of eight prompts the one that the engine's dtype disturbs least: no flipped expert
        prompts = [kit.prompt(4, seed=seed) for seed in range(8)]
        plain, rounded = (
            (kit.reference.logits(prompts, rounded=r)[:, -1] / temperature).log_softmax(-1).numpy()
            for r in (False, True)
        )
        best = int(np.abs(plain - rounded).mean(-1).argmin())
        groups = await asyncio.gather(
            *(
                kit.client.generate(
                    prompts[best],
                    samples=count,
                    slot=g,
                    seed=31 + g,
                    max_tokens=1,
                    temperature=temperature,
                )
                for g in range(-(-DRAWS // count))
            )
        )
        drawn = [s.tokens[0] for group in groups for s in group]
        plain_V, rounded_V = plain[best].astype(np.float64), rounded[best]
        chance_V = np.exp(plain_V)
        expected = float((chance_V * plain_V).sum())
        error = float((chance_V * (plain_V - expected) ** 2).sum() / len(drawn)) ** 0.5
        noise = float((chance_V * np.abs(rounded_V - plain_V)).sum())
        off = abs(float(plain_V[drawn].mean()) - expected)
        limit = DEVIATIONS * error + MEAN_FACTOR * noise
        numbers.append(Number(f"at {temperature:g}: mean log p off by", off, limit))
    return [*numbers, f"{len(drawn)} draws each"]


async def truncation(kit: Kit) -> Found:
    """top_k = 2 in evaluation: one of the two likeliest; log-probs over the full vocabulary."""
    await kit.serving()
    group = await kit.client.generate(
        kit.prompt(4),
        samples=kit.samples(8),
        max_tokens=kit.tokens(4),
        temperature=0.7,
        top_k=2,
        purpose=EVALUATION,
    )
    batch = Batch(group, 0.7, kit.reference)
    behind = []
    for row_TV, s in zip(batch.reference.logits(batch.everything).numpy(), group, strict=True):
        begin = len(s.prompt) - 1
        second_T = np.sort(row_TV[begin : begin + len(s.tokens)], -1)[:, -2]
        taken_T = row_TV[np.arange(begin, begin + len(s.tokens)), s.tokens]
        behind.append(np.maximum(0, second_T - taken_T))
    beyond = Number("mean behind the second", float(np.concatenate(behind).mean()), batch.limit())
    return [*batch.numbers(), beyond]


async def cohort_bits(kit: Kit) -> Found:
    """A cohort twice: in order, and shuffled, delayed, with other work beside it."""
    await kit.serving()
    orders = [list(range(MEMBERS)), random.Random(1).sample(range(MEMBERS), MEMBERS)]
    first = await _cohort(kit, "in-order", orders[0], 0.0)
    beside = asyncio.gather(
        *(kit.client.generate(kit.prompt(2, seed=s), max_tokens=kit.tokens(60)) for s in range(5))
    )
    second = await _cohort(kit, "shuffled", orders[1], 0.05)
    await beside
    same = sum(a.bits() == b.bits() for a, b in zip(first, second, strict=True))
    if same < len(first):
        raise Unmet(f"{same} of {len(first)} sequences have the same bits", "all of them")
    return [f"{len(first)} sequences, tokens, log-probs and routes bit for bit"]


async def _cohort(kit: Kit, name: str, order: list[int], delay_s: float) -> list[Sampled]:
    async def one(slot: int) -> list[Sampled]:
        await asyncio.sleep(delay_s * order.index(slot))
        return await kit.client.generate(
            kit.prompt(1 + slot, seed=slot),
            samples=_each(kit),
            slot=slot,
            seed=50 + slot,
            max_tokens=kit.tokens(24),
            stop=[1],
            with_routes=kit.routes,
            cohort=(name, MEMBERS, 0),
        )

    groups = await asyncio.gather(*(one(slot) for slot in sorted(order)))
    return [sequence for group in groups for sequence in group]


def _each(kit: Kit) -> int:
    return max(1, min(4, kit.can.max_group_size, kit.can.max_cohort_sequences // MEMBERS))


async def cohort_resend(kit: Kit) -> Found:
    """Half a cohort, then the whole one under the next try."""
    await kit.serving()

    def member(slot: int, attempt: int) -> Any:
        options: dict[str, Any] = {"slot": slot, "cohort": ("resent", 2, attempt)}
        return kit.client.generate(kit.prompt(2), seed=slot, max_tokens=kit.tokens(8), **options)

    old = asyncio.ensure_future(member(0, 3))
    await asyncio.sleep(0.2)
    if old.done():
        raise NotRun("half a cohort has been served")
    await asyncio.gather(member(0, 4), member(1, 4))
    await refused(old, ABORTED, what="the older try")
    await refused(member(0, 3), ABORTED, what="an older try that comes late")
    return ["try 4 served, try 3 ABORTED"]


async def cohort_limit(kit: Kit) -> Found:
    """More sequences than advertised."""
    await kit.serving()
    size = kit.can.max_cohort_sequences + 1
    call = kit.client.generate(kit.prompt(2), cohort=("too large", size, 0))
    await refused(call, (grpc.StatusCode.RESOURCE_EXHAUSTED,), "cohort.size", what=f"{size} groups")
    return [f"{kit.can.max_cohort_sequences} sequences at most"]


def claims_determinism(kit: Kit) -> str:
    """Of cohort rows."""
    return "" if kit.can.deterministic else "can.deterministic is false"


ROWS = (
    Row(
        "samples",
        "samples of a group differ, and so do those of another seed",
        "GenerateRequest.seed: the draw depends on (seed, sample, position) alone",
        samples,
    ),
    Row(
        "distribution",
        "tokens are drawn from softmax(logits / temperature), at 1 and at 0.7",
        "SamplingParams.temperature",
        distribution,
    ),
    Row(
        "truncation",
        "top_k is obeyed in evaluation, and log-probs stay over the full vocabulary",
        "SamplingParams.top_k; every log-prob is of softmax(logits / temperature)",
        truncation,
    ),
    Row(
        "cohort-bits",
        "a cohort gives the same bits, whatever arrives when and runs beside it",
        "Cohort; EngineAbilities.deterministic: equal requests give equal bits",
        cohort_bits,
        claims_determinism,
    ),
    Row(
        "cohort-resend",
        "a newer try discards what is left of an older one",
        "Cohort.try_number: a newer try discards what is left of an older one (ABORTED)",
        cohort_resend,
        claims_determinism,
    ),
    Row(
        "cohort-limit",
        "a cohort over the advertised limit is refused",
        "EngineAbilities.max_cohort_sequences",
        cohort_limit,
        claims_determinism,
    ),
)
