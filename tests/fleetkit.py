"""A run on engines that the test starts and kills itself: real engines, collector, training process
and Redis; the test writes what a gateway would.

with Fleet(folder) as fleet:
    engines = fleet.engine(), fleet.engine()
    fleet.start(spec, *engines)
    record = fleet.wait()
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import redis
from enginekit import engine_process
from rediskit import RedisServer

from keel.queue import RUNS_KEY, groups_key, metrics_key, run_key
from keel.record import Desired, RunRecord, pack_fields
from keel.spec import parse_spec


@dataclasses.dataclass
class EngineProcess:
    """An engine and how to end it."""

    address: str
    process: subprocess.Popen
    plain: bool
    """Any run may have it."""

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        self.process.kill()
        self.process.wait()


class Fleet:
    """Everything but the gateway; one run at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._exit = ExitStack()
        self._token, self._runs = 0, 0
        self._used: list[EngineProcess] = []
        self._idle: list[EngineProcess] = []
        self._trainer: subprocess.Popen | None = None
        self.run = ""

    def __enter__(self) -> Self:
        server = RedisServer(self._folder)
        server.start()
        self._exit.callback(server.stop)
        self.url = server.url
        self.client = self._exit.enter_context(redis.Redis.from_url(self.url))
        self._process("keel_rollout.collector.main", "--redis", self.url)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._exit.close()

    def engine(
        self, *, listen: str = "", lies_from: int | None = None, shared: Path | None = None
    ) -> EngineProcess:
        """A torch engine: one that an earlier run has left, or a new one.

        Args:
            listen: a new one at this address.
            lies_from: see `lying_engine`.
            shared: its `--shared`.
        """
        plain = not listen and lies_from is None and shared is None
        if plain and self._idle:
            self._used.append(self._idle.pop())
            return self._used[-1]
        options = ["--listen", listen] if listen else []
        options += ["--shared", str(shared)] if shared else []
        program = ["-m", "keel_rollout.engine_main"]
        if lies_from is not None:
            program = [str(Path(__file__).with_name("lying_engine.py"))]
            options += ["--lies-from", str(lies_from)]
        process = engine_process(*options, program=program)
        engine = EngineProcess(*self._exit.enter_context(process), plain=plain)
        self._used.append(engine)
        return engine

    def rest(self) -> None:
        """Ends the engines that were used, but for those that another run may have."""
        while self._used:
            engine = self._used.pop()
            if engine.plain and engine.process.poll() is None:
                self._idle.append(engine)
            else:
                engine.kill()

    def start(
        self, spec: dict[str, Any], *engines: EngineProcess, weights: Path | None = None
    ) -> str:
        """Leases the engines to a new run and starts its training; returns the run's id."""
        self._runs += 1
        self._token += 10
        self.run = f"run-{self._runs}"
        record = RunRecord(
            self.run,
            parse_spec(spec),
            time.time(),
            trainer="127.0.0.1:1",
            engines=tuple(engine.address for engine in engines),
            fencing_token=self._token,
            engine_token=self._token,
        )
        self.client.hset(run_key(self.run), mapping=record.to_hash())
        self.client.zadd(RUNS_KEY, {self.run: record.created_s})
        more = ["--weights", str(weights)] if weights else []
        self._trainer = self._process(
            *("keel_trainer.run", "--run", self.run, "--runs", str(self._folder / "runs")),
            *("--fencing-token", str(self._token), "--redis", self.url, *more),
        )
        return self.run

    def record(self) -> RunRecord:
        """The run's record now."""
        return RunRecord.from_hash(self.run, self.client.hgetall(run_key(self.run)))

    def lease(self, *engines: EngineProcess, draining: tuple[str, ...] = ()) -> None:
        """What the gateway writes when engines join, drain or leave."""
        self._token += 1
        fields = pack_fields(
            engines=tuple(engine.address for engine in engines),
            engine_token=self._token,
            draining=draining,
        )
        self.client.hset(run_key(self.run), mapping=fields)

    def desire(self, desired: Desired) -> None:
        """PAUSED: the run stops at the end of its lap, until RUNNING."""
        self.client.hset(run_key(self.run), mapping=pack_fields(desired=desired))

    def until(self, holds: Callable[[RunRecord], object], seconds: float = 120) -> RunRecord:
        """The first record for which `holds`."""
        deadline = time.monotonic() + seconds
        while not holds(record := self.record()):
            assert not record.phase.final, f"{record.phase}: {record.error}"
            assert time.monotonic() < deadline, (record, self.log())
            time.sleep(0.02)
        return record

    def wait(self, seconds: float = 240) -> RunRecord:
        """The record of the run that has ended."""
        deadline = time.monotonic() + seconds
        while not (record := self.record()).phase.final:
            assert time.monotonic() < deadline, (record, self.log())
            time.sleep(0.05)
        assert self._trainer is not None
        assert self._trainer.wait(20) == 0
        return record

    def groups(self) -> list[dict[str, int]]:
        """By step: groups trained on, by engine's address."""
        rows = sorted(
            (
                json.loads(value)
                for field, value in self.client.hgetall(metrics_key(self.run)).items()
                if b"evaluation" not in field
            ),
            key=lambda row: row["step"],
        )
        prefix = "engine/groups/"
        return [
            {k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix)}
            for row in rows
        ]

    def left_in_queue(self) -> int:
        """Groups in the stream."""
        return self.client.xlen(groups_key(self.run))

    def log(self) -> str:
        """What the processes said last."""
        return "".join(path.read_text()[-3000:] for path in self._folder.glob("*.log"))

    def _process(self, module: str, *arguments: str) -> subprocess.Popen:
        log = self._exit.enter_context((self._folder / f"{module}-{self._runs}.log").open("ab"))
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        self._exit.callback(process.wait, 20)
        self._exit.callback(process.kill)
        return process


def weights(record: RunRecord) -> bytes:
    """The final weights, as they lie on disk."""
    assert record.phase == "SUCCEEDED", record.error
    return (Path(record.model) / "model.safetensors").read_bytes()
