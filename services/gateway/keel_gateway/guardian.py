"""Ends a stack's processes when the process that started them is gone, even by SIGKILL.

Run as a script, with a pipe as standard input that only the parent holds open. Each line is the
whole list of process groups to end; at the end of the pipe they get SIGTERM, and after a grace
SIGKILL. Standard library only: it must start at once.
"""

from __future__ import annotations

import os
import signal
import sys
import time

GRACE_S = 5.0


def main() -> None:
    """Reads lists until the pipe ends; then ends the last list's groups."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # it goes when its parent does, not before
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    groups: list[int] = []
    for line in sys.stdin:
        if line.endswith("\n"):  # else the parent died while writing: the list before holds
            groups = [int(group) for group in line.split()]
    end_groups(groups, GRACE_S)


def end_groups(groups: list[int], grace_s: float) -> None:
    """SIGTERM to every group, SIGKILL to those that are left after `grace_s`."""
    deadline = time.monotonic() + grace_s
    groups = [group for group in groups if send(group, signal.SIGTERM)]
    while groups and time.monotonic() < deadline:
        time.sleep(0.05)
        groups = [group for group in groups if send(group, 0)]
    for group in groups:
        send(group, signal.SIGKILL)


def send(group: int, number: int) -> bool:
    """Sends a signal to a process group; False if there is no such group."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    main()
