"""The engines of a run: in which state each is, and which may be given work.

    leased ──▶ JOINING ──proved the version──▶ READY ──drain asked──▶ DRAINING ──empty──▶ not leased
                 ▲  ▲                            │
                 │  └────a newer version─────────┤
                 └──repaired── STALE ◀───────────┤  its log-probs are not those of the weights
                                                 └▶ LOST: does not answer

The record decides, through `engine_state` alone: the gateway writes who is leased and who drains,
the trainer who has proved which version and who has failed the proof, the collector who is empty.
LOST is the asker's own finding; an engine that is back is what the record says. STALE comes before
DRAINING: a wrong engine's groups are wrong however it is to leave.
"""

from __future__ import annotations

from enum import StrEnum

from keel.record import RunRecord


class EngineState(StrEnum):
    """What an engine is to its run."""

    JOINING = "JOINING"
    """Leased; it has not yet proved that it serves the run's version."""
    READY = "READY"
    """Serves the run's version, proved by hash and probe: it is given groups."""
    DRAINING = "DRAINING"
    """Finishes what it has and is given nothing new; empty, it leaves the run."""
    STALE = "STALE"
    """What it computes is not what it was sent, or it refuses it; it is given nothing until it is
    repaired."""
    LOST = "LOST"
    """Does not answer."""


def engine_state(record: RunRecord, address: str, *, answers: bool = True) -> EngineState:
    """State of a leased engine.

    Args:
        answers: whether it answered whoever asks, as far as that is known.
    """
    assert address in record.engines, f"{address} is not leased to {record.run}"
    if not answers:
        return EngineState.LOST
    if address in record.stale:
        return EngineState.STALE
    if address in record.draining:
        return EngineState.DRAINING
    served = record.proved.get(address)
    if served is not None and served == record.policy_version:
        return EngineState.READY
    return EngineState.JOINING


def ready_engines(record: RunRecord) -> tuple[str, ...]:
    """Addresses that may be given the groups of the record's version, in order of lease."""
    return tuple(a for a in record.engines if engine_state(record, a) is EngineState.READY)
