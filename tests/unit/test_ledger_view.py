"""`keel ledger`, `keel dead-letters` and their routes: what became of every group."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import redis
from clikit import Gateway, job
from gateway_house import House, the_problem
from gateway_peers import SPEC
from rediskit import RedisServer

from keel.dead_letters import DeadLetter
from keel.ledger import FILE, Checkpointed, Line, Opened, Used, encode
from keel.queue import dead_envelopes_key, dead_letters_key
from keel_gateway.ledger_view import laps, view

pytest_plugins = ["cli_fixtures"]

N, B = 2, 3


def opened(step: int = 0, cold_start_step: int = 0) -> Opened:
    return Opened(
        step=step,
        cold_start_step=cold_start_step,
        off_policiness=N,
        groups_per_minibatch=B,
        token=1,
        at_s=0.0,
    )


def step(number: int, **changes: Any) -> list[Line]:
    """The groups of an optimizer step; `changes` are of the first."""
    lap, index = divmod(number - 1, N)
    groups: list[Line] = []
    for slot in range(index * B, (index + 1) * B):
        fields = {"kind": "group", "step": number, "attempt": 0, "lap": lap, "slot": slot}
        fields |= {"entry": f"{lap}-{slot}", "xxh3": "0" * 16} | ({} if groups else changes)
        groups.append(Used.model_validate(fields))
    return groups


def supervised(number: int) -> Used:
    fields = {"kind": "demonstrations", "step": number, "lap": number - 1, "slot": 0}
    return Used.model_validate(fields | {"attempt": 0, "entry": f"{number}-0", "xxh3": "0" * 16})


def checkpoint(step: int, cold_start_step: int = 2) -> Checkpointed:
    return Checkpointed(step=step, cold_start_step=cold_start_step)


def story() -> list[Line]:
    """Killed in the cold start, and in the second lap after its checkpoint of the first."""
    return [
        *(opened(), supervised(1)),
        *(opened(), supervised(1), supervised(2), checkpoint(0)),
        *(*step(1), *step(2, outcome="void"), checkpoint(2)),
        *step(3),
        *(opened(2, 2), *step(3, outcome="dead"), *step(4), checkpoint(4)),
    ]


def test_lap_by_lap() -> None:
    cold, first, second = laps(story())
    assert (cold.lap, cold.first_step, cold.last_step, cold.trained) == (None, 1, 2, 2)
    assert (cold.again, cold.takeovers, cold.checkpoint) == (1, 1, True)
    assert (first.lap, first.first_step, first.last_step) == (0, 1, 2)
    assert (first.trained, first.void, first.dead) == (5, 1, 0)
    assert (first.again, first.takeovers, first.checkpoint) == (0, 0, True)
    assert (second.trained, second.void, second.dead) == (5, 0, 1)
    assert (second.again, second.takeovers, second.checkpoint) == (3, 1, True)
    assert laps([]) == []
    # what a crash has undone and nobody has done again yet
    (_, _, torn) = laps([*story()[:-8], opened(2, 2)])
    assert (torn.first_step, torn.trained, torn.takeovers, torn.checkpoint) == (None, 0, 1, False)


def test_the_verdict() -> None:
    found = view(story(), "x")
    assert (found.verdict, found.problems) == ("10 groups trained, 0 lost, 0 twice", [])
    lost = view([opened(), *step(1)[1:], *step(2)], "x")
    assert (lost.verdict, len(lost.problems)) == ("5 groups trained, 1 lost, 0 twice", 1)
    twice = view([opened(), *step(1), *step(2, entry="0-0")], "x")
    assert (twice.verdict, len(twice.problems)) == ("6 groups trained, 0 lost, 1 twice", 1)


class TestCommand:
    def test_of_a_folder_or_a_file(self, keel: Callable[..., Any], tmp_path: Path) -> None:
        (tmp_path / FILE).write_bytes(encode(story()))
        for path in (tmp_path, tmp_path / FILE):
            told = keel("ledger", str(path))
            assert told.exit_code == 0, told.complained
            assert told.said.splitlines()[-1] == "10 groups trained, 0 lost, 0 twice"
            assert "resumed, checkpoint" in told.said
        assert "2 earlier ones left out" in keel("ledger", str(tmp_path), "--limit", "1").said
        found = json.loads(keel("ledger", str(tmp_path), "--json").said)
        assert (found["trained"], found["lost"], found["takeovers"]) == (10, [], 2)

    def test_what_is_wrong_is_named_and_exits_with_1(
        self, keel: Callable[..., Any], tmp_path: Path
    ) -> None:
        (tmp_path / FILE).write_bytes(encode([opened(), *step(1)[1:]]))
        told = keel("ledger", str(tmp_path))
        assert told.exit_code == 1
        assert "step 1, slot 0/0 is missing" in told.said
        assert json.loads(keel("ledger", str(tmp_path), "--json").said)["lost"]

    def test_no_file_and_no_ledger(self, keel: Callable[..., Any], tmp_path: Path) -> None:
        told = keel("ledger", str(tmp_path))
        assert told.exit_code == 1
        assert f"{tmp_path / FILE} is not there" in told.complained
        (tmp_path / FILE).write_text('{"kind": "group"}\n')
        told = keel("ledger", str(tmp_path))
        assert told.exit_code == 1
        assert "ledger, line 1" in told.complained

    def test_of_a_job(self, keel: Callable[..., Any], gateway: Gateway) -> None:
        gateway.jobs(job())
        found = view(story(), "/runs/first-abcdef/ledger.jsonl").model_dump(mode="json")
        gateway.answers["GET", "/v1/jobs/first-abcdef/ledger"] = found
        told = keel("ledger", "first")
        assert (told.exit_code, told.said.splitlines()[-1]) == (0, found["verdict"])

    def test_dead_letters(self, keel: Callable[..., Any], gateway: Gateway, tmp_path: Path) -> None:
        gateway.jobs(job())
        path = "/v1/jobs/first-abcdef/dead-letters"
        gateway.answers["GET", path] = {"dead_letters": []}
        assert keel("dead-letters").said == "first-abcdef has no dead letters\n"
        found = [letter("1-0"), letter("2-0", lap=None, slot=None)]
        gateway.answers["GET", path] = {
            "dead_letters": [one.model_dump(mode="json") for one in found]
        }
        gateway.answers["GET", f"{path}/groups/1-0"] = "raw"
        told = keel("dead-letters", "--save", str(tmp_path / "dead"))
        assert told.exit_code == 0, told.complained
        assert "lap 3, slot 5" in told.said
        assert "envelope.payload: unset" in told.said
        assert "1 of 2 saved" in told.said
        assert [file.name for file in (tmp_path / "dead").iterdir()] == ["groups-1-0.envelope"]
        assert (tmp_path / "dead" / "groups-1-0.envelope").read_bytes() == b"raw"
        as_json = json.loads(keel("dead-letters", "--json").said)
        assert as_json["dead_letters"] == [one.model_dump(mode="json") for one in found]

    def test_jobs_says_that_there_are_some(
        self, keel: Callable[..., Any], gateway: Gateway
    ) -> None:
        one = job(phase="TRAINING").model_copy(update={"dead_letters": 2})
        gateway.jobs(one)
        assert "2 dead letters: keel dead-letters first-abcdef" in keel("jobs").said


def letter(entry: str, **changes: Any) -> DeadLetter:
    fields: dict[str, Any] = {
        "stream": "groups",
        "entry": entry,
        "attempt": 0,
        "lap": 3,
        "slot": 5,
        "reason": "envelope.payload: unset",
        "tries": 3,
        "died_at": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        "size_bytes": 2048,
    }
    return DeadLetter.model_validate(fields | changes)


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    server = RedisServer(tmp_path)
    server.start()
    with redis.Redis.from_url(server.url) as client:
        yield House(server, client)
    server.stop()


async def test_the_routes(house: House, tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        client = await house.open(stack)
        run = (await client.post("/v1/jobs", json=SPEC)).json()["id"]
        at = f"/v1/jobs/{run}"

        told = the_problem(await client.get(f"{at}/ledger"), 404)["detail"]
        assert "no trainer has begun it" in told
        house.write(run, phase="TRAINING", artifact="/elsewhere", folder=tmp_path / run)
        told = the_problem(await client.get(f"{at}/ledger"), 404)["detail"]
        assert f"is on its trainer's disk: {tmp_path / run / FILE} is not there" in told
        assert f"keel ledger {tmp_path / run / FILE}" in told
        (tmp_path / run).mkdir()
        (tmp_path / run / FILE).write_bytes(encode(story()))
        found = (await client.get(f"{at}/ledger")).json()
        assert (found["trained"], found["verdict"]) == (10, "10 groups trained, 0 lost, 0 twice")

        assert (await client.get(f"{at}/dead-letters")).json() == {"dead_letters": []}
        assert (await client.get(at)).json()["dead_letters"] == 0
        dead = letter("1-0")
        house.redis.hset(dead_letters_key(run), dead.field, dead.model_dump_json())
        house.redis.hset(dead_envelopes_key(run), dead.field, b"\x00raw")
        (listed,) = (await client.get(f"{at}/dead-letters")).json()["dead_letters"]
        assert DeadLetter.model_validate(listed) == dead
        raw = await client.get(f"{at}/dead-letters/groups/1-0")
        assert (raw.content, raw.headers["content-type"]) == (
            b"\x00raw",
            "application/octet-stream",
        )
        the_problem(await client.get(f"{at}/dead-letters/groups/2-0"), 404)
        the_problem(await client.get(f"{at}/dead-letters/others/1-0"), 422)
        assert (await client.get(at)).json()["dead_letters"] == 1
        assert (await client.get("/v1/jobs")).json()["jobs"][0]["dead_letters"] == 1
        told = (await client.get("/metrics")).text
        assert f'keel_run_dead_letters{{run="{run}"}} 1.0' in told

        house.write(run, phase="SUCCEEDED")  # of 8 steps
        found = (await client.get(f"{at}/ledger")).json()
        assert found["lost"] == ["steps 5 to 8 are missing"]
        (tmp_path / run / FILE).write_text("{}\n")
        assert "ledger, line 1" in the_problem(await client.get(f"{at}/ledger"), 409)["detail"]
