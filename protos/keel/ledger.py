"""The ledger of a run: what it trained on, a line for each group, and whether that is right.

The trainer appends to RUN/ledger.jsonl and syncs it to disk before a checkpoint covers the step:

    {"kind": "opened", ...}      a training process took over, after this step
    {"kind": "group", ...}       a slot was used by a step; in the cold start, "demonstrations"
    {"kind": "checkpoint", ...}  everything up to this step survives a crash from now on

A process that takes over goes on from a checkpoint, and what was trained after that is trained
again: those lines no longer count. `audit` reads the lines so, and says what is lost, twice or
changed. It needs nothing but the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from keel.errors import WireError
from keel.queue import SlotKey

FILE = "ledger.jsonl"

Outcome = Literal["trained", "void", "dead"]


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class Opened(_Line):
    """A training process took over where a checkpoint stood, or at the beginning."""

    kind: Literal["opened"] = "opened"
    step: int
    """Optimizer steps done. Lines of later steps, above this one, no longer count."""
    cold_start_step: int
    """Supervised steps done, likewise."""
    off_policiness: int
    """N: steps of a lap."""
    groups_per_minibatch: int
    """B: groups of a step."""
    token: int
    """Fencing token of its lease."""
    at_s: float
    """Unix time, s."""


class Used(_Line):
    """A slot was used by a step: the groups of a lap in order, each once."""

    kind: Literal["group", "demonstrations"]
    step: int
    """Optimizer step, from 1; of demonstrations the supervised step."""
    attempt: int
    """Attempt of the run."""
    lap: int
    """The paper's global step, from 0; of demonstrations the supervised step, from 0."""
    slot: int
    """Place in the lap."""
    entry: str
    """Id of the entry in the stream."""
    xxh3: str
    """xxh3-64 of its envelope, 16 hexadecimal digits; empty where it could not be read."""
    outcome: Outcome = "trained"
    """Void: nothing in it could be trained on. Dead: it could not be read, see `keel.dead_letters`.
    """


class Checkpointed(_Line):
    """A checkpoint is on disk."""

    kind: Literal["checkpoint"] = "checkpoint"
    step: int
    """Optimizer steps that it covers."""
    cold_start_step: int
    """Supervised steps that it covers."""


Line = Opened | Used | Checkpointed

_LINE: TypeAdapter[Line] = TypeAdapter(Annotated[Line, Field(discriminator="kind")])


def encode(lines: Iterable[Line]) -> bytes:
    """Lines as they are in the file."""
    return b"".join(line.model_dump_json().encode() + b"\n" for line in lines)


def whole(data: bytes) -> bytes:
    """Without the line at the end that a crash has torn."""
    return data[: data.rfind(b"\n") + 1]


def parse(data: bytes) -> Iterator[Line]:
    """The lines of a file; a torn last one is passed over.

    Raises:
        WireError: a whole line is not as the trainer writes it.
    """
    for number, text in enumerate(whole(data).splitlines(), start=1):
        try:
            yield _LINE.validate_json(text)
        except ValidationError as error:
            what = error.errors(include_url=False)[0]
            place = ".".join(map(str, what["loc"]))
            raise WireError(f"ledger, line {number}: {place}: {what['msg']}") from error


def read(path: Path) -> list[Line]:
    """The lines of a ledger. Raises OSError, or WireError as `parse`."""
    return list(parse(path.read_bytes()))


@dataclass(slots=True)
class Audit:
    """What the lines add up to."""

    steps: int = 0
    """Optimizer steps done."""
    cold_start_steps: int = 0
    """Supervised steps done."""
    trained: int = 0
    """Groups trained on, each counted once."""
    void: int = 0
    """Slots with nothing to train on."""
    dead: int = 0
    """Slots given up as dead letters."""
    takeovers: int = 0
    """Training processes after the first."""
    again: int = 0
    """Groups that were trained on again because a crash had undone them."""
    lost: list[str] = field(default_factory=list)
    """Slots that a step should have used and did not."""
    twice: list[str] = field(default_factory=list)
    """Slots and entries that count in two places."""
    changed: list[str] = field(default_factory=list)
    """Slots that had other bytes when they were trained on again."""

    @property
    def problems(self) -> list[str]:
        """Everything that should not be."""
        return [*self.lost, *self.twice, *self.changed]

    def __str__(self) -> str:
        return (
            f"{self.steps} steps, {self.trained} groups trained on, {self.void} void, {self.dead} "
            f"dead letters; {self.takeovers} takeovers, {self.again} groups again after a crash; "
            f"{len(self.lost)} lost, {len(self.twice)} twice, {len(self.changed)} changed"
        )


def counting(lines: Iterable[Line]) -> tuple[list[Used], list[Used]]:
    """The slots that the weights are made of, in order; and those that a crash has undone."""
    count: list[Used] = []
    undone: list[Used] = []
    for line in lines:
        if isinstance(line, Used):
            count.append(line)
        elif isinstance(line, Opened):
            stays = [
                used.step <= (line.step if used.kind == "group" else line.cold_start_step)
                for used in count
            ]
            undone += [used for used, there in zip(count, stays, strict=True) if not there]
            count = [used for used, there in zip(count, stays, strict=True) if there]
    return count, undone


def audit(lines: Iterable[Line]) -> Audit:
    """Checks that every step used its slots, each slot once, and again with the same bytes only.

    Example:
        audit(read(Path("runs/jobs/demo-x1/ledger.jsonl"))).problems == []
    """
    lines = list(lines)
    opened = [line for line in lines if isinstance(line, Opened)]
    if not opened:
        return Audit(lost=["the line that says how the run began"]) if lines else Audit()
    count, undone = counting(lines)
    result = Audit(takeovers=len(opened) - 1)
    groups = [used for used in count if used.kind == "group"]
    demonstrations = [used for used in count if used.kind == "demonstrations"]
    outcomes = [used.outcome for used in groups]
    result.trained, result.void, result.dead = (
        outcomes.count(outcome) for outcome in ("trained", "void", "dead")
    )
    # what a checkpoint covers was done, whether or not a line tells of it
    covered = [line for line in lines if not isinstance(line, Used)]
    result.steps = max(line.step for line in [*covered, *groups])
    result.cold_start_steps = max(
        [line.cold_start_step for line in covered] + [used.step for used in demonstrations]
    )
    due = {("group", step, *place) for step, place in _places(opened[0], result.steps)}
    due |= {("demonstrations", step + 1, step, 0) for step in range(result.cold_start_steps)}
    there = [(used.kind, used.step, used.lap, used.slot) for used in count]
    result.lost = [_told(*place) + " is missing" for place in sorted(due - set(there))]
    result.twice = [_told(*place) + " was not due" for place in sorted(set(there) - due)]
    result.twice += _repeated(count)
    first = {(used.kind, _slot(used)): used.xxh3 for used in reversed(undone)}
    for used in count:
        before = first.get((used.kind, _slot(used)))
        if before is None:
            continue
        result.again += used.kind == "group"
        if before != used.xxh3:
            place = _told(used.kind, used.step, used.lap, used.slot)
            result.changed.append(f"{place} had bytes {before or '?'}, then {used.xxh3 or '?'}")
    return result


def _places(recipe: Opened, steps: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """(step, (lap, slot)) of every group that `steps` steps use."""
    size = recipe.groups_per_minibatch
    for step in range(steps):
        lap, index = divmod(step, recipe.off_policiness)
        for slot in range(index * size, (index + 1) * size):
            yield step + 1, (lap, slot)


def _repeated(count: Iterable[Used]) -> Iterator[str]:
    """Slots, and entries, that stand in two lines which count."""
    slots: set[tuple[str, SlotKey]] = set()
    entries: set[tuple[str, str]] = set()
    for used in count:
        place = _told(used.kind, used.step, used.lap, used.slot)
        if (slot := (used.kind, _slot(used))) in slots:
            yield f"{place} was used before"
        elif (entry := (used.kind, used.entry)) in entries:
            yield f"{place} came from entry {used.entry}, which was used before"
        else:
            entries.add(entry)
        slots.add(slot)


def _slot(used: Used) -> SlotKey:
    return SlotKey(used.attempt, used.lap, used.slot)


def _told(kind: str, step: int, lap: int, slot: int) -> str:
    if kind == "demonstrations":
        return f"supervised step {step}"
    return f"step {step}, slot {lap}/{slot}"
