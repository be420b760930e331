"""TensorBoard: DIR/RUN/, a row an event, so that a killed writer leaves whole rows or none.

The writer is TensorBoard's own, without TensorFlow and without torch. TensorBoard keeps scalars in
float32.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keel.metrics import Row
from keel.samples import Sample
from keel_gateway.schemas import Job
from keel_gateway.sinks.base import checked_folder, describe, numbers, require

EXTRA = "tensorboard"


class TensorBoard:
    """See `Sink`. Scalars under the names of docs/metrics.md; texts `spec` and `samples`.

    Example:
        sink = TensorBoard(Path("tb"), job)  # continues what is in tb/RUN
    """

    def __init__(self, folder: Path, job: Job) -> None:
        writer = require("tensorboard.summary.writer.event_file_writer", EXTRA)
        self._events = require("tensorboard.compat.proto.event_pb2", EXTRA)
        self._summary = require("tensorboard.compat.proto.summary_pb2", EXTRA)
        self._tensors = require("tensorboard.compat.proto.tensor_pb2", EXTRA)
        self._types = require("tensorboard.compat.proto.types_pb2", EXTRA)
        self._text = require("tensorboard.plugins.text.metadata", EXTRA)
        self._parent = folder
        folder = checked_folder(folder / job.id)
        self.last_step = last_step(folder)
        self._writer = writer.EventFileWriter(str(folder))
        if self.last_step < 0:
            spec = job.spec.model_dump_json(indent=2)
            self._add(0, [self._texts("spec", [_verbatim(spec)])])

    @property
    def place(self) -> str:
        """See `Sink`."""
        return f"tensorboard --logdir {self._parent}"

    def write(self, row: Row, samples: Sequence[Sample]) -> None:
        """See `Sink`."""
        value = self._summary.Summary.Value
        values = [value(tag=name, simple_value=x) for name, x in numbers(row).items()]
        if samples:
            values.append(self._texts("samples", [_verbatim(describe(s)) for s in samples]))
        self._add(row["step"], values)
        self.last_step = row["step"]

    def close(self) -> None:
        """See `Sink`."""
        self._writer.close()

    def _add(self, step: int, values: Sequence[Any]) -> None:
        summary = self._summary.Summary(value=values)
        event = self._events.Event(wall_time=time.time(), step=step, summary=summary)
        self._writer.add_event(event)

    def _texts(self, tag: str, texts: Sequence[str]) -> Any:
        tensor = self._tensors.TensorProto(dtype=self._types.DT_STRING)
        tensor.tensor_shape.dim.add(size=len(texts))
        tensor.string_val.extend(text.encode() for text in texts)
        metadata = self._text.create_summary_metadata(display_name=tag, description="")
        return self._summary.Summary.Value(tag=tag, metadata=metadata, tensor=tensor)


def last_step(folder: Path) -> int:
    """The last step of any row in a folder of event files; -1 if there is none."""
    loader = require("tensorboard.backend.event_processing.event_file_loader", EXTRA)
    steps = [-1]
    for file in folder.glob("events.out.tfevents.*"):
        for event in loader.LegacyEventFileLoader(str(file)).Load():
            if any(value.HasField("simple_value") for value in event.summary.value):
                steps.append(event.step)
    return max(steps)


def _verbatim(text: str) -> str:
    """As Markdown that shows the text as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines())
