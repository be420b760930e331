"""Bad input gets a clear answer, and the engine goes on serving."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import numpy as np
import pytest
from enginekit import CONFIG, EngineClient, checkpoint, collect, manifest, request

from keel import rpc
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.rollout.v1 import rollout_service_pb2_grpc as pb_grpc
from keel.types.v1 import tensor_pb2

pytest_plugins = ["engine_fixtures"]

INVALID = grpc.StatusCode.INVALID_ARGUMENT
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.fixture
async def serving(client: EngineClient, model_a: Any) -> EngineClient:
    """Version 0 is model a."""
    await client.load()
    await client.publish(0, checkpoint(model_a))
    return client


CASES: list[tuple[str, dict[str, Any], grpc.StatusCode, str]] = [
    ("prompt longer than the model takes", {"prompt": [5] * 513}, INVALID, "prompt_token_ids"),
    ("prompt and response together", {"max_tokens": 511}, INVALID, "sampling.max_tokens"),
    ("empty prompt", {"prompt": []}, INVALID, "prompt_token_ids"),
    ("token beyond the vocabulary", {"prompt": [5, 64]}, INVALID, "prompt_token_ids[1]"),
    ("negative token", {"prompt": [-1]}, INVALID, "prompt_token_ids[0]"),
    ("no samples", {"num_samples": 0}, INVALID, "num_samples"),
    ("too many samples", {"num_samples": 1025}, EXHAUSTED, "num_samples"),
    ("no tokens", {"max_tokens": 0}, INVALID, "sampling.max_tokens"),
    ("top_p in training", {"top_p": 0.9}, INVALID, "sampling.top_p"),
    ("top_k in training", {"top_k": 5}, INVALID, "sampling.top_k"),
    ("greedy in training", {"temperature": 0.0}, INVALID, "sampling.temperature"),
    ("negative temperature", {"temperature": -1.0}, INVALID, "sampling.temperature"),
    ("temperature nan", {"temperature": float("nan")}, INVALID, "sampling.temperature"),
    ("no purpose", {"purpose": pb.PURPOSE_UNSPECIFIED}, INVALID, "purpose"),
    ("top_p of zero", {"top_p": 0.0, "purpose": 2}, INVALID, "sampling.top_p"),
    ("stop token", {"stop": [64]}, INVALID, "sampling.stop_token_ids"),
    ("cohort without a name", {"cohort": ("", 1, 0)}, INVALID, "cohort.id"),
    ("cohort of nothing", {"cohort": ("x", 0, 0)}, INVALID, "cohort.size"),
    ("cohort too large", {"cohort": ("x", 4097, 0)}, EXHAUSTED, "cohort.size"),
]


async def refused(call: Any, code: grpc.StatusCode, *words: str) -> None:
    """Awaits `call`, which must fail with `code` and name every word."""
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await call
    assert failure.value.code() == code, failure.value.details()
    for word in words:
        assert word in str(failure.value.details())


async def test_every_bad_request_names_its_field(serving: EngineClient) -> None:
    """Status and field for each case, and the engine serves afterwards."""
    for what, options, code, field in CASES:
        options = {"prompt": [5, 9], **options}
        try:
            await refused(serving.generate(options.pop("prompt"), **options), code, field)
        except (AssertionError, pytest.fail.Exception) as error:
            raise AssertionError(f"{what}: {error}") from error
    assert len((await serving.generate([5]))[0].tokens) == 16


async def test_the_longest_request_is_taken(serving: EngineClient) -> None:
    """511 prompt tokens and one more are 512, which is what the model takes."""
    assert len((await serving.generate([5] * 511, max_tokens=1))[0].tokens) == 1


@pytest.mark.parametrize(
    ("tensor", "field"),
    [
        (tensor_pb2.Tensor(), "prompt_token_ids.dtype"),
        (tensor_pb2.Tensor(dtype=tensor_pb2.D_TYPE_INT64, shape=[1], data=bytes(8)), "dtype"),
        (tensor_pb2.Tensor(dtype=tensor_pb2.D_TYPE_INT32, shape=[1, 1], data=bytes(4)), "shape"),
        (tensor_pb2.Tensor(dtype=tensor_pb2.D_TYPE_INT32, shape=[2], data=bytes(4)), "data"),
        (tensor_pb2.Tensor(dtype=tensor_pb2.D_TYPE_INT32, shape=[-1], data=b""), "shape"),
    ],
)
async def test_a_malformed_tensor_is_refused(
    serving: EngineClient, tensor: tensor_pb2.Tensor, field: str
) -> None:
    """Wrong dtype, rank or byte count."""
    call = request(serving.run, [5])
    call.prompt_token_ids.CopyFrom(tensor)
    await refused(collect(serving.stub, call), INVALID, field)


async def test_a_malformed_protobuf_or_an_oversized_message_leaves_it_up(
    serving: EngineClient, engine_address: str
) -> None:
    """Bytes that are no message, and one over max_message_bytes."""
    async with rpc.aio_channel(engine_address) as channel:
        for method in ("Generate", "LoadModel", "FinishWeightUpdate"):
            path = f"/keel.rollout.v1.RolloutService/{method}"
            call = channel.unary_stream if method == "Generate" else channel.unary_unary
            answer = call(path)(b"\xff\xff\xff\xff\x01")
            reading = answer.read() if method == "Generate" else answer
            await refused(reading, INVALID, f"{method}: 5 bytes are no request")
    big = request(serving.run, [5])
    big.prompt_token_ids.data = bytes(rpc.MAX_MESSAGE_BYTES)
    unlimited = [("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(engine_address, options=unlimited) as channel:
        await refused(collect(pb_grpc.RolloutServiceStub(channel), big), EXHAUSTED)
    assert len((await serving.generate([5]))[0].tokens) == 16


async def test_cohort_members_must_agree(serving: EngineClient) -> None:
    """A slot twice, another size, a try that is over: each refused; the cohort itself lives."""
    first = asyncio.ensure_future(serving.generate([5], slot=0, cohort=("x", 2, 0)))
    await asyncio.sleep(0.05)
    await refused(serving.generate([5], slot=0, cohort=("x", 2, 0)), INVALID, "id.slot")
    await refused(serving.generate([5], slot=1, cohort=("x", 3, 0)), INVALID, "cohort.size")
    await serving.generate([5], slot=1, cohort=("x", 2, 0))
    await first
    again = serving.generate([5], slot=1, cohort=("x", 2, 0))
    await refused(again, grpc.StatusCode.FAILED_PRECONDITION, "higher try_number")


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({**CONFIG, "architectures": ["GPT2LMHeadModel"]}, "Qwen3MoeForCausalLM"),
        ({**CONFIG, "architectures": []}, "architectures"),
        ({**CONFIG, "hidden_size": -5}, "config.json"),
        ({**CONFIG, "sliding_window": 16, "use_sliding_window": True}, "sliding_window"),
    ],
)
async def test_a_model_that_cannot_be_loaded_leaves_the_old_one(
    serving: EngineClient, config: dict[str, Any], word: str
) -> None:
    """ModelError as INVALID_ARGUMENT; version 0 goes on."""
    await refused(serving.load(config), INVALID, word)
    assert np.isfinite((await serving.generate([5], version=0))[0].logprobs).all()


async def test_load_needs_a_config_and_a_known_precision(serving: EngineClient) -> None:
    """No config.json, names that are paths or come twice, not JSON, a dtype the engine lacks."""
    load = serving.stub.LoadModel
    await refused(load(pb.LoadModelRequest(lease=serving.lease)), INVALID, "config.json")
    files = [pb.ModelFile(name="config.json", data=b"\xff")]
    for name in ("", "..", "../tokenizer.json", "/etc/passwd", "a\\b", "config.json"):
        odd = pb.LoadModelRequest(lease=serving.lease, files=[*files, pb.ModelFile(name=name)])
        await refused(load(odd), INVALID, "files.name")
    precision = pb.EnginePrecision(dtype=tensor_pb2.D_TYPE_FLOAT32)
    broken = pb.LoadModelRequest(lease=serving.lease, files=files, precision=precision)
    await refused(load(broken), INVALID, "config.json")
    half = pb.EnginePrecision(dtype=tensor_pb2.D_TYPE_FLOAT16)
    await refused(serving.load(precision=half), INVALID, "precision.dtype")
    wrong = pb.EnginePrecision(dtype=tensor_pb2.D_TYPE_FLOAT32, quantize=9)  # type: ignore[arg-type]
    await refused(serving.load(precision=wrong), INVALID, "precision.quantize")


async def test_a_probe_is_checked_before_anything_is_applied(
    serving: EngineClient, model_b: Any
) -> None:
    """A probe of one token, or out of the vocabulary: refused, version 0 stays."""
    tensors = checkpoint(model_b)
    await serving.begin(manifest(1, tensors))
    await serving.stub.UpdateWeights(serving.pieces(1, tensors))
    for probe in ([5], [5, 64]):
        await refused(serving.finish(manifest(1, tensors), probe), INVALID, "probe_token_ids")
    assert (await serving.generate([5], version=0))[0].spans == [(1, 17, 0)]
