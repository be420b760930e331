"""One real vLLM engine for all of these tests, in the environment of its own."""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from enginekit import EngineClient, engine_client, engine_process, random_model

_NUMBERS = itertools.count(1)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """The Python that has vLLM; where there is none the tests are skipped, and say so."""
    python = Path(os.environ.get("KEEL_VLLM_PYTHON", ROOT / ".venv-vllm/bin/python"))
    if not python.exists():
        pytest.skip(f"{python} is missing: `make engine-vllm` makes it, and vLLM is then tested")
    return str(python)


@pytest.fixture(scope="session")
def vllm_shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Storage that the session's engine shares."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="session")
def vllm_address(vllm_python: str, vllm_shared: Path) -> Iterator[str]:
    """The address of one vLLM engine for the session, on one thread."""
    arguments = ("--kind", "vllm", "--threads", "1", "--shared", str(vllm_shared))
    with engine_process(*arguments, python=vllm_python) as (address, _):
        yield address


@pytest.fixture
async def client(vllm_address: str) -> AsyncIterator[EngineClient]:
    """A client of one run: a model that an earlier test loaded is there at once."""
    async with engine_client(vllm_address, "run", next(_NUMBERS)) as made:
        yield made


@pytest.fixture
def next_version() -> Callable[[], int]:
    """Policy versions, each higher than all before."""
    return lambda: next(_NUMBERS)


@pytest.fixture(scope="session")
def model_a() -> Any:
    """A random model of the preset."""
    return random_model(seed=1)


@pytest.fixture(scope="session")
def model_b() -> Any:
    """Another one, quite different."""
    return random_model(seed=2)
