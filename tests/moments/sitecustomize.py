"""Ends a Python process at a named moment, or lies to it about the time; does nothing unasked.

With this folder on PYTHONPATH and KEEL_MOMENTS naming another, the functions of POINTS are wrapped
as their modules are imported. A moment is armed by a file in that folder that has its name: the
first process to reach the moment unlinks the file and kills itself. Children inherit all of it.
With KEEL_CLOCK naming a file in the same folder, `time.time()` is off by the seconds in that file.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import inspect
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

FOLDER = Path(os.environ.get("KEEL_MOMENTS", ""))
CLOCK = os.environ.get("KEEL_CLOCK", "")


class Point(NamedTuple):
    """A moment in a function's life."""

    name: str
    module: str
    function: str
    """Class.method, or a function of the module."""
    when: str
    """"before" it or "after" it has returned."""
    only: Callable[..., bool] = lambda *args, **kwargs: True
    """Of the function's arguments: calls that count."""


POINTS = (
    Point("apply-probe", "keel_rollout.engines.torch.engine", "TorchEngine.apply", "after"),
    Point(
        "mid-update",
        *("keel_rollout.engines.staging", "Staging.write", "before"),
        lambda staging, *_: staging.staged_bytes > 0,
    ),
    Point("ledger-save", "keel_trainer.ledger", "Ledger.append", "after"),
    Point("mid-checkpoint", "keel_trainer.checkpoint", "sync", "before"),
    Point("checkpoint-ack", "keel_trainer.checkpoint", "Checkpoints.save", "after"),
    Point("record-publish", "keel_trainer.store", "RunStore.record_version", "after"),
    Point("end-blobs", "keel_trainer.store", "RunStore.end", "after"),
    Point("mid-lap", "keel_trainer.store", "RunStore.write_row", "after"),
    Point("blob-entry", "keel.blobs", "BlobStore.put", "after"),
    Point(
        "entry-reply",
        *("redis.asyncio.client", "Pipeline.execute", "after"),
        lambda pipe, *_, **__: any(command[0][0] == "XADD" for command in pipe.command_stack),
    ),
    Point("grant-start", "keel_gateway.scheduler", "Scheduler._grant", "after"),
)


def reached(name: str) -> None:
    """Ends the process if the moment is armed."""
    try:
        (FOLDER / name).unlink()
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def wrapped(point: Point, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with its moment."""

    def before(args: tuple, kwargs: dict[str, Any]) -> bool:
        counts = point.only(*args, **kwargs)
        if counts and point.when == "before":
            reached(point.name)
        return counts and point.when == "after"

    @functools.wraps(function)
    async def awaited(*args: Any, **kwargs: Any) -> Any:
        counts = before(args, kwargs)
        result = await function(*args, **kwargs)
        if counts:
            reached(point.name)
        return result

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        counts = before(args, kwargs)
        result = function(*args, **kwargs)
        if counts:
            reached(point.name)
        return result

    return awaited if inspect.iscoroutinefunction(function) else called


def put_in(module: ModuleType) -> None:
    """Wraps what POINTS says of a module; AttributeError if it is not there any more."""
    for point in POINTS:
        if point.module == module.__name__:
            *owners, name = point.function.split(".")
            owner: Any = module
            for step in owners:
                owner = getattr(owner, step)
            setattr(owner, name, wrapped(point, getattr(owner, name)))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of POINTS as the others do, and has them wrapped once they are run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not any(point.module == name for point in POINTS):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((s for f in others if (s := f.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                put_in(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def lie() -> None:
    """Makes `time.time` and `time.time_ns` add what the clock's file says."""
    path, true, true_ns = FOLDER / CLOCK, time.time, time.time_ns

    def off_s() -> float:
        # gRPC computes deadlines here that its core, whose clock is not set, then waits for
        if sys._getframe(2).f_globals.get("__name__", "").startswith("grpc"):
            return 0.0
        try:
            return float(path.read_text(encoding="ascii") or 0)
        except OSError:
            return 0.0

    time.time = lambda: true() + off_s()
    time.time_ns = lambda: true_ns() + int(off_s() * 1e9)


if "KEEL_MOMENTS" in os.environ:
    sys.meta_path.insert(0, _Finder())
    if CLOCK:
        lie()
