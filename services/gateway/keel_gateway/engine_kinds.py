"""The engines of a stack: those that Keel starts, by kind, number and interpreter, and others."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

from keel.errors import InvalidField
from keel.spec import EngineSpec
from keel_gateway.settings import parse_address
from keel_gateway.supervisor import StackError

KINDS = ("torch", "vllm")
"""Those that `keel_rollout.engine_main` knows. Whoever starts another gives its address."""
VLLM_PYTHON = "KEEL_VLLM_PYTHON"
VLLM_VENV = ".venv-vllm"
"""vLLM pins another torch, so it lives in an environment of its own."""
MOST = 64
VALID = (
    f"a number from 1 to {MOST}, or kinds of {', '.join(KINDS)}, such as torch=1,vllm=1, or "
    "HOST:PORT of one that runs already"
)


def parse_engines(text: str, kinds: Sequence[str] = KINDS[:1]) -> tuple[str, ...]:
    """Each engine that `--engines` asks for: its kind, or its address if it runs already.

    Args:
        kinds: what a bare number means: each in turn.

    Raises:
        InvalidField: it is neither a number nor kinds, or one of `kinds` cannot be started here.

    Example:
        parse_engines("torch=2,gpu-7:50051") == ("torch", "torch", "gpu-7:50051")
    """
    if count := _count(text):
        return tuple(islice(cycle(_startable(kinds)), count))
    found: list[str] = []
    for part in text.split(","):
        if ":" in part:
            parse_address("--engines", part)
            found.append(part.strip())
            continue
        kind, equals, number = part.strip().partition("=")
        count = _count(number) if equals else 1
        if kind not in KINDS or not count or kind in found:
            raise InvalidField("--engines", text, VALID)
        found += [kind] * count
    if len(found) > MOST:
        raise InvalidField("--engines", text, VALID)
    return tuple(found)


def engines_of(asked: EngineSpec) -> tuple[str, ...]:
    """The kind of each engine that a job asks for, or InvalidField where Keel starts none such."""
    if asked.engines > MOST:
        raise InvalidField("engine.count", asked.engines, f"at most {MOST} on one machine")
    return tuple(islice(cycle(_startable(asked.kinds)), asked.engines))


def python_of(kind: str) -> str:
    """The interpreter that runs an engine of this kind; StackError where there is none."""
    if kind != "vllm":
        return sys.executable
    path = vllm_python()
    if not os.access(path, os.X_OK):
        raise StackError(
            f"there is no {path} to run engine vllm: make engine-vllm installs it, or "
            f"{VLLM_PYTHON} names the Python that has vllm and keel-rollout"
        )
    return str(path)


def vllm_python() -> Path:
    """Where the Python of engine vllm is, or would be: beside this environment, or as told."""
    beside = Path(sys.prefix).parent / VLLM_VENV / "bin" / "python"
    return Path(os.environ.get(VLLM_PYTHON) or beside)


def _startable(kinds: Sequence[str]) -> Sequence[str]:
    for kind in kinds:
        if kind not in KINDS:
            started = f"one that is started here ({', '.join(KINDS)})"
            valid = f"{started}; start an engine of your own, and say --engines HOST:PORT"
            raise InvalidField("engine.kind", kind, valid)
    return kinds


def _count(text: str) -> int:
    """A number from 1 to MOST; 0 if it is none."""
    text = text.strip()
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 4 else 0
    return number if number <= MOST else 0
