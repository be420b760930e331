"""A run's ledger lap by lap: what each was made of, what was done again, where checkpoints are."""

from __future__ import annotations

import asyncio
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from keel.errors import KeelError, NotFound, StateError, WireError
from keel.ledger import FILE, Audit, Checkpointed, Line, Opened, Used, audit, counting, read
from keel.record import Phase, RunRecord
from keel_gateway.schemas import Ledger, LedgerLap

_one_at_a_time = asyncio.Semaphore(1)


def view(lines: Iterable[Line], path: str) -> Ledger:
    """The whole of it, as it is told."""
    lines = list(lines)
    found = audit(lines)
    return Ledger(
        path=path,
        steps=found.steps,
        cold_start_steps=found.cold_start_steps,
        trained=found.trained,
        void=found.void,
        dead=found.dead,
        takeovers=found.takeovers,
        again=found.again,
        lost=found.lost,
        twice=found.twice,
        changed=found.changed,
        verdict=verdict(found),
        laps=laps(lines),
    )


def verdict(found: Audit) -> str:
    """The audit in a sentence.

    Example:
        "960 groups trained, 0 lost, 0 twice"
    """
    told = f"{found.trained} groups trained, {len(found.lost)} lost, {len(found.twice)} twice"
    return f"{told}, {len(found.changed)} changed" if found.changed else told


def laps(lines: Sequence[Line]) -> list[LedgerLap]:
    """The cold start, if there was one, then every lap, ascending."""
    opened = [line for line in lines if isinstance(line, Opened)]
    if not opened:
        return []
    count, undone = counting(lines)
    steps_a_lap = opened[0].off_policiness
    used: dict[int | None, list[Used]] = defaultdict(list)
    again: dict[int | None, set[tuple[int, int]]] = defaultdict(set)
    for line in count:
        used[_lap(line)].append(line)
    for line in undone:
        again[_lap(line)].add((line.lap, line.slot))
    resumed: dict[int | None, int] = defaultdict(int)
    for one in opened[1:]:
        resumed[None if _in_cold_start(one, count) else one.step // steps_a_lap] += 1
    covered = {
        None if line.step == 0 else (line.step - 1) // steps_a_lap
        for line in lines
        if isinstance(line, Checkpointed)
    }
    found = []
    for lap in sorted({*used, *again, *resumed}, key=lambda lap: -1 if lap is None else lap):
        outcomes = [line.outcome for line in used[lap]]
        steps = [line.step for line in used[lap]]
        there = {(line.lap, line.slot) for line in used[lap]}
        found.append(
            LedgerLap(
                lap=lap,
                first_step=min(steps, default=None),
                last_step=max(steps, default=None),
                trained=outcomes.count("trained"),
                void=outcomes.count("void"),
                dead=outcomes.count("dead"),
                again=len(again[lap] & there),
                takeovers=resumed[lap],
                checkpoint=lap in covered,
            )
        )
    return found


async def of_run(record: RunRecord) -> Ledger:
    """The ledger of a run, where its trainer's disk is seen from here.

    Read in a process of its own: a long run's takes many seconds and much memory.

    Raises:
        NotFound: it is not seen, or not begun; the message says where it is.
        StateError: it is not what a trainer writes.
    """
    if not record.folder:
        raise NotFound(f"run {record.run!r} has no ledger yet: no trainer has begun it")
    path = Path(record.folder) / FILE
    if not path.is_file():
        raise _not_there(path, f"the ledger of run {record.run!r} is on its trainer's disk")
    found = Ledger.model_validate_json(await _audited(path))
    done, asked = found.steps, record.spec.recipe.steps
    if record.phase is Phase.SUCCEEDED and done < asked:
        missing = f"steps {done + 1} to {asked} are missing"
        verdict = f"{found.verdict}; {missing}"
        found = found.model_copy(update={"lost": [*found.lost, missing], "verdict": verdict})
    return found


async def _audited(path: Path) -> bytes:
    """What `main` prints of a ledger. One at a time: each takes a core."""
    async with _one_at_a_time:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "keel_gateway.ledger_view", str(path)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            out, err = await process.communicate()
        finally:
            if process.returncode is None:  # whoever asked has gone
                process.kill()
                await process.wait()
        if process.returncode:
            raise StateError(err.decode(errors="replace").strip().rpartition("\n")[2])
        return out


def main(argv: Sequence[str]) -> int:
    """Prints a ledger as JSON, or one line that says why not."""
    try:
        found = of_file(Path(argv[0]))
    except KeelError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(found.model_dump_json())
    return 0


def of_file(path: Path) -> Ledger:
    """The ledger in a file. Errors as `of_run`."""
    try:
        return view(read(path), str(path))
    except FileNotFoundError as error:
        raise _not_there(path, "the ledger is elsewhere") from error
    except OSError as error:
        raise NotFound(f"{path} cannot be read here: {error.strerror}") from error
    except WireError as error:
        raise StateError(f"{path}: {error}") from error


def _not_there(path: Path, what: str) -> NotFound:
    look = f"Where it is: keel ledger {path}"
    return NotFound(f"{what}: {path} is not there on this machine. {look}")


def _lap(line: Used) -> int | None:
    return line.lap if line.kind == "group" else None


def _in_cold_start(opened: Opened, count: Sequence[Used]) -> bool:
    supervised = sum(line.kind == "demonstrations" for line in count)
    return opened.cold_start_step < supervised


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
