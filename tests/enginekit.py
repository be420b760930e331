"""A real rollout engine for tests, and what a trainer and a collector do with one.

async with engine_client(address, run="r") as client:
    await client.load(CONFIG)
    await client.publish(0, checkpoint(random_model(CONFIG)))
    sequences = await client.generate([5, 9, 2], num_samples=4)
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion

from keel import codec, rpc
from keel.presets import PRESETS
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.rollout.v1 import rollout_service_pb2_grpc as pb_grpc
from keel.types.v1 import sequence_pb2, tensor_pb2
from keel.weights.v1 import manifest_pb2

CONFIG: dict[str, Any] = dict(PRESETS["tiny-qwen3-moe"].config)
DENSE_CONFIG: dict[str, Any] = {
    **CONFIG,
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "tie_word_embeddings": True,
}
FLOAT32 = pb.EnginePrecision(dtype=tensor_pb2.D_TYPE_FLOAT32)
FP8 = pb.EnginePrecision(
    dtype=tensor_pb2.D_TYPE_FLOAT32, quantize=pb.QUANTIZATION_FP8, quantize_inputs=True
)
STREAM, SAFETENSORS = (
    manifest_pb2.WEIGHT_TRANSPORT_STREAM,
    manifest_pb2.WEIGHT_TRANSPORT_SAFETENSORS,
)
Checkpoint = Mapping[str, torch.Tensor]


def random_model(config: Mapping[str, Any] = CONFIG, seed: int = 0, std: float = 0.1) -> Any:
    """A float32 model with weights wide enough that routes and distributions are not flat."""
    cls = getattr(transformers, config["architectures"][0])
    model = cls(cls.config_class.from_dict(dict(config))).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, std, generator=generator)
    return model


def checkpoint(model: Any) -> dict[str, torch.Tensor]:
    """The tensors that `save_pretrained` would write: HF names, one per expert."""
    tied = model.all_tied_weights_keys
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    return {k: v.detach().contiguous() for k, v in revert_weight_conversion(model, state).items()}


def manifest(
    version: int, tensors: Checkpoint, transport: manifest_pb2.WeightTransport = STREAM
) -> manifest_pb2.WeightManifest:
    """The manifest of float32 tensors."""
    entries = [
        manifest_pb2.TensorEntry(
            name=name,
            dtype=tensor_pb2.D_TYPE_FLOAT32,
            shape=tensor.shape,
            xxh3=codec.xxh3(tensor.numpy()),
        )
        for name, tensor in tensors.items()
    ]
    return manifest_pb2.WeightManifest(
        policy_version=version,
        fingerprint=codec.fingerprint(entries),
        tensors=entries,
        transport=transport,
    )


def forward(model: Any, tokens: Sequence[int], temperature: float = 1.0) -> np.ndarray:
    """Log-probs [T - 1] of tokens 1..T-1 by a plain forward pass, no cache."""
    ids = torch.tensor([list(tokens)])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float() / temperature
    return torch.log_softmax(logits, -1).gather(-1, ids[0, 1:, None])[:, 0].numpy()


def forward_routes(model: Any, tokens: Sequence[int]) -> np.ndarray:
    """Expert ids [T - 1, L, K], each cell sorted, by a plain forward pass."""
    kept: list[torch.Tensor] = []
    gates = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    hooks = [gate.register_forward_hook(lambda _m, _i, out: kept.append(out[2])) for gate in gates]
    forward(model, tokens)
    for hook in hooks:
        hook.remove()
    return torch.stack(kept, dim=1)[:-1].sort(-1).values.numpy()


@dataclass
class Sampled:
    """One sequence as its messages told it."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    routes: list[np.ndarray] = field(default_factory=list)
    chunks: int = 0
    complete: pb.SequenceComplete | None = None

    @property
    def everything(self) -> list[int]:
        """Prompt and response."""
        return self.prompt + self.tokens

    @property
    def routes_TLK(self) -> np.ndarray:
        """All rows."""
        return np.concatenate(self.routes)

    @property
    def spans(self) -> list[tuple[int, int, int]]:
        """(begin, end, version)."""
        assert self.complete is not None
        spans = self.complete.policy_versions
        return [(s.span.begin, s.span.end, s.policy_version) for s in spans]

    def bits(self) -> tuple:
        """What must be equal for two sequences to be the same, bit for bit."""
        routes = np.concatenate(self.routes).tobytes() if self.routes else b""
        return tuple(self.tokens), np.float32(self.logprobs).tobytes(), routes


def request(
    run: str,
    prompt: Sequence[int],
    *,
    num_samples: int = 1,
    slot: int = 0,
    seed: int = 7,
    temperature: float = 1.0,
    max_tokens: int = 16,
    stop: Sequence[int] = (),
    cohort: tuple[str, int, int] | None = None,
    purpose: pb.Purpose = pb.PURPOSE_TRAINING,
    with_routes: bool = True,
    version: int | None = None,
    **sampling: Any,
) -> pb.GenerateRequest:
    """A GenerateRequest. `cohort` is (id, size, try)."""
    message = pb.GenerateRequest(
        id=sequence_pb2.SlotId(run=run, slot=slot),
        prompt_token_ids=codec.to_tensor(np.array(prompt, np.int32)),
        num_samples=num_samples,
        sampling=sequence_pb2.SamplingParams(
            temperature=temperature, max_tokens=max_tokens, stop_token_ids=stop, **sampling
        ),
        seed=seed,
        purpose=purpose,
        with_routes=with_routes,
        require_policy_version=version,
    )
    if cohort is not None:
        message.cohort.id, message.cohort.size, message.cohort.try_number = cohort
    return message


class EngineClient:
    """Trainer and collector of one run."""

    def __init__(self, channel: grpc.aio.Channel, run: str, token: int) -> None:
        self.stub = pb_grpc.RolloutServiceStub(channel)
        self.run = run
        self.lease = pb.Lease(run=run, fencing_token=token)

    async def load(
        self, config: Mapping[str, Any] = CONFIG, precision: pb.EnginePrecision = FLOAT32
    ) -> pb.ModelSignature:
        """LoadModel."""
        files = [pb.ModelFile(name="config.json", data=json.dumps(dict(config)).encode())]
        answer = await self.stub.LoadModel(
            pb.LoadModelRequest(lease=self.lease, files=files, precision=precision)
        )
        return answer.loaded

    async def begin(self, man: manifest_pb2.WeightManifest) -> bool:
        """BeginWeightUpdate; whether the version is served already."""
        call = pb.BeginWeightUpdateRequest(lease=self.lease, manifest=man)
        return (await self.stub.BeginWeightUpdate(call)).already_served

    def pieces(self, version: int, tensors: Checkpoint) -> Iterator[pb.UpdateWeightsRequest]:
        """The update stream of whole tensors, in pieces of at most 1 MiB."""
        for name, tensor in tensors.items():
            data = tensor.numpy().tobytes()
            for begin in range(0, len(data), rpc.CHUNK_BYTES):
                part = data[begin : begin + rpc.CHUNK_BYTES]
                chunk = pb.TensorChunk(name=name, offset_bytes=begin, data=part)
                yield pb.UpdateWeightsRequest(lease=self.lease, policy_version=version, chunk=chunk)

    async def finish(
        self, man: manifest_pb2.WeightManifest, probe: Sequence[int] | None = None
    ) -> np.ndarray | None:
        """FinishWeightUpdate; the probe's log-probs."""
        call = pb.FinishWeightUpdateRequest(
            lease=self.lease, policy_version=man.policy_version, fingerprint=man.fingerprint
        )
        if probe is not None:
            call.probe_token_ids.CopyFrom(codec.to_tensor(np.array(probe, np.int32)))
        answer = await self.stub.FinishWeightUpdate(call)
        assert answer.policy_version == man.policy_version
        if probe is None:
            return None
        return codec.to_ndarray(
            answer.probe_logprobs, "probe", dtypes=("float32",), shape=(len(probe) - 1,)
        )

    async def publish(
        self, version: int, tensors: Checkpoint, probe: Sequence[int] | None = None
    ) -> np.ndarray | None:
        """A whole update by stream."""
        man = manifest(version, tensors)
        if not await self.begin(man):
            await self.stub.UpdateWeights(self.pieces(version, tensors))
        return await self.finish(man, probe)

    async def pause(self, mode: pb.PauseMode) -> int:
        """Pause; sequences in flight."""
        answer = await self.stub.Pause(pb.PauseRequest(lease=self.lease, mode=mode))
        return answer.sequences_in_flight

    async def resume(self) -> None:
        """Resume."""
        await self.stub.Resume(pb.ResumeRequest(lease=self.lease))

    async def state(self) -> pb.EngineState:
        """State at this moment."""
        return (await self.stub.GetWeightVersion(pb.GetWeightVersionRequest())).state

    async def generate(self, prompt: Sequence[int], **options: Any) -> list[Sampled]:
        """Generate; see `request` for the options."""
        return await collect(self.stub, request(self.run, prompt, **options))


async def collect(stub: Any, call: pb.GenerateRequest) -> list[Sampled]:
    """All sequences of a request, as the messages told them, each checked against `complete`."""
    prompt = call.prompt_token_ids  # perhaps malformed, which is for the engine to say
    known = np.frombuffer(prompt.data, np.int32).tolist() if len(prompt.shape) == 1 else []
    sequences = [Sampled(list(known)) for _ in range(call.num_samples)]
    async for message in stub.Generate(call):
        if message.HasField("complete"):
            sequences[message.complete.sample].complete = message.complete
        else:
            _append(sequences[message.chunk.sample], message.chunk)
    for sequence in sequences:
        assert sequence.complete is not None
        assert sequence.complete.response_tokens == len(sequence.tokens)
        assert sequence.complete.route_rows == sum(map(len, sequence.routes))
    return sequences


def _append(sequence: Sampled, chunk: pb.SequenceChunk) -> None:
    assert sequence.complete is None, "a chunk after complete"
    sequence.chunks += 1
    if chunk.HasField("token_ids"):
        tokens = codec.to_ndarray(chunk.token_ids, "t", dtypes=("int32",), shape=(None,))
        logprobs = codec.to_ndarray(
            chunk.rollout_logprobs, "l", dtypes=("float32",), shape=(len(tokens),)
        )
        sequence.tokens += tokens.tolist()
        sequence.logprobs += logprobs.tolist()
    if chunk.HasField("routes"):
        sequence.routes.append(
            codec.to_ndarray(
                chunk.routes, "r", dtypes=("uint8", "uint16"), shape=(None, None, None)
            )
        )


@contextlib.asynccontextmanager
async def engine_client(address: str, run: str, token: int) -> AsyncIterator[EngineClient]:
    """A client on a channel of its own."""
    async with rpc.aio_channel(address) as channel:
        yield EngineClient(channel, run, token)


@contextlib.contextmanager
def engine_process(
    *arguments: str,
    python: str = sys.executable,
    program: Sequence[str] = ("-m", "keel_rollout.engine_main"),
) -> Iterator[tuple[str, subprocess.Popen]]:
    """Starts `keel-engine` on a free port; yields its address and process."""
    command = [python, *program, "--listen", "127.0.0.1:0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [*command, *arguments], stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stderr is not None
    try:
        log = ""
        for line in process.stderr:
            log += line
            found = re.search(r"listens on (\S+)", line)
            if found:
                break
        else:
            raise AssertionError(f"the engine did not start:\n{log}")
        with _drained(process.stderr):
            yield found[1], process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(timeout=20)
        process.stderr.close()


@contextlib.contextmanager
def _drained(stream: Any) -> Iterator[None]:
    """Keeps reading, so that the process never blocks on a full pipe."""

    def read() -> None:
        with contextlib.suppress(ValueError):  # closed, once the process has ended
            for _ in stream:
                pass

    threading.Thread(target=read, daemon=True).start()
    yield
