"""The trainer as a process: bad calls leave it up, and a run's fate is in its record."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
import redis
from disturbed import training_process
from rediskit import start_redis

from keel import rpc
from keel.blobs import BlobStore
from keel.queue import SlotKey, run_key
from keel.record import Desired, Phase, RunRecord
from keel.spec import parse_spec
from keel.trainer.v1 import trainer_service_pb2 as pb
from keel.trainer.v1 import trainer_service_pb2_grpc as pb_grpc


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return start_redis(tmp_path_factory.mktemp("redis"))


@contextmanager
def trainer(
    redis_url: str, folder: Path, *flags: str
) -> Iterator[tuple[grpc.Channel, subprocess.Popen[bytes]]]:
    """A trainer process, and a channel to it."""
    log = folder / "trainer.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "keel_trainer.main", "--listen", "127.0.0.1:0"),
                *("--redis", redis_url, "--runs", str(folder / "runs")),
                *flags,
            ],
            stderr=file,
        )
    try:
        deadline = time.monotonic() + 60
        while not (found := re.search(r"port (\d+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        with rpc.channel(f"127.0.0.1:{found[1]}") as channel:
            yield channel, process
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def channel(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[grpc.Channel]:
    with trainer(redis_url, tmp_path_factory.mktemp("trainer")) as (channel, _):
        yield channel


@pytest.fixture
def stub(channel: grpc.Channel) -> pb_grpc.TrainerServiceStub:
    return pb_grpc.TrainerServiceStub(channel)


def write(
    redis_url: str, run: str, model: str = "/nowhere", replay: str = "auto", **fields: object
) -> None:
    recipe = {"steps": 1, "replay": replay}
    spec = parse_spec({"name": run, "model": {"path": model}, "recipe": recipe})
    record = RunRecord(run, spec, 0.0, fencing_token=5, **fields)  # type: ignore[arg-type]
    with redis.Redis.from_url(redis_url) as client:
        client.hset(run_key(run), mapping=record.to_hash())


def refused(call: object, request: object) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call(request, timeout=20)  # type: ignore[operator]
    return caught.value.code(), caught.value.details()


def test_bad_calls_are_refused_with_the_field(
    stub: pb_grpc.TrainerServiceStub, redis_url: str
) -> None:
    write(redis_url, "held")
    assert refused(stub.StartRun, pb.StartRunRequest()) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "run: '' is not valid; valid: a run id",
    )
    code, text = refused(stub.StartRun, pb.StartRunRequest(run="unknown", fencing_token=5))
    assert (code, "unknown" in text) == (grpc.StatusCode.NOT_FOUND, True)
    for token in (4, 6):
        code, text = refused(stub.StartRun, pb.StartRunRequest(run="held", fencing_token=token))
        assert code == grpc.StatusCode.PERMISSION_DENIED
        assert f"{token} is not the lease of run 'held'; valid: 5" in text


def test_a_malformed_message_leaves_it_up(
    channel: grpc.Channel, stub: pb_grpc.TrainerServiceStub, redis_url: str
) -> None:
    raw = channel.unary_unary("/keel.trainer.v1.TrainerService/StartRun")
    for garbage in (b"\xff" * 64, b"\x0a\xff\xff\xff\xff\x0f"):
        code, text = refused(raw, garbage)
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert f"{len(garbage)} bytes are no request" in text
    write(redis_url, "fine")
    assert stub.GetRun(pb.GetRunRequest(run="fine")).run.phase == pb.RUN_PHASE_QUEUED


def test_a_run_that_cannot_be_says_why_and_is_watched_to_its_end(
    stub: pb_grpc.TrainerServiceStub, redis_url: str
) -> None:
    write(redis_url, "lost")
    request = pb.StartRunRequest(run="lost", fencing_token=5)
    assert stub.StartRun(request, timeout=20).run.run == "lost"
    assert stub.StartRun(request, timeout=20).run.running, "idempotent"
    *_, last = stub.WatchRun(pb.WatchRunRequest(run="lost"), timeout=60)
    assert last.run.phase == pb.RUN_PHASE_FAILED
    assert "model.path: '/nowhere' is not a folder" in last.run.error
    code, text = refused(stub.StartRun, request)
    assert (code, "is over: FAILED" in text) == (grpc.StatusCode.FAILED_PRECONDITION, True)


def test_replay_of_a_dense_model_fails_with_the_field(
    stub: pb_grpc.TrainerServiceStub, redis_url: str
) -> None:
    """The gateway refuses it of presets; a folder, only the trainer can look into."""
    write(redis_url, "dense", "preset:tiny-qwen3", replay="R3")
    stub.StartRun(pb.StartRunRequest(run="dense", fencing_token=5), timeout=20)
    *_, last = stub.WatchRun(pb.WatchRunRequest(run="dense"), timeout=60)
    assert last.run.phase == pb.RUN_PHASE_FAILED
    assert last.run.error.startswith("recipe.replay: 'R3' is not valid; valid: auto or none")


def test_cancel_of_a_run_without_a_process_ends_it(
    stub: pb_grpc.TrainerServiceStub, redis_url: str
) -> None:
    write(redis_url, "idle")
    stub.PauseRun(pb.PauseRunRequest(run="idle", fencing_token=5))
    with redis.Redis.from_url(redis_url) as client:
        paused = RunRecord.from_hash("idle", client.hgetall(run_key("idle")))
        assert paused.desired == Desired.PAUSED
        view = stub.CancelRun(pb.CancelRunRequest(run="idle", fencing_token=5)).run
        assert view.phase == pb.RUN_PHASE_CANCELLED
        cancelled = RunRecord.from_hash("idle", client.hgetall(run_key("idle")))
        assert cancelled.phase == Phase.CANCELLED


def test_a_child_ends_with_its_service_whatever_killed_it(redis_url: str, tmp_path: Path) -> None:
    """Else a second one would be started beside it, and each would take the other's groups."""
    nobody = ("127.0.0.1:1",)
    write(redis_url, "orphan", model="preset:tiny-qwen3-moe", engines=nobody)
    with trainer(redis_url, tmp_path) as (channel, process):
        stub = pb_grpc.TrainerServiceStub(channel)
        stub.StartRun(pb.StartRunRequest(run="orphan", fencing_token=5), timeout=20)
        for view in stub.WatchRun(pb.WatchRunRequest(run="orphan"), timeout=60):
            if view.run.phase == pb.RUN_PHASE_PREPARING:
                break
        child = training_process("orphan")
        assert child is not None
        process.kill()
        deadline = time.monotonic() + 10
        while training_process("orphan") is not None:
            assert time.monotonic() < deadline, f"{child} lives on"
            time.sleep(0.05)


def test_blobs_that_a_finished_run_has_left_are_swept_at_the_start(
    redis_url: str, tmp_path: Path
) -> None:
    write(redis_url, "over", phase=Phase.SUCCEEDED)
    write(redis_url, "going-on", phase=Phase.TRAINING)
    blobs = BlobStore(str(tmp_path / "blobs"))
    for run in ("over", "going-on", "of-another-redis"):
        blobs.put(run, "groups", SlotKey(0, 3, 1), b"late")
    with trainer(redis_url, tmp_path, "--blobs", blobs.root):
        deadline = time.monotonic() + 20
        while "over" in blobs.runs():
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert blobs.runs() == ["going-on", "of-another-redis"]
