"""JSONL files of prompts: read whole and checked before anything is trained, then row by row.

Of each row some 24 bytes stay in memory (where it begins, hashes of its prompt and id), never its
text, so a file may be larger than memory. One bad line refuses the file: what would be dropped
silently would be missed in the results.

    dataset = Dataset.open("task.dataset", Path("train.jsonl"), answers="verifier math")
    train, held_out = dataset.split(0.05)
    dataset.row(train[shuffled(derive_seed(0, "shuffle"), index, len(train))])
"""

from __future__ import annotations

import json
import os
import threading
from array import array
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
import numpy.typing as npt
import xxhash

from keel.errors import DatasetError
from keel.rows import Kind, Prompt, Row, RowFault, parse_row

LINE_BYTES = 16 * 2**20
"""Most bytes of one line."""
MOST_HELD_OUT = 1000
MOST_FAULTS = 5
"""Bad lines that a complaint names."""
_MOST_SHAPES = 1000
_BOM = b"\xef\xbb\xbf"

Rows = npt.NDArray[np.int64]
"""[N] row numbers, from 0, in file order."""


class Dataset:
    """A checked file, held open: replacing it changes nothing, writing into it is noticed."""

    def __init__(self, field: str, path: Path, file: BinaryIO, kind: Kind, answers: str) -> None:
        self.field, self.path = field, path
        self._file, self._kind, self._answers = file, kind, answers
        self._lock = threading.Lock()
        self._stamp = _stamp(file)
        self._offsets, self._lines = array("q"), array("q")
        self._prompt_hashes, self._id_hashes = array("Q"), array("Q")
        self.shapes: dict[tuple[str, ...], int] = {}
        """Roles of chat prompts, each sequence of them with the first row that has it; () is text.
        A template takes or refuses by these."""
        self.xxh3 = ""
        """Of the file's bytes."""

    @classmethod
    def open(cls, field: str, path: Path, *, kind: Kind = "problems", answers: str = "") -> Self:
        """Reads and checks every line.

        Args:
            field: the job's key that names the file, for messages.
            answers: as in `parse_row`.

        Raises:
            DatasetError: the file cannot be read, has no row, or has a bad line; one message names
                the first few and how many there are.
        """
        dataset = cls(field, path, _opened(field, path), kind, answers)
        try:
            dataset._scan()
        except BaseException:
            dataset.close()
            raise
        return dataset

    def __len__(self) -> int:
        return len(self._offsets)

    def row(self, number: int) -> Row:
        """A row; DatasetError if the file is not as it was when it was checked."""
        self.check_unchanged()
        with self._lock:
            self._file.seek(self._offsets[number])
            line = self._file.readline(LINE_BYTES + 1)
        try:
            return parse_row(line, kind=self._kind, answers=self._answers)
        except RowFault as error:
            raise self._changed() from error

    def line(self, number: int) -> int:
        """The line of a row, from 1."""
        return self._lines[number]

    def check_unchanged(self) -> None:
        """DatasetError if the file was written to since it was checked."""
        if _stamp(self._file) != self._stamp:
            raise self._changed()

    @property
    def prompt_hashes(self) -> npt.NDArray[np.uint64]:
        """[N] of each row: `prompt_hash`."""
        return np.frombuffer(self._prompt_hashes, np.uint64)

    def split(self, share: float) -> tuple[Rows, Rows]:
        """Training and held-out rows: by a hash of the prompt, so rows of one prompt stay together
        and a row added later moves no other across.

        Only the least (one prompt) and the most (1,000 rows) bend this: there a new row may take
        an old one's place.

        Raises:
            DatasetError: nothing would be left to train on.
        """
        hashes_N = self.prompt_hashes
        if share == 0:
            return np.arange(len(self)), np.arange(0)
        last = np.uint64(min(int(share * 2.0**64), 2**64 - 1))
        ordered_N = np.sort(hashes_N)
        last = max(last, ordered_N[0])
        if len(ordered_N) > MOST_HELD_OUT and ordered_N[MOST_HELD_OUT] <= last:
            # up to the last prompt that fits whole; one prompt at least
            last = max(ordered_N[0], ordered_N[MOST_HELD_OUT] - np.uint64(1))
        held_N = hashes_N <= last
        if held_N.all():
            raise DatasetError(
                self.field,
                self.path,
                f"task.held_out = {share:g} leaves nothing to train on: it has {len(self)} rows "
                f"of {len(np.unique(hashes_N))} prompts; valid: at least 2 prompts, or 0",
            )
        return np.flatnonzero(~held_N), np.flatnonzero(held_N)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _scan(self) -> None:
        faults = _Faults()
        digest = xxhash.xxh3_64()
        for number, begin, line in _lines(self._file, digest, faults):
            try:
                row = parse_row(line, kind=self._kind, answers=self._answers)
            except RowFault as fault:
                faults.add(number, str(fault))
                continue
            self._add(number, begin, row)
        self._name_duplicates(faults)
        self.xxh3 = digest.hexdigest()
        if faults.count:
            raise DatasetError(self.field, self.path, faults.told(len(self) + faults.rows))
        if not len(self):
            size = self._stamp[1]
            empty = "only blank lines" if size else "an empty file"
            raise DatasetError(self.field, self.path, f"{empty}; valid: a JSON object on each line")
        self.check_unchanged()

    def _add(self, number: int, begin: int, row: Row) -> None:
        self._offsets.append(begin)
        self._lines.append(number)
        self._prompt_hashes.append(prompt_hash(row.prompt))
        # 0 stands for none
        self._id_hashes.append(xxhash.xxh3_64_intdigest(row.id.encode()) | 1 if row.id else 0)
        shape = () if isinstance(row.prompt, str) else tuple(m["role"] for m in row.prompt)
        if len(self.shapes) < _MOST_SHAPES:
            self.shapes.setdefault(shape, len(self) - 1)

    def _name_duplicates(self, faults: _Faults) -> None:
        hashes_N = np.frombuffer(self._id_hashes, np.uint64)
        order_N = np.argsort(hashes_N, kind="stable")
        sorted_N = hashes_N[order_N]
        same = np.flatnonzero((sorted_N[1:] == sorted_N[:-1]) & (sorted_N[1:] != 0))
        for number in np.sort(order_N[same + 1]):
            twin = int(order_N[np.searchsorted(sorted_N, hashes_N[number])])
            one, other = self.row(twin), self.row(int(number))
            if one.id == other.id:
                fault = RowFault("id", other.id, f"an id of its own; line {self.line(twin)} has it")
                faults.add(self.line(int(number)), str(fault), of_a_row=False)

    def _changed(self) -> DatasetError:
        return DatasetError(
            self.field,
            self.path,
            "it was changed while the run goes on, and what was trained on is no longer in it; "
            "valid: the file as it was at the start, or a new job",
        )


class _Faults:
    """Counts all, keeps the first few."""

    def __init__(self) -> None:
        self.count = self.rows = 0
        self._first: list[tuple[int, str]] = []

    def add(self, line: int, what: str, *, of_a_row: bool = True) -> None:
        self.count += 1
        self.rows += of_a_row
        self._first = sorted([*self._first, (line, what)])[:MOST_FAULTS]

    def told(self, lines: int) -> str:
        named = "; ".join(f"line {line}, {what}" for line, what in self._first)
        more = self.count - len(self._first)
        return (
            f"{self.count:,} of {lines:,} lines cannot be used: {named}"
            + (f"; and {more:,} more" if more else "")
            + ". One bad line refuses the file; nothing was trained"
        )


def check_head(
    field: str, path: Path, *, kind: Kind = "problems", answers: str = "", lines: int = 1000
) -> None:
    """DatasetError if the first lines of a file already refuse it; a quick look, no more."""
    faults, seen = _Faults(), 0
    with _opened(field, path) as file:
        for number, _, line in _lines(file, None, faults):
            try:
                parse_row(line, kind=kind, answers=answers)
            except RowFault as fault:
                faults.add(number, str(fault))
            seen += 1
            if seen == lines:
                break
    if faults.count:
        raise DatasetError(field, path, faults.told(seen))
    if not seen:
        raise DatasetError(field, path, "no row in it; valid: a JSON object on each line")


def prompt_hash(prompt: Prompt) -> int:
    """64 well-mixed bits of a prompt's content: text and one user message of it are the same."""
    match prompt:
        case str(text):
            pass
        case [{"role": "user", "content": str(text), **more}] if not more:
            pass
        case messages:
            text = json.dumps(messages, sort_keys=True)
    return xxhash.xxh3_64_intdigest(text.encode())


def shuffled(seed: int, index: int, rows: int) -> int:
    """Which of `rows` comes at place `index` of an endless shuffle: each once an epoch.

    A function of its arguments, so a run that resumes needs no state.
    """
    epoch, place = divmod(index, rows)
    return int(_order(seed, epoch, rows)[place])


@lru_cache(maxsize=8)
def _order(seed: int, epoch: int, rows: int) -> Rows:
    """Rows sorted by splitmix64 of their number: the same on every machine and version of numpy."""
    key = np.uint64(xxhash.xxh3_64_intdigest(f"{seed}/{epoch}".encode()))
    z = key + np.arange(1, rows + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(z ^ (z >> np.uint64(31)), kind="stable")


def _opened(field: str, path: Path) -> BinaryIO:
    try:
        if path.is_dir():
            raise DatasetError(field, path, "a folder; valid: a JSONL file")
        return path.open("rb")
    except FileNotFoundError:
        raise DatasetError(
            field, path, "there is no such file; valid: a JSONL file that the collector can read"
        ) from None
    except OSError as error:
        raise DatasetError(field, path, f"it cannot be read: {error.strerror or error}") from error


def _lines(
    file: BinaryIO, digest: xxhash.xxh3_64 | None, faults: _Faults
) -> Iterator[tuple[int, int, bytes]]:
    """Line number, offset and bytes of each line that is not blank or too long."""
    number, begin = 0, 0
    while line := file.readline(LINE_BYTES + 1):
        number += 1
        size, too_long = len(line), False
        if digest is not None:
            digest.update(line)
        while len(line) > LINE_BYTES and not line.endswith(b"\n"):  # pass over the rest of it
            too_long = True
            line = file.readline(LINE_BYTES + 1)
            size += len(line)
            if digest is not None:
                digest.update(line)
            if not line:
                break
        skip = len(_BOM) if number == 1 and line.startswith(_BOM) else 0
        if too_long:
            faults.add(number, f"line: {size:,} bytes are not valid; valid: up to {LINE_BYTES:,}")
        elif line[skip:].strip():
            yield number, begin + skip, line[skip:]
        begin += size


def _stamp(file: BinaryIO) -> tuple[int, int]:
    about = os.fstat(file.fileno())
    return about.st_mtime_ns, about.st_size
