"""The REST interface, over a real Redis and real gRPC peers, in this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from gateway_house import POLL_S, House, the_problem
from gateway_peers import (
    SPEC,
    eventually,
    sample_hash,
)
from prometheuskit import samples
from redis.asyncio.client import Pipeline
from redis.exceptions import WatchError
from rediskit import RedisServer

from keel.errors import InvalidField, StateError
from keel.metrics import encode_row, evaluation_field, row_field
from keel.queue import FENCING_KEY, RUNS_KEY, checkpoints_key, metrics_key, run_key, samples_key


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def house(server: RedisServer) -> Any:
    with redis.Redis.from_url(server.url) as client:
        client.flushall()
        client.set(FENCING_KEY, 0)  # the first token is 1
        yield House(server, client)
        client.config_set("maxmemory", 0)


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as opened:
        yield opened


async def test_a_job_is_taken_leased_and_started(house: House, stack: AsyncExitStack) -> None:
    client = await house.open(stack)
    response = await client.post("/v1/jobs", json=SPEC)
    assert response.status_code == 201
    job = response.json()
    assert response.headers["location"] == f"/v1/jobs/{job['id']}"
    assert job["id"].startswith("first-")
    assert (job["phase"], job["desired"]) == ("QUEUED", "RUNNING")
    assert job["reason"] == f"trainer {job['trainer']} is starting it"
    assert (job["step"], job["steps"], job["policy_version"]) == (0, 8, None)
    assert job["spec"]["rollout"]["temperature"] == 1.0
    assert len(job["engines"]) == 1
    await eventually(lambda: house.trainer.started == [(job["id"], 1)])
    house.write(job["id"], phase="TRAINING", step=4, policy_version=1, started_s=12.5)
    seen = (await client.get(f"/v1/jobs/{job['id']}")).json()
    assert (seen["phase"], seen["step"], seen["policy_version"]) == ("TRAINING", 4, 1)
    assert seen["reason"] == ""
    assert seen["started_at"] == "1970-01-01T00:00:12.500000Z"
    (engine,) = (await client.get("/v1/engines")).json()["engines"]
    assert engine["run"] == job["id"]
    assert (engine["healthy"], engine["kind"], engine["state"]) == (True, "torch", "EMPTY")
    assert engine["capabilities"]["can"]["routes"] is True


async def test_a_lost_reply_makes_no_second_job(
    house: House, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await house.open(stack, peers=False)
    execute, lost = Pipeline.execute, []

    async def loses_one(self: Pipeline, *arguments: Any) -> Any:
        first = self.explicit_transaction and not lost
        answer = await execute(self, *arguments)
        if first:  # what redis-py makes of a connection that breaks after EXEC was sent
            lost.append(answer)
            raise WatchError("A ConnectionError occurred while watching one or more keys")
        return answer

    monkeypatch.setattr(Pipeline, "execute", loses_one)
    job = (await client.post("/v1/jobs", json=SPEC)).json()
    assert len(lost) == 1
    assert [one["id"] for one in (await client.get("/v1/jobs")).json()["jobs"]] == [job["id"]]


async def test_toml_is_the_same_job(house: House, stack: AsyncExitStack) -> None:
    client = await house.open(stack)
    text = 'name = "t"\nmodel.path = "preset:tiny-qwen3-moe"\nrecipe = {steps = 8}\n'
    response = await client.post(
        "/v1/jobs", content=text, headers={"content-type": "application/toml"}
    )
    assert response.status_code == 201, response.text
    assert response.json()["spec"]["recipe"]["steps"] == 8


async def test_the_second_job_waits_for_the_first(house: House, stack: AsyncExitStack) -> None:
    client = await house.open(stack)
    first = (await client.post("/v1/jobs", json=SPEC)).json()["id"]
    second = (await client.post("/v1/jobs", json=SPEC | {"name": "second"})).json()
    assert second["phase"] == "QUEUED"
    assert f"is leased to {first}" in second["reason"]
    listed = (await client.get("/v1/jobs")).json()["jobs"]
    assert [job["id"] for job in listed] == [second["id"], first]
    assert len((await client.get("/v1/jobs?limit=1")).json()["jobs"]) == 1
    await eventually(lambda: house.trainer.started)
    house.write(first, phase="SUCCEEDED", finished_s=1.0)
    # leases end with the run; tokens only grow
    await eventually(lambda: (second["id"], 2) in house.trainer.started)
    assert house.redis.get(FENCING_KEY) == b"2"


@pytest.mark.parametrize(
    ("change", "named", "told"),
    [
        ({"no_such_key": 1}, "no_such_key", "no such key"),
        ({"recipe": {"steps": 8, "leraning_rate": 1}}, "recipe.leraning_rate", "no such key"),
        ({"recipe": {"steps": -8}}, "recipe.steps", "greater than"),
        ({"recipe": {"steps": 7, "off_policiness": 4}}, "recipe.steps", "such as 8"),
        ({"rollout": {"top_p": 0.9}}, "rollout.top_p", "leave it out"),
        ({"model": {"path": "preset:nothing"}}, "model.path", "preset:tiny-qwen3-moe"),
        ({"rollout": {"max_tokens": 512}}, "rollout.max_tokens", "1 to 511"),
        ({"seed": 2**70}, "seed", "less than"),
        ({"name": "../../etc"}, "name", "pattern"),
    ],
)
async def test_a_bad_spec_is_refused_by_name(
    house: House, stack: AsyncExitStack, change: dict[str, Any], named: str, told: str
) -> None:
    client = await house.open(stack, peers=False)
    body = the_problem(await client.post("/v1/jobs", json=SPEC | change), 422)
    (error,) = body["errors"]
    assert error["field"] == named
    assert told in error["valid"]
    assert house.redis.zcard(RUNS_KEY) == 0


async def test_a_bad_data_file_is_refused_where_the_gateway_sees_it(
    house: House, stack: AsyncExitStack, tmp_path: Path
) -> None:
    """A path whose folder is unknown here may be on the collector's disk."""
    client = await house.open(stack, peers=False)
    file = tmp_path / "d.jsonl"
    file.write_text('{"prompt": "p"}\n')
    hard = {"name": "hard", "dataset": str(tmp_path / "no.jsonl")}
    change = {
        "task": {"dataset": str(file), "verifier": "math"},
        "evaluation": {"sets": [hard]},
    }
    body = the_problem(await client.post("/v1/jobs", json=SPEC | change), 422)
    first, second = body["errors"]
    assert (first["field"], first["value"]) == ("task.dataset", str(file))
    assert first["valid"].startswith("1 of 1 lines cannot be used: line 1, answer: missing")
    assert second["field"] == "evaluation.sets.0.dataset"
    assert second["valid"].startswith("there is no such file")
    change = {"task": {"dataset": "/elsewhere/of/the/collector.jsonl", "verifier": "math"}}
    assert (await client.post("/v1/jobs", json=SPEC | change)).status_code == 201


async def test_every_fault_is_named_but_not_without_end(
    house: House, stack: AsyncExitStack
) -> None:
    client = await house.open(stack, peers=False)
    body = the_problem(await client.post("/v1/jobs", json={"name": 3}), 422)
    assert {e["field"] for e in body["errors"]} == {"name", "model", "recipe"}
    many = {f"key{i}": "x" * 10_000 for i in range(90)}
    body = the_problem(await client.post("/v1/jobs", json=SPEC | many), 422)
    assert len(body["errors"]) == 50
    assert len(json.dumps(body)) < 30_000


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[" * 200_000, b'"\\ud800"', b"\xff\xfe", b'{"seed": NaN}', b"1" * 9000],
    ids=["empty", "cut", "deep", "surrogate", "bytes", "nan", "digits"],
)
async def test_malformed_json(house: House, stack: AsyncExitStack, content: bytes) -> None:
    client = await house.open(stack, peers=False)
    headers = {"content-type": "application/json"}
    body = the_problem(await client.post("/v1/jobs", content=content, headers=headers), 400)
    assert body["errors"][0]["field"] == "body"
    headers = {"content-type": "application/toml"}
    the_problem(await client.post("/v1/jobs", content=content or b"=", headers=headers), 400)


@pytest.mark.parametrize("content", [b"[]", b"3", b"null", b'"x"'])
async def test_json_that_is_no_object(house: House, stack: AsyncExitStack, content: bytes) -> None:
    client = await house.open(stack, peers=False)
    headers = {"content-type": "application/json"}
    the_problem(await client.post("/v1/jobs", content=content, headers=headers), 422)


async def test_other_problems(house: House, stack: AsyncExitStack) -> None:
    client = await house.open(stack, peers=False)
    the_problem(await client.get("/nowhere"), 404)
    assert "DELETE" in the_problem(await client.delete("/v1/jobs"), 405)["detail"]
    the_problem(await client.get("/v1/jobs/none"), 404)
    the_problem(await client.get("/v1/jobs/none/metrics"), 404)
    the_problem(await client.post("/v1/jobs/none/cancel"), 404)
    body = the_problem(await client.get("/v1/jobs?limit=0"), 422)
    assert body["errors"][0]["field"] == "limit"
    the_problem(await client.post("/v1/jobs", data={"a": "b"}), 415)
    huge = json.dumps(SPEC | {"name": "x" * 2**20})
    headers = {"content-type": "application/json"}
    the_problem(await client.post("/v1/jobs", content=huge, headers=headers), 413)
    house.redis.zadd(RUNS_KEY, {"broken": 1.0})
    house.redis.hset(run_key("broken"), mapping={"spec": "{}"})
    assert "broken" in the_problem(await client.get("/v1/jobs/broken"), 500)["detail"]
    assert (await client.get("/v1/jobs")).json() == {"jobs": []}


async def test_a_bug_tells_no_more_than_its_kind(
    house: House, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: Any) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr("keel_gateway.store.Store.get", broken)
    client = await house.open(stack, peers=False)
    response = await client.get("/v1/jobs/any")
    assert "RuntimeError" in the_problem(response, 500)["detail"]
    assert "secret" not in response.text


async def test_an_engine_without_routes_is_no_engine_for_r3(
    house: House, stack: AsyncExitStack
) -> None:
    house.engine.can.routes = False
    client = await house.open(stack)
    (engine,) = (await client.get("/v1/engines")).json()["engines"]
    response = await client.post("/v1/jobs", json=SPEC)
    (error,) = the_problem(response, 422)["errors"]
    assert (error["field"], error["value"]) == ("recipe.replay", "auto")
    assert engine["address"] in error["valid"]
    assert "no routes" in error["valid"]
    recipe = SPEC["recipe"] | {"replay": "R2"}
    assert (await client.post("/v1/jobs", json=SPEC | {"recipe": recipe})).status_code == 201


async def test_without_engines_a_job_waits_and_says_why(
    house: House, stack: AsyncExitStack
) -> None:
    client = await house.open(stack, peers=False)
    job = (await client.post("/v1/jobs", json=SPEC)).json()
    assert job["phase"] == "QUEUED"
    assert "waits for engine: 127.0.0.1:1 does not answer (UNAVAILABLE" in job["reason"]
    assert "waits for trainer: 127.0.0.1:2 does not answer (UNAVAILABLE" in job["reason"]


async def test_cancel_before_a_lease(house: House, stack: AsyncExitStack) -> None:
    client = await house.open(stack, peers=False)
    run = (await client.post("/v1/jobs", json=SPEC)).json()["id"]
    for _ in range(2):
        response = await client.post(f"/v1/jobs/{run}/cancel")
        assert response.status_code == 200
        job = response.json()
        assert (job["phase"], job["desired"], job["reason"]) == ("CANCELLED", "CANCELLED", "")
        assert job["finished_at"] is not None


async def test_cancel_goes_to_the_trainer(house: House, stack: AsyncExitStack) -> None:
    client = await house.open(stack)
    run = (await client.post("/v1/jobs", json=SPEC)).json()["id"]
    await eventually(lambda: house.trainer.started)
    house.write(run, phase="TRAINING")
    job = (await client.post(f"/v1/jobs/{run}/cancel")).json()
    assert (job["phase"], job["desired"]) == ("TRAINING", "CANCELLED")
    assert job["reason"] == f"trainer {job['trainer']} is stopping it"
    await eventually(lambda: (run, 1) in house.trainer.cancelled)
    house.write(run, phase="CANCELLED")  # only the trainer ends what it has taken
    assert (await client.post(f"/v1/jobs/{run}/cancel")).json()["phase"] == "CANCELLED"
    other = (await client.post("/v1/jobs", json=SPEC)).json()["id"]
    await eventually(lambda: (other, 2) in house.trainer.started)
    house.write(other, phase="FAILED", error="out of luck")
    assert "FAILED" in the_problem(await client.post(f"/v1/jobs/{other}/cancel"), 409)["detail"]


async def test_cancel_of_a_run_that_its_trainer_never_took(
    house: House, stack: AsyncExitStack
) -> None:
    house.trainer.refusal = StateError("still stopping the last one")
    client = await house.open(stack)
    run = (await client.post("/v1/jobs", json=SPEC)).json()["id"]
    await eventually(lambda: house.trainer.started)
    await eventually(lambda: _reason_has(client, run, "still stopping the last one"))
    await client.post(f"/v1/jobs/{run}/cancel")
    await eventually(lambda: _phase_is(client, run, "CANCELLED"))


async def test_a_paused_job_keeps_its_engine_and_a_queued_one_gets_none(
    house: House, stack: AsyncExitStack
) -> None:
    client = await house.open(stack)
    first, second, third = [
        (await client.post("/v1/jobs", json=SPEC | {"name": name})).json()["id"]
        for name in ("first", "second", "third")
    ]
    await eventually(lambda: house.trainer.started == [(first, 1)])
    house.write(first, phase="TRAINING")
    for _ in range(2):
        job = (await client.post(f"/v1/jobs/{first}/pause")).json()
        assert (job["phase"], job["desired"], job["paused"]) == ("TRAINING", "PAUSED", False)
        assert job["reason"] == "pauses before its next lap"
    house.write(first, paused=True)
    job = (await client.get(f"/v1/jobs/{first}")).json()
    assert job["paused"]
    assert job["reason"].startswith(f"paused: keeps trainer {job['trainer']}")
    job = (await client.post(f"/v1/jobs/{second}/pause")).json()
    assert (job["phase"], job["paused"]) == ("QUEUED", True)
    assert job["reason"] == "paused: gets no trainer and no engine until it is resumed"
    for _ in range(2):
        job = (await client.post(f"/v1/jobs/{first}/resume")).json()
        assert (job["desired"], job["paused"], job["reason"]) == ("RUNNING", False, "")
    house.write(first, phase="SUCCEEDED", paused=False)
    await eventually(lambda: (third, 2) in house.trainer.started)
    for what in ("pause", "resume"):
        detail = the_problem(await client.post(f"/v1/jobs/{first}/{what}"), 409)["detail"]
        assert "has ended (SUCCEEDED)" in detail
        the_problem(await client.post(f"/v1/jobs/none/{what}"), 404)
    house.write(third, phase="SUCCEEDED")
    await asyncio.sleep(5 * POLL_S)
    assert (await client.get(f"/v1/jobs/{second}")).json()["trainer"] == ""
    assert (await client.post(f"/v1/jobs/{second}/resume")).json()["desired"] == "RUNNING"
    await eventually(lambda: (second, 3) in house.trainer.started)
    await client.post(f"/v1/jobs/{second}/cancel")
    detail = the_problem(await client.post(f"/v1/jobs/{second}/pause"), 409)["detail"]
    assert "was cancelled" in detail


async def test_checkpoints_are_those_that_the_trainer_lists(
    house: House, stack: AsyncExitStack
) -> None:
    client = await house.open(stack, peers=False)
    run = (await client.post("/v1/jobs", json=SPEC)).json()["id"]
    url = f"/v1/jobs/{run}/checkpoints"
    assert (await client.get(url)).json() == {"checkpoints": []}
    one = {
        **{"attempt": 0, "step": 8, "cold_start_step": 3, "policy_version": 2},
        **{"created_at": "2026-01-02T03:04:05Z", "size_bytes": 9, "folder": "/runs/r/step-8"},
    }
    house.redis.set(checkpoints_key(run), json.dumps([one]))
    assert (await client.get(url)).json() == {"checkpoints": [one]}
    the_problem(await client.get("/v1/jobs/none/checkpoints"), 404)


async def test_a_spec_that_the_trainer_refuses_fails(house: House, stack: AsyncExitStack) -> None:
    house.trainer.refusal = InvalidField("model.path", "/nowhere", "a model folder")
    client = await house.open(stack)
    run = (await client.post("/v1/jobs", json=SPEC)).json()["id"]
    await eventually(lambda: _phase_is(client, run, "FAILED"))
    job = (await client.get(f"/v1/jobs/{run}")).json()
    assert "model.path: '/nowhere' is not valid" in job["error"]
    assert (await client.get("/v1/engines")).json()["engines"][0]["run"] is None


async def test_a_run_that_nobody_works_on_is_started_again(
    house: House, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keel_gateway.scheduler.LOOK_EVERY_S", 0.05)
    client = await house.open(stack)
    run = (await client.post("/v1/jobs", json=SPEC)).json()["id"]
    await eventually(lambda: house.trainer.started == [(run, 1)])
    await asyncio.sleep(0.3)
    assert len(house.trainer.started) == 1  # while it runs, it is left alone
    house.trainer.running.clear()
    await eventually(lambda: len(house.trainer.started) == 2)
    house.write(run, phase="SUCCEEDED")
    house.trainer.running.clear()
    await asyncio.sleep(0.3)
    assert house.trainer.started == [(run, 1)] * 2


async def test_metrics_are_paged_and_merged(house: House, stack: AsyncExitStack) -> None:
    client = await house.open(stack, peers=False)
    spec = SPEC | {"recipe": SPEC["recipe"] | {"steps": 600}, "evaluation": {"every": 4}}
    run = (await client.post("/v1/jobs", json=spec)).json()["id"]
    url = f"/v1/jobs/{run}/metrics"
    assert (await client.get(url)).json() == {"rows": [], "evaluation": None}
    rows = {
        row_field(0, step): encode_row({"step": step, "reward/mean": step / 600, "grad_norm": nan})
        for nan in [float("nan")]
        for step in range(1, 601)
    }
    rows |= {
        evaluation_field(0, step): encode_row({"step": step, "accuracy/eval": step / 1000})
        for step in range(0, 600, 4)
    }
    house.redis.hset(metrics_key(run), mapping=rows)
    (first,) = (await client.get(url)).json()["rows"]  # record.step is still 0
    assert first == {"step": 0, "accuracy/eval": 0.0}
    house.write(run, step=600)
    body = (await client.get(url)).json()
    assert [row["step"] for row in body["rows"]] == list(range(601))
    assert body["rows"][4] == {
        "step": 4,
        "reward/mean": 4 / 600,
        "grad_norm": None,
        "accuracy/eval": 0.004,
    }
    # that of step 600 has not arrived
    assert body["evaluation"] == {"step": 596, "accuracy/eval": 0.596}
    seen: list[int] = []
    while True:
        after = seen[-1] if seen else -1
        page = (await client.get(f"{url}?after={after}&limit=250")).json()["rows"]
        if not page:
            break
        seen += [row["step"] for row in page]
    assert seen == list(range(601))
    body = (await client.get(f"{url}?after=600")).json()
    assert body == {"rows": [], "evaluation": {"step": 596, "accuracy/eval": 0.596}}
    # a later attempt replaces what it did again
    house.redis.hset(metrics_key(run), row_field(1, 600), encode_row({"step": 600, "lap": 7}))
    house.write(run, attempt=1)
    (last,) = (await client.get(f"{url}?after=599")).json()["rows"]
    assert last["lap"] == 7


async def test_samples_come_in_whole_steps(house: House, stack: AsyncExitStack) -> None:
    client = await house.open(stack, peers=False)
    run = (await client.post("/v1/jobs", json=SPEC)).json()["id"]
    url = f"/v1/jobs/{run}/samples"
    assert (await client.get(url)).json() == {"samples": []}
    for step in (1, 5, 10, 101):
        house.redis.hset(samples_key(run), mapping=sample_hash(step))
    everything = (await client.get(url)).json()["samples"]
    places = [(one["step"], one["sample"]) for one in everything]
    assert places == [(step, sample) for step in (1, 5, 10, 101) for sample in range(3)]
    assert everything[4] == json.loads(sample_hash(5)["0:5:1"])
    page = (await client.get(f"{url}?limit=7")).json()["samples"]
    assert [one["step"] for one in page] == [1] * 3 + [5] * 3
    page = (await client.get(f"{url}?limit=1&after=5")).json()["samples"]
    assert [one["step"] for one in page] == [10] * 3
    assert (await client.get(f"{url}?after=101")).json() == {"samples": []}
    the_problem(await client.get("/v1/jobs/none/samples"), 404)
    body = the_problem(await client.get(f"{url}?limit=0"), 422)
    assert body["errors"][0]["field"] == "limit"


async def test_readiness(house: House, stack: AsyncExitStack) -> None:
    async with AsyncExitStack() as alone:
        client = await house.open(alone, peers=False)
        assert (await client.get("/healthz")).json() == {"status": "ok"}
        response = await client.get("/readyz")
        detail = the_problem(response, 503)["detail"]
        assert "no engine is healthy: 127.0.0.1:1" in detail
        assert "no trainer is healthy: 127.0.0.1:2" in detail
        assert int(response.headers["retry-after"]) > 0
    client = await house.open(stack)
    assert (await client.get("/readyz")).json() == {"status": "ok", "notes": []}


async def test_openapi_describes_everything(house: House, stack: AsyncExitStack) -> None:
    client = await house.open(stack, peers=False)
    schema = (await client.get("/openapi.json")).json()
    components = schema["components"]["schemas"]

    def references(part: Any) -> set[str]:
        if isinstance(part, dict):
            own = {part["$ref"]} if isinstance(part.get("$ref"), str) else set()
            return own.union(*map(references, part.values()))
        return set().union(*map(references, part)) if isinstance(part, list) else set()

    for reference in references(schema):
        assert reference.removeprefix("#/components/schemas/") in components
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            assert operation["description"], (method, path)
            assert operation["summary"], (method, path)
    for name in (
        "Job",
        "RecipeSpec",
        "Engine",
        "Problem",
        "RolloutSpec",
        "Sample",
        "CheckpointInfo",
    ):
        for key, value in components[name]["properties"].items():
            assert value.get("description"), (name, key)
    post = schema["paths"]["/v1/jobs"]["post"]
    example = post["requestBody"]["content"]["application/json"]["examples"]["a small run"]
    assert (await client.post("/v1/jobs", json=example["value"])).status_code == 201


async def test_without_redis_the_gateway_answers_503_and_comes_back(
    tmp_path: Path, stack: AsyncExitStack
) -> None:
    server = RedisServer(tmp_path)
    server.start()
    house = House(server, redis.Redis.from_url(server.url))
    client = await house.open(stack)
    run = (await client.post("/v1/jobs", json=SPEC)).json()["id"]
    server.stop()
    for path in ("/v1/jobs", f"/v1/jobs/{run}", f"/v1/jobs/{run}/metrics", "/v1/engines"):
        response = await client.get(path)
        the_problem(response, 503)
        assert int(response.headers["retry-after"]) > 0
    the_problem(await client.post("/v1/jobs", json=SPEC), 503)
    the_problem(await client.post(f"/v1/jobs/{run}/cancel"), 503)
    assert "Redis" in the_problem(await client.get("/readyz"), 503)["detail"]
    assert (await client.get("/healthz")).status_code == 200
    server.start()
    house.write(run, phase="SUCCEEDED")
    other = (await client.post("/v1/jobs", json=SPEC)).json()["id"]
    await eventually(lambda: any(started == other for started, _ in house.trainer.started))
    server.stop()


async def _reason_has(client: httpx.AsyncClient, run: str, part: str) -> bool:
    return part in (await client.get(f"/v1/jobs/{run}")).json()["reason"]


async def _phase_is(client: httpx.AsyncClient, run: str, phase: str) -> bool:
    return bool((await client.get(f"/v1/jobs/{run}")).json()["phase"] == phase)


async def told(client: httpx.AsyncClient) -> dict[tuple[str, tuple[str, ...]], float]:
    """What /metrics says."""
    answer = await client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return samples(answer.text)


async def test_prometheus_sees_jobs_peers_and_the_newest_row_of_unfinished_runs(
    house: House, stack: AsyncExitStack
) -> None:
    client = await house.open(stack)
    run = (await client.post("/v1/jobs", json=SPEC)).json()["id"]
    house.write(run, phase="TRAINING", step=2, policy_version=0)
    for step in (1, 2):
        row = {"step": step, "mismatch/k3": step / 4, "reward/part/format": 0.5, "entropy": None}
        house.redis.hset(metrics_key(run), row_field(0, step), encode_row(row))
    house.redis.hset(
        metrics_key(run), evaluation_field(0, 0), encode_row({"step": 0, "accuracy/eval": 0.125})
    )
    now = await told(client)
    assert now["keel_redis_up", ()] == 1
    assert now["keel_jobs", ("TRAINING",)] == 1
    assert now["keel_jobs", ("SUCCEEDED",)] == 0
    assert now["keel_engines", ("empty",)] == 1
    assert now["keel_trainers", ("healthy",)] == 1
    assert now["keel_run_step", (run,)] == 2
    assert now["keel_run_steps", (run,)] == SPEC["recipe"]["steps"]
    newest = {key[1][0]: value for key, value in now.items() if key[0] == "keel_run_metric"}
    assert newest == {
        "step": 2,
        "mismatch/k3": 0.5,
        "reward/part/format": 0.5,
        "accuracy/eval": 0.125,
    }
    house.write(run, phase="SUCCEEDED", step=8)
    now = await told(client)
    assert now["keel_jobs", ("SUCCEEDED",)] == 1
    assert now["keel_jobs", ("TRAINING",)] == 0
    assert not [key for key in now if run in key[1]], "a run that is over leaves no series"


async def test_prometheus_sees_requests_by_route_and_not_by_path(
    house: House, stack: AsyncExitStack
) -> None:
    client = await house.open(stack)
    for path in ("/v1/jobs/a", "/v1/jobs/b", "/no/such", "/no/such/either", "/v1/jobs"):
        await client.get(path)
    now = await told(client)
    requests = {key[1]: n for key, n in now.items() if key[0] == "keel_http_requests_total"}
    assert requests == {
        ("GET", "/v1/jobs/{run}", "404"): 2,
        ("GET", "none", "404"): 2,
        ("GET", "/v1/jobs", "200"): 1,
    }
    assert now["keel_http_request_seconds_count", ("GET", "/v1/jobs/{run}")] == 2
    assert now["process_resident_memory_bytes", ()] > 1e6


async def test_prometheus_is_answered_while_redis_and_peers_are_away(
    house: House, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await house.open(stack, peers=False)
    assert house.app is not None

    async def away() -> None:
        raise redis.ConnectionError("away")

    monkeypatch.setattr(house.app.state.store, "unfinished", away)
    now = await told(client)
    assert now["keel_redis_up", ()] == 0
    assert now["keel_engines", ("away",)] == now["keel_trainers", ("away",)] == 1
    assert not [key for key in now if key[0] == "keel_jobs"]
