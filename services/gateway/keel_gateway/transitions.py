"""The gateway's state machine: the only place where it decides what a run record becomes.

    change    allowed while                       the record becomes
    grant     QUEUED, RUNNING wanted, no lease    trainer, engines and fencing token set
    cancel    not ended (again: no change)        CANCELLED wanted; without a lease also CANCELLED
    pause     RUNNING wanted (again: no change)   PAUSED wanted: its trainer stops before the next
                                                  lap; QUEUED, it gets no lease
    resume    PAUSED wanted (again: no change)    RUNNING wanted
    abandon   CANCELLED wanted, and QUEUED        CANCELLED: the trainer never took it,
              or the trainer is gone for good     or is no more
    refuse    QUEUED, leased                      FAILED: the trainer refuses its spec

Every other phase is written by the trainer (`keel.record` draws them all). A lease ends with the
run: whoever is in the record of a run that has not ended is leased to it. Expiry and renewal of
leases belong here when they come.
"""

from __future__ import annotations

from dataclasses import replace

from keel.errors import StateError
from keel.record import Desired, Phase, RunRecord


def grant(
    record: RunRecord, *, trainer: str, engines: tuple[str, ...], fencing_token: int
) -> RunRecord:
    """Leases a trainer and engines to a run that waits for them."""
    if record.phase is not Phase.QUEUED or record.trainer or record.desired is not Desired.RUNNING:
        raise StateError(f"run {record.run!r} does not wait for a lease ({_state(record)})")
    return replace(record, trainer=trainer, engines=engines, fencing_token=fencing_token)


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


def _state(record: RunRecord) -> str:
    return f"phase {record.phase}, {record.desired} wanted, trainer {record.trainer or 'none'}"
