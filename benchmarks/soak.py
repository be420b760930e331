"""The soak: the whole stack at full rate, and whether any process grows.

`make soak` (ten minutes; `--minutes`). One long run of the tiny job, most of its groups by way of
the blob store, a checkpoint at every lap. Every two seconds: the memory that each process has
written, Redis's data, bytes on disk. After warm-up each must be flat within its bound, or the
exit status is 1. Writes benchmarks/results/soak.json and docs/assets/soak.svg. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import redis

from keel.ledger import FILE, audit, read
from keel_gateway.stack import Stack

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from jobs import FINAL, Jobs, job_spec, taught_model
from soak_figure import figure

RESULTS = Path(__file__).parent / "results" / "soak.json"
FIGURE = Path(__file__).parents[1] / "docs" / "assets" / "soak.svg"
EVERY_S = 2.0
WARM_UP = 0.25
"""Share of the time in which caches fill, arenas find their size and nothing is judged."""
LEAST_BOUND_BYTES, BOUND_SHARE = 8 * 2**20, 0.03
"""Most that a process may grow in the time that is judged: the larger of these."""
STEP_BYTES = 6 * 1024
"""Most that Redis may keep of a step: its row of metrics, the fingerprint of its version, samples
of some laps. It is the run's history, which is kept."""
DATA = "Redis, data"
SERVICES = ("engine-0", "collector", "trainer", "gateway", "redis")
INLINE_LIMIT = "2KiB"
MIB = 2**20


@dataclass
class Series:
    """One quantity over time."""

    unit: str
    at_s: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, at_s: float, value: float) -> None:
        """A sample."""
        self.at_s.append(at_s)
        self.values.append(value)

    def after(self, begin_s: float) -> Series:
        """The samples from `begin_s` on."""
        kept = [pair for pair in zip(self.at_s, self.values, strict=True) if pair[0] >= begin_s]
        return Series(self.unit, [at for at, _ in kept], [value for _, value in kept])

    def slope(self) -> float:
        """Per second, robust: the median over all pairs of samples (Theil-Sen)."""
        points = list(zip(self.at_s, self.values, strict=True))
        slopes = [(b - a) / (t - s) for (s, a), (t, b) in combinations(points, 2) if t > s]
        return median(slopes) if slopes else 0.0


def processes(stack: Stack, job: str) -> dict[str, list[psutil.Process]]:
    """The stack's processes by what they are."""
    found: dict[str, list[psutil.Process]] = {}
    for name in SERVICES:
        pid = stack.pid(name)
        if pid is None:
            raise AssertionError(f"{name} has died: see {stack.log_file(name)}")
        service = psutil.Process(pid)
        found[name] = [service]
        children = service.children(recursive=True)
        if name == "collector":
            found["verifier workers"] = children
        elif name == "trainer":
            found["training process"] = [one for one in children if job in one.cmdline()]
    return found


def memory_bytes(group: list[psutil.Process]) -> int:
    """What these processes have written (anonymous and shared memory, each page once).

    Pages of program files are left out: how they count depends on who else has them in use.
    """
    total = 0
    for process in group:
        text = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii")
        fields = dict(line.split(":", 1) for line in text.splitlines()[1:])
        total += sum(int(fields[name].split()[0]) for name in ("Pss_Anon", "Pss_Shmem"))
    return 1024 * total


def disk_bytes(folder: Path) -> int:
    """Of the files under a folder; those that go while one looks count as nothing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def soak(folder: Path, minutes: float) -> tuple[dict[str, Series], dict[str, Any]]:
    """Runs the job for so long; every series by name, and what the run did meanwhile."""
    args = {"collector": ("--inline-limit", INLINE_LIMIT)}
    with Stack(folder, args=args) as stack, redis.Redis.from_url(stack.redis_url) as db:
        jobs = Jobs(stack.url)
        model = taught_model(jobs)
        spec = job_spec(
            name="soak",
            model=model,
            recipe={"steps": 4_000_000},
            evaluation={"every": 40, "samples": 16},
        )
        job = jobs.submit(spec)
        jobs.wait(job, step=4)
        began, first = time.monotonic(), jobs.get(job)["step"]
        series: dict[str, Series] = {}

        def note(name: str, unit: str, value: float) -> None:
            series.setdefault(name, Series(unit)).add(round(time.monotonic() - began, 1), value)

        while time.monotonic() - began < 60 * minutes:
            for name, group in processes(stack, job).items():
                note(name, "bytes", memory_bytes(group))
            note(DATA, "bytes", db.info("memory")["used_memory"])
            note("job folder", "bytes", disk_bytes(stack.jobs / job))
            note("blobs", "bytes", disk_bytes(stack.blobs))
            state = jobs.get(job)
            assert state["phase"] not in FINAL, state
            note("steps", "steps", state["step"] - first)
            time.sleep(EVERY_S)
        jobs.http.post(f"/v1/jobs/{job}/cancel").raise_for_status()
        jobs.wait(job)
        books = audit(read(stack.jobs / job / FILE))
        assert not books.problems, books.problems
        done = int(series["steps"].values[-1])
        return series, {"minutes": minutes, "steps": done, "groups": books.trained + books.void}


def verdicts(series: dict[str, Series], minutes: float) -> list[dict[str, Any]]:
    """Growth of each process after warm-up, against its bound."""
    begin_s = WARM_UP * 60 * minutes
    judged_s = 60 * minutes - begin_s
    steps = series["steps"].after(begin_s)
    step_count = steps.values[-1] - steps.values[0]
    rows = []
    for name, whole in series.items():
        if name in ("steps", "job folder", "blobs"):
            continue
        part = whole.after(begin_s)
        bound = max(LEAST_BOUND_BYTES, BOUND_SHARE * median(part.values))
        if name in (DATA, "redis"):
            bound += STEP_BYTES * step_count
        growth = part.slope() * judged_s
        rows.append(
            {
                "process": name,
                "median_mib": round(median(part.values) / MIB, 1),
                "largest_mib": round(max(whole.values) / MIB, 1),
                "growth_mib": round(growth / MIB, 2),
                "growth_mib_per_hour": round(part.slope() * 3600 / MIB, 1),
                "bound_mib": round(bound / MIB, 1),
                "flat": growth <= bound,
            }
        )
    return rows


def main() -> int:
    """Soaks, prints, writes; 1 where something grows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="keel-soak-") as folder:
        series, done = soak(Path(folder), args.minutes)
    rows = verdicts(series, args.minutes)
    print(f"{done['steps']} steps, {done['groups']} groups in {args.minutes:g} minutes")
    print(f"{'':18} {'median':>10} {'growth':>10} {'an hour':>11} {'bound':>10}")
    for row in rows:
        print(
            f"{row['process']:18} {row['median_mib']:6.1f} MiB {row['growth_mib']:6.2f} MiB "
            f"{row['growth_mib_per_hour']:7.1f} MiB {row['bound_mib']:6.1f} MiB"
            f"{'' if row['flat'] else '   GROWS'}"
        )
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    content = {
        **done,
        "warm_up_share": WARM_UP,
        "machine": machine,
        "load": round(os.getloadavg()[0], 1),
        "processes": rows,
        "largest_bytes": {
            name: int(max(series[name].values)) for name in ("job folder", "blobs", DATA)
        },
    }
    RESULTS.write_text(json.dumps(content, indent=2) + "\n")
    memory = {row["process"]: series[row["process"]] for row in rows if row["process"] != DATA}
    FIGURE.write_text(
        figure(
            {name: (one.at_s, one.values) for name, one in memory.items()},
            warm_up_s=WARM_UP * 60 * args.minutes,
        )
    )
    return 0 if all(row["flat"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
