"""The tutorial, run as written: every command on the page, in its order, on the real stack."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from docs.tutorial_page import BACKGROUND, Block, Terminals, blocks

from keel_gateway.client import GatewayClient, find_url

PAGE = (Path(__file__).parents[2] / "docs" / "tutorial.md").read_text(encoding="utf-8")
TIMEOUT_S = 300
"""For one command; on two idle cores none takes more than 60 s."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the page was followed from its first to its last block; its services still run."""
    folder = tmp_path_factory.mktemp("tutorial")
    # the page uses port 8080, which may be taken on the machine of a test
    terminals = Terminals(folder, {"KEEL_PORT": str(free_port())}, TIMEOUT_S)
    try:
        for block in blocks(PAGE):
            terminals.run(block)
        yield folder
    finally:
        terminals.close()


def test_the_page_works_from_its_first_to_its_last_block(folder: Path) -> None:
    assert len((folder / "first.html").read_text(encoding="utf-8")) > 1_000_000


def rows_of(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> list[dict[str, Any]]:
    monkeypatch.chdir(folder)
    with GatewayClient(find_url(None)) as client:
        (job,) = [job for job in client.jobs() if job.name == name]
        rows = client.metrics(job.id).rows
    assert job.step == 80
    return rows


def rewards(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Mean reward of the first and of the last tenth of the steps."""
    found = [row["reward/mean"] for row in rows[1:]]
    return sum(found[:8]) / 8, sum(found[-8:]) / 8


def test_the_first_job_learns_as_the_page_says(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(folder, monkeypatch, "first")
    first, last = rewards(rows)
    assert last > 1.4 * first
    for row in rows[1:]:
        assert row["replay/rows_obeyed"] == row["replay/rows_requested"] > 0
        # "the two gaps, which stay small"
        assert row["mismatch/k3"] < 0.01
        assert row["staleness/k3"] < 0.3


def test_data_of_ones_own_are_learned_as_the_page_says(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(folder, monkeypatch, "words")
    first, last = rewards(rows)
    assert 0.2 < first < 0.4, "three in ten"
    assert last > 0.4, "more than four in ten"
    assert rows[-1]["reward/part/regex"] == rows[-1]["reward/mean"]
    scores = [row["accuracy/eval"] for row in rows if row.get("accuracy/eval") is not None]
    assert len(scores) == 3
    assert scores[-1] > scores[0]


def test_a_command_that_fails_is_not_passed_over(tmp_path: Path) -> None:
    terminals = Terminals(tmp_path, {}, 10)
    terminals.run(Block("text", "", "false\n", 1))
    terminals.run(Block("toml", "a.toml", "a = 1\n", 1))
    assert (tmp_path / "a.toml").read_text() == "a = 1\n"
    for block in (
        Block("bash", "", "false\ntrue\n", 1),
        Block("bash", "", "false | true\n", 1),
        Block("python", "", "assert False\n", 1),
        Block("bash", BACKGROUND, "true\n", 1),
    ):
        with pytest.raises(AssertionError):
            terminals.run(block)


def test_a_block_that_would_silently_not_run_is_an_error() -> None:
    assert [b.line for b in blocks("a\n\n```bash\nls\n```\n\n```text\nb\n```\n")] == [3, 7]
    for page in ("```\nls\n```\n", "```sh\nls\n```\n", "- a\n\n  ```bash\n  ls\n  ```\n"):
        with pytest.raises(ValueError, match=r"fence|to be run"):
            blocks(page)
