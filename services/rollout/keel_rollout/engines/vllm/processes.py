"""The processes that vLLM starts, and the shared memory that they leave behind when killed."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

import psutil

SCRATCH = "VLLM_RPC_BASE_PATH"
"""The variable by which vLLM, in every process, knows where its sockets go."""


def started(before: Collection[psutil.Process]) -> list[psutil.Process]:
    """Children of this process that are new since `before`, and theirs."""
    new = [child for child in children() if child not in before]
    for child in list(new):
        with suppress(psutil.Error):
            new += child.children(recursive=True)
    return new


def children() -> list[psutil.Process]:
    """Children of this process, but for Python's own tracker."""
    return [child for child in psutil.Process().children() if not _is_tracker(child)]


def _is_tracker(process: psutil.Process) -> bool:
    try:
        return any("resource_tracker" in part for part in process.cmdline())
    except psutil.Error:
        return True


def segments(pid: int | str) -> set[Path]:
    """Segments of POSIX shared memory that Python made and the process has mapped."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return set()
    return {Path(path) for path in re.findall(r"(/dev/shm/psm_\w+)", maps)}


def end(processes: Iterable[psutil.Process], memory: Iterable[Path]) -> None:
    """Kills what still runs, waits until it is gone, and removes its shared memory.

    Trackers end by themselves once what they track is dead, and clean up.
    """
    left = list(processes)
    for process in left:
        with suppress(psutil.Error):
            if not _is_tracker(process):
                process.kill()
    deadline_s = time.monotonic() + 5
    while any(map(_runs, left)) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    for path in memory:
        path.unlink(missing_ok=True)


def _runs(process: psutil.Process) -> bool:
    """Dead but not yet collected by its parent is dead enough."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def make_scratch() -> None:
    """A private folder for vLLM's sockets, which it leaves behind when killed, and for configs."""
    os.environ[SCRATCH] = tempfile.mkdtemp(prefix="keel-vllm-")


def clear_scratch(*, keep: bool = False) -> None:
    """Empties the folder, where nothing of vLLM runs any more.

    Args:
        keep: the folder itself stays.
    """
    folder = Path(os.environ[SCRATCH])
    for path in folder.glob("*"):
        if path.is_socket():
            path.unlink(missing_ok=True)
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)


def end_self() -> None:
    """Ends this process at once, with its shared memory and vLLM's sockets."""
    for path in segments("self"):
        path.unlink(missing_ok=True)
    clear_scratch()
    os._exit(1)
