"""The whole stack as processes, and a client for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from jobs import Jobs, job_spec, taught_model

from keel_gateway.stack import Stack


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with Stack(tmp_path_factory.mktemp("stack")) as stack:
        yield stack


@pytest.fixture(scope="session")
def jobs(stack: Stack) -> Jobs:
    return Jobs(stack.url)


@pytest.fixture(scope="session")
def taught(jobs: Jobs) -> dict[str, Any]:
    """See `taught_model`."""
    return taught_model(jobs)


@pytest.fixture(scope="session")
def undisturbed(jobs: Jobs, taught: dict[str, Any]) -> dict[str, Any]:
    """`job_spec(model=taught)`, run once without interference."""
    return jobs.run(job_spec(model=taught))
