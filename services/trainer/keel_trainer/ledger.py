"""Writes the ledger of a run (`keel.ledger`): on disk before anything relies on it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from keel.disk import sync
from keel.errors import FencedError
from keel.ledger import FILE, Line, encode, whole
from keel_trainer.storage import StorageError


class Ledger:
    """The file of one run, to be appended to. What a crash has torn at its end is cut off first."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._size: int | None = None
        """Bytes of whole lines; None before the first look."""
        self._torn = False
        """The last write failed: there may be more than that."""

    def append(self, lines: Iterable[Line]) -> None:
        """Returns once the lines are on disk.

        Raises:
            StorageError: they are not, or it is not known. May be repeated.
            FencedError: somebody else has written to the file meanwhile.
        """
        data = encode(lines)
        try:
            self._write(data)
        except OSError as error:
            self._torn = True
            raise StorageError(self._path.parent, len(data), error) from error
        self._torn = False

    def _write(self, data: bytes) -> None:
        created = not self._path.exists()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            there = file.tell()
            if self._size is None:
                self._size = len(whole(self._path.read_bytes()))
            elif there != self._size and not self._torn:
                raise FencedError(
                    f"{self._path} has {there} bytes and this process knows of {self._size}: "
                    "another trainer has the run"
                )
            if there != self._size:
                file.truncate(self._size)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if created:
            sync(self._path.parent)
        self._size += len(data)
