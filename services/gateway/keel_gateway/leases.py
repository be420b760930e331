"""Who gets which trainer and engines: a pure function of the records and of who is there.

Leases are exclusive and stand in the records of runs that have not ended. Runs are served in the
order of submission; one that nothing free suits does not hold up those behind it. A run that waits
takes all its engines at once or none: one that asks for several may wait long while others ask for
one. A run that goes on with fewer than it asks for, since one was drained, gets what becomes free.

A lease lapses when its holder has been silent for long, and a lapsed one ends when another can take
the place: then the run gets that other. With nobody free it waits for either.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from keel.record import Desired, Phase, RunRecord
from keel_gateway import transitions
from keel_gateway.admission import engine_lacks
from keel_gateway.registry import Engine, Peer

P = TypeVar("P", bound=Peer)


@dataclass(frozen=True, slots=True)
class Grant:
    """A trainer and engines for a run that waits; one or the other for a run that goes on."""

    run: str
    trainer: str
    """Empty: it keeps the one that it has."""
    engines: dict[str, str]
    """Kind by address, in the order of lease."""
    lost: tuple[str, ...] = ()
    """Engines that leave for them."""

    def apply(self, record: RunRecord, *, token: int) -> RunRecord:
        """The run's record with what it is granted, under a new token. StateError: it has changed
        since it was planned.
        """
        if not self.trainer:
            return transitions.join(
                record, engines=self.engines, engine_token=token, lost=self.lost
            )
        if not self.engines:
            return transitions.hand_over(record, trainer=self.trainer, fencing_token=token)
        return transitions.grant(
            record, trainer=self.trainer, engines=self.engines, fencing_token=token
        )


@dataclass(slots=True)
class Plan:
    """What to do now."""

    grants: list[Grant] = field(default_factory=list)
    waiting: dict[str, str] = field(default_factory=dict)
    """By run: why it is still QUEUED, or goes on with fewer engines than it asks for, or has a
    trainer that is silent."""


def holders(records: Iterable[RunRecord]) -> dict[str, str]:
    """By address of a trainer or an engine: the run that it is leased to."""
    return {
        address: record.run
        for record in records
        if record.trainer and not record.phase.final
        for address in (record.trainer, *record.engines)
    }


def plan(
    records: Iterable[RunRecord],
    trainers: Mapping[str, Peer],
    engines: Mapping[str, Engine],
    drained: Collection[str] = (),
    lapsed: Collection[str] = (),
) -> Plan:
    """Gives what is free to the runs that want it.

    Args:
        records: all that have not ended, in the order of submission.
        trainers, engines: by address.
        drained: engines that are not to be leased.
        lapsed: trainers and engines that have been silent for longer than a lease lasts.
    """
    records = list(records)
    held = holders(records)
    result = Plan()
    for record in records:
        if record.desired is not Desired.RUNNING:
            continue
        kept = [address for address in record.engines if address not in lapsed]
        need, forsaken = record.spec.engine.engines - len(kept), record.trainer in lapsed
        if need <= 0 and not forsaken if record.trainer else record.phase is not Phase.QUEUED:
            continue
        free_trainers, no_trainer = _free(record, "trainer", trainers, held, lambda trainer: "")
        if forsaken and free_trainers:
            result.grants.append(Grant(record.run, free_trainers[0], {}))
            held[free_trainers[0]] = record.run
            continue  # engines at the next look: this alone is one change of the record
        unfit = partial(_unfit, record, drained)
        free_engines, no_engine = _free(record, "engine", engines, held, unfit)
        has = Counter(record.engine_kinds.get(address, "") for address in kept)
        chosen = _choose(
            record.spec.engine.kinds, need, has, {a: _kind(engines[a]) for a in free_engines}
        )
        short = need - len(chosen)
        reasons = []
        if not free_trainers and not record.trainer:
            reasons.append(no_trainer)
        if forsaken:
            reasons.append(no_trainer.replace("waits for trainer", "no other trainer is free"))
        if short > 0:
            there = {*has, *chosen.values()}
            lacking = [kind for kind in record.spec.engine.kinds if kind not in there]
            reasons.append(_waits(record, len(engines), short, lacking, no_engine))
        if reasons:
            result.waiting[record.run] = "; ".join(reasons)
        if record.trainer:
            grant = Grant(record.run, "", chosen, _lost(record, kept, chosen))
        elif not reasons:
            grant = Grant(record.run, free_trainers[0], chosen)
        else:
            continue
        if chosen:
            held |= dict.fromkeys(filter(None, (grant.trainer, *grant.engines)), record.run)
            result.grants.append(grant)
    return result


def _lost(record: RunRecord, kept: Collection[str], chosen: Mapping[str, str]) -> tuple[str, ...]:
    """Which lapsed engines leave for the chosen: no more than must, of the same kinds first."""
    lapsed = [address for address in record.engines if address not in kept]
    lapsed.sort(key=lambda a: record.engine_kinds.get(a, "") not in chosen.values())
    over = len(record.engines) + len(chosen) - record.spec.engine.engines
    return tuple(lapsed[: max(0, over)])


def _choose(
    kinds: Sequence[str], need: int, has: Mapping[str, int], free: Mapping[str, str]
) -> dict[str, str]:
    """At most `need` of the free, kinds spread evenly, the first of `kinds` first.

    A place is kept for every kind of which there would be none.

    Args:
        has: engines that the run has, by kind.
        free: kind of each that suits, by address; and so are those returned.
    """
    count, chosen, left = Counter(has), dict[str, str](), dict(free)
    while len(chosen) < need:
        missing = [kind for kind in kinds if not count[kind]]
        there = set(left.values())
        wanted = [kind for kind in missing if kind in there]
        if not wanted and len(missing) < need - len(chosen):
            wanted = [kind for kind in kinds if kind in there]
        if not wanted:
            break
        kind = min(wanted, key=lambda kind: (count[kind], kinds.index(kind)))
        address = next(address for address, theirs in left.items() if theirs == kind)
        chosen[address] = left.pop(address)
        count[kind] += 1
    return chosen


def _waits(
    record: RunRecord, known: int, short: int, lacking: Sequence[str], no_engine: str
) -> str:
    """Why engines are short; of one that asks for several, how many and which."""
    asked = record.spec.engine
    if asked.engines == 1 or not known:
        return no_engine
    none_of = f", none of kind {' or '.join(lacking)}" if lacking else ""
    _, colon, told = no_engine.partition(": ")
    return f"waits for {short} of {asked.engines} engines{none_of}{colon}{told}"


def _free(
    record: RunRecord,
    noun: str,
    peers: Mapping[str, P],
    held: Mapping[str, str],
    unfit: Callable[[P], str],
) -> tuple[list[str], str]:
    """Addresses that can be leased, and why the others cannot; the run's own need no words."""
    if not peers:
        return [], f"no {noun} is configured (the gateway's --{noun}s, KEEL_{noun.upper()}S)"
    why = {
        address: f"is leased to {held[address]}" if address in held else peer.problem or unfit(peer)
        for address, peer in peers.items()
    }
    told = ", ".join(
        f"{address} {reason}"
        for address, reason in why.items()
        if reason and held.get(address) != record.run
    )
    free = [address for address, reason in why.items() if not reason]
    return free, f"waits for {noun}: {told}" if told else f"waits for {noun}"


def _kind(engine: Engine) -> str:
    assert engine.capabilities is not None, "one that has not said what it can do is not free"
    return engine.capabilities.can.kind


def _unfit(record: RunRecord, drained: Collection[str], engine: Engine) -> str:
    if engine.address in drained:
        return f"is drained (keel engines undrain {engine.address})"
    if engine.capabilities is None:
        return "has not said yet what it can do"
    lacks = list(engine_lacks(record.spec, engine.capabilities))
    return "cannot do " + ", ".join(str(lack) for lack in lacks) if lacks else ""
