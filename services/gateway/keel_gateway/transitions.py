"""The gateway's state machine: the only place where it decides what a run record becomes.

    change    allowed while                       the record becomes
    grant     QUEUED, RUNNING wanted, no lease    trainer, engines and both tokens set
    hand_over leased, RUNNING wanted              another trainer, under new, higher tokens: the
                                                  one before reads that its lease is over, and
                                                  engines refuse it
    join      leased, RUNNING wanted, fewer       engines added under a new, higher engine token;
              engines than it asks for, or some   those that are lost leave for them
              of them lost
    drain     not ended                           `draining` is those of its engines that operators
                                                  want empty; one taken back serves again
    leave     draining, and drained or lost, or   the engine is no longer its
              before the first version
    cancel    not ended (again: no change)        CANCELLED wanted; without a lease also CANCELLED
    pause     RUNNING wanted (again: no change)   PAUSED wanted: its trainer stops before the next
                                                  lap; QUEUED, it gets no lease
    resume    PAUSED wanted (again: no change)    RUNNING wanted
    abandon   CANCELLED wanted, and QUEUED        CANCELLED: the trainer never took it,
              or the trainer is gone for good     or is no more
    refuse    QUEUED, leased                      FAILED: the trainer refuses its spec

    trainer: not leased --grant--> leased --silent, and another free: hand_over--> not leased
    engine:  not leased --grant, join--> leased --drain--> draining --leave--> not leased
                                          | ^--drain taken back--'                 ^
                                          '--silent, and another free: join--------'

Every other phase is written by the trainer (`keel.record` draws them all). Whoever is in the record
of a run that has not ended is leased to it, until the run ends or, once it is silent for the length
of a lease (`keel_gateway.leases`), another takes its place. An answer renews its lease.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TypeVar

from keel.errors import StateError
from keel.record import Desired, Phase, RunRecord

V = TypeVar("V")


def grant(
    record: RunRecord, *, trainer: str, engines: Mapping[str, str], fencing_token: int
) -> RunRecord:
    """Leases a trainer and engines to a run that waits for them.

    Args:
        engines: kind by address, in the order of lease.
    """
    if record.phase is not Phase.QUEUED or record.trainer or record.desired is not Desired.RUNNING:
        raise StateError(f"run {record.run!r} does not wait for a lease ({_state(record)})")
    return replace(
        record,
        trainer=trainer,
        engines=tuple(engines),
        engine_kinds=dict(engines),
        fencing_token=fencing_token,
        engine_token=fencing_token,
    )


def hand_over(record: RunRecord, *, trainer: str, fencing_token: int) -> RunRecord:
    """Leases another trainer to a run whose own is silent; it goes on from the newest checkpoint.

    The run keeps its engines, which now refuse whatever the trainer before still sends.
    """
    if not _goes_on(record) or trainer == record.trainer:
        raise StateError(f"run {record.run!r} wants no other trainer ({_state(record)})")
    assert fencing_token > max(record.fencing_token, record.engine_token), "tokens grow"
    return replace(record, trainer=trainer, fencing_token=fencing_token, engine_token=fencing_token)


def join(
    record: RunRecord,
    *,
    engines: Mapping[str, str],
    engine_token: int,
    lost: Collection[str] = (),
) -> RunRecord:
    """Leases more engines to a run that goes on with fewer than it asks for.

    What was known of them is forgotten: between two leases they may have served others.

    Args:
        engines: kind by address, in the order of lease.
        lost: engines that leave for them, since nothing answers there any more.
    """
    record = _without_engines(record, lost)
    want = record.spec.engine.engines
    if not _goes_on(record) or len(record.engines) + len(engines) > want:
        raise StateError(
            f"run {record.run!r} wants no more engines "
            f"({_state(record)}, {len(record.engines)} of {want} engines)"
        )
    assert not set(engines) & set(record.engines), "leased twice"
    assert engine_token > record.engine_token, "engines refuse a token that does not grow"
    return replace(
        record,
        engines=(*record.engines, *engines),
        engine_kinds={**record.engine_kinds, **engines},
        engine_token=engine_token,
        draining=_without(record.draining, engines),
        drained=_without(record.drained, engines),
        proved=_cut(record.proved, engines),
        stale=_cut(record.stale, engines),
    )


def drain(record: RunRecord, *, wanted: Collection[str]) -> RunRecord:
    """Records which engines of the run are to be emptied; the others serve (again).

    Args:
        wanted: all engines that operators want empty, of this run or not.
    """
    if record.phase.final:
        return record
    draining = tuple(address for address in record.engines if address in wanted)
    # `drained` is the collector's: it may not have seen a drain that was taken back and asked anew
    return replace(record, draining=draining)


def leave(record: RunRecord, *, lost: Collection[str] = ()) -> RunRecord:
    """Takes away the engines that drain and have nothing of the run left.

    Before the first version no engine can have anything of it.

    Args:
        lost: engines where nothing answers; the collector sends what they had to others.
    """
    if record.phase.final:
        return record
    empty = {*record.drained, *lost} if record.policy_version is not None else record.engines
    return _without_engines(record, set(record.draining) & set(empty))


def cancel(record: RunRecord, *, now_s: float) -> RunRecord:
    """Records that the user wants no more of the run; ends it at once where nobody works on it."""
    if record.phase is Phase.CANCELLED:
        return record
    if record.phase.final:
        raise StateError(
            f"run {record.run!r} has ended ({record.phase}); only one that has not can be cancelled"
        )
    wanted = replace(record, desired=Desired.CANCELLED)
    if record.trainer:
        return wanted
    return replace(wanted, phase=Phase.CANCELLED, finished_s=now_s)


def pause(record: RunRecord) -> RunRecord:
    """Records that the run is to stop where it can go on later. What it leases, it keeps."""
    return _want(record, Desired.PAUSED, "paused")


def resume(record: RunRecord) -> RunRecord:
    """Records that a paused run is to go on."""
    return _want(record, Desired.RUNNING, "resumed")


def _want(record: RunRecord, desired: Desired, done: str) -> RunRecord:
    if record.phase.final:
        raise StateError(
            f"run {record.run!r} has ended ({record.phase}); only one that has not can be {done}"
        )
    if record.desired is Desired.CANCELLED:
        raise StateError(f"run {record.run!r} was cancelled; only one that was not can be {done}")
    return replace(record, desired=desired)


def abandon(record: RunRecord, *, now_s: float, orphan: bool = False) -> RunRecord:
    """Ends a leased run that is to be cancelled and that no trainer has.

    Args:
        orphan: its trainer is gone for good. Else the trainer must never have taken it.
    """
    theirs = record.phase.final or not (orphan or record.phase is Phase.QUEUED)
    if theirs or record.desired is not Desired.CANCELLED:
        raise StateError(f"run {record.run!r} is its trainer's to end ({_state(record)})")
    return replace(record, phase=Phase.CANCELLED, finished_s=now_s)


def refuse(record: RunRecord, *, error: str, now_s: float) -> RunRecord:
    """Ends a leased run whose trainer says that it can never run."""
    if record.phase is not Phase.QUEUED or not record.trainer:
        raise StateError(f"run {record.run!r} is its trainer's to end ({_state(record)})")
    return replace(record, phase=Phase.FAILED, error=error, finished_s=now_s)


def _goes_on(record: RunRecord) -> bool:
    leased = bool(record.trainer) and not record.phase.final
    return leased and record.desired is Desired.RUNNING


def _without_engines(record: RunRecord, gone: Collection[str]) -> RunRecord:
    return replace(
        record,
        engines=_without(record.engines, gone),
        draining=_without(record.draining, gone),
        drained=_without(record.drained, gone),
        proved=_cut(record.proved, gone),
        stale=_cut(record.stale, gone),
    )


def _state(record: RunRecord) -> str:
    return f"phase {record.phase}, {record.desired} wanted, trainer {record.trainer or 'none'}"


def _without(addresses: tuple[str, ...], gone: Collection[str]) -> tuple[str, ...]:
    return tuple(address for address in addresses if address not in gone)


def _cut(known: Mapping[str, V], gone: Collection[str]) -> dict[str, V]:
    return {address: value for address, value in known.items() if address not in gone}
