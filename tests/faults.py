"""The fault table: faults on every process, connection and clock of a running job, seeded.

`make faults` runs it whole. Each run has the job of the undisturbed one and must end with its final
weights, bit for bit; by its ledger no group is lost or trained twice; nothing is left in the queue
or the blob store. Printed: fault, on whom, count, survived, longest recovery; groups.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from disturbed import FAULTS, MEANING, NAMED, Disturbed, Fault, patiently
from jobs import FINAL, Jobs, job_spec, model_bytes, taught_model

from keel.ledger import Audit

RECOVERY_S, CLEAN_S = 300.0, 60.0
ENGINES: Mapping[str, dict[str, Any]] = {
    "torch": {"quantize": "fp8"},
    "vllm": {"kind": "vllm", "dtype": "bfloat16", "quantize": "none"},
}
"""[engine] of the job, by kind. vLLM does not repeat its bits: its runs are only audited."""
OPENING = "grant-start"
"""The moment that comes before everything else of a run."""
CLOSING = "end-blobs"
"""The one that comes when it is over."""
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "faults.json"


@dataclass
class Table:
    """What was done, and how long it took until the job moved again."""

    inflicted: Counter[Fault] = field(default_factory=Counter)
    recoveries_s: dict[Fault, list[float]] = field(default_factory=lambda: defaultdict(list))
    repeats: bool = True
    """Weights were compared."""
    audits: list[Audit] = field(default_factory=list)
    """Of each run that ended as it should."""

    def __str__(self) -> str:
        rows = [
            f"{'fault':15} {'on':17} {'count':>5} {'survived':>8} {'recovery':>9} {'longest':>8}"
        ]
        for fault in sorted(self.inflicted):
            times = self.recoveries_s[fault]
            rows.append(
                f"{fault.kind:15} {fault.victim:17} {self.inflicted[fault]:5} {len(times):8} "
                f"{median(times) if times else 0:7.1f} s {max(times, default=0):6.1f} s"
                + (f"   {MEANING[fault.kind]}" if fault.kind in MEANING else "")
            )
        survived = sum(map(len, self.recoveries_s.values()))
        rows.append(f"{'all':33} {self.inflicted.total():5} {survived:8}")
        rows.append(
            f"{len(self.audits)} runs ended "
            + ("with the undisturbed run's weights, bit for bit" if self.repeats else "whole")
            + f"; by their ledgers {sum(a.trained + a.void for a in self.audits)} groups: "
            f"{sum(len(a.lost) for a in self.audits)} lost, "
            f"{sum(len(a.twice) for a in self.audits)} trained twice, "
            f"{sum(a.again for a in self.audits)} trained again after a crash had undone them"
        )
        return "\n".join(rows)

    def to_json(self) -> dict[str, Any]:
        """As benchmarks keep it."""
        return {
            "runs": len(self.audits),
            "faults": [
                {
                    "fault": fault.kind,
                    "on": fault.victim,
                    "count": count,
                    "survived": len(self.recoveries_s[fault]),
                    "recovery_s": {
                        "median": round(median(self.recoveries_s[fault]), 2),
                        "longest": round(max(self.recoveries_s[fault]), 2),
                    },
                }
                for fault, count in sorted(self.inflicted.items())
            ],
            "groups": {
                "trained": sum(a.trained for a in self.audits),
                "void": sum(a.void for a in self.audits),
                "lost": sum(len(a.lost) for a in self.audits),
                "twice": sum(len(a.twice) for a in self.audits),
                "again": sum(a.again for a in self.audits),
            },
        }


def fault_job(model: dict[str, Any], laps: int, engine: str) -> dict[str, Any]:
    """A job that is long enough to be hurt many times; a checkpoint at every lap."""
    return job_spec(
        name="faults",
        model=model,
        engine=ENGINES[engine],
        recipe={"steps": 4 * laps},
        evaluation={"every": 20, "samples": 16},
    )


def disturbed_run(
    disturbed: Disturbed,
    spec: dict[str, Any],
    faults: Sequence[Fault],
    seed: int,
    table: Table,
    say: Callable[[str], None],
) -> bytes:
    """Runs the job with `faults` inflicted at random moments; returns its final weights."""
    chance = random.Random(seed)
    opening = [fault for fault in faults if fault.kind == OPENING]
    closing = [fault for fault in faults if fault.kind == CLOSING]
    job = begun(disturbed, spec, opening[:1], table, say)
    for fault in faults:
        if fault.kind in (OPENING, CLOSING):
            continue
        time.sleep(chance.uniform(0.2, 3.0))
        before = progress(disturbed.jobs, job)
        assert before[0] not in FINAL, "the job is too short for its faults"
        began = time.monotonic()
        if not disturbed.inflict(fault, job, chance):
            continue
        if fault.kind in NAMED:  # until that moment came, the job went on
            began = time.monotonic()
        if fault.kind in NAMED or fault.kind == "SIGKILL":  # a last step may just have been told
            before = progress(disturbed.jobs, job)
        after_s = moved_on(disturbed.jobs, job, before, began, fault, table)
        say(f"  {fault.kind}, {fault.victim}: moved on after {after_s:.1f} s")
    for fault in closing[:1]:
        disturbed.arm(fault)
    state = disturbed.jobs.wait(job, timeout_s=600)
    assert state["phase"] == "SUCCEEDED", state["error"]
    for fault in closing[:1]:
        disturbed.wait_until_reached(fault)
        table.inflicted[fault] += 1
    after_s = cleaned_up(disturbed, job)
    for fault in closing[:1]:
        table.recoveries_s[fault].append(after_s)
        say(f"  {fault.kind}, {fault.victim}: cleaned up after {after_s:.1f} s")
    check_books(disturbed, job, spec["recipe"]["steps"], table)
    return model_bytes(state)


def begun(
    disturbed: Disturbed,
    spec: dict[str, Any],
    opening: Sequence[Fault],
    table: Table,
    say: Callable[[str], None],
) -> str:
    """The job, submitted; with `opening`, the gateway dies between its lease and its start."""
    for fault in opening:
        disturbed.arm(fault)
    began = time.monotonic()
    try:
        job = disturbed.jobs.submit(spec)
    except Exception:
        if not opening:
            raise
        listed: Any = patiently(lambda: disturbed.jobs.named(spec["name"]), RECOVERY_S)
        job = listed[0] if listed else disturbed.jobs.submit(spec)
    for fault in opening:
        disturbed.wait_until_reached(fault)
        after_s = moved_on(disturbed.jobs, job, ("QUEUED", 0, 0, None), began, fault, table)
        say(f"  {fault.kind}, {fault.victim}: moved on after {after_s:.1f} s")
    return job


def moved_on(
    jobs: Jobs, job: str, before: tuple[Any, ...], began: float, fault: Fault, table: Table
) -> float:
    """Seconds from `began` until the job is further than `before`."""
    table.inflicted[fault] += 1
    while progress(jobs, job) == before:
        assert time.monotonic() - began < RECOVERY_S, f"{fault}: the job stands still"
        time.sleep(0.1)
    table.recoveries_s[fault].append(time.monotonic() - began)
    return table.recoveries_s[fault][-1]


def cleaned_up(disturbed: Disturbed, job: str) -> float:
    """Seconds until a run that is over has left nothing: its phase is told before."""
    began = time.monotonic()
    while left := disturbed.left(job):
        assert time.monotonic() - began < CLEAN_S, f"left behind: {left}"
        time.sleep(0.1)
    return time.monotonic() - began


def check_books(disturbed: Disturbed, job: str, steps: int, table: Table) -> None:
    """The run has used every group once."""
    audit = disturbed.audit(job)
    assert not audit.problems, audit.problems
    assert (audit.steps, audit.dead) == (steps, 0), str(audit)
    table.audits.append(audit)


def progress(jobs: Jobs, job: str) -> tuple[Any, ...]:
    """What changes as a job gets on; waits for a gateway that is away."""
    state: Any = patiently(lambda: jobs.get(job), RECOVERY_S)
    return tuple(state[key] for key in ("phase", "cold_start_step", "step", "policy_version"))


def hands(
    runs: int, per_run: int, chance: random.Random, engine: str = "torch"
) -> list[list[Fault]]:
    """Faults by run: every kind about equally often, in random order; an opening comes first."""
    deck: list[Fault] = []
    known = [fault for fault in FAULTS if engine == "torch" or fault.kind != "apply-probe"]
    while len(deck) < runs * per_run:
        deck += chance.sample(known, len(known))
    openings = [fault for fault in deck[: runs * per_run] if fault.kind == OPENING][:runs]
    others = [fault for fault in deck if fault.kind != OPENING]
    dealt = [openings[run : run + 1] for run in range(runs)]
    for hand in dealt:
        hand += [others.pop(0) for _ in range(per_run - len(hand))]
    chance.shuffle(dealt)
    return dealt


def fault_table(
    dealt: Sequence[Sequence[Fault]],
    laps: int,
    seed: int,
    say: Callable[[str], None],
    engine: str = "torch",
) -> Table:
    """A run for each hand of faults; AssertionError at the first loss, with the table so far."""
    chance, table = random.Random(seed), Table(repeats=engine == "torch")
    with tempfile.TemporaryDirectory(prefix="keel-faults-") as folder:
        disturbed = Disturbed(Path(folder), engine)
        try:
            spec = fault_job(taught_model(disturbed.jobs, ENGINES[engine]), laps, engine)
            undisturbed = model_bytes(disturbed.jobs.run(spec)) if table.repeats else b""
            say("begins to disturb")
            for run, faults in enumerate(dealt, start=1):
                say(f"run {run} of {len(dealt)}")
                weights = disturbed_run(
                    *(disturbed, spec | {"name": f"faults-{run}"}, faults),
                    *(chance.randrange(2**32), table, say),
                )
                assert weights == undisturbed or not table.repeats, (
                    f"run {run} ended with other weights"
                )
        except AssertionError as error:
            raise AssertionError(f"{error}\n{table}") from error
        finally:
            disturbed.close()
    return table


def main() -> None:
    """The whole table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--faults", type=int, default=11, help="faults a run")
    parser.add_argument("--laps", type=int, default=150, help="laps a run")
    parser.add_argument("--engine", choices=ENGINES, default="torch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help=f"JSON of the table, such as {RESULTS}")
    args = parser.parse_args()
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s {text}", flush=True)

    dealt = hands(args.runs, args.faults, random.Random(args.seed), args.engine)
    table = fault_table(dealt, args.laps, args.seed, say, args.engine)
    print(table)
    if args.save:
        args.save.write_text(json.dumps(table.to_json(), indent=2) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
