"""Keeps processes running: started in order, restarted when they die, stopped in reverse.

    start --> [ready] --> running --dies--> wait (0.5 s, 1 s, ... 30 s) --> started again
                             | stop: SIGTERM, a grace, SIGKILL to its whole group

Each service leads a process group of its own, so that what it started goes with it; `guardian`
ends the groups should this process be killed.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from keel.errors import KeelError
from keel_gateway import guardian

log = logging.getLogger(__name__)

POLL_S = 0.1
FIRST_DELAY_S, LONGEST_DELAY_S = 0.5, 30.0
HEALTHY_AFTER_S = 30.0
"""A service that lived this long is restarted without delay growing."""
DEATHS_AT_START = 3
"""Deaths before everything is ready that make starting fail."""
STOP_GRACE_S = 10.0
LOG_TAIL_LINES = 15


class StackError(KeelError):
    """The services do not come up; the message says which, why, and where its log is."""


@dataclass(frozen=True, slots=True)
class Service:
    """One process to be kept running.

    Example:
        Service("redis", ("redis-server", "--port", "6379"), ready=lambda: "" if ping() else "mute")
    """

    name: str
    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to this process's environment."""
    ready: Callable[[], str] | None = None
    """Empty once it is ready, else what is missing; asked again and again. The services after it
    are started when it is ready; None: at once."""


@dataclass(slots=True)
class _Running:
    service: Service
    process: subprocess.Popen[bytes] | None = None
    started_s: float = 0.0
    restart_at_s: float = 0.0
    failures: int = 0
    """Deaths in a row, each before HEALTHY_AFTER_S."""


class Supervisor:
    """Runs services until `stop`.

    Example:
        supervisor = Supervisor([redis, engine], Path("runs/logs"))
        supervisor.start()
        ...
        supervisor.stop()
    """

    def __init__(self, services: Sequence[Service], logs: Path) -> None:
        self._running = {service.name: _Running(service) for service in services}
        assert len(self._running) == len(services), "two services of one name"
        self._logs = logs
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._watch = threading.Thread(target=self._restart_the_dead, daemon=True)
        self._guardian: subprocess.Popen[bytes] | None = None

    def start(self, *, patience_s: float = 120.0) -> None:
        """Starts all in order, each after the one before is ready. StackError if one is not."""
        self._logs.mkdir(parents=True, exist_ok=True)
        self._watch.start()
        deadline = time.monotonic() + patience_s
        for running in self._running.values():
            with self._lock:
                self._spawn(running)
            self._wait_until_ready(running.service, deadline)

    def stop(self) -> None:
        """Stops all, the last started first; may be repeated.

        Whatever interrupts it, nothing is left running.
        """
        self._stopping.set()
        try:
            with self._lock:
                for running in reversed(self._running.values()):
                    _end(running, STOP_GRACE_S)
        finally:
            for running in self._running.values():
                _end(running, 0.0)
            self._close_guardian()

    def pid(self, name: str) -> int | None:
        """Process id of a service as it runs now; None between death and restart."""
        process = self._running[name].process
        return process.pid if process and process.poll() is None else None

    def log_file(self, name: str) -> Path:
        """Where a service's output goes."""
        return self._logs / f"{name}.log"

    def _spawn(self, running: _Running) -> None:
        if self._stopping.is_set():
            return
        with self.log_file(running.service.name).open("ab") as output:
            running.process = subprocess.Popen(
                list(running.service.argv),
                env={**os.environ, **running.service.env},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
        running.started_s = time.monotonic()
        self._tell_guardian()

    def _wait_until_ready(self, service: Service, deadline: float) -> None:
        missing = ""
        while service.ready is not None and (missing := service.ready()):
            for name, running in self._running.items():
                if running.failures >= DEATHS_AT_START:
                    raise StackError(f"{name} dies whenever it is started.\n{self._tail(name)}")
            if time.monotonic() > deadline:
                raise StackError(
                    f"{service.name} is not ready: {missing}\n{self._tail(service.name)}"
                )
            time.sleep(POLL_S)

    def _restart_the_dead(self) -> None:
        while not self._stopping.wait(POLL_S):
            with self._lock:
                for running in self._running.values():
                    self._look_after(running)

    def _look_after(self, running: _Running) -> None:
        now, process = time.monotonic(), running.process
        if process is not None and process.poll() is not None:
            # what it had started must not live beside what its successor starts
            guardian.send(process.pid, signal.SIGKILL)
            running.process = None
            self._tell_guardian()
            lived_long = now - running.started_s >= HEALTHY_AFTER_S
            running.failures = 1 if lived_long else running.failures + 1
            delay_s = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2 ** (running.failures - 1))
            running.restart_at_s = now + delay_s
            log.warning(
                "%s ended (%s); starting it again in %.1f s; log: %s",
                running.service.name,
                _status(process.returncode),
                delay_s,
                self.log_file(running.service.name),
            )
        elif process is None and running.failures and now >= running.restart_at_s:
            self._spawn(running)

    def _tell_guardian(self) -> None:
        groups = [str(r.process.pid) for r in self._running.values() if r.process is not None]
        if self._guardian is None or self._guardian.poll() is not None:
            self._guardian = subprocess.Popen(
                [sys.executable, "-S", "-E", guardian.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                process_group=0,
            )
        assert self._guardian.stdin is not None
        with suppress(BrokenPipeError):  # just died; the next list goes to a new one
            self._guardian.stdin.write(f"{' '.join(groups)}\n".encode())
            self._guardian.stdin.flush()

    def _close_guardian(self) -> None:
        if self._guardian is not None:
            with suppress(BrokenPipeError):
                self._guardian.communicate(b"\n")
            self._guardian = None

    def _tail(self, name: str) -> str:
        path = self.log_file(name)
        lines = path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return "\n".join([f"The end of {path}:", *(f"  {line}" for line in lines)])


def _end(running: _Running, grace_s: float) -> None:
    """SIGTERM to the process; after `grace_s`, or when it has ended, SIGKILL to its group."""
    process = running.process
    if process is None:
        return
    if grace_s and process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
    guardian.send(process.pid, signal.SIGKILL)
    process.wait()
    running.process = None


def _status(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
