"""Events of a job: derived, resumed, shared; over a real Redis and real HTTP."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
import uvicorn
from gateway_peers import SPEC, eventually
from rediskit import RedisServer

from keel.errors import InvalidField
from keel.metrics import encode_row, evaluation_field, row_field
from keel.queue import metrics_key, run_key
from keel.record import RunRecord, pack_fields
from keel.spec import parse_spec
from keel_gateway import client as client_module
from keel_gateway import feeds as feeds_module
from keel_gateway.app import create_app
from keel_gateway.client import GatewayClient, ProblemError, Unreachable
from keel_gateway.events import Cursor, events_after
from keel_gateway.feeds import Feeds
from keel_gateway.listen import Event, parse_events
from keel_gateway.main import GatewayServer
from keel_gateway.schemas import Job
from keel_gateway.settings import Settings
from keel_gateway.store import Store, connect

RUN = "first-abcdef"
Told = tuple[str, Any]
"""Kind, and what identifies it: the step, or the phase."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


class Trainer:
    """Writes into Redis what a trainer and a collector would."""

    def __init__(self, url: str, *, steps: int = 12, every: int = 4, lap_steps: int = 4) -> None:
        self.redis = redis.Redis.from_url(url)
        self.redis.flushall()
        recipe = SPEC["recipe"] | {"steps": steps, "off_policiness": lap_steps}
        self.spec = parse_spec(SPEC | {"recipe": recipe, "evaluation": {"every": every}})
        record = RunRecord(RUN, self.spec, 1.0, trainer="t:1", engines=("e:1",))
        self.redis.hset(run_key(RUN), mapping=record.to_hash())

    def write(self, **fields: Any) -> None:
        self.redis.hset(run_key(RUN), mapping=pack_fields(**fields))

    def row(self, step: int, *, whole: bool = True, attempt: int = 0, **columns: Any) -> None:
        row = {"step": step, "reward/mean": step / 100} | columns
        row |= {"time/publish_s": 0.5} if whole else {}
        self.redis.hset(metrics_key(RUN), row_field(attempt, step), encode_row(row))

    def rows(self, steps: range, *, attempt: int = 0) -> None:
        rows = {
            row_field(attempt, step): encode_row(
                {"step": step, "reward/mean": step / 100, "time/publish_s": 0.5}
            )
            for step in steps
        }
        self.redis.hset(metrics_key(RUN), mapping=rows)
        self.write(step=steps[-1])

    def evaluation(self, step: int, *, attempt: int = 0) -> None:
        row = encode_row({"step": step, "accuracy/eval": step / 100})
        self.redis.hset(metrics_key(RUN), evaluation_field(attempt, step), row)


class Watcher:
    """Takes events from a store, from a cursor on."""

    def __init__(self, url: str) -> None:
        self.redis = connect(url)
        self.store = Store(self.redis)
        self.cursor = Cursor()
        self.reason = ""

    def shown(self, record: RunRecord) -> Job:
        return Job.from_record(record, self.reason, {})

    async def once(self) -> list[Event]:
        """One read."""
        events = await events_after(self.store, self.shown, RUN, self.cursor)
        if events:
            self.cursor = events[-1].cursor
        lines = b"".join(event.wire for event in events).decode().split("\n")
        parsed = list(parse_events(lines))
        assert [event.id for event in parsed] == [str(event.cursor) for event in events]
        return parsed

    async def all(self) -> list[Event]:
        """Reads until nothing is left."""
        found: list[Event] = []
        while events := await self.once():
            found += events
        return found

    async def go_on_after(self, event_id: str) -> list[Event]:
        """What a new watcher gets who comes with this id."""
        self.cursor = Cursor.parse(event_id, await self.store.get(RUN))
        return await self.all()


@pytest.fixture
async def watcher(server: RedisServer) -> AsyncIterator[Watcher]:
    made = Watcher(server.url)
    yield made
    await made.redis.aclose()


def told(events: list[Event]) -> list[Told]:
    return [(e.kind, e.data["phase"] if "phase" in e.data else e.data["step"]) for e in events]


async def test_a_finished_job_is_told_in_order_and_from_any_id_on(
    server: RedisServer, watcher: Watcher
) -> None:
    trainer = Trainer(server.url)
    trainer.rows(range(1, 13))
    for step in (0, 4, 8, 12):
        trainer.evaluation(step)
    trainer.write(phase="SUCCEEDED", policy_version=3)
    events = await watcher.all()
    metrics = [("metrics", step) for step in range(1, 13)]
    assert told(events) == [
        ("evaluation", 0),
        *metrics[:4],
        ("evaluation", 4),
        *metrics[4:8],
        ("evaluation", 8),
        *metrics[8:],
        ("evaluation", 12),
        ("job", "SUCCEEDED"),
        ("end", "SUCCEEDED"),
    ]
    assert events[1].data == {"step": 1, "reward/mean": 0.01, "time/publish_s": 0.5}
    assert events[-2].data["policy_version"] == 3
    assert len({event.id for event in events}) == len(events)
    for index, event in enumerate(events):
        assert await watcher.go_on_after(event.id) == events[index + 1 :]


async def test_rows_are_told_once_whole_and_evaluations_when_they_come(
    server: RedisServer, watcher: Watcher
) -> None:
    trainer = Trainer(server.url)
    (first,) = await watcher.all()
    assert (first.kind, first.data["phase"], first.data["step"]) == ("job", "QUEUED", 0)
    trainer.write(phase="TRAINING", step=3)
    for step in (1, 2, 3):
        trainer.row(step, whole=False)
    assert told(await watcher.all()) == [("job", "TRAINING")]
    trainer.row(2)
    assert await watcher.all() == [], "row 1 comes first"
    trainer.row(1)
    assert told(await watcher.all()) == [("metrics", 1), ("metrics", 2)]
    trainer.evaluation(0)
    trainer.row(3)
    assert told(await watcher.all()) == [("evaluation", 0), ("metrics", 3)]
    # a crash: the lap is trained again, with the same bits
    for step in (1, 2, 3):
        trainer.row(step, whole=False)
    trainer.write(phase="PREPARING")
    trainer.write(phase="TRAINING")
    assert await watcher.all() == []
    trainer.rows(range(1, 5))
    assert told(await watcher.all()) == [("metrics", 4)]


async def test_a_job_event_for_each_change_that_people_care_for(
    server: RedisServer, watcher: Watcher
) -> None:
    trainer = Trainer(server.url)
    await watcher.all()
    for change in (
        {"phase": "TRAINING"},
        {"desired": "PAUSED"},
        {"paused": True},
        {"desired": "RUNNING", "paused": False},
        {"attempt": 1},
        {"collector_error": "no verifier"},
        {"phase": "FAILED", "error": "the collector"},
    ):
        trainer.write(**change)
        events = await watcher.all()
        assert [event.kind for event in events] == ["job", "end"][: 1 + ("error" in change)]
    watcher.cursor = Cursor()
    trainer.write(phase="TRAINING", step=0)
    await watcher.all()
    trainer.write(policy_version=0, started_s=5.0)
    assert await watcher.all() == []
    watcher.reason = "trainer t:1 does not answer"
    (event,) = await watcher.all()
    assert event.data["reason"] == watcher.reason


async def test_the_cold_start_is_told_in_twentieths(server: RedisServer, watcher: Watcher) -> None:
    trainer = Trainer(server.url)
    spec = trainer.spec.model_dump(mode="json") | {"cold_start": {"steps": 400}}
    trainer.redis.hset(run_key(RUN), "spec", json.dumps(spec))
    trainer.write(phase="COLD_START")
    seen = []
    for step in range(0, 401):
        trainer.write(cold_start_step=step)
        seen += [event.data["cold_start_step"] for event in await watcher.once()]
    assert seen == list(range(0, 401, 20))


async def test_what_a_new_attempt_did_again_comes_again(
    server: RedisServer, watcher: Watcher
) -> None:
    trainer = Trainer(server.url)
    trainer.write(phase="TRAINING")
    trainer.rows(range(1, 9))
    trainer.evaluation(4)
    ids = {event.data["step"]: event.id for event in await watcher.all() if event.kind == "metrics"}
    trainer.evaluation(8)
    trainer.write(attempt=1)
    assert told(await watcher.all()) == [("job", "TRAINING"), ("evaluation", 8)]
    trainer.row(5, attempt=1, whole=False)
    assert await watcher.all() == []
    trainer.row(5, attempt=1)
    trainer.row(6, attempt=1, lap=9)
    events = await watcher.all()
    assert told(events) == [("metrics", 5), ("metrics", 6)]
    assert events[1].data["lap"] == 9
    trainer.rows(range(7, 13), attempt=1)
    trainer.evaluation(8, attempt=1)
    assert told(await watcher.all()) == [
        *(("metrics", step) for step in (7, 8)),
        ("evaluation", 8),
        *(("metrics", step) for step in range(9, 13)),
    ]
    # one who was away all the time gets no step twice
    for since in (2, 8):
        events = [e for e in await watcher.go_on_after(ids[since]) if e.kind == "metrics"]
        assert [e.data["step"] for e in events] == list(range(min(since, 4) + 1, 13))


async def test_a_cancelled_job_tells_its_last_rows_as_they_are(
    server: RedisServer, watcher: Watcher
) -> None:
    trainer = Trainer(server.url)
    trainer.write(phase="TRAINING")
    trainer.rows(range(1, 5))
    trainer.row(5, whole=False)
    trainer.write(step=6)  # row 6 was lost
    await watcher.all()
    trainer.write(phase="CANCELLED")
    assert told(await watcher.all()) == [
        ("metrics", 5),
        ("job", "CANCELLED"),
        ("end", "CANCELLED"),
    ]


async def test_long_histories_come_in_parts(server: RedisServer, watcher: Watcher) -> None:
    trainer = Trainer(server.url, steps=1200, every=1, lap_steps=1)
    evaluations = {
        evaluation_field(0, step): encode_row({"step": step, "accuracy/eval": 0.5})
        for step in range(1201)
    }
    trainer.redis.hset(metrics_key(RUN), mapping=evaluations)
    trainer.rows(range(1, 1201))
    trainer.redis.hdel(metrics_key(RUN), *(row_field(0, step) for step in range(400, 700)))
    trainer.write(phase="FAILED")
    assert len(await watcher.once()) < 600
    watcher.cursor = Cursor()
    events = await watcher.all()
    steps = [s for kind, s in told(events) if kind == "metrics"]
    assert steps == [*range(1, 400), *range(700, 1201)]
    assert [s for kind, s in told(events) if kind == "evaluation"] == list(range(1201))
    assert [event.kind for event in events[-2:]] == ["job", "end"]


async def test_nothing_is_lost_or_told_twice_however_it_is_written_and_watched(
    server: RedisServer, watcher: Watcher
) -> None:
    """30 runs at random: laps, crashes, late evaluations, watchers who come back with an old id."""
    for seed in range(30):
        draw = random.Random(seed)
        trainer = Trainer(server.url, steps=12)
        trainer.write(phase="TRAINING")
        watcher.cursor = Cursor()
        found: list[Event] = []

        async def look(draw: random.Random = draw, found: list[Event] = found) -> None:
            if draw.random() < 0.5:
                events = await watcher.once()
                received = draw.randrange(len(events) + 1)  # the connection broke there
                found += events[:received]
                if received < len(events):
                    known = found[-1].id if found else None
                    record = await watcher.store.get(RUN)
                    watcher.cursor = Cursor.parse(known, record) if known else Cursor()

        lap, late = 0, 0
        while lap < 3:
            again = draw.randrange(lap + 1) if draw.random() < 0.3 else lap
            for trained in range(again, lap + 1):
                steps = range(trained * 4 + 1, trained * 4 + 5)
                for step in steps:
                    trainer.row(step, whole=False)
                    await look()
                    trainer.write(step=max(step, lap * 4))
                    await look()
                if trained == lap and draw.random() < 0.2:
                    break  # killed before it published
                for step in steps:
                    trainer.row(step)
                    await look()
            else:
                if draw.random() < 0.7 or late < lap:
                    trainer.evaluation(late * 4)
                    late += 1
                lap += 1
            await look()
        for evaluated in range(late, 4):
            trainer.evaluation(evaluated * 4)
            await look()
        trainer.write(phase="SUCCEEDED", step=12)
        found += await watcher.all()
        metrics = [e for e in found if e.kind == "metrics"]
        assert [e.data["step"] for e in metrics] == list(range(1, 13)), seed
        assert all("time/publish_s" in e.data for e in metrics), seed
        assert [e.data["step"] for e in found if e.kind == "evaluation"] == [0, 4, 8, 12], seed
        assert [e.kind for e in found].count("end") == 1
        assert found[-1].kind == "end"


@pytest.mark.parametrize(
    "text",
    [
        "x",
        "0:1:0",
        "0:1:0:-:",
        "-1:1:0:-",
        "1:1:0:-",
        "0:13:0:-",
        "0:1:13:-",
        "0:1:0:XYZ",
        "0:\u0661:0:-",
    ],
)
async def test_an_id_of_no_event_is_refused(
    server: RedisServer, watcher: Watcher, text: str
) -> None:
    Trainer(server.url)
    with pytest.raises(InvalidField, match="Last-Event-ID"):
        Cursor.parse(text, await watcher.store.get(RUN))


def test_an_id_says_the_cursor() -> None:
    record = RunRecord(RUN, parse_spec(SPEC), 1.0)
    for cursor in (
        Cursor(),
        Cursor(0, 8, 4, "0123456789abcdef"),
        Cursor(0, 8, 8, "0123456789abcdef", ended=True),
    ):
        assert Cursor.parse(str(cursor), record) == cursor


async def test_a_thousand_watchers_read_redis_as_often_as_one(
    server: RedisServer, watcher: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds_module, "POLL_S", 0.05)
    trainer = Trainer(server.url, steps=400, lap_steps=1, every=0)
    trainer.write(phase="TRAINING")
    trainer.rows(range(1, 301))
    reads = 0

    async def read(run: str, cursor: Cursor) -> Any:
        nonlocal reads
        reads += 1
        return await events_after(watcher.store, watcher.shown, run, cursor)

    feeds = Feeds(read)
    taken = [b""] * 1000

    async def take(index: int) -> None:
        # those who come back have part of it already
        cursor = Cursor(0, 10 * (index % 4), -1)
        async for chunk in feeds.watch(RUN, cursor):
            taken[index] += chunk

    async with asyncio.TaskGroup() as group:
        for index in range(1000):
            group.create_task(take(index))
        await eventually(lambda: all(b'"step": 300,' in text for text in taken))
        caught_up = reads
        assert caught_up <= 20
        for step in range(301, 321):
            trainer.rows(range(step, step + 1))
            newest = b'"step": %d,' % step
            await eventually(lambda newest=newest: all(newest in text for text in taken))
        live = reads - caught_up
        trainer.write(phase="SUCCEEDED")
    # a tick of the feed finds a step; all stand at its end, which is read once more
    assert live <= 20 * 12, live
    for index, text in enumerate(taken):
        events = list(parse_events(text.decode().split("\n")))
        steps = [e.data["step"] for e in events if e.kind == "metrics"]
        assert steps == list(range(10 * (index % 4) + 1, 321))
        assert events[-1].kind == "end"
    await eventually(lambda: not feeds._feeds)


@asynccontextmanager
async def serving(url: str, port: int = 0) -> AsyncIterator[str]:
    """A gateway over real HTTP in this process; yields its URL."""
    app = create_app(Settings("127.0.0.1", port, url, ("127.0.0.1:1",), ("127.0.0.1:2",), 0.2))
    config = uvicorn.Config(app, host="127.0.0.1", port=port, log_config=None)
    served = GatewayServer(config, app.state.feeds)
    task = asyncio.create_task(served.serve())
    await eventually(lambda: served.started)
    (listener,) = served.servers[0].sockets
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        served.should_exit = True
        async with asyncio.timeout(5):
            await task


async def read_events(answer: httpx.Response, count: int) -> list[Event]:
    """The first `count` events; then the connection may go."""
    found: list[Event] = []
    lines: list[str] = []
    async for line in answer.aiter_lines():
        lines.append(line)
        found = list(parse_events(lines))
        if len(found) == count:
            break
    return found


async def test_a_dropped_connection_goes_on_where_it_was(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds_module, "KEEPALIVE_S", 0.2)
    trainer = Trainer(server.url)
    trainer.write(phase="TRAINING")
    trainer.rows(range(1, 4))
    path = f"/v1/jobs/{RUN}/events"
    async with serving(server.url) as url, httpx.AsyncClient(base_url=url, timeout=20) as http:
        async with http.stream("GET", path) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert answer.headers["cache-control"] == "no-cache"
            first = await read_events(answer, 3)
        assert told(first) == [("job", "TRAINING"), ("metrics", 1), ("metrics", 2)]
        headers = {"Last-Event-ID": first[-1].id}
        # an old id in the URL, as a browser keeps it: the header is newer
        async with http.stream("GET", f"{path}?last_event_id={first[0].id}", headers=headers) as a:
            second = await read_events(a, 1)
        assert told(second) == [("metrics", 3)]
        async with http.stream("GET", f"{path}?last_event_id={second[-1].id}") as answer:
            raw = answer.aiter_raw()
            assert await anext(raw) == b": ping\n\n"
            trainer.rows(range(4, 5))
            while not (chunk := await anext(raw)).startswith(b"event"):
                assert chunk == b": ping\n\n"
            (event,) = parse_events(chunk.decode().split("\n"))
            assert told([event]) == [("metrics", 4)]
        trainer.write(phase="SUCCEEDED")
        body = (await http.get(path, headers={"Last-Event-ID": event.id})).text
        last = list(parse_events(body.split("\n")))
        assert told(last) == [("job", "SUCCEEDED"), ("end", "SUCCEEDED")]
        answer = await http.get(path, headers={"Last-Event-ID": last[-1].id})
        assert (answer.status_code, answer.content) == (204, b"")
        answer = await http.get(path, headers={"Last-Event-ID": "yesterday"})
        assert answer.status_code == 422
        assert answer.headers["content-type"] == "application/problem+json"
        (error,) = answer.json()["errors"]
        assert (error["field"], error["value"]) == ("Last-Event-ID", "yesterday")
        answer = await http.get("/v1/jobs/none/events")
        assert answer.status_code == 404
        schema = (await http.get("/openapi.json")).json()["paths"]["/v1/jobs/{run}/events"]["get"]
        assert (
            "event: metrics"
            in schema["responses"]["200"]["content"]["text/event-stream"]["example"]
        )
        parameters = {one["name"]: one["in"] for one in schema["parameters"]}
        assert parameters == {"run": "path", "last-event-id": "header", "last_event_id": "query"}


async def test_a_crowd_that_comes_at_once_is_let_in(server: RedisServer) -> None:
    """Three times as many as redis-py's own pool has connections."""
    trainer = Trainer(server.url, every=0)
    trainer.rows(range(1, 3))
    trainer.write(phase="SUCCEEDED")
    limits = httpx.Limits(max_connections=300)
    async with (
        serving(server.url) as url,
        httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as http,
    ):
        path = f"/v1/jobs/{RUN}/events"
        answers = await asyncio.gather(*(http.get(path) for _ in range(300)))
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.text.count("event: metrics") for answer in answers} == {2}


async def test_the_client_survives_the_gateway_and_gets_each_event_once(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "RECONNECT_S", 0.05)
    trainer = Trainer(server.url, every=0)
    trainer.write(phase="TRAINING")
    found: list[Event] = []

    seen = threading.Thread()
    port = 0
    for lap in range(3):
        async with serving(server.url, port) as url:
            port = int(url.rpartition(":")[2])
            if lap == 0:
                seen = threading.Thread(target=_collect, args=(url, found))
                seen.start()
            steps = range(lap * 4 + 1, lap * 4 + 5)
            trainer.rows(steps)
            last = ("metrics", steps[-1])
            await eventually(lambda last=last: last in told(list(found)))
    trainer.write(phase="SUCCEEDED")
    async with serving(server.url, port) as url:
        await asyncio.to_thread(seen.join, 20)
        assert not seen.is_alive()
        again: list[Event] = []
        await asyncio.to_thread(_collect, url, again)
        rows = [[e.data for e in one if e.kind == "metrics"] for one in (found, again)]
        assert rows[0] == rows[1]
        with GatewayClient(url) as client:
            ids = [again[-1].id, again[-3].id]
            rest = await asyncio.to_thread(
                lambda: [list(client.events(RUN, last_event_id=i)) for i in ids]
            )
            assert rest == [[], again[-2:]]
            with pytest.raises(ProblemError, match="no run 'none'"):
                await asyncio.to_thread(lambda: list(client.events("none")))
    assert [step for kind, step in told(found) if kind == "metrics"] == list(range(1, 13))
    assert [e.kind for e in found][-2:] == ["job", "end"]
    with GatewayClient(url) as client, pytest.raises(Unreachable):
        next(client.events(RUN))


def _collect(url: str, found: list[Event]) -> None:
    with GatewayClient(url) as client:
        for event in client.events(RUN):
            found.append(event)


async def test_a_stream_waits_while_redis_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds_module, "POLL_S", 0.1)
    server = RedisServer(tmp_path)
    server.start()
    trainer = Trainer(server.url, every=0)
    trainer.write(phase="TRAINING")
    path = f"/v1/jobs/{RUN}/events"
    async with (
        serving(server.url) as url,
        httpx.AsyncClient(base_url=url, timeout=20) as http,
        http.stream("GET", path) as answer,
    ):
        raw = answer.aiter_raw()
        assert b"event: job" in await anext(raw)
        server.stop()
        assert (await http.get(path)).status_code == 503
        await asyncio.sleep(1.0)
        server.start()
        trainer.rows(range(1, 3))
        assert b"event: metrics" in await anext(raw)
    server.stop()
