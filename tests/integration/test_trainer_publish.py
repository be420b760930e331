"""Publishing to a real engine process: proved, resent, repaired, and a liar found out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from enginekit import engine_process

from keel.errors import IntegrityError
from keel.record import RunRecord
from keel.spec import parse_spec
from keel_trainer.artifact import prepare_artifact
from keel_trainer.backends.torch import TorchBackend
from keel_trainer.publish import EngineError, Publisher, Version, probe_tokens

PROBE = probe_tokens(64)


def never() -> None:
    """Nothing is to be waited for."""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_artifact(SPEC, tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with engine_process() as (address, _):
        yield address


SPEC = parse_spec({"name": "p", "model": {"path": "preset:tiny-qwen3-moe"}, "recipe": {"steps": 1}})


def publisher(address: str, artifact: Path, run: str, token: int) -> Publisher:
    record = RunRecord(run, SPEC, 0.0, engines=(address,), fencing_token=token)
    return Publisher(record, artifact, TorchBackend.from_pretrained(artifact).info, PROBE)


def version(backend: TorchBackend, number: int) -> Version:
    return Version.build(number, backend.weights(), backend.probe_logprobs(PROBE.tolist()))


def test_a_version_is_proved_and_found_again(address: str, artifact: Path) -> None:
    backend = TorchBackend.from_pretrained(artifact)
    publish = publisher(address, artifact, "one", 1)
    publish.publish(version(backend, 0), never)
    assert publish.first_gap is not None
    # float32 engine against float32 trainer: only kernels differ
    assert publish.first_gap < 1e-5
    assert publish.behind(0) == []
    assert publish.behind(1) == [address]
    assert publish.routes_available(never)
    # a lost reply: the same version again is no new one
    publish.publish(version(backend, 0), never)
    publish.close()


def test_an_engine_whose_log_probs_are_not_those_of_the_weights_is_found(
    address: str, artifact: Path
) -> None:
    backend = TorchBackend.from_pretrained(artifact)
    publish = publisher(address, artifact, "two", 2)
    publish.publish(version(backend, 0), never)
    right = version(backend, 1)
    stale = dataclasses.replace(right, probe_logprobs=[p - 0.1 for p in right.probe_logprobs])
    with pytest.raises(IntegrityError, match=r"version 1.*median gap 0\.1 nats.*at most 0\.02"):
        publish.publish(stale, never)
    publish.close()


def test_bytes_that_differ_from_their_hash_leave_the_old_version(
    address: str, artifact: Path
) -> None:
    backend = TorchBackend.from_pretrained(artifact)
    publish = publisher(address, artifact, "three", 3)
    publish.publish(version(backend, 0), never)
    torn = version(backend, 1)
    name = next(iter(torn.tensors))
    data = np.frombuffer(torn.tensors[name], np.uint8).copy()
    data[0] ^= 1
    torn.tensors[name] = data.data
    with pytest.raises(EngineError, match="DATA_LOSS"):
        publish.publish(torn, never)
    assert publish.behind(0) == [], "version 0 is still served"
    publish.close()


def test_an_engine_that_is_ahead_is_left_there(address: str, artifact: Path) -> None:
    """The trainer died after publishing version 1 and before recording it, and is back at 0."""
    backend = TorchBackend.from_pretrained(artifact)
    first = publisher(address, artifact, "ahead", 4)
    first.publish(version(backend, 0), never)
    first.publish(version(backend, 1), never)
    again = publisher(address, artifact, "ahead", 4)
    assert again.behind(0) == []
    again.publish(version(backend, 1), never)
    assert again.behind(1) == []
    assert again.behind(2) == [address]


def test_an_overtaken_lease_is_refused(address: str, artifact: Path) -> None:
    backend = TorchBackend.from_pretrained(artifact)
    publisher(address, artifact, "four", 9).publish(version(backend, 0), never)
    with pytest.raises(EngineError, match="PERMISSION_DENIED"):
        publisher(address, artifact, "three", 3).publish(version(backend, 1), never)
