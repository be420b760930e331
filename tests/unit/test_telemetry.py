"""What services tell Prometheus."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import redis
from prometheus_client import REGISTRY, CollectorRegistry, Gauge, generate_latest
from prometheuskit import samples
from rediskit import RedisServer

from keel.errors import InvalidField
from keel.metrics import encode_row, row_field
from keel.queue import metrics_key, run_key
from keel.record import Phase, RunRecord, pack_fields
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.spec import parse_spec
from keel.telemetry import serve_metrics
from keel.types.v1 import sequence_pb2
from keel_rollout import engine_metrics
from keel_rollout.engines.base import Finished, Piece
from keel_trainer.store import connect
from keel_trainer.telemetry import TrainingCollector

SPEC = parse_spec(
    {"name": "first", "model": {"path": "preset:tiny-qwen3-moe"}, "recipe": {"steps": 8}}
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


def test_metrics_are_served_where_they_are_asked_for() -> None:
    registry = CollectorRegistry()
    Gauge("a_gauge", "Of this test.", registry=registry).set(3)
    server = serve_metrics("127.0.0.1:0", registry)
    assert server is not None
    url = f"http://127.0.0.1:{server.server_port}/metrics"
    assert samples(httpx.get(url, trust_env=False).text) == {("a_gauge", ()): 3.0}
    server.shutdown()
    server.server_close()


def test_nothing_is_served_unless_asked_for() -> None:
    before = threading.active_count()
    assert serve_metrics("") is None
    assert threading.active_count() == before


@pytest.mark.parametrize("address", ["9090", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:99999"])
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(InvalidField, match="--metrics"):
        serve_metrics(address)


def test_an_address_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(InvalidField, match="in use"):
            serve_metrics(address)


def engine_samples() -> dict[tuple[str, tuple[str, ...]], float]:
    return samples(generate_latest(REGISTRY).decode())


def piece(sample: int, tokens: int) -> Piece:
    ids = np.zeros(tokens, np.int32)
    return Piece(sample, ids, np.zeros(tokens, np.float32), None)


def finished(sample: int) -> Finished:
    return Finished(sample, sequence_pb2.FINISH_REASON_STOP, (), routes_valid=False)


@pytest.mark.parametrize(("ends", "outcome"), [(2, "complete"), (1, "dropped")])
def test_a_group_is_counted_to_its_end(ends: int, outcome: str) -> None:
    before = engine_samples()
    with engine_metrics.GroupCount(2) as count:
        count.event(piece(0, 5))
        count.event(piece(1, 3))
        in_flight = engine_samples()["keel_engine_sequences_in_flight", ()]
        for sample in range(ends):
            count.event(finished(sample))
    after = engine_samples()
    assert in_flight - before["keel_engine_sequences_in_flight", ()] == 2
    assert (
        after["keel_engine_sequences_in_flight", ()]
        == (before["keel_engine_sequences_in_flight", ()])
    )
    grown = {key: after[key] - before[key] for key in after if key in before}
    assert grown["keel_engine_tokens_total", ()] == 8
    assert grown["keel_engine_groups_total", (outcome,)] == 1


def test_engine_state_and_version_are_those_of_the_moment() -> None:
    now = [pb.ENGINE_STATE_EMPTY, -1]
    engine_metrics.tell(lambda: now[0], lambda: now[1])  # type: ignore[arg-type, return-value]
    assert engine_samples()["keel_engine_state", ("empty",)] == 1
    now[:] = [pb.ENGINE_STATE_READY, 7]
    told = engine_samples()
    assert told["keel_engine_state", ("empty",)] == 0
    assert told["keel_engine_state", ("ready",)] == 1
    assert told["keel_engine_policy_version", ()] == 7


def test_the_trainer_tells_the_newest_row_of_each_run_in_training(server: RedisServer) -> None:
    running = ["first-a", "first-b", "no-record"]
    with redis.Redis.from_url(server.url) as client:
        for run in running[:2]:
            client.hset(run_key(run), mapping=RunRecord(run, SPEC, 1.0).to_hash())
        fields = pack_fields(phase=Phase.TRAINING, step=3, policy_version=2, attempt=1)
        client.hset(run_key("first-b"), mapping=fields)
        row = {"step": 3, "mismatch/k3": 0.25, "routing/layer/1": 0.5, "is/ess": None}
        client.hset(metrics_key("first-b"), row_field(1, 3), encode_row(row))
        client.hset(metrics_key("first-b"), row_field(0, 3), encode_row({"step": 3, "entropy": 9}))
    registry = CollectorRegistry()
    registry.register(TrainingCollector(connect(server.url, retries=0), lambda: running))
    told = samples(generate_latest(registry).decode())
    assert told == {
        ("keel_trainer_runs", ()): 3,
        ("keel_trainer_step", ("first-a",)): 0,
        ("keel_trainer_step", ("first-b",)): 3,
        ("keel_trainer_cold_start_step", ("first-a",)): 0,
        ("keel_trainer_cold_start_step", ("first-b",)): 0,
        ("keel_trainer_policy_version", ("first-a",)): -1,
        ("keel_trainer_policy_version", ("first-b",)): 2,
        ("keel_trainer_metric", ("step", "first-b")): 3,
        ("keel_trainer_metric", ("mismatch/k3", "first-b")): 0.25,
        ("keel_trainer_metric", ("routing/layer/1", "first-b")): 0.5,
    }
    running.clear()
    told = samples(generate_latest(registry).decode())
    assert told == {("keel_trainer_runs", ()): 0}, "a run that is over leaves no series"


def test_the_trainer_without_redis_still_answers(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    client = connect("redis://127.0.0.1:1/0", retries=0)
    registry.register(TrainingCollector(client, lambda: ["first-a"]))
    assert samples(generate_latest(registry).decode()) == {("keel_trainer_runs", ()): 1}


def test_the_page_names_every_metric_and_none_besides() -> None:
    """docs/sinks.md against the registries: engine and collector share this process's."""
    import keel_rollout.collector.telemetry  # noqa: F401

    page = (Path(__file__).parents[2] / "docs" / "sinks.md").read_text()
    own = {f.name for f in REGISTRY.collect() if f.name.startswith("keel_")}
    assert len(own) == 16
    written = {name.removesuffix("_total") for name in re.findall(r"`(keel_[a-z_]+)", page)}
    here = {name for name in written if name.startswith(("keel_engine_", "keel_collector_"))}
    assert here == own
