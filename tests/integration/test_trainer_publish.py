"""Publishing to real engine processes: proved, resent, repaired, and a liar found out."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import resource
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from enginekit import engine_process

from keel.errors import IntegrityError
from keel.record import RunRecord
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.rollout.v1 import rollout_service_pb2_grpc as pb_grpc
from keel.rpc import channel
from keel.spec import parse_spec
from keel_trainer.artifact import prepare_artifact
from keel_trainer.backends.torch import TorchBackend
from keel_trainer.delivery import EngineError, EngineLink
from keel_trainer.publish import Publisher
from keel_trainer.version import SharedWeights, Version, probe_tokens

PROBE = probe_tokens(64)
JOB = {"name": "p", "model": {"path": "preset:tiny-qwen3-moe"}, "recipe": {"steps": 1}}
SPEC, TWO = parse_spec(JOB), parse_spec(JOB | {"engine": {"count": 2}})


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_artifact(SPEC, tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def backend(artifact: Path) -> TorchBackend:
    return TorchBackend.from_pretrained(artifact)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def address(shared: Path) -> Iterator[str]:
    with engine_process("--shared", str(shared)) as (address, _):
        yield address


@pytest.fixture(scope="module")
def second() -> Iterator[str]:
    """Another engine, which shares no storage."""
    with engine_process() as (address, _):
        yield address


class Run:
    """A run's record as its fields are written, and a publisher that follows it."""

    def __init__(
        self,
        artifact: Path,
        *engines: str,
        run: str,
        token: int,
        proved: dict[str, int] | None = None,
        **more: Any,
    ) -> None:
        self.record = RunRecord(
            run, SPEC, 0.0, engines=engines, engine_token=token, proved=proved or {}
        )
        self.history: list[dict[str, Any]] = []
        info = TorchBackend.from_pretrained(artifact).info
        self.publisher = Publisher(
            self.record, artifact, info, PROBE, read=lambda: self.record, write=self.write, **more
        )

    def write(self, **fields: Any) -> None:
        self.history.append(fields)
        self.record = dataclasses.replace(self.record, **fields)

    def change(self, **fields: Any) -> None:
        """What the gateway writes."""
        self.record = dataclasses.replace(self.record, **fields)
        self.publisher.follow(self.record)

    def publish(self, version: Version) -> None:
        self.publisher.publish(version, lambda: self.record)

    def until(self, holds: Callable[[RunRecord], bool], seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while not holds(self.record):
            assert time.monotonic() < deadline, self.record
            self.publisher.follow(self.record)
            time.sleep(0.02)


@pytest.fixture
def started(artifact: Path) -> Iterator[Callable[..., Run]]:
    """Starts runs; closes their publishers."""
    runs: list[Run] = []

    def start(*engines: str, **options: Any) -> Run:
        runs.append(Run(artifact, *engines, **options))
        return runs[-1]

    yield start
    for run in runs:
        run.publisher.close()


def version(backend: TorchBackend, number: int) -> Version:
    return Version.build(number, backend.weights(), backend.probe_logprobs(PROBE.tolist()))


def torn(right: Version) -> Version:
    """One bit of the bytes differs from what the manifest says."""
    name = next(iter(right.tensors))
    data = np.frombuffer(right.tensors[name], np.uint8).copy()
    data[0] ^= 1
    return dataclasses.replace(right, tensors=right.tensors | {name: data.data})


def wrong(right: Version, nats: float = 0.1) -> Version:
    """The trainer's own log-probs lie off those of the weights, so the engine's do."""
    return dataclasses.replace(right, probe_logprobs=[p - nats for p in right.probe_logprobs])


def test_a_version_is_proved_and_found_again(
    started: Callable[..., Run], address: str, backend: TorchBackend
) -> None:
    first = started(address, run="one", token=1)
    first.publish(version(backend, 0))
    assert first.record.proved == {address: 0}
    # float32 engine against float32 trainer: only kernels differ
    assert first.publisher.first_gaps.keys() == {"torch"}
    assert first.publisher.first_gaps["torch"] < 1e-5
    # a lost reply, or a trainer that was restarted: the same version again is no new one, and what
    # serves it is not taken from the collector meanwhile
    again = started(address, run="one", token=1, proved={address: 0})
    again.publish(version(backend, 0))
    assert again.history == []


def test_an_engine_is_not_ready_while_it_changes(
    started: Callable[..., Run], address: str, backend: TorchBackend
) -> None:
    run = started(address, run="changing", token=2)
    for number in (0, 1, 2):
        run.publish(version(backend, number))
    assert [fields["proved"] for fields in run.history if "proved" in fields] == [
        {address: 0},
        {},
        {address: 1},
        {},
        {address: 2},
    ]


def test_an_engine_whose_log_probs_are_not_those_of_the_weights_is_found(
    started: Callable[..., Run], address: str, backend: TorchBackend
) -> None:
    run = started(address, run="two", token=3)
    run.publish(version(backend, 0))
    with pytest.raises(IntegrityError, match=r"version 1.*median gap 0\.1 nats.*at most 0\.02"):
        run.publish(wrong(version(backend, 1)))
    assert "median gap 0.1 nats, valid: at most 0.02" in run.record.stale[address]
    assert run.record.proved == {}


def test_another_model_at_first_load_is_found(
    started: Callable[..., Run], address: str, backend: TorchBackend
) -> None:
    run = started(address, run="other", token=4)
    with pytest.raises(IntegrityError, match=r"gap at first load is 0\.8 nats.*at most 0\.5"):
        run.publish(wrong(version(backend, 0), 0.8))


def test_bytes_that_differ_from_their_hash_leave_the_old_version(
    started: Callable[..., Run], address: str, backend: TorchBackend
) -> None:
    run = started(address, run="three", token=5)
    run.publish(version(backend, 0))
    with pytest.raises(EngineError, match="DATA_LOSS"):
        run.publish(torn(version(backend, 1)))
    again = started(address, run="three", token=5)
    again.publish(version(backend, 0))
    assert again.record.proved == {address: 0}, "version 0 is still served"
    assert [f for f in again.history if f.get("proved") == {}] == [], "and was not sent anew"


def test_an_overtaken_lease_is_refused(
    started: Callable[..., Run], address: str, backend: TorchBackend
) -> None:
    started(address, run="four", token=9).publish(version(backend, 0))
    run = started(address, run="three", token=5)
    with pytest.raises(EngineError, match="PERMISSION_DENIED"):
        run.publish(version(backend, 1))
    assert "PERMISSION_DENIED" in run.record.stale[address]


def test_each_engine_proves_a_version_on_its_own(
    started: Callable[..., Run], address: str, second: str, backend: TorchBackend
) -> None:
    run = started(address, second, run="pair", token=10)
    for number in (0, 1):
        run.publish(version(backend, number))
        run.until(lambda record, n=number: record.proved == {address: n, second: n})


def test_a_dead_engine_holds_up_nobody(
    started: Callable[..., Run], address: str, backend: TorchBackend
) -> None:
    run = started("127.0.0.1:1", address, run="half", token=11)
    began = time.monotonic()
    run.publish(version(backend, 0))
    assert time.monotonic() - began < 5
    assert run.record.proved == {address: 0}
    assert run.record.stale == {}


def test_an_engine_that_refuses_for_good_is_told_and_the_others_go_on(
    started: Callable[..., Run], address: str, second: str, backend: TorchBackend
) -> None:
    started(second, run="holder", token=50).publish(version(backend, 0))
    run = started(address, second, run="refused", token=12)
    run.publish(version(backend, 0))
    run.until(lambda record: "PERMISSION_DENIED" in record.stale.get(second, ""))
    assert run.record.proved == {address: 0}
    # given back and leased again: the token grows, and the next version is another chance
    run.change(engine_token=51)
    run.publish(version(backend, 1))
    run.until(lambda record: record.proved == {address: 1, second: 1} and not record.stale)


def test_draining_the_last_good_engine_waits_for_one_in_its_place(
    started: Callable[..., Run], address: str, second: str, backend: TorchBackend
) -> None:
    """The other one was given up; the run would fail only if nothing were to come."""
    started(second, run="holder-2", token=59).publish(version(backend, 0))
    run = started(address, second, run="short", token=53)
    run.record = dataclasses.replace(run.record, spec=TWO)
    run.publish(version(backend, 0))
    run.until(lambda record: second in record.stale)
    run.change(draining=(address,))
    run.change(engines=(second,), draining=(), proved={})
    run.change(engines=(second, address), engine_token=54)
    run.until(lambda record: record.proved == {address: 0})


def test_an_engine_that_left_and_joined_again_unseen_is_proved_anew(
    started: Callable[..., Run], address: str, backend: TorchBackend
) -> None:
    """The gateway has cut what it had proved, twice between two looks of ours."""
    run = started(address, run="unseen", token=55)
    run.publish(version(backend, 0))
    run.record = dataclasses.replace(run.record, proved={}, engine_token=56)
    run.until(lambda record: record.proved == {address: 0})


def test_an_engine_that_has_left_is_not_brought_back(
    started: Callable[..., Run], backend: TorchBackend
) -> None:
    """Whoever restarts it has it for himself, also while the training loop looks at no record."""
    with contextlib.ExitStack() as processes:
        other, process = processes.enter_context(engine_process())
        run = started(other, run="left", token=90)
        run.publish(version(backend, 0))
        run.record = dataclasses.replace(run.record, engines=())
        process.kill()
        process.wait()
        processes.enter_context(engine_process("--listen", other))
        with channel(other) as line:
            stub = pb_grpc.RolloutServiceStub(line)
            for _ in range(12):  # the worker looks every 2 s
                answer = stub.GetCapabilities(pb.GetCapabilitiesRequest(), wait_for_ready=True)
                assert answer.state == pb.ENGINE_STATE_EMPTY
                time.sleep(0.25)


def test_a_version_that_was_given_up_frees_its_memory(
    started: Callable[..., Run], address: str, backend: TorchBackend
) -> None:
    run = started(address, run="memory", token=57)
    run.publish(version(backend, 0))
    with pytest.raises(IntegrityError):
        run.publish(wrong(version(backend, 1)))
    run.publish(version(backend, 2))
    gc.collect()
    assert [each.number for each in gc.get_objects() if type(each) is Version] == [2]


def test_a_shared_folder_that_is_full_is_passed_over(
    started: Callable[..., Run], address: str, shared: Path, backend: TorchBackend
) -> None:
    """A limit on the size of a file stands for a full disk: both end save_file alike."""
    run = started(address, run="full", token=58, shared=SharedWeights(shared, "full"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        run.publish(version(backend, 0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert run.record.proved == {address: 0}
    assert not list((shared / "weights" / "full").iterdir())


def test_a_restarted_engine_is_brought_back_in_the_background(
    started: Callable[..., Run], address: str, backend: TorchBackend
) -> None:
    with contextlib.ExitStack() as processes:
        other, process = processes.enter_context(engine_process())
        run = started(address, other, run="restart", token=60)
        run.publish(version(backend, 0))
        run.until(lambda record: len(record.proved) == 2)
        process.kill()
        process.wait()
        processes.enter_context(engine_process("--listen", other))
        began = time.monotonic()
        run.until(lambda record: other not in record.proved)
        run.until(lambda record: record.proved == {address: 0, other: 0})
        assert time.monotonic() - began < 15


def test_engines_join_drain_and_leave(
    started: Callable[..., Run], address: str, second: str, backend: TorchBackend
) -> None:
    run = started(address, run="moves", token=70)
    run.publish(version(backend, 0))
    run.change(engines=(address, second), engine_token=71)
    run.until(lambda record: record.proved == {address: 0, second: 0})
    run.change(draining=(address,))
    run.publish(version(backend, 1))
    run.until(lambda record: record.proved == {address: 0, second: 1})
    time.sleep(0.3)
    assert run.record.proved[address] == 0, "what drains keeps its version"
    run.change(engines=(second,), draining=())
    assert run.record.proved == {second: 1}


def test_weights_go_by_reference_to_those_that_share_the_folder(
    started: Callable[..., Run], address: str, second: str, shared: Path, backend: TorchBackend
) -> None:
    """The second engine shares nothing: it gets the same version by stream."""
    weights = SharedWeights(shared, "shared")
    seen: list[tuple[str, int]] = []
    file = weights.file

    @contextlib.contextmanager
    def watched(sent: Version) -> Iterator[str]:
        with file(sent) as path:
            seen.append((path, (shared / path).stat().st_mode & 0o777))
            yield path

    weights.file = watched  # type: ignore[method-assign]
    run = started(address, second, run="shared", token=80, shared=weights)
    for number in (0, 1):
        run.publish(version(backend, number))
        run.until(lambda record, n=number: record.proved == {address: n, second: n})
    by_reference = [f"weights/shared/version-{n}.safetensors" for n in (0, 0, 1)]
    assert sorted(seen) == [(path, 0o600) for path in by_reference], "the second asked once"
    assert list((shared / "weights" / "shared").iterdir()) == []
    run.publisher.close()
    assert not (shared / "weights" / "shared").exists()


def test_engines_are_brought_to_a_version_at_the_same_time(
    started: Callable[..., Run],
    address: str,
    second: str,
    backend: TorchBackend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each takes two seconds longer than it does; one after the other would be four."""
    run = started(address, second, run="parallel", token=90)
    bring = EngineLink.bring

    def slow(link: EngineLink, *args: Any, **options: Any) -> Any:
        time.sleep(2)
        return bring(link, *args, **options)

    monkeypatch.setattr(EngineLink, "bring", slow)
    began = time.monotonic()
    run.publish(version(backend, 0))
    run.until(lambda record: record.proved == {address: 0, second: 0})
    assert 2 <= time.monotonic() - began < 4


def test_a_newer_version_overtakes_one_that_a_slow_engine_still_waits_for(
    started: Callable[..., Run],
    address: str,
    second: str,
    backend: TorchBackend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = started(address, second, run="overtaken", token=100)
    brought: list[tuple[str, int]] = []
    go = threading.Event()
    bring = EngineLink.bring

    def slow(link: EngineLink, sent: Version, *args: Any, **options: Any) -> Any:
        if link.address == second:
            assert go.wait(30)
        brought.append((link.address, sent.number))
        return bring(link, sent, *args, **options)

    monkeypatch.setattr(EngineLink, "bring", slow)
    for number in range(4):
        run.publish(version(backend, number))
    go.set()
    run.until(lambda record: record.proved == {address: 3, second: 3})
    assert [number for to, number in brought if to == address] == [0, 1, 2, 3]
    assert [number for to, number in brought if to == second] == [0, 3]
