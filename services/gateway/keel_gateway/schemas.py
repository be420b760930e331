"""What the REST interface answers with."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Self

from google.protobuf.json_format import MessageToDict
from pydantic import BaseModel, ConfigDict, Field

from keel.checkpoints import CheckpointInfo
from keel.dead_letters import DeadLetter
from keel.fleet import EngineState
from keel.metrics import COLUMNS
from keel.record import Desired, Phase, RunRecord
from keel.rollout.v1 import rollout_service_pb2
from keel.samples import Sample
from keel.spec import RunSpec
from keel_gateway.registry import Engine as EnginePeer


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class Job(_Answer):
    """A run, as its record says."""

    id: str
    """The spec's name and a random ending."""
    name: str
    """The spec's name."""
    phase: Phase
    """Where it stands."""
    desired: Desired
    """What its user wants of it."""
    paused: bool
    """It stands still because its user wants so; between the wish and this it finishes a lap."""
    reason: str
    """What it waits for (an engine, an answer of its trainer, its start or stop), or which of its
    engines serve nothing, and why; else empty."""
    spec: RunSpec
    """What was submitted, defaults filled in."""
    created_at: datetime
    """When it was submitted."""
    started_at: datetime | None
    """When its trainer took it."""
    finished_at: datetime | None
    """When it ended."""
    step: int
    """Optimizer steps done, cold start not counted."""
    steps: int
    """Optimizer steps in all."""
    cold_start_step: int
    """Supervised steps done."""
    cold_start_steps: int
    """Supervised steps in all."""
    policy_version: int | None
    """Newest version published."""
    attempt: int
    """Grows with each deliberate rollback."""
    trainer: str
    """Leased trainer; empty before."""
    engines: list[str]
    """Leased engines."""
    engine_kinds: dict[str, str]
    """Kind of each engine that it has or had, by address."""
    engine_states: dict[str, EngineState]
    """State of each that it has, by address: JOINING (has not yet proved that it serves the newest
    version), READY, DRAINING, STALE or LOST. Empty once the job is over."""
    artifact: str
    """Folder of the base model, on the trainer's disk."""
    folder: str = ""
    """Folder of its checkpoints and its ledger, on the trainer's disk."""
    model: str
    """Folder of the final model, on the trainer's disk."""
    error: str
    """Why it failed."""
    dead_letters: int = 0
    """Groups and demonstrations that its trainer could not read and gave up."""

    @classmethod
    def from_record(
        cls,
        record: RunRecord,
        reason: str,
        engine_states: Mapping[str, EngineState],
        dead_letters: int = 0,
    ) -> Self:
        """The job of a record."""
        spec = record.spec
        return cls(
            id=record.run,
            name=spec.name,
            phase=record.phase,
            desired=record.desired,
            paused=record.desired is Desired.PAUSED
            and not record.phase.final
            and (record.paused or not record.trainer),
            reason=reason,
            spec=spec,
            created_at=datetime.fromtimestamp(record.created_s, UTC),
            started_at=_time(record.started_s),
            finished_at=_time(record.finished_s),
            step=record.step,
            steps=spec.recipe.steps,
            cold_start_step=record.cold_start_step,
            cold_start_steps=spec.cold_start.steps,
            policy_version=record.policy_version,
            attempt=record.attempt,
            trainer=record.trainer,
            engines=list(record.engines),
            engine_kinds=dict(record.engine_kinds),
            engine_states=dict(engine_states),
            artifact=record.artifact,
            folder=record.folder,
            model=record.model,
            error=record.error or record.collector_error,
            dead_letters=dead_letters,
        )


class JobList(_Answer):
    """Jobs, the last submitted first."""

    jobs: list[Job]
    """At most `limit`."""


class Metrics(_Answer):
    """Metric rows of a job."""

    rows: list[dict[str, float | int | None]] = Field(
        description="One a step, ascending; null where a value was not finite. Step 0 has only an "
        "evaluation. Columns:\n\n" + "\n".join(f"- `{k}`: {v}" for k, v in COLUMNS.items())
    )
    evaluation: dict[str, float | int | None] | None
    """The newest evaluation, whatever `after` is: it arrives later than the row of its step."""


class CheckpointList(_Answer):
    """Checkpoints of a job."""

    checkpoints: list[CheckpointInfo]
    """Those that exist, the oldest first; `checkpoint.keep` of the spec are kept."""


class Samples(_Answer):
    """Samples of a job."""

    samples: list[Sample]
    """By step, slot and sample, ascending; all of a step's, or none."""


class DeadLetterList(_Answer):
    """What a job's trainer gave up."""

    dead_letters: list[DeadLetter]
    """In the order of slots."""


class LedgerLap(_Answer):
    """What a lap was made of."""

    lap: int | None
    """From 0; null: the cold start, whose groups are batches of demonstrations."""
    first_step: int | None
    """First of its steps; null, like the next, where only an attempt that a crash has undone is
    known."""
    last_step: int | None
    """Last of them so far."""
    trained: int
    """Groups trained on."""
    void: int
    """Slots with nothing to train on."""
    dead: int
    """Slots given up as dead letters."""
    again: int
    """Groups of it that were trained on again because a crash had undone them."""
    takeovers: int
    """Training processes that began, or went on, in it."""
    checkpoint: bool
    """One was written at its end, or in the cold start."""


class Ledger(_Answer):
    """What a job's weights are made of: an audit of the ledger that its trainer has written."""

    path: str
    """The file."""
    steps: int
    """Optimizer steps done."""
    cold_start_steps: int
    """Supervised steps done."""
    trained: int
    """Groups trained on, each counted once."""
    void: int
    """Slots with nothing to train on."""
    dead: int
    """Slots given up as dead letters."""
    takeovers: int
    """Training processes after the first."""
    again: int
    """Groups that were trained on again because a crash had undone them."""
    lost: list[str]
    """Slots that a step should have used and did not. Empty, like the next two, if all is well."""
    twice: list[str]
    """Slots and entries that count in two places."""
    changed: list[str]
    """Slots that had other bytes when they were trained on again."""
    verdict: str
    """In a sentence: 960 groups trained, 0 lost, 0 twice."""
    laps: list[LedgerLap]
    """The cold start, if there was one, then every lap."""

    @property
    def problems(self) -> list[str]:
        """Everything that should not be."""
        return [*self.lost, *self.twice, *self.changed]


class Engine(_Answer):
    """A rollout engine, as last seen."""

    address: str
    """Its gRPC address."""
    healthy: bool
    """It answers and is SERVING."""
    problem: str
    """Why it is not healthy; else empty."""
    kind: str | None
    """"torch", "vllm", ...; null before its first answer, like the next two."""
    state: str | None
    """What it says of itself: EMPTY, LOADED, READY, PAUSED or STALE."""
    capabilities: dict[str, Any] | None
    """keel.rollout.v1.GetCapabilitiesResponse in protobuf's JSON."""
    last_seen_at: datetime | None
    """When it last answered."""
    run: str | None
    """Job that it is leased to."""
    run_state: str
    """What it is to that job: JOINING, READY, DRAINING, STALE or LOST; without one FREE, DRAINED
    (no job gets it until it is undrained) or LOST."""
    proved_version: int | None
    """Policy version that it was last proved to serve, by hash and probe."""
    stale: str
    """Why it is STALE, with the numbers; else empty."""

    @classmethod
    def from_peer(cls, engine: EnginePeer, record: RunRecord | None, run_state: str) -> Self:
        """The engine as the registry has it, and the record of the job that leases it."""
        said = engine.capabilities
        states = rollout_service_pb2.EngineState
        return cls(
            address=engine.address,
            healthy=engine.healthy,
            problem=engine.problem,
            kind=said.can.kind if said else None,
            state=states.Name(said.state).removeprefix("ENGINE_STATE_") if said else None,
            capabilities=MessageToDict(said, preserving_proto_field_name=True) if said else None,
            last_seen_at=_time(engine.last_seen_s),
            run=record.run if record else None,
            run_state=run_state,
            proved_version=record.proved.get(engine.address) if record else None,
            stale=record.stale.get(engine.address, "") if record else "",
        )


class EngineList(_Answer):
    """Every engine that the gateway was told of."""

    engines: list[Engine]
    """In the order of KEEL_ENGINES."""


class Health(_Answer):
    """The gateway is well."""

    status: str = "ok"
    """Always "ok"; what is not, is a problem."""


class Readiness(Health):
    """A job could run now."""

    notes: list[str] = []
    """What has happened since the gateway began and its operator should know: that Redis has lost
    its data, say."""


def _time(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
