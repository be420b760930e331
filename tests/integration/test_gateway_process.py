"""The gateway as a process: it is killed and started again, and nothing is forgotten."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import redis
from gateway_peers import SPEC, EnginePeer, TrainerPeer, abilities, eventually, serve
from rediskit import start_redis

from keel.queue import FENCING_KEY, groups_key, run_key
from keel.record import pack_fields


class Gateway:
    """A gateway process and a client for it."""

    def __init__(self, folder: Path, redis_url: str, *flags: str) -> None:
        self._log = folder / "gateway.log"
        self._flags = ["--listen", "127.0.0.1:0", "--redis", redis_url, *flags]

    @asynccontextmanager
    async def __call__(self) -> AsyncIterator[httpx.AsyncClient]:
        """Runs it, and kills it without warning."""
        with self._log.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "keel_gateway.main", *self._flags], stderr=log
            )
        try:
            port = await eventually(lambda: self._port(process))
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
                yield client
        finally:
            process.kill()
            process.wait()

    def _port(self, process: subprocess.Popen[bytes]) -> str:
        text = self._log.read_text()
        assert process.poll() is None, text
        found = re.search(r"listening on http://127\.0\.0\.1:(\d+)", text)
        return found[1] if found else ""


def start_counting_redis(folder: Path) -> str:
    """A Redis in which the first fencing token is 1."""
    url = start_redis(folder)
    with redis.Redis.from_url(url) as client:
        client.set(FENCING_KEY, 0)
    return url


async def test_jobs_survive_a_restart_of_the_gateway(tmp_path: Path) -> None:
    trainer, url = TrainerPeer(), start_counting_redis(tmp_path)
    async with serve(trainer) as trainer_at, serve(EnginePeer(abilities())) as engine_at:
        gateway = Gateway(tmp_path, url, "--trainers", trainer_at, "--engines", engine_at)
        async with gateway() as client:
            first = (await client.post("/v1/jobs", json=SPEC)).json()
            second = (await client.post("/v1/jobs", json=SPEC | {"name": "second"})).json()
            await eventually(lambda: trainer.started == [(first["id"], 1)])
        async with gateway() as client:
            listed = (await client.get("/v1/jobs")).json()["jobs"]
            assert [job["id"] for job in listed] == [second["id"], first["id"]]
            assert listed[1]["spec"] == first["spec"]
            # with the same lease, though the trainer never stopped: StartRun is idempotent
            await eventually(lambda: trainer.started == [(first["id"], 1)] * 2)
            with redis.Redis.from_url(url) as client_of_trainer:
                client_of_trainer.hset(
                    run_key(first["id"]), mapping=pack_fields(phase="SUCCEEDED", step=8)
                )
            await eventually(lambda: trainer.started[-1] == (second["id"], 2))
            job = (await client.get(f"/v1/jobs/{first['id']}")).json()
            assert (job["phase"], job["step"]) == ("SUCCEEDED", 8)


async def test_a_trainer_that_comes_back_gets_its_run_again(tmp_path: Path) -> None:
    url = start_counting_redis(tmp_path)
    async with serve(EnginePeer(abilities())) as engine_at:
        async with serve(TrainerPeer()) as trainer_at:
            pass  # only to find an address
        gateway = Gateway(tmp_path, url, "--trainers", trainer_at, "--engines", engine_at)
        async with gateway() as client:
            job = (await client.post("/v1/jobs", json=SPEC)).json()
            assert (job["phase"], job["trainer"]) == ("QUEUED", "")
            assert f"{trainer_at} does not answer" in job["reason"]
            before = TrainerPeer()
            async with serve(before, trainer_at):
                await eventually(lambda: before.started == [(job["id"], 1)])
            away = f"trainer {trainer_at} does not answer"
            await eventually(lambda: _reason_has(client, job["id"], away))
            after = TrainerPeer()
            async with serve(after, trainer_at):
                await eventually(lambda: after.started == [(job["id"], 1)])
                starting = f"trainer {trainer_at} is starting it"
                await eventually(lambda: _reason_has(client, job["id"], starting))


async def test_a_run_of_a_trainer_that_was_taken_away_can_be_cancelled(tmp_path: Path) -> None:
    url = start_counting_redis(tmp_path)
    async with serve(EnginePeer(abilities())) as engine_at:
        async with serve(TrainerPeer()) as gone_at:
            gateway = Gateway(tmp_path, url, "--trainers", gone_at, "--engines", engine_at)
            async with gateway() as client:
                job = (await client.post("/v1/jobs", json=SPEC)).json()
                assert job["trainer"] == gone_at
        with redis.Redis.from_url(url) as client_of_trainer:
            client_of_trainer.hset(run_key(job["id"]), mapping=pack_fields(phase="TRAINING"))
            client_of_trainer.xadd(groups_key(job["id"]), {"envelope": b""})
        async with serve(successor := TrainerPeer()) as trainer_at:
            gateway = Gateway(tmp_path, url, "--trainers", trainer_at, "--engines", engine_at)
            async with gateway() as client:
                away = f"trainer {gone_at} does not answer"
                await eventually(lambda: _reason_has(client, job["id"], away))
                await eventually(lambda: _reason_has(client, job["id"], "was not told of it"))
                second = (await client.post("/v1/jobs", json=SPEC)).json()
                assert f"{engine_at} is leased to {job['id']}" in second["reason"]
                await client.post(f"/v1/jobs/{job['id']}/cancel")
                # the engine is free again
                await eventually(lambda: successor.started == [(second["id"], 2)])
                ended = (await client.get(f"/v1/jobs/{job['id']}")).json()
                assert (ended["phase"], ended["reason"]) == ("CANCELLED", "")
        with redis.Redis.from_url(url) as client_of_trainer:
            assert not client_of_trainer.exists(groups_key(job["id"]))


async def test_a_run_moves_from_a_trainer_that_is_gone_to_one_that_is_free(tmp_path: Path) -> None:
    url = start_counting_redis(tmp_path)
    async with serve(EnginePeer(abilities())) as engine_at, serve(TrainerPeer()) as second_at:
        pass  # only to find addresses
    async with serve(EnginePeer(abilities()), engine_at):
        async with serve(first := TrainerPeer()) as first_at:
            trainers = ("--trainers", f"{first_at},{second_at}", "--lease-s", "0.5")
            gateway = Gateway(tmp_path, url, *trainers, "--engines", engine_at)
            async with gateway() as client:
                job = (await client.post("/v1/jobs", json=SPEC)).json()
                await eventually(lambda: first.started == [(job["id"], 1)])
        async with gateway() as client:  # a new one counts anew, and the first is gone for good
            alone = f"trainer {first_at} does not answer"
            await eventually(lambda: _reason_has(client, job["id"], alone))
            free = f"no other trainer is free: {second_at} does not answer"
            await eventually(lambda: _reason_has(client, job["id"], free))
            async with serve(second := TrainerPeer(), second_at):
                await eventually(lambda: second.started == [(job["id"], 2)])
                moved = (await client.get(f"/v1/jobs/{job['id']}")).json()
                assert (moved["trainer"], moved["engines"]) == (second_at, [engine_at])
                async with serve(first, first_at):  # it is back, and free: nothing moves again
                    second_job = (await client.post("/v1/jobs", json=SPEC)).json()
                    assert f"{engine_at} is leased to {job['id']}" in second_job["reason"]
                    await asyncio.sleep(1)
                    assert (await client.get(f"/v1/jobs/{job['id']}")).json() == moved
                assert second.started == [(job["id"], 2)]
                assert first.started == [(job["id"], 1)]


async def test_a_run_of_a_trainer_that_was_taken_away_moves_too(tmp_path: Path) -> None:
    url = start_counting_redis(tmp_path)
    async with serve(EnginePeer(abilities())) as engine_at, serve(second := TrainerPeer()) as at:
        async with serve(TrainerPeer()) as gone_at:
            gateway = Gateway(tmp_path, url, "--trainers", gone_at, "--engines", engine_at)
            async with gateway() as client:
                job = (await client.post("/v1/jobs", json=SPEC)).json()
                assert job["trainer"] == gone_at
        flags = ("--trainers", at, "--engines", engine_at, "--lease-s", "0.5")
        async with Gateway(tmp_path, url, *flags)():
            await eventually(lambda: second.started == [(job["id"], 2)])


async def test_a_run_whose_trainer_is_gone_can_be_cancelled(tmp_path: Path) -> None:
    url = start_counting_redis(tmp_path)
    async with serve(EnginePeer(abilities())) as engine_at, serve(TrainerPeer()) as trainer_at:
        flags = ("--trainers", trainer_at, "--engines", engine_at)
        async with Gateway(tmp_path, url, *flags)() as client:
            job = (await client.post("/v1/jobs", json=SPEC)).json()
            assert job["trainer"] == trainer_at
    with redis.Redis.from_url(url) as client_of_trainer:
        client_of_trainer.hset(run_key(job["id"]), mapping=pack_fields(phase="TRAINING"))
    async with Gateway(tmp_path, url, *flags, "--lease-s", "0.5")() as client:
        await client.post(f"/v1/jobs/{job['id']}/cancel")
        await eventually(lambda: _phase_is(client, job["id"], "CANCELLED"))


async def test_a_body_over_the_limit_does_not_stop_the_gateway(tmp_path: Path) -> None:
    async with Gateway(tmp_path, start_redis(tmp_path))() as client:
        huge = b'{"name": "' + b"x" * 3 * 2**20 + b'"}'
        headers = {"content-type": "application/json"}
        response = await client.post("/v1/jobs", content=huge, headers=headers)
        assert response.status_code == 413
        assert response.headers["content-type"] == "application/problem+json"
        assert (await client.get("/healthz")).status_code == 200


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--listen", "0.0.0.0:0"], "no authentication yet"),
        (["--engines", "nonsense"], "--engines: 'nonsense' is not valid; valid: HOST:PORT"),
        (["--redis", "http://x"], "redis://"),
        (["--lease-s", "soon"], "--lease-s: 'soon' is not valid; valid: seconds, more than 0"),
        (["--lease-s", "0"], "--lease-s"),
    ],
)
def test_a_wrong_setting_ends_it_with_a_sentence(flags: list[str], told: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "keel_gateway.main", *flags],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr


async def test_it_stops_when_told(tmp_path: Path) -> None:
    url = start_counting_redis(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "keel_gateway.main", "--listen", "127.0.0.1:0", "--redis", url],
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if b"startup complete" in line:
            break
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=10) in (0, -signal.SIGTERM)
    process.stderr.close()


async def _phase_is(client: httpx.AsyncClient, run: str, phase: str) -> bool:
    return bool((await client.get(f"/v1/jobs/{run}")).json()["phase"] == phase)


async def _reason_has(client: httpx.AsyncClient, run: str, part: str) -> bool:
    return part in (await client.get(f"/v1/jobs/{run}")).json()["reason"]
