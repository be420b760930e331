"""What each engine is to its run, as people and Prometheus are told."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from keel.fleet import EngineState, engine_state
from keel.record import RunRecord
from keel_gateway.registry import Engine

FREE, DRAINED = "FREE", "DRAINED"
"""States of an engine that is in no run: to be leased, and not to be until it is undrained."""


def states(record: RunRecord, engines: Mapping[str, Engine]) -> dict[str, EngineState]:
    """State of each engine that an unfinished run leases, by address; LOST only where one asks."""
    if record.phase.final:
        return {}
    silent = {address for address, engine in engines.items() if engine.silent}
    return {a: engine_state(record, a, answers=a not in silent) for a in record.engines}


def state_in_run(engine: Engine, record: RunRecord | None, drained: Collection[str]) -> str:
    """State in its run, or FREE, DRAINED or LOST outside of one.

    Args:
        record: of the run that leases it; None: no run does.
    """
    if record is not None:
        return engine_state(record, engine.address, answers=not engine.silent)
    if engine.address in drained:
        return DRAINED
    return EngineState.LOST if engine.silent else FREE


def trouble(
    record: RunRecord, engines: Mapping[str, Engine], slow: Collection[str], waits: str
) -> str:
    """Why a run has fewer engines READY than it asks for; empty where that is a moment's matter.

    Args:
        slow: those that have been JOINING for long: every version makes an engine JOINING for a
            moment.
        waits: what it still waits for; empty: it has as many as it asks for.

    Example:
        "1 of 2 engines READY: b:2 is LOST (does not answer)"
    """
    told = []
    for address, state in states(record, engines).items():
        if state is EngineState.READY or (state is EngineState.JOINING and address not in slow):
            continue
        why = record.stale.get(address, "")
        if state is EngineState.LOST:
            why = engines[address].problem
        told.append(f"{address} is {state}" + (f" ({why})" if why else ""))
    if not told and not waits:
        return ""
    ready = len(record.engines) - len(told)
    why = "; ".join([*told, *filter(None, [waits])])
    return f"{ready} of {record.spec.engine.engines} engines READY: {why}"
