"""An update in the middle of a generation: which version made which token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.types.v1.sequence_pb2 import FINISH_REASON_LENGTH
from keel_rollout.conformance.client import Sampled
from keel_rollout.conformance.kit import TRIES, Batch, Kit, too_fast
from keel_rollout.conformance.reference import (
    FLOORS,
    PLACE_FACTOR,
    Floats,
    Reference,
    Routes,
    gap_numbers,
    gaps,
    limits,
    mean_gap,
    replay_limit,
)
from keel_rollout.conformance.rows_engine import expect
from keel_rollout.conformance.rows_numbers import TELLING, USED, WORSE, late
from keel_rollout.conformance.verdicts import Found, Number, Row, Unmet


async def midway(kit: Kit) -> Found:
    """Every token's log-prob and row of routes fits the version that its span names."""
    old_version = await kit.serving()
    for attempt in range(TRIES):
        old, new = kit.reference, kit.other()
        old_version = await kit.serving()
        async with kit.half_way(0.5 / 2**attempt) as running:
            in_flight = await kit.client.pause(pb.PAUSE_MODE_KEEP)
            try:
                version = await kit.publish(new)
            finally:
                await kit.client.resume()
            group = await running
        for s in group:
            expect("finish_reason", s.complete.finish_reason, FINISH_REASON_LENGTH)
        if in_flight and any(len(s.spans) > 1 for s in group):
            break
        _one_version(group, {old_version.manifest.policy_version: old}, new)
    else:
        raise too_fast()
    numbers = [v.manifest.policy_version for v in (old_version, version)]
    for s in group:
        _spans_cover(s, numbers)
    return _fit(kit, [s for s in group if len(s.spans) == 2], (old, new))


def _one_version(group: list[Sampled], others: dict[int, Reference], new: Reference) -> None:
    """Sequences of one span each, which may be: not caught half-way. Then all tokens fit it."""
    for s in group:
        number = s.spans[0][2] if s.spans else -1
        batch = Batch([s], 1.0, others.get(number, new))
        wrong = [str(found) for found in batch.numbers() if not found.ok]
        if wrong:
            raise Unmet(
                f"policy_versions {s.spans}: {'; '.join(wrong)}",
                "two spans, of the old and the new version, each fitting its tokens",
            )


def _spans_cover(s: Sampled, numbers: list[int]) -> None:
    """Ascending, gapless, from the prompt's end to the response's, old before new."""
    begins = [begin for begin, _, _ in s.spans]
    ends = [end for _, end, _ in s.spans]
    versions = [number for _, _, number in s.spans]
    whole = [len(s.prompt), *ends[:-1]] == begins and ends[-1:] == [len(s.everything)]
    if not whole or versions not in (numbers, numbers[:1], numbers[1:]):
        raise Unmet(
            f"policy_versions {s.spans}",
            f"spans that cover [{len(s.prompt)}, {len(s.everything)}) without a gap, "
            f"versions {numbers[0]} then {numbers[1]}",
        )


def _fit(kit: Kit, group: list[Sampled], references: tuple[Reference, Reference]) -> Found:
    """Gaps of both parts: all tokens, those beside the border, and with routes replayed."""
    found: list[Number | str] = []
    for name, reference in zip(("before", "after"), references, strict=True):
        part = _Part(reference, group, before=name == "before")
        found += part.gaps(name)
        if kit.routes and all(s.complete.routes_valid for s in group):
            found += part.routes()
    borders = sorted({s.spans[1][0] for s in group})
    where = f"{borders[0]} to {borders[-1]}"
    return [*found, f"{len(group)} sequences, the new version from position {where}"]


class _Part:
    """The tokens of each sequence before, or from, the first one of the new version."""

    def __init__(self, reference: Reference, group: list[Sampled], *, before: bool) -> None:
        self.reference, self.group, self.before = reference, group, before
        self.everything = [s.everything for s in group]
        # log-prob t is of token t + 1
        self.tokens = [
            slice(len(s.prompt) - 1, s.spans[1][0] - 1)
            if before
            else slice(s.spans[1][0] - 1, None)
            for s in group
        ]
        self.rows = [slice(0, kept.stop) if before else kept for kept in self.tokens]
        """Rows of routes that this version made; the others of the new one were never told."""
        self.ours = self.cut(
            [np.array([*[0] * (len(s.prompt) - 1), *s.logprobs], np.float32) for s in group]
        )
        self.plain = self.cut(reference.logprobs(self.everything))
        self.rounded = self.plain
        if reference.dtype != "float32":
            self.rounded = self.cut(reference.logprobs(self.everything, rounded=True))

    def cut(self, whole: list[Floats]) -> list[Floats]:
        """This part of each sequence."""
        return [values[kept] for values, kept in zip(whole, self.tokens, strict=True)]

    def replay(self, routes: Sequence[Routes]) -> list[Floats]:
        """Log-probs with this part's rows replayed."""
        return self.cut(self.reference.logprobs(self.everything, routes=routes, replayed=self.rows))

    def gaps(self, name: str) -> Found:
        """Of all tokens, and of the one beside the border."""
        noise = gaps(self.rounded, self.plain)
        beside = slice(-1, None) if self.before else slice(0, 1)
        border = gaps([v[beside] for v in self.ours], [v[beside] for v in self.plain])
        limit = PLACE_FACTOR * limits(self.reference.dtype, noise)[0]
        return [
            *gap_numbers(self.reference.dtype, gaps(self.ours, self.plain), noise, f"{name}: "),
            Number("beside the border", float(np.median(border)), limit),
        ]

    def routes(self) -> Found:
        """As `rows_numbers.routes_used`."""
        told = [s.routes_TLK for s in self.group]
        own = self.reference.natural_routes(self.everything, rounded=True)
        limit = replay_limit(self.reference.dtype, gaps(self.rounded, self.replay(own)))
        replayed = mean_gap(self.ours, self.replay(told))
        unreplayed = WORSE * mean_gap(self.ours, self.plain) + FLOORS["float32"]
        found = [Number("replayed", replayed, min(limit, unreplayed))]
        natural = self.reference.natural_routes(self.everything)
        if mean_gap(self.replay(late(natural)), self.plain) > 2 * TELLING * limit:
            # else this model's log-probs hardly depend on its routes
            shifted, least = mean_gap(self.ours, self.replay(late(told))), TELLING
            least *= max(replayed, limit)
            found.append(Number("a row late", shifted, least, at_least=True))
        return found


MIDWAY = Row(
    "spans",
    "an update under a generation: each token and its routes fit the version that its span names",
    f"VersionSpan: the version whose weights gave these log-probs; PAUSE_MODE_KEEP; {USED}",
    midway,
)
