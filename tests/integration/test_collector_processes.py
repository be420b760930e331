"""Collector and torch engine as real processes: what a kill changes in the data (nothing)."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import redis
from collector_peers import envelopes, lease, make_spec, without_times, write_run
from rediskit import RedisServer

from keel.codec import to_ndarray
from keel.queue import metrics_key, run_key
from keel.record import RunRecord
from keel.types.v1 import sequence_pb2
from keel_trainer.artifact import prepare_artifact
from keel_trainer.backends.torch import TorchBackend
from keel_trainer.publish import Publisher
from keel_trainer.version import Version, probe_tokens

SPEC = make_spec(
    rollout={"group_size": 16, "max_tokens": 24},
    recipe={"off_policiness": 2, "groups_per_minibatch": 12, "steps": 2},
    evaluation={"every": 2, "samples": 40},
)
SLOTS = 24


def until(holds: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Service:
    """A process whose log can be read."""

    def __init__(self, log: Path, *command: str) -> None:
        self._command, self._log = command, log

    def start(self) -> None:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *self._command],
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def log(self) -> str:
        return self._log.read_text()

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(20)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Service]:
    engine = Service(tmp_path / "engine.log", "keel_rollout.engine_main", "--listen", "127.0.0.1:0")
    engine.start()
    yield engine
    engine.process.kill()
    engine.process.wait()


@pytest.fixture
def collector(tmp_path: Path, server: RedisServer) -> Iterator[Service]:
    collector = Service(
        tmp_path / "collector.log", "keel_rollout.collector.main", "--redis", server.url
    )
    yield collector
    if collector.process.poll() is None:
        collector.process.kill()
        collector.process.wait()


def address_of(engine: Service) -> str:
    until(lambda: "listens on" in engine.log())
    found = re.findall(r"listens on (\S+)", engine.log())
    return found[-1]


def publish(artifact: Path, address: str) -> None:
    """Version 0 to the engine, as the trainer does it."""
    backend = TorchBackend.from_pretrained(artifact)
    probe = probe_tokens(64)
    record = RunRecord(run="r", spec=SPEC, created_s=0.0, engines=(address,), fencing_token=1)
    publisher = Publisher(
        record, artifact, backend.info, probe, read=lambda: record, write=lambda **fields: None
    )
    publisher.publish(
        Version.build(0, backend.weights(), backend.probe_logprobs(probe)), lambda: record
    )
    publisher.close()


def test_kills_of_the_collector_change_nothing_in_the_data(
    server: RedisServer, engine: Service, collector: Service, tmp_path: Path
) -> None:
    """A lap of 24 x 16 in two cohorts and an evaluation: undisturbed, then with kills."""
    artifact = prepare_artifact(SPEC, tmp_path / "base")
    address = address_of(engine)
    publish(artifact, address)
    with redis.Redis.from_url(server.url) as client:
        write_run(client, SPEC, artifact, address, policy_version=0, fencing_token=1)
        collector.start()
        until(lambda: client.xlen("keel:groups:r") == SLOTS)
        assert collector.end(signal.SIGTERM) == 0
        undisturbed = envelopes(client)
        row = client.hget(metrics_key("r"), "0:0:evaluation")

        client.xtrim("keel:groups:r", maxlen=0)
        client.delete(metrics_key("r"))
        collector.start()
        until(lambda: client.hexists(metrics_key("r"), "0:0:evaluation"))
        assert collector.end(signal.SIGKILL) == -signal.SIGKILL
        for enough in (1, 17):
            collector.start()
            until(lambda enough=enough: client.xlen("keel:groups:r") >= enough)
            collector.end(signal.SIGKILL)
        collector.start()
        until(lambda: client.xlen("keel:groups:r") == SLOTS)
        time.sleep(0.3)
        disturbed = envelopes(client)
        assert client.hget(metrics_key("r"), "0:0:evaluation") == row
        assert not client.hget(run_key("r"), "collector_error")
    assert [e.id.slot for e in disturbed] == list(range(SLOTS))
    assert list(map(without_times, disturbed)) == list(map(without_times, undisturbed))
    check_content(undisturbed)


def test_kills_within_an_evaluation_of_several_sets_change_no_number(
    server: RedisServer, engine: Service, collector: Service, tmp_path: Path
) -> None:
    """Two sets of 120 prompts of a file, 8 sampled responses each: eight cohorts."""
    for name, first in (("d", 0), ("e", 5000)):
        rows = [{"prompt": f"{i}+1=", "answer": str(i % 10)} for i in range(first, first + 3000)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first_digit = {"name": "regex", "pattern": "^(?P<answer>[0-9])"}
    spec = make_spec(
        task={"dataset": str(tmp_path / "d.jsonl"), "verifier": [first_digit]},
        rollout={"group_size": 16, "max_tokens": 8},
        evaluation={
            "every": 2,
            "samples": 120,
            "k": 8,
            "max_tokens": 24,
            "temperature": 1.0,
            "sets": [{"name": "held"}, {"name": "own", "dataset": str(tmp_path / "e.jsonl")}],
        },
    )
    artifact = prepare_artifact(SPEC, tmp_path / "base")
    address = address_of(engine)
    publish(artifact, address)
    rows = []
    with redis.Redis.from_url(server.url) as client:
        write_run(client, spec, artifact, address, policy_version=0, fencing_token=1)
        for kills in ((), (0.1, 0.4)):
            for seconds in kills:
                begun = collector.log().count("version 0")
                collector.start()
                until(lambda begun=begun: collector.log().count("version 0") > begun)
                time.sleep(seconds)
                collector.end(signal.SIGKILL)
                assert not client.hexists(metrics_key("r"), "0:0:evaluation")
            collector.start()
            until(lambda: client.hexists(metrics_key("r"), "0:0:evaluation"))
            collector.end(signal.SIGKILL)
            rows.append(json.loads(client.hget(metrics_key("r"), "0:0:evaluation")))
            client.delete(metrics_key("r"))
    assert rows[0] == rows[1]
    assert 0 < rows[0]["eval/held/avg@8"] < 0.1  # chance: one token of 64
    assert rows[0]["eval/held/avg@8"] != rows[0]["eval/own/avg@8"]
    assert rows[0]["eval/held/pass@8"] > rows[0]["eval/held/avg@8"]


def check_content(found: list[sequence_pb2.Envelope]) -> None:
    """A model with random weights: routes as wide as the model, log-probs near -log 64."""
    logprobs = []
    for envelope in found:
        assert len(envelope.group.sequences) == 16
        for sequence in envelope.group.sequences:
            assert sequence.invalid_reason == ""
            assert list(sequence.routes.inline.shape) == [sequence.token_ids.shape[0] - 1, 2, 2]
            shape = sequence.rollout_logprobs
            logprobs.append(to_ndarray(shape, "p", dtypes=("float32",), shape=(None,)))
    assert np.concatenate(logprobs).mean() == pytest.approx(-np.log(64), abs=0.3)


def test_an_engine_killed_in_the_middle_is_waited_for(
    server: RedisServer, engine: Service, collector: Service, tmp_path: Path
) -> None:
    """It comes back on another port, gets its model again, and the lap is completed."""
    artifact = prepare_artifact(SPEC, tmp_path / "base")
    address = address_of(engine)
    publish(artifact, address)
    with redis.Redis.from_url(server.url) as client:
        write_run(client, SPEC, artifact, address, policy_version=0, fencing_token=1)
        collector.start()
        until(lambda: client.xlen("keel:groups:r") > 0)
        engine.end(signal.SIGKILL)
        time.sleep(0.3)
        engine.start()
        until(lambda: len(re.findall("listens on", engine.log())) == 2)
        lease(client, address_of(engine))
        publish(artifact, address_of(engine))
        until(lambda: client.xlen("keel:groups:r") == SLOTS)
        assert not client.hget(run_key("r"), "collector_error")
        found = envelopes(client)
    check_content(found)
    assert collector.end(signal.SIGTERM) == 0
    assert "again in 0.1 s" in collector.log()
    assert "Traceback" not in collector.log()


def test_the_collector_leaves_no_worker_behind(
    server: RedisServer, engine: Service, collector: Service, tmp_path: Path
) -> None:
    artifact = prepare_artifact(SPEC, tmp_path / "base")
    publish(artifact, address_of(engine))
    with redis.Redis.from_url(server.url) as client:
        write_run(client, SPEC, artifact, address_of(engine), policy_version=0)
        collector.start()
        until(lambda: client.xlen("keel:groups:r") == SLOTS)
        (worker,) = psutil.Process(collector.process.pid).children()
        collector.end(signal.SIGKILL)
    worker.wait(5)
