"""The built-in tasks by name. Their verifiers are in worker processes (`verify_worker`)."""

from __future__ import annotations

from keel.spec import MULTIPLICATION, TaskSpec
from keel_rollout.collector.tasks.base import BuiltInTask
from keel_rollout.collector.tasks.multiplication import Multiplication


def built_in_task(spec: TaskSpec) -> BuiltInTask:
    """The task that a job asks for, where it names no file."""
    return {MULTIPLICATION: Multiplication}[spec.dataset](spec.difficulty)
