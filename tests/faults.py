"""The fault table: random faults on every process and connection of a running job, seeded.

`make faults` runs it whole. Each run has the job of the undisturbed one and must end with its final
weights, bit for bit, and with nothing left in the queue. Printed: fault, count, survived, recovery.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
from jobs import FINAL, Jobs, job_spec, model_bytes, taught_model
from proxy import Proxy

from keel.queue import demos_key, groups_key
from keel_gateway.stack import Stack

PROCESSES = ("engine-0", "collector", "trainer", "training process", "gateway", "redis")
CONNECTIONS = ("engine-0", "trainer", "redis")
"""Seen from their clients: collector and trainer; gateway; everybody."""
STOPPED_S, CUT_S = 3.0, 2.0
RECOVERY_S = 120.0
FAULTS = [
    *(("SIGKILL", victim) for victim in PROCESSES),
    *(("SIGSTOP", victim) for victim in PROCESSES),
    *(("cut", victim) for victim in CONNECTIONS),
]


@dataclass
class Table:
    """What was done, and how long it took until the job moved again."""

    recoveries_s: dict[tuple[str, str], list[float]] = field(
        default_factory=lambda: defaultdict(list)
    )

    def __str__(self) -> str:
        rows = [f"{'fault':8} {'on':18} {'count':>5} {'survived':>8} {'longest recovery':>16}"]
        for fault, times in sorted(self.recoveries_s.items()):
            rows.append(
                f"{fault[0]:8} {fault[1]:18} {len(times):5} {len(times):8} {max(times):14.1f} s"
            )
        total = sum(map(len, self.recoveries_s.values()))
        rows.append(f"{'all':27} {total:5} {total:8}")
        return "\n".join(rows)


class Disturbed:
    """A stack with proxies between its services, and ways to hurt it."""

    def __init__(self, folder: Path) -> None:
        self._exit = ExitStack()
        self._proxies: dict[str, Proxy] = {}
        self.stack = self._exit.enter_context(Stack(folder, via=self._via))
        self.jobs = Jobs(self.stack.url)

    def close(self) -> None:
        """Stops everything."""
        self._exit.close()

    def inflict(self, fault: tuple[str, str], job: str) -> bool:
        """One fault; False if its victim was not there at this moment."""
        kind, victim = fault
        if kind == "cut":
            self._proxies[victim].cut(CUT_S)
            return True
        pid = training_process(job) if victim == "training process" else self.stack.pid(victim)
        if pid is None:
            return False
        try:
            if kind == "SIGKILL":
                os.kill(pid, signal.SIGKILL)
            else:
                os.kill(pid, signal.SIGSTOP)
                time.sleep(STOPPED_S)
                os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            return False
        return True

    def left_in_queue(self, job: str) -> int:
        """Entries of both streams."""
        with redis.Redis.from_url(self.stack.redis_url) as client:
            return client.xlen(groups_key(job)) + client.xlen(demos_key(job))

    def _via(self, name: str, address: str) -> str:
        if name == "gateway":
            return address
        self._proxies[name] = self._exit.enter_context(Proxy(address, seed=0))
        return self._proxies[name].address


def training_process(job: str) -> int | None:
    """The process that trains a job, if there is one now."""
    found = subprocess.run(
        ["pgrep", "-f", f"keel_trainer.run --run {job}"], capture_output=True, text=True
    )
    pids = found.stdout.split()
    return int(pids[0]) if pids else None


def fault_job(model: dict[str, Any], laps: int) -> dict[str, Any]:
    """A job that is long enough to be hurt many times; a checkpoint at every lap."""
    return job_spec(
        name="faults",
        model=model,
        recipe={"steps": 4 * laps},
        evaluation={"every": 20, "samples": 16},
    )


def disturbed_run(
    disturbed: Disturbed,
    spec: dict[str, Any],
    faults: list[tuple[str, str]],
    seed: int,
    table: Table,
    say: Callable[[str], None],
) -> bytes:
    """Runs the job with `faults` inflicted at random moments; returns its final weights."""
    chance = random.Random(seed)
    job = disturbed.jobs.submit(spec)
    for fault in faults:
        time.sleep(chance.uniform(0.2, 3.0))
        before = progress(disturbed.jobs, job)
        assert before[0] not in FINAL, "the job is too short for its faults"
        began = time.monotonic()
        if not disturbed.inflict(fault, job):
            continue
        while progress(disturbed.jobs, job) == before:
            assert time.monotonic() - began < RECOVERY_S, f"{fault}: the job stands still"
            time.sleep(0.1)
        table.recoveries_s[fault].append(time.monotonic() - began)
        say(f"  {' '.join(fault)}: moved on after {time.monotonic() - began:.1f} s")
    state = disturbed.jobs.wait(job, timeout_s=600)
    assert state["phase"] == "SUCCEEDED", state["error"]
    assert disturbed.left_in_queue(job) == 0
    return model_bytes(state)


def progress(jobs: Jobs, job: str) -> tuple[Any, ...]:
    """What changes as a job gets on; waits for a gateway that is away."""
    deadline = time.monotonic() + RECOVERY_S
    while True:
        try:
            state = jobs.get(job)
        except Exception:
            assert time.monotonic() < deadline, "the gateway does not come back"
            time.sleep(0.1)
            continue
        keys = ("phase", "cold_start_step", "step", "policy_version")
        return tuple(state[key] for key in keys)


def fault_table(runs: int, per_run: int, laps: int, seed: int, say: Callable[[str], None]) -> Table:
    """Every kind about equally often, in random order; AssertionError at the first loss."""
    chance, table = random.Random(seed), Table()
    deck: list[tuple[str, str]] = []
    with tempfile.TemporaryDirectory(prefix="keel-faults-") as folder:
        disturbed = Disturbed(Path(folder))
        try:
            spec = fault_job(taught_model(disturbed.jobs), laps)
            undisturbed = model_bytes(disturbed.jobs.run(spec))
            for run in range(runs):
                while len(deck) < per_run:
                    deck += chance.sample(FAULTS, len(FAULTS))
                faults, deck = deck[:per_run], deck[per_run:]
                say(f"run {run + 1} of {runs}")
                weights = disturbed_run(
                    disturbed, spec, faults, chance.randrange(2**32), table, say
                )
                assert weights == undisturbed, f"run {run + 1} ended with other weights"
        finally:
            disturbed.close()
    return table


def main() -> None:
    """The whole table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--faults", type=int, default=11, help="faults a run")
    parser.add_argument("--laps", type=int, default=150, help="laps a run")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s {text}", flush=True)

    table = fault_table(args.runs, args.faults, args.laps, args.seed, say)
    print(table)
    print(f"{args.runs} runs, all with the undisturbed run's weights, bit for bit")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
