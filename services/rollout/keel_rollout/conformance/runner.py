"""Tries the rows one after another, and calls each by its outcome."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from keel.errors import InvalidField, KeelError
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel_rollout.conformance.catalogue import STAGES
from keel_rollout.conformance.client import connect
from keel_rollout.conformance.kit import Kit
from keel_rollout.conformance.reference import DTYPES, Model
from keel_rollout.conformance.verdicts import (
    NotRun,
    Number,
    Outcome,
    Row,
    Stage,
    Status,
    Unmet,
)

RUN = "conformance"
"""What runs of the kit are called, and a random end; such an engine is free to be taken again."""
SILENT_ROWS = 2
"""After so many rows in a row without an answer, the rest is not tried."""


@dataclass(frozen=True)
class Options:
    """How to try an engine."""

    address: str
    run: str
    token: int
    dtype: str | None = None
    """None: float32 if the engine has it, else its first."""
    shared: Path | None = None
    force: bool = False
    timeout_s: float = 120.0


@asynccontextmanager
async def kit_for(
    options: Options, model: Callable[[str], Model]
) -> AsyncIterator[tuple[Kit, pb.GetCapabilitiesResponse]]:
    """A kit on an engine that may be taken; InvalidField says why one may not.

    Args:
        model: makes the reference for a dtype; called once the engine has answered.
    """
    async with connect(options.address, options.run, options.token, options.timeout_s) as client:
        try:
            told = await client.capabilities()
        except grpc.aio.AioRpcError as error:
            raise InvalidField(
                "ENGINE",
                options.address,
                f"the address of a running engine ({error.code().name}: {error.details()})",
            ) from error
        held = told.run and not told.run.startswith(RUN) and told.run != options.run
        if held and not options.force:
            raise InvalidField(
                "ENGINE",
                options.address,
                f"an engine that no run holds; run {told.run!r} holds this one and would lose its "
                "model: --force takes it away",
            )
        dtype = _dtype(options, told.can)
        kit = Kit(client, told.can, model(dtype), dtype, options.shared)
        await _check_taken(kit)
        yield kit, told


def _dtype(options: Options, can: pb.EngineAbilities) -> str:
    offered = [name for name, code in DTYPES.items() if code in can.dtypes]
    if options.dtype is None and offered:
        return offered[0]
    if options.dtype not in offered:
        valid = ", ".join(offered) or "none: can.dtypes is empty, which is a fault of the engine"
        raise InvalidField("--dtype", options.dtype, valid)
    return options.dtype


async def _check_taken(kit: Kit) -> None:
    """LoadModel once, to see that the lease is good and the engine takes this model at all."""
    try:
        await kit.load()
    except grpc.aio.AioRpcError as error:
        if error.code() == grpc.StatusCode.PERMISSION_DENIED:
            token = kit.client.lease.fencing_token
            raise InvalidField("--token", token, f"a higher one: {error.details()}") from error
        raise InvalidField(
            "--model",
            kit.model.config.get("architectures"),
            f"one that the engine takes ({error.code().name}: {error.details()})",
        ) from error


async def trial(
    kit: Kit,
    chosen: Callable[[str], bool],
    before: Callable[[Stage, str], None],
    after: Callable[[Stage, list[Outcome]], None],
) -> list[Outcome]:
    """Tries every chosen row.

    Args:
        chosen: whether a row of this full name is wanted.
        before: told of each row, by its stage and full name, before it is tried.
        after: told of a stage's outcomes once it is over.
    """
    outcomes: list[Outcome] = []
    silent = 0
    for stage in STAGES:
        rows = [row for row in stage.rows if chosen(f"{stage.name}/{row.name}")]
        done: list[Outcome] = []
        entered = False
        for row in rows:
            outcome = Outcome(f"{stage.name}/{row.name}", row.proves, row.contract)
            before(stage, outcome.name)
            begin_s = time.perf_counter()
            if silent >= SILENT_ROWS:
                outcome.status = Status.NOT_RUN
                outcome.note = "the engine no longer answers"
            else:
                kit.stage = stage.name
                entered = await _try(kit, stage, row, outcome, entered=entered)
                silent = silent + 1 if "DEADLINE_EXCEEDED" in outcome.seen else 0
            outcome.seconds = time.perf_counter() - begin_s
            if outcome.status is Status.FAIL:
                kit.failed.add(outcome.name)
            done.append(outcome)
        if done:
            after(stage, done)
        outcomes += done
    return outcomes


async def _try(kit: Kit, stage: Stage, row: Row, outcome: Outcome, *, entered: bool) -> bool:
    """Fills in the outcome; returns whether the stage has been entered."""
    reason = row.claim(kit)
    if reason:
        outcome.status, outcome.note = Status.NOT_CLAIMED, reason
        return entered
    try:
        if not entered:
            await stage.enter(kit)
            entered = True
        found = await row.body(kit)
    except NotRun as why:
        outcome.status, outcome.note = Status.NOT_RUN, str(why)
    except Unmet as unmet:
        _fail(outcome, unmet.seen, unmet.valid)
    except grpc.aio.AioRpcError as error:
        _fail(outcome, f"{error.code().name}: {error.details()}", "an answer")
    except KeelError as error:  # bytes that are not what the contract says
        _fail(outcome, str(error), "what the contract says")
    else:
        outcome.numbers = [item for item in found if isinstance(item, Number)]
        outcome.note = "; ".join(item for item in found if isinstance(item, str))
        wrong = [number for number in outcome.numbers if not number.ok]
        if wrong:
            _fail(outcome, ", ".join(f"{n.what} {n.value:.2g}" for n in wrong), wrong[0].valid)
    if outcome.status is Status.FAIL:
        with contextlib.suppress(grpc.aio.AioRpcError):
            await kit.client.resume()  # a pause must not outlive its row
    return entered


def _fail(outcome: Outcome, seen: str, valid: str) -> None:
    outcome.status, outcome.seen, outcome.valid = Status.FAIL, seen, valid


def as_json(
    options: Options, told: pb.GetCapabilitiesResponse, kit: Kit, outcomes: list[Outcome]
) -> dict[str, Any]:
    """The whole trial as one object."""
    return {
        "engine": {
            "address": options.address,
            "kind": told.can.kind,
            "version": told.can.version,
            "device": told.can.device,
        },
        "architecture": kit.model.config["architectures"][0],
        "dtype": kit.model.a.dtype,
        "ok": passed(outcomes),
        "counts": counts(outcomes),
        "rows": [outcome.as_json() for outcome in outcomes],
    }


def counts(outcomes: list[Outcome]) -> dict[str, int]:
    """Rows by status."""
    return {str(s): sum(o.status is s for o in outcomes) for s in Status}


def passed(outcomes: list[Outcome]) -> bool:
    """Whether the engine may be trusted, as far as was tried: nothing failed, something passed."""
    status = [outcome.status for outcome in outcomes]
    return Status.FAIL not in status and Status.PASS in status
