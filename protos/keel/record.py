"""The run record: the truth about a run, a Redis hash at `keel.queue.run_key`.

Each field has one writer. Readers take the whole hash.

    QUEUED -> PREPARING -> COLD_START -> TRAINING -> FINISHING -> SUCCEEDED
       \\__________\\____________\\___________\\___________\\-----> FAILED | CANCELLED
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from keel.errors import WireError
from keel.spec import RunSpec, parse_spec


class Phase(StrEnum):
    """Where a run stands. Names are those of keel.trainer.v1.RunPhase."""

    QUEUED = "QUEUED"
    PREPARING = "PREPARING"
    COLD_START = "COLD_START"
    TRAINING = "TRAINING"
    FINISHING = "FINISHING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def final(self) -> bool:
        """The run is over."""
        return self in (Phase.SUCCEEDED, Phase.FAILED, Phase.CANCELLED)


class Desired(StrEnum):
    """What its user wants of a run."""

    RUNNING = "RUNNING"
    PAUSED = "PAUSED"
    CANCELLED = "CANCELLED"


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run. `None` and empty mean not written yet."""

    run: str
    """Run id. Writer: gateway, like spec, created_s, desired (also the trainer, on PauseRun,
    ResumeRun and CancelRun) and the leases below."""
    spec: RunSpec
    created_s: float
    """Unix time of the submission, s."""
    desired: Desired = Desired.RUNNING
    trainer: str = ""
    """Address of the leased trainer; empty while QUEUED."""
    engines: tuple[str, ...] = ()
    """Addresses of the leased engines."""
    engine_kinds: Mapping[str, str] = field(default_factory=dict)
    """Kind of each engine that was ever leased to it, by address."""
    fencing_token: int = 0
    """Token of the trainer's lease."""
    engine_token: int = 0
    """Token of the engines' leases; grows whenever an engine joins. Goes with every call that
    changes an engine."""
    draining: tuple[str, ...] = ()
    """Those of `engines` that are to be emptied and given back."""
    drained: tuple[str, ...] = ()
    """Writer: collector. Those of `draining` that have nothing of this run in flight. The gateway
    drops those that leave or join."""
    phase: Phase = Phase.QUEUED
    """Writer: trainer, once StartRun was taken; the gateway before. So are all fields below."""
    attempt: int = 0
    folder: str = ""
    """Folder of its ledger, checkpoints and final model, on the trainer's disk."""
    artifact: str = ""
    """Folder of the base artifact (config, tokenizer, weights) on the shared volume."""
    policy_version: int | None = None
    """Newest version that is published and proved."""
    proved: Mapping[str, int] = field(default_factory=dict)
    """By engine address: the version that it was last proved to serve, by hash and probe. The
    gateway drops an engine's entry, here and below, when it leaves and when it joins."""
    stale: Mapping[str, str] = field(default_factory=dict)
    """By engine address: why what it computes is not what it was sent, with the numbers."""
    step: int = 0
    """Optimizer steps done, cold start not counted."""
    cold_start_step: int = 0
    """Supervised steps done."""
    started_s: float | None = None
    """Unix time when the trainer took it, s."""
    paused: bool = False
    """It has stopped because PAUSED is wanted, and computes nothing until RUNNING is."""
    trouble: str = ""
    """Why it stands still, as long as it does: a full disk, say."""
    finished_s: float | None = None
    """Unix time of the end, s."""
    model: str = ""
    """Folder of the final model."""
    error: str = ""
    """Why it FAILED."""
    collector_error: str = ""
    """Writer: collector. Why it cannot go on; the trainer then fails the run."""
    queue_full: str = ""
    """Writer: collector. Why it holds back the next group, with the numbers; the trainer then
    checkpoints and acknowledges what it can. Empty when it goes on."""

    def to_hash(self) -> dict[str, str]:
        """Every field, for the first writing of a record."""
        return {
            "spec": self.spec.model_dump_json(),
            **pack_fields(
                created_s=self.created_s,
                desired=self.desired,
                trainer=self.trainer,
                engines=self.engines,
                fencing_token=self.fencing_token,
                engine_token=self.engine_token,
                phase=self.phase,
                attempt=self.attempt,
                step=self.step,
            ),
        }

    @classmethod
    def from_hash(cls, run: str, raw: Mapping[bytes, bytes]) -> RunRecord:
        """The record, or WireError naming the field that is not as written by Keel.

        Fields that only a newer writer knows are passed over.
        """
        values = {key.decode(): value.decode() for key, value in raw.items()}
        for required in ("spec", "created_s"):
            if required not in values:
                raise WireError(f"run record {run!r} has no {required}")
        known: dict[str, object] = {}
        try:
            known["spec"] = parse_spec(json.loads(values.pop("spec")))
            for name, parse in _PARSERS.items():
                if name in values:
                    known[name] = parse(values.pop(name))
        except ValueError as error:
            raise WireError(f"run record {run!r}: {error}") from error
        return cls(run=run, **known)  # type: ignore[arg-type]


_PARSERS: dict[str, Callable[[str], object]] = {
    "created_s": float,
    "desired": Desired,
    "trainer": str,
    "engines": lambda text: tuple(json.loads(text)),
    "engine_kinds": json.loads,
    "fencing_token": int,
    "engine_token": int,
    "draining": lambda text: tuple(json.loads(text)),
    "drained": lambda text: tuple(json.loads(text)),
    "proved": json.loads,
    "stale": json.loads,
    "phase": Phase,
    "attempt": int,
    "folder": str,
    "artifact": str,
    "policy_version": int,
    "step": int,
    "cold_start_step": int,
    "paused": lambda text: text == str(True),
    "started_s": float,
    "trouble": str,
    "finished_s": float,
    "model": str,
    "error": str,
    "collector_error": str,
    "queue_full": str,
}


def pack_fields(**fields: object) -> dict[str, str]:
    """Some fields as hash values: what a writer hands to HSET.

    Example:
        pack_fields(phase=Phase.TRAINING, engines=("a:1",))
        == {"phase": "TRAINING", "engines": '["a:1"]'}
    """
    unknown = fields.keys() - _PARSERS.keys()
    assert not unknown, f"not fields of a run record: {unknown}"
    return {
        name: json.dumps(value) if isinstance(value, (tuple, Mapping)) else str(value)
        for name, value in fields.items()
    }
