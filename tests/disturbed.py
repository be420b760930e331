"""A stack that can be hurt: its processes, its connections, its clocks, at named moments too."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import redis
from jobs import Jobs
from proxy import Proxy

from keel import ledger
from keel.ledger import Audit
from keel.queue import bytes_key, demos_key, groups_key
from keel_gateway.stack import Stack

MOMENTS = Path(__file__).parent / "moments"
PROCESSES = ("engine-0", "collector", "trainer", "training process", "gateway", "redis")
CONNECTIONS = ("engine-0", "trainer", "redis")
"""Seen from their clients: collector and trainer; gateway; everybody."""
CLOCKS = ("engine-0", "collector", "trainer", "gateway")
"""Services whose clock can be set; the training process has the trainer's."""
NAMED: Mapping[str, str] = {
    "mid-update": "engine-0",
    "apply-probe": "engine-0",
    "mid-lap": "training process",
    "record-publish": "training process",
    "ledger-save": "training process",
    "mid-checkpoint": "training process",
    "checkpoint-ack": "training process",
    "end-blobs": "training process",
    "blob-entry": "collector",
    "entry-reply": "collector",
    "grant-start": "gateway",
}
"""Whom each moment of `moments/sitecustomize.py` kills."""
MEANING: Mapping[str, str] = {
    "mid-update": "amid the stream of weights",
    "apply-probe": "new weights in, not yet proved",
    "mid-lap": "a step's row is written, the lap is not over",
    "record-publish": "a version is recorded, not published",
    "ledger-save": "groups are in the ledger, no checkpoint covers them",
    "mid-checkpoint": "a checkpoint is half on disk",
    "checkpoint-ack": "a checkpoint is on disk, its groups not acknowledged",
    "end-blobs": "the run is over, its blobs are still there",
    "blob-entry": "a blob is on disk, its entry not in the queue",
    "entry-reply": "an entry is in the queue, its reply not read",
    "grant-start": "a lease is granted, the run not started",
}
STOPPED_S, CUT_S, DAY_S = 3.0, 2.0, 86_400.0
INLINE_LIMIT_BYTES = 2_048
"""Envelopes above it are blobs: here, most."""
ARMED_S = 120.0


class Fault(NamedTuple):
    """What is done to whom."""

    kind: str
    """SIGKILL, SIGSTOP, cut, clock, or a moment."""
    victim: str


FAULTS = (
    *(Fault("SIGKILL", victim) for victim in PROCESSES),
    *(Fault("SIGSTOP", victim) for victim in PROCESSES),
    *(Fault("cut", victim) for victim in CONNECTIONS),
    *(Fault("clock", victim) for victim in CLOCKS),
    *(Fault(moment, victim) for moment, victim in NAMED.items()),
)


class Disturbed:
    """A stack with proxies between its services, and ways to hurt it."""

    def __init__(self, folder: Path, engine: str = "torch") -> None:
        self._exit = ExitStack()
        self._proxies: dict[str, Proxy] = {}
        self._moments = folder / "moments"
        self._moments.mkdir()
        path = os.pathsep.join(filter(None, (str(MOMENTS), os.environ.get("PYTHONPATH"))))
        env = {"PYTHONPATH": path, "KEEL_MOMENTS": str(self._moments)}
        self.stack = self._exit.enter_context(
            Stack(
                folder / "stack",
                engines=(engine,),
                via=self._via,
                args={"collector": ("--inline-limit", str(INLINE_LIMIT_BYTES))},
                env={name: {**env, "KEEL_CLOCK": f"clock-{name}"} for name in CLOCKS},
            )
        )
        self.jobs = Jobs(self.stack.url)

    def close(self) -> None:
        """Stops everything."""
        self._exit.close()

    def inflict(self, fault: Fault, job: str, chance: random.Random) -> bool:
        """One fault, to its end; False if its victim was not there at this moment."""
        match fault.kind:
            case "cut":
                self._proxies[fault.victim].cut(CUT_S)
                return True
            case "clock":
                self._set_clock(fault.victim, chance)
                return True
            case "SIGKILL" | "SIGSTOP":
                return self._signal(fault, job)
        self.arm(fault)
        self.wait_until_reached(fault)
        return True

    def arm(self, fault: Fault) -> None:
        """The next process that reaches this moment dies of it."""
        self._armed(fault).touch()

    def wait_until_reached(self, fault: Fault, timeout_s: float = ARMED_S) -> None:
        """Returns once a process has died of the moment; AssertionError if none reaches it."""
        deadline = time.monotonic() + timeout_s
        while self._armed(fault).exists():
            assert time.monotonic() < deadline, f"{fault.kind}: no process came to this moment"
            time.sleep(0.02)

    def left(self, job: str) -> list[str]:
        """What a run that is over has left behind: of its streams, of its blobs."""
        streams = (groups_key(job), demos_key(job))
        keys = [key for stream in streams for key in (stream, bytes_key(stream))]
        with redis.Redis.from_url(self.stack.redis_url) as client:
            there = [key for key in keys if client.exists(key)]
        blobs = [path.name for path in (self.stack.blobs / job).rglob("*") if path.is_file()]
        return [*there, *blobs]

    def audit(self, job: str) -> Audit:
        """What the run's ledger adds up to."""
        return ledger.audit(ledger.read(self.stack.jobs / job / ledger.FILE))

    def _armed(self, fault: Fault) -> Path:
        return self._moments / fault.kind

    def _signal(self, fault: Fault, job: str) -> bool:
        training = fault.victim == "training process"
        pid = training_process(job) if training else self.stack.pid(fault.victim)
        if pid is None:
            return False
        try:
            if fault.kind == "SIGKILL":
                os.kill(pid, signal.SIGKILL)
            else:
                os.kill(pid, signal.SIGSTOP)
                time.sleep(STOPPED_S)
                os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            return False
        return True

    def _set_clock(self, victim: str, chance: random.Random) -> None:
        """A day forward, a day back, or right again: whatever it is not now."""
        path = self._moments / f"clock-{victim}"
        now = path.read_text() if path.exists() else "0"
        offsets = [text for text in ("0", str(DAY_S), str(-DAY_S)) if text != now]
        whole = path.with_suffix(".new")
        whole.write_text(chance.choice(offsets))
        whole.replace(path)

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


def patiently(ask: Callable[[], object], timeout_s: float) -> object:
    """What `ask` returns, once the gateway, which may be away, lets it."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return ask()
        except Exception:
            assert time.monotonic() < deadline, "the gateway does not come back"
            time.sleep(0.1)
