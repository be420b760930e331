"""Who gets which trainer and engine: a pure function of the records and of who is there.

Leases are exclusive and stand in the records of runs that have not ended. Runs are served in the
order of submission; one that nothing free suits does not hold up those behind it. That starves
nobody while a run takes one engine: whatever becomes free goes to the first that it suits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from keel.record import Desired, Phase, RunRecord
from keel_gateway.admission import engine_lacks
from keel_gateway.registry import Engine, Peer

P = TypeVar("P", bound=Peer)


@dataclass(frozen=True, slots=True)
class Grant:
    """A trainer and engines for a run."""

    run: str
    trainer: str
    engines: tuple[str, ...]


@dataclass(slots=True)
class Plan:
    """What to do now."""

    grants: list[Grant] = field(default_factory=list)
    waiting: dict[str, str] = field(default_factory=dict)
    """By run: why it is still QUEUED."""


def holders(records: Iterable[RunRecord]) -> dict[str, str]:
    """By address of a trainer or an engine: the run that it is leased to."""
    return {
        address: record.run
        for record in records
        if record.trainer and not record.phase.final
        for address in (record.trainer, *record.engines)
    }


def plan(
    records: Iterable[RunRecord], trainers: Mapping[str, Peer], engines: Mapping[str, Engine]
) -> Plan:
    """Gives what is free to the runs that wait.

    Args:
        records: all that have not ended, in the order of submission.
        trainers, engines: by address.
    """
    records = list(records)
    held = holders(records)
    result = Plan()
    for record in records:
        if record.phase is not Phase.QUEUED or record.trainer:
            continue
        if record.desired is not Desired.RUNNING:
            continue
        free_trainers, no_trainer = _free("trainer", trainers, held, lambda trainer: "")
        free_engines, no_engine = _free("engine", engines, held, partial(_unfit, record))
        count = record.spec.engine.engines
        if not free_trainers or len(free_engines) < count:
            short = (no_trainer if not free_trainers else "", no_engine if not free_engines else "")
            result.waiting[record.run] = "; ".join(filter(None, short))
            continue
        grant = Grant(record.run, free_trainers[0], tuple(free_engines[:count]))
        held |= dict.fromkeys((grant.trainer, *grant.engines), record.run)
        result.grants.append(grant)
    return result


def _free(
    noun: str, peers: Mapping[str, P], held: Mapping[str, str], unfit: Callable[[P], str]
) -> tuple[list[str], str]:
    """Addresses that can be leased, and, for when there are none, why."""
    if not peers:
        return [], f"no {noun} is configured (the gateway's --{noun}s, KEEL_{noun.upper()}S)"
    why = {
        address: f"is leased to {held[address]}" if address in held else peer.problem or unfit(peer)
        for address, peer in peers.items()
    }
    told = ", ".join(f"{address} {reason}" for address, reason in why.items())
    return [address for address, reason in why.items() if not reason], f"waits for {noun}: {told}"


def _unfit(record: RunRecord, engine: Engine) -> str:
    if engine.capabilities is None:
        return "has not said yet what it can do"
    lacks = list(engine_lacks(record.spec, engine.capabilities))
    return "cannot do " + ", ".join(str(lack) for lack in lacks) if lacks else ""
