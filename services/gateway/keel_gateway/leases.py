"""Who gets which trainer and engines: a pure function of the records and of who is there.

Leases are exclusive and stand in the records of runs that have not ended. Runs are served in the
order of submission; one that nothing free suits does not hold up those behind it. A run that waits
takes all its engines at once or none: one that asks for several may wait long while others ask for
one. A run that goes on with fewer than it asks for, since one was drained, gets what becomes free.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from keel.record import Desired, Phase, RunRecord
from keel_gateway.admission import engine_lacks
from keel_gateway.registry import Engine, Peer

P = TypeVar("P", bound=Peer)


@dataclass(frozen=True, slots=True)
class Grant:
    """A trainer and engines for a run that waits; engines alone for one that goes on."""

    run: str
    trainer: str
    """Empty: it has one."""
    engines: dict[str, str]
    """Kind by address, in the order of lease."""


@dataclass(slots=True)
class Plan:
    """What to do now."""

    grants: list[Grant] = field(default_factory=list)
    waiting: dict[str, str] = field(default_factory=dict)
    """By run: why it is still QUEUED, or goes on with fewer engines than it asks for."""


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
) -> Plan:
    """Gives what is free to the runs that want it.

    Args:
        records: all that have not ended, in the order of submission.
        trainers, engines: by address.
        drained: engines that are not to be leased.
    """
    records = list(records)
    held = holders(records)
    result = Plan()
    for record in records:
        if record.desired is not Desired.RUNNING:
            continue
        need = record.spec.engine.engines - len(record.engines)
        if need <= 0 if record.trainer else record.phase is not Phase.QUEUED:
            continue
        free_trainers, no_trainer = _free(record, "trainer", trainers, held, lambda trainer: "")
        unfit = partial(_unfit, record, drained)
        free_engines, no_engine = _free(record, "engine", engines, held, unfit)
        has = Counter(record.engine_kinds.get(address, "") for address in record.engines)
        chosen = _choose(
            record.spec.engine.kinds, need, has, {a: _kind(engines[a]) for a in free_engines}
        )
        short = need - len(chosen)
        reasons = []
        if not record.trainer and not free_trainers:
            reasons.append(no_trainer)
        if short:
            there = {*has, *chosen.values()}
            lacking = [kind for kind in record.spec.engine.kinds if kind not in there]
            reasons.append(_waits(record, len(engines), short, lacking, no_engine))
        if reasons:
            result.waiting[record.run] = "; ".join(reasons)
        if record.trainer:
            grant = Grant(record.run, "", chosen)
        elif not reasons:
            grant = Grant(record.run, free_trainers[0], chosen)
        else:
            continue
        if chosen:
            held |= dict.fromkeys(filter(None, (grant.trainer, *grant.engines)), record.run)
            result.grants.append(grant)
    return result


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
