"""Fixtures around `enginekit`; a test module says `pytest_plugins = ["engine_fixtures"]`."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from enginekit import EngineClient, engine_client, engine_process, random_model

_TOKENS = itertools.count(1)


@pytest.fixture(scope="session")
def engine_shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Storage that the session's engine shares."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="session")
def engine_address(engine_shared: Path) -> Iterator[str]:
    """The address of one torch engine for the session."""
    with engine_process("--shared", str(engine_shared)) as (address, _):
        yield address


@pytest.fixture
def next_token() -> Callable[[], int]:
    """Fencing tokens, each higher than all before, as a gateway grants them."""
    return lambda: next(_TOKENS)


@pytest.fixture
async def client(engine_address: str, next_token: Callable[[], int]) -> AsyncIterator[EngineClient]:
    """A run of its own, with the highest lease; nothing loaded for it yet."""
    token = next_token()
    async with engine_client(engine_address, f"run-{token}", token) as made:
        yield made


@pytest.fixture(scope="session")
def model_a() -> Any:
    """A random model of the preset."""
    return random_model(seed=1)


@pytest.fixture(scope="session")
def model_b() -> Any:
    """Another one, quite different."""
    return random_model(seed=2)
