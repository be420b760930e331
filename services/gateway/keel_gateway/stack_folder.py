"""What a stack keeps in its folder besides data: a lock, and the ports of its services."""

from __future__ import annotations

import fcntl
import json
import logging
import random
import socket
from pathlib import Path
from typing import IO

from keel.errors import InvalidField

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
LOCK_FILE = "stack.lock"
FREE_PORTS = range(20000, 30000)
"""Free ports come from here: below those that the system gives to outgoing connections, so that no
connection takes a service's port while it restarts."""


def is_stack(folder: Path) -> bool:
    """Whether a stack runs in `folder`, or has."""
    return (folder / LOCK_FILE).is_file()


def lock_folder(folder: Path, field: str) -> IO[str]:
    """The lock on a stack's folder, until closed; InvalidField naming `field` if it is in use.

    Two stacks on one folder would write to one append-only file.
    """
    file = (folder / LOCK_FILE).open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise InvalidField(
            field, str(folder), "a folder that no running stack uses; stop that one first"
        ) from None
    return file


def write_json(file: Path, data: object) -> None:
    """All or nothing, also when killed."""
    new = file.with_suffix(".new")
    new.write_text(json.dumps(data) + "\n")
    new.replace(file)


def remembered_ports(file: Path) -> dict[str, int]:
    """Ports of the stack that ran here before, as far as they are free.

    Runs that it left unfinished are leased to these addresses, and wait for them.
    """
    if not file.exists():
        return {}
    ports: dict[str, int] = json.loads(file.read_text())
    for name, port in list(ports.items()):
        if not bindable(port):
            log.warning("port %d of %s is taken: unfinished runs will not find it", port, name)
            del ports[name]
    return ports


def free_port(taken: set[int]) -> int:
    while True:
        port = random.choice(FREE_PORTS)
        if port not in taken and bindable(port):
            return port


def checked_port(port: int) -> int:
    if not bindable(port):
        raise InvalidField("--port", port, f"a port that nothing on {HOST} listens on")
    return port


def bindable(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True
