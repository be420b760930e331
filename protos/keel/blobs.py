"""Envelopes too large for the queue: files of a folder, or of anything that fsspec opens.

    RUN/STREAM-ATTEMPT-LAP-SLOT-HASH     one serialized envelope; the entry has its BlobRef

The producer puts a blob on disk before it adds the entry; the trainer removes the blobs of a slot
once a checkpoint covers it, those that never got an entry among them, and with a run all it has.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from keel.codec import xxh3
from keel.disk import sync
from keel.errors import IntegrityError, KeelError, NotFound, WireError
from keel.queue import SlotKey, Stream
from keel.types.v1 import sequence_pb2

_NAME = re.compile(r"(demos|groups)-([0-9]{1,10})-([0-9]{1,10})-([0-9]{1,10})-([0-9a-f]{16})")
_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@contextlib.contextmanager
def _as_os_error(root: str) -> Iterator[None]:
    """Whatever a client of some store raises where the store fails, is an OSError to us."""
    try:
        yield
    except (OSError, KeelError):
        raise
    except Exception as error:
        raise OSError(f"{root}: {type(error).__name__}: {error}") from error


class BlobStore:
    """A place for blobs. Its methods block, and raise OSError where the place fails.

    Example:
        store = BlobStore("/srv/keel/blobs")  # or "s3://bucket/blobs", with s3fs installed
        ref = store.put("r", "groups", SlotKey(0, 3, 1), data)  # on disk now
        store.get(ref, run="r") == data
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self._fs, path = url_to_fs(root)
        self._path = path.rstrip("/")
        self._local = isinstance(self._fs, LocalFileSystem)

    def put(
        self, run: str, stream: Stream, slot: SlotKey, data: bytes | bytearray
    ) -> sequence_pb2.BlobRef:
        """Returns once the bytes are durable. Put again, they replace themselves."""
        digest = xxh3(data)
        name = f"{stream}-{slot.attempt}-{slot.lap}-{slot.slot}-{digest:016x}"
        folder = self._folder(run)
        with _as_os_error(self.root):
            self._fs.makedirs(folder, exist_ok=True)
            if self._local:
                _write_synced(Path(folder), name, data)
            else:
                self._fs.pipe_file(f"{folder}/{name}", data)
        return sequence_pb2.BlobRef(uri=f"{run}/{name}", size_bytes=len(data), xxh3=digest)

    def get(self, ref: sequence_pb2.BlobRef, *, run: str) -> bytes:
        """The bytes of a blob of `run`.

        Raises:
            WireError: `ref` does not name a blob of this run.
            NotFound: it is not there, and the run's folder is.
            OSError: the folder is not there either: the store is, say, not mounted.
            IntegrityError: it has other bytes.
        """
        folder, _, name = ref.uri.partition("/")
        if folder != run or not _NAME.fullmatch(name):
            valid = f"{run}/STREAM-ATTEMPT-LAP-SLOT-HASH"
            raise WireError(f"blob.uri: {ref.uri[:200]!r} is not valid; valid: {valid}")
        with _as_os_error(self.root):
            try:
                data = self._fs.cat_file(f"{self._folder(run)}/{name}")
            except FileNotFoundError as error:
                self._fs.invalidate_cache(self._path)
                if self._fs.exists(self._folder(run)):
                    raise NotFound(f"blob {ref.uri} is not in {self.root}") from error
                raise OSError(f"{self.root} has nothing of run {run}: is it mounted?") from error
        if len(data) != ref.size_bytes or xxh3(data) != ref.xxh3:
            raise IntegrityError(
                f"blob {ref.uri} in {self.root} has {len(data)} bytes with xxh3 {xxh3(data):016x}; "
                f"its entry says {ref.size_bytes} and {ref.xxh3:016x}"
            )
        return data

    def slots(self, run: str, stream: Stream) -> dict[SlotKey, list[str]]:
        """Names of the blobs of a stream, by slot."""
        found: dict[SlotKey, list[str]] = {}
        for name in self._names(self._folder(run)):
            if (match := _NAME.fullmatch(name)) and match[1] == stream:
                slot = SlotKey(int(match[2]), int(match[3]), int(match[4]))
                found.setdefault(slot, []).append(name)
        return found

    def remove(self, run: str, stream: Stream, slots: Collection[SlotKey]) -> None:
        """Removes every blob of these slots; those that are gone are no error."""
        there = self.slots(run, stream)
        for slot in there.keys() & set(slots):
            for name in there[slot]:
                with _as_os_error(self.root), contextlib.suppress(FileNotFoundError):
                    self._fs.rm_file(f"{self._folder(run)}/{name}")
        if self._local:
            self._remove_unfinished(run, stream, slots)

    def runs(self) -> list[str]:
        """Runs that have blobs, or had."""
        return sorted(name for name in self._names(self._path) if _RUN.fullmatch(name))

    def remove_run(self, run: str) -> None:
        """Removes all blobs of a run, and its folder."""
        with _as_os_error(self.root), contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._folder(run), recursive=True)

    def _remove_unfinished(self, run: str, stream: Stream, slots: Collection[SlotKey]) -> None:
        """Files of these slots that somebody who was killed had begun to write."""
        begun = {f".{stream}-{slot.attempt}-{slot.lap}-{slot.slot}" for slot in slots}
        folder = Path(self._folder(run))
        for path in folder.glob(f".{stream}-*"):
            if path.name.rpartition("-")[0] in begun:
                path.unlink(missing_ok=True)

    def _names(self, folder: str) -> list[str]:
        with _as_os_error(self.root):
            # other processes write here too, which a listing kept by fsspec would not show
            self._fs.invalidate_cache(folder)
            try:
                listed = self._fs.ls(folder, detail=False)
            except FileNotFoundError:
                return []
        return [PurePosixPath(path).name for path in listed]

    def _folder(self, run: str) -> str:
        if not _RUN.fullmatch(run):
            raise WireError(f"run: {run!r} is not valid; valid: letters, digits, '.', '_', '-'")
        return f"{self._path}/{run}"


def _write_synced(folder: Path, name: str, data: bytes | bytearray) -> None:
    """Writes a file whole or not at all; it is there even after the power went."""
    temporary = folder / f".{name}"
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / name)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync(folder)
