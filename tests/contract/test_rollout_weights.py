"""Versions: staged, verified, then applied; never a mixture, never a reused number."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from enginekit import (
    CONFIG,
    FLOAT32,
    FP8,
    SAFETENSORS,
    EngineClient,
    checkpoint,
    engine_client,
    forward,
    manifest,
)
from safetensors.torch import save_file

from keel import codec, rpc
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.rollout.v1 import rollout_service_pb2_grpc as pb_grpc
from keel.types.v1 import tensor_pb2
from keel_rollout.engines.torch import create
from keel_rollout.engines.torch.model import Model
from keel_rollout.servicer import RolloutServicer

pytest_plugins = ["engine_fixtures"]

PROBE = [3, 4, 5, 6, 50, 51]


async def refused(call: Any, code: grpc.StatusCode, *words: str) -> None:
    """Awaits `call`, which must fail with `code` and name every word."""
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await call
    assert failure.value.code() == code, failure.value.details()
    for word in words:
        assert word in str(failure.value.details())


async def serves(client: EngineClient, model: Any, version: int) -> None:
    """Asserts that exactly `model` is served, as `version`."""
    answer = await client.stub.GetWeightVersion(pb.GetWeightVersionRequest())
    assert answer.policy_version == version
    (s,) = await client.generate([5, 9, 2], version=version)
    np.testing.assert_allclose(s.logprobs, forward(model, s.everything)[2:], atol=1e-5)


async def test_an_engine_is_loaded_then_ready(client: EngineClient, model_a: Any) -> None:
    """LOADED serves nothing; the first update makes it READY; the probe is the plain forward."""
    await client.load()
    assert await client.state() == pb.ENGINE_STATE_LOADED
    await refused(client.generate([5]), grpc.StatusCode.FAILED_PRECONDITION, "LOADED")
    probe = await client.publish(0, checkpoint(model_a), PROBE)
    np.testing.assert_allclose(probe, forward(model_a, PROBE), atol=1e-5)
    assert await client.state() == pb.ENGINE_STATE_READY
    await serves(client, model_a, 0)


async def test_loading_whole_gives_the_same_bits_as_updating(
    engine_address: str, next_token: Callable[[], int], model_a: Any, model_b: Any
) -> None:
    """a then b, against b alone on a newly loaded model; float32 and emulated fp8."""
    for precision in (FLOAT32, FP8):
        bits = []
        for history in ([model_a, model_b], [model_b]):
            token = next_token()
            async with engine_client(engine_address, f"run-{token}", token) as client:
                await client.load(precision=precision)
                for version, model in enumerate(history):
                    await client.publish(version, checkpoint(model))
                group = await client.generate([5, 9], num_samples=8, cohort=("c", 1, 0))
                bits.append([s.bits() for s in group])
        assert bits[0] == bits[1]


async def test_an_update_of_the_preset_takes_far_less_than_200_ms(
    client: EngineClient, model_a: Any
) -> None:
    """117 tensors, 0.9 million float32, probe included: median of five (measured: about 40 ms)."""
    await client.load()
    tensors = checkpoint(model_a)
    taken_s = []
    for version in range(6):
        begin_s = time.perf_counter()
        await client.publish(version, tensors, PROBE)
        taken_s.append(time.perf_counter() - begin_s)
    assert sorted(taken_s)[2] < 0.2, taken_s


async def test_a_version_is_a_number_and_a_fingerprint(
    client: EngineClient, model_a: Any, model_b: Any
) -> None:
    """Same again: nothing to send. Same number, other bits, or a lower number: refused."""
    await client.load()
    a, b = checkpoint(model_a), checkpoint(model_b)
    await client.publish(3, a)
    assert await client.begin(manifest(3, a))
    probe = await client.finish(manifest(3, a), PROBE)
    np.testing.assert_allclose(probe, forward(model_a, PROBE), atol=1e-5)
    precondition = grpc.StatusCode.FAILED_PRECONDITION
    await refused(client.begin(manifest(3, b)), precondition, "policy_version: 3", "never reused")
    await refused(client.begin(manifest(2, b)), precondition, "policy_version: 2", "only grow")
    await serves(client, model_a, 3)
    await client.load()
    await serves(client, model_a, 3)
    await refused(client.generate([5], version=4), precondition, "require_policy_version: 4")


@pytest.mark.parametrize("fault", ["hash", "cut", "shape", "missing", "unknown", "dtype", "offset"])
async def test_a_faulty_update_names_the_tensor_and_keeps_the_old_version(
    client: EngineClient, model_a: Any, model_b: Any, fault: str
) -> None:
    """Each fault is refused where it shows first; version 0 goes on; then version 1 succeeds."""
    await client.load()
    await client.publish(0, checkpoint(model_a))
    good = checkpoint(model_b)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    man = manifest(1, good)
    entry = next(entry for entry in man.tensors if entry.name == name)
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    if fault in ("hash", "cut", "offset"):
        pieces = list(client.pieces(1, good))
        place = next(i for i, piece in enumerate(pieces) if piece.chunk.name == name)
        if fault == "hash":
            pieces[place].chunk.data = pieces[place].chunk.data[::-1]
        elif fault == "cut":
            del pieces[place]
        else:
            pieces[place].chunk.offset_bytes = 4
        await client.begin(man)
        if fault == "offset":
            await refused(client.stub.UpdateWeights(iter(pieces)), invalid, name, "offset_bytes")
        else:
            await client.stub.UpdateWeights(iter(pieces))
            code = (
                grpc.StatusCode.DATA_LOSS
                if fault == "hash"
                else grpc.StatusCode.FAILED_PRECONDITION
            )
            await refused(client.finish(man), code, name)
    else:
        if fault == "shape":
            entry.shape[:] = [128, 64]
        elif fault == "dtype":
            entry.dtype = tensor_pb2.D_TYPE_INT32
        elif fault == "missing":
            man.tensors.remove(entry)
        else:
            entry.name = name = "model.layers.9.nothing.weight"
        await refused(client.begin(man), invalid, name)
    await serves(client, model_a, 0)
    await client.publish(1, good)
    await serves(client, model_b, 1)


async def test_a_manifest_that_lies_about_its_fingerprint_is_refused(
    client: EngineClient, model_a: Any
) -> None:
    """DATA_LOSS at Begin, and again where Finish names another fingerprint."""
    await client.load()
    tensors = checkpoint(model_a)
    man = manifest(0, tensors)
    man.fingerprint += 1
    await refused(client.begin(man), grpc.StatusCode.DATA_LOSS, "fingerprint")
    man.fingerprint -= 1
    await client.begin(man)
    await client.stub.UpdateWeights(client.pieces(0, tensors))
    man.fingerprint += 1
    await refused(client.finish(man), grpc.StatusCode.DATA_LOSS, "fingerprint")


async def test_a_stream_that_breaks_off_can_be_taken_up(client: EngineClient, model_a: Any) -> None:
    """The rest by a second stream; or everything again after another Begin."""
    await client.load()
    tensors = checkpoint(model_a)
    man = manifest(0, tensors)
    pieces = list(client.pieces(0, tensors))

    async def breaking() -> Any:
        for piece in pieces[:40]:
            yield piece
        await asyncio.sleep(0.1)
        broken.cancel()
        await asyncio.sleep(10)

    await client.begin(man)
    broken = client.stub.UpdateWeights(breaking())
    with pytest.raises(asyncio.CancelledError):
        await broken
    await client.stub.UpdateWeights(iter(pieces[40:]))
    await client.finish(man)
    await serves(client, model_a, 0)


async def test_weights_by_reference(
    client: EngineClient, engine_shared: Path, model_a: Any, tmp_path: Path
) -> None:
    """A safetensors file under the shared root; a path out of it is refused, links included."""
    await client.load()
    tensors = checkpoint(model_a)
    (engine_shared / "v").mkdir(exist_ok=True)
    save_file(dict(tensors), engine_shared / "v" / "0.safetensors")
    save_file(dict(tensors), tmp_path / "out.safetensors")
    link = engine_shared / "link.safetensors"
    link.unlink(missing_ok=True)
    link.symlink_to(tmp_path / "out.safetensors")
    man = manifest(0, tensors, SAFETENSORS)
    await client.begin(man)

    def send(path: str) -> Any:
        message = pb.UpdateWeightsRequest(
            lease=client.lease, policy_version=0, safetensors_path=path
        )
        return client.stub.UpdateWeights(iter([message]))

    outside = str(tmp_path / "out.safetensors")
    for path in ("../out.safetensors", outside, "link.safetensors", "", "nothing", "a\0b", "v"):
        await refused(send(path), grpc.StatusCode.INVALID_ARGUMENT, "safetensors_path")
    assert (await send("v/0.safetensors")).staged_bytes == sum(t.nbytes for t in tensors.values())
    await client.finish(man)
    await serves(client, model_a, 0)


async def test_bfloat16_tensors_are_taken(client: EngineClient, model_a: Any) -> None:
    """The engine casts to its own dtype: version 0 in bfloat16 is the model rounded to it."""
    await client.load()
    tensors = {name: t.to(torch.bfloat16) for name, t in checkpoint(model_a).items()}
    raw = {name: t.view(torch.int16) for name, t in tensors.items()}
    man = manifest(0, raw)
    for entry in man.tensors:
        entry.dtype = tensor_pb2.D_TYPE_BFLOAT16
    man.fingerprint = codec.fingerprint(man.tensors)
    await client.begin(man)
    await client.stub.UpdateWeights(client.pieces(0, raw))
    probe = await client.finish(man, PROBE)
    rounded = copy.deepcopy(model_a)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    np.testing.assert_allclose(probe, forward(rounded, PROBE), atol=1e-5)


async def test_fencing(engine_address: str, client: EngineClient, model_a: Any) -> None:
    """A lower token, no lease, or another run's lease: refused on every mutating call."""
    await client.load()
    await client.publish(0, checkpoint(model_a))
    async with engine_client(engine_address, client.run, 0) as old:
        denied = grpc.StatusCode.PERMISSION_DENIED
        await refused(old.load(), denied, "fencing_token: 0")
        await refused(old.pause(pb.PAUSE_MODE_KEEP), denied)
        await refused(old.resume(), denied)
        await refused(old.begin(manifest(1, checkpoint(model_a))), denied)
        await refused(old.stub.UpdateWeights(old.pieces(1, checkpoint(model_a))), denied)
        await refused(old.finish(manifest(0, checkpoint(model_a))), denied)
    await refused(client.stub.Resume(pb.ResumeRequest()), grpc.StatusCode.INVALID_ARGUMENT, "lease")
    async with engine_client(engine_address, "other", client.lease.fencing_token) as other:
        precondition = grpc.StatusCode.FAILED_PRECONDITION
        await refused(other.pause(pb.PAUSE_MODE_KEEP), precondition, client.run)
        await refused(other.generate([5]), precondition, "id.run")
    await serves(client, model_a, 0)


async def test_an_update_that_fails_half_way_makes_the_engine_stale(
    model_a: Any, model_b: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """STALE serves nothing and tells who waits; a full update repairs it, in the same bits."""
    engine = create("cpu", 1)
    server, port = await rpc.serve(
        "127.0.0.1:0",
        ["keel.rollout.v1.RolloutService"],
        lambda s: pb_grpc.add_RolloutServiceServicer_to_server(RolloutServicer(engine, None), s),
    )
    try:
        async with engine_client(f"127.0.0.1:{port}", "r", 1) as client:
            assert await client.state() == pb.ENGINE_STATE_EMPTY
            empty = client.pause(pb.PAUSE_MODE_KEEP)
            await refused(empty, grpc.StatusCode.FAILED_PRECONDITION, "EMPTY")
            await client.load()
            await client.publish(4, checkpoint(model_a))
            await client.pause(pb.PAUSE_MODE_KEEP)
            waiting = asyncio.ensure_future(client.generate([5, 9]))
            await asyncio.sleep(0.1)
            apply = Model.apply

            def half(self: Model, state: dict[str, torch.Tensor]) -> None:
                names = sorted(state)
                bad = {**state, names[9]: torch.zeros(3, 3, 3)}
                apply(self, bad)

            monkeypatch.setattr(Model, "apply", half)
            broken = client.publish(5, checkpoint(model_b))
            await refused(broken, grpc.StatusCode.INTERNAL, "half-way")
            assert await client.state() == pb.ENGINE_STATE_STALE
            await refused(waiting, grpc.StatusCode.FAILED_PRECONDITION, "STALE")
            await refused(client.generate([5]), grpc.StatusCode.FAILED_PRECONDITION, "STALE")
            answer = await client.stub.GetWeightVersion(pb.GetWeightVersionRequest())
            assert not answer.HasField("policy_version")
            monkeypatch.undo()
            lower = client.begin(manifest(3, checkpoint(model_a)))
            await refused(lower, grpc.StatusCode.FAILED_PRECONDITION, "only grow")
            await client.publish(5, checkpoint(model_b))
            await client.resume()
            await serves(client, model_b, 5)
    finally:
        await engine.close()
        await server.stop(0)


async def test_another_model_replaces_the_one_loaded(client: EngineClient, model_a: Any) -> None:
    """In-flight requests end ABORTED; versions start afresh."""
    await client.load()
    await client.publish(7, checkpoint(model_a))
    running = asyncio.ensure_future(client.generate([5, 9], num_samples=64, max_tokens=500))
    await asyncio.sleep(0.2)
    signature = await client.load({**CONFIG, "num_hidden_layers": 1})
    assert list(signature.moe_layers) == [0]
    group = await running
    assert {s.complete.finish_reason for s in group if s.complete} == {3}
    assert await client.state() == pb.ENGINE_STATE_LOADED
    await client.load()
    await client.publish(0, checkpoint(model_a))
    await serves(client, model_a, 0)
