"""What surviving costs: ledger, checkpoint and acknowledgement as a share of a step's time.

`make bench-durability` (six minutes). Two kinds of runs, interleaved, with the demo's batch: with a
checkpoint after every lap, the most that a job can ask for, and with none before the end, where
only the ledger is written. The trainer's own columns say where its time went; the disk's floor is a
plain file of a checkpoint's size, written and synced. Prints a table and writes
benchmarks/results/durability.json.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from keel.ledger import FILE, audit, read
from keel_gateway.client import GatewayClient
from keel_gateway.stack import Stack
from keel_gateway.summary import TRAINER_TIMES

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from jobs import Jobs

PAIRS, LAPS, N, B = 5, 6, 4, 32
RESULTS = Path(__file__).parent / "results" / "durability.json"
Row = dict[str, Any]
DURABLE = "time/checkpoint_s"


def spec(every: int) -> dict[str, Any]:
    """The demo's batch, without its cold start: untrained responses are as long as they can be."""
    return {
        "name": "durability",
        "model": {"path": "preset:tiny-qwen3-moe"},
        "task": {"difficulty": 3},
        "engine": {"quantize": "fp8"},
        "rollout": {"group_size": 8, "max_tokens": 24},
        "recipe": {
            "replay": "R3",
            "off_policiness": N,
            "groups_per_minibatch": B,
            "steps": N * LAPS,
            "learning_rate": 4e-4,
        },
        "evaluation": {"every": 0},
        "checkpoint": {"every": every},
    }


def measure(stack: Stack, every: int) -> dict[str, float]:
    """Seconds a step of one run: of everything, and of what surviving takes; bytes on disk."""
    jobs = Jobs(stack.url)
    state = jobs.run(spec(every))
    job = state["id"]
    found = audit(read(stack.jobs / job / FILE))
    assert found.problems == [], found.problems
    assert found.trained + found.void == LAPS * N * B
    # what a lap writes is told in the next one's rows; the first lap pays for the start
    rows = [row for row in jobs.rows(job) if row["step"] > N]
    with GatewayClient(stack.url) as client:
        kept = client.checkpoints(job)
    steps_s = [sum(row.get(name) or 0 for name in TRAINER_TIMES) for row in rows]
    return {
        "step_s": statistics.median(steps_s),
        "durable_s": statistics.median(row[DURABLE] for row in rows),
        "bytes": kept[-1].size_bytes,
    }


def disk_floor_s(folder: Path, size: int) -> float:
    """Seconds to write and sync a file of that size, median of nine."""
    data, taken = os.urandom(size), []
    for number in range(9):
        began = time.perf_counter()
        with (folder / f"floor-{number}").open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        taken.append(time.perf_counter() - began)
        (folder / f"floor-{number}").unlink()
    return statistics.median(taken)


def rows(
    with_s: list[dict[str, float]], without_s: list[dict[str, float]], floor_s: float
) -> list[Row]:
    """Shares of a step, and the checkpoint against the disk."""
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"

    def row(id: str, ours: float, peer: float, ratios: list[float], compares: str) -> Row:
        return {
            "id": id,
            "ours": round(ours, 5),
            "peer": round(peer, 5),
            "ratio": round(statistics.median(ratios), 4),
            "lowest": round(min(ratios), 4),
            "highest": round(max(ratios), 4),
            "unit": "s",
            "compares": compares,
            "machine": machine,
            "load": round(os.getloadavg()[0], 1),
        }

    def middle(runs: list[dict[str, float]], key: str) -> float:
        return statistics.median(run[key] for run in runs)

    shares = [
        row(
            name,
            middle(runs, "durable_s"),
            middle(runs, "step_s"),
            [run["durable_s"] / run["step_s"] for run in runs],
            "surviving / the whole step",
        )
        for name, runs in (("checkpoint every lap", with_s), ("ledger alone", without_s))
    ]
    both = list(zip(with_s, without_s, strict=True))
    written_s = [(one["durable_s"] - other["durable_s"]) * N for one, other in both]
    return [
        *shares,
        row(
            "step with checkpoints",
            middle(with_s, "step_s"),
            middle(without_s, "step_s"),
            [one["step_s"] / other["step_s"] for one, other in both],
            "a step of a run with a checkpoint every lap / with none",
        ),
        row(
            "checkpoint against the disk",
            statistics.median(written_s),
            floor_s,
            [taken / floor_s for taken in written_s],
            "checkpoint and acknowledgement / a plain file of its size, written and synced",
        ),
    ]


def main() -> None:
    """Measures, prints, writes."""
    print(f"{LAPS} laps of {N} steps x {B} groups x 8 responses, {PAIRS} pairs", flush=True)
    with tempfile.TemporaryDirectory() as folder, Stack(Path(folder)) as stack:
        measure(stack, N)  # warms up
        runs = [(measure(stack, N), measure(stack, 0)) for _ in range(PAIRS)]
        size = int(runs[0][0]["bytes"])
        found = rows([a for a, _ in runs], [b for _, b in runs], disk_floor_s(Path(folder), size))
    print(f"{'':28} {'ours':>9} {'peer':>9}  ratio   lowest, highest")
    for row in found:
        print(
            f"{row['id']:28} {row['ours']:7.4f} s {row['peer']:7.4f} s {row['ratio']:6.4f}   "
            f"{row['lowest']:.4f}, {row['highest']:.4f}"
        )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"checkpoint_bytes": size, "rows": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
