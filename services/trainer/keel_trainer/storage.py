"""Disks that are full or broken: the run waits and says so, and goes on when there is room."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from keel.blobs import BlobStore
from keel.errors import KeelError

log = logging.getLogger(__name__)

Result = TypeVar("Result")

_RETRY_S = 2.0


class StorageError(KeelError):
    """Something could not be written. It may be tried again.

    Args:
        folder: where.
        size_bytes: about how much room it takes.
        error: what the system said.
    """

    def __init__(self, folder: Path, size_bytes: int, error: Exception) -> None:
        try:
            free = f"{shutil.disk_usage(_existing(folder)).free:,} bytes are free there"
        except OSError:
            free = "the disk does not say what is free"
        super().__init__(
            f"cannot write to {folder}: {error} (about {size_bytes:,} bytes needed; {free})"
        )


def insist(
    what: str,
    write: Callable[[], Result],
    *,
    tell: Callable[[str], None],
    check: Callable[[], object],
) -> Result:
    """The result of a write that may repeat, however long the disk takes none.

    Args:
        what: for people: "the checkpoint of step 120".
        tell: says why the run stands still; empty: it goes on.
        check: called before each new try; raises to give up.
    """
    told = ""
    while True:
        try:
            result = write()
        except StorageError as error:
            if str(error.__cause__) != told:  # the free bytes change all the time
                tell(f"{what} waits for room: {error}; the run goes on when there is some")
                told = str(error.__cause__)
        else:
            tell("")
            return result
        time.sleep(_RETRY_S)
        check()


def drop_blobs(blobs: BlobStore | None, run: str) -> None:
    """What is left of a run that is over; where that fails, the service does it when it starts."""
    try:
        if blobs is not None:
            blobs.remove_run(run)
    except OSError as error:
        log.warning("blobs of %s are left: %s", run, error)


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())
