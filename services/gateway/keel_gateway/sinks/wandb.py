"""Weights & Biases, online or offline: a run with the id of the job, the spec as its config.

Run again, it goes on after the last step that is there: online W&B says which (a run is resumed by
its id), offline the files in the folder do. Offline runs are uploaded by `wandb sync`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from keel.metrics import Row
from keel.samples import Sample
from keel_gateway.schemas import Job
from keel_gateway.sinks.base import SinkError, checked_folder, gaps_of, numbers, require

EXTRA = "wandb"
COLUMNS = ("prompt", "response", "reward", "advantage", "gap mean", "gap max", "experts differ")
"""Of the table `samples`: gaps are means and maxima of |log pi_old - log mu_old|, nats."""

_FILE_HEADER_BYTES, _BLOCK_BYTES = 7, 32768
_CHUNK_HEADER = struct.Struct("<IHB")
"""Checksum, length, kind: 1 whole, 2 first, 3 middle, 4 last."""


class WeightsAndBiases:
    """See `Sink`. Numbers under the names of docs/metrics.md; a table `samples` a logged step.

    Args:
        folder: W&B makes its folder `wandb` in it.
    """

    def __init__(self, project: str, folder: Path, job: Job, *, offline: bool) -> None:
        self._wandb = require("wandb", EXTRA)
        checked_folder(folder)
        self._folder, self._offline = folder, offline
        before = -1
        for file in folder.glob(f"wandb/*-{job.id}/run-{job.id}.wandb"):
            before = max(before, last_step(file))
        try:
            self._run = self._wandb.init(
                project=project,
                id=job.id,
                name=job.id,
                dir=str(folder),
                mode="offline" if offline else "online",
                resume="allow",
                config=job.spec.model_dump(mode="json"),
                # nothing of the machine that happens to follow the run
                settings=self._wandb.Settings(
                    silent=True,
                    console="off",
                    save_code=False,
                    disable_git=True,
                    x_disable_stats=True,
                    x_disable_meta=True,
                ),
            )
        except self._wandb.errors.Error as error:
            raise SinkError(f"W&B: {error}") from error
        if not offline:
            before = self._run.step - 1 if self._run.resumed else -1
        self.last_step = before

    @property
    def place(self) -> str:
        """See `Sink`."""
        if self._offline:
            return f"wandb sync {Path(self._run.dir).parent}"
        return str(self._run.url)

    def write(self, row: Row, samples: Sequence[Sample]) -> None:
        """See `Sink`."""
        content: dict[str, Any] = dict(numbers(row))
        if samples:
            table = self._wandb.Table(columns=list(COLUMNS), data=[_cells(s) for s in samples])
            content["samples"] = table
        self._run.log(content, step=row["step"], commit=True)
        self.last_step = row["step"]

    def close(self) -> None:
        """See `Sink`."""
        self._run.finish()
        self._wandb.teardown()  # its server writes the end of the file only when it ends itself


def last_step(file: Path) -> int:
    """The last step in a file of an offline run; -1 if there is none."""
    return max((record.history.step.num for record in history(file)), default=-1)


def history(file: Path) -> Iterator[Any]:
    """The records of a .wandb file that are rows; a torn end is no error.

    The file is LevelDB's log format: blocks of 32 KiB, each a row of chunks. W&B has no reader of
    its own in Python any more (0.31).
    """
    messages = require("wandb.proto.wandb_internal_pb2", EXTRA)
    for payload in _payloads(file.read_bytes()):
        record = messages.Record.FromString(payload)
        if record.WhichOneof("record_type") == "history":
            yield record


def _payloads(data: bytes) -> Iterator[bytes]:
    at, whole = _FILE_HEADER_BYTES, b""
    while at + _CHUNK_HEADER.size <= len(data):
        left = _BLOCK_BYTES - at % _BLOCK_BYTES
        if left < _CHUNK_HEADER.size:  # padding
            at += left
            continue
        _, length, kind = _CHUNK_HEADER.unpack_from(data, at)
        at += _CHUNK_HEADER.size
        if at + length > len(data):
            return
        whole = (whole if kind in (3, 4) else b"") + data[at : at + length]
        at += length
        if kind in (1, 4):
            yield whole


def _cells(sample: Sample) -> list[Any]:
    gaps = [abs(gap) for gap in gaps_of(sample) if gap is not None]
    mean, largest = (sum(gaps) / len(gaps), max(gaps)) if gaps else (None, None)
    differ = sample.experts_differ and sum(layers > 0 for layers in sample.experts_differ)
    return [
        *(sample.prompt, sample.response, sample.reward, sample.advantage),
        *(mean, largest, differ),
    ]
