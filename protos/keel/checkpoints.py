"""Checkpoints that a run has, as its trainer lists them in Redis (`keel.queue.checkpoints_key`).

The whole list is written at once, whenever it changes: readers see what is on the trainer's disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from pydantic import BaseModel, ConfigDict, TypeAdapter


class CheckpointInfo(BaseModel):
    """One checkpoint: a folder from which the run goes on with the same bits."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    attempt: int
    """Attempt of the run."""
    step: int
    """Optimizer steps that it covers, cold start not counted."""
    cold_start_step: int
    """Supervised steps that it covers."""
    policy_version: int | None
    """Version that its weights are; null within the cold start."""
    created_at: datetime
    """When it was written."""
    size_bytes: int
    """What its files take."""
    folder: str
    """On the trainer's disk."""


_LIST = TypeAdapter(list[CheckpointInfo])


def encode_checkpoints(checkpoints: Sequence[CheckpointInfo]) -> bytes:
    """The list as JSON, oldest first."""
    return _LIST.dump_json(list(checkpoints))


def decode_checkpoints(value: bytes | None) -> list[CheckpointInfo]:
    """The list; empty where none was written yet."""
    return [] if value is None else _LIST.validate_json(value)
