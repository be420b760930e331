"""What a trainer and a collector do with an engine, and what its stream must look like."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

from keel import codec, rpc
from keel.errors import WireError
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.rollout.v1 import rollout_service_pb2_grpc as pb_grpc
from keel.types.v1 import sequence_pb2, tensor_pb2
from keel.weights.v1 import manifest_pb2
from keel_rollout.conformance.verdicts import Unmet

STREAM = manifest_pb2.WEIGHT_TRANSPORT_STREAM
SAFETENSORS = manifest_pb2.WEIGHT_TRANSPORT_SAFETENSORS
TRAINING, EVALUATION = pb.PURPOSE_TRAINING, pb.PURPOSE_EVALUATION
_DTYPES = {
    torch.float32: tensor_pb2.D_TYPE_FLOAT32,
    torch.bfloat16: tensor_pb2.D_TYPE_BFLOAT16,
    torch.float16: tensor_pb2.D_TYPE_FLOAT16,
}
LOAD_S = 900.0
"""How long LoadModel and FinishWeightUpdate may take: an engine may start or compile in them."""

Weights = Mapping[str, torch.Tensor]


@dataclass
class Sampled:
    """One sequence as its messages told it."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    routes: list[npt.NDArray] = field(default_factory=list)
    complete: pb.SequenceComplete = field(default_factory=pb.SequenceComplete)
    completes: int = 0

    @property
    def everything(self) -> list[int]:
        """Prompt and response."""
        return self.prompt + self.tokens

    @property
    def routes_TLK(self) -> npt.NDArray:
        """All rows, [0, 0, 0] if there are none."""
        return np.concatenate(self.routes) if self.routes else np.zeros((0, 0, 0), np.uint8)

    @property
    def spans(self) -> list[tuple[int, int, int]]:
        """(begin, end, version)."""
        spans = self.complete.policy_versions
        return [(s.span.begin, s.span.end, s.policy_version) for s in spans]

    def bits(self) -> tuple[Any, ...]:
        """What is equal if two sequences are the same, bit for bit."""
        return (
            tuple(self.tokens),
            np.array(self.logprobs, np.float32).tobytes(),
            self.routes_TLK.tobytes(),
        )

    def add(self, chunk: pb.SequenceChunk) -> None:
        """Takes the next chunk; Unmet or WireError if it is none."""
        if self.completes:
            raise Unmet(f"sample {chunk.sample}: a chunk after its complete", "complete comes last")
        if chunk.HasField("token_ids"):
            tokens = codec.to_ndarray(
                chunk.token_ids, "chunk.token_ids", dtypes=("int32",), shape=(None,)
            )
            self.tokens += tokens.tolist()
            self.logprobs += codec.to_ndarray(
                chunk.rollout_logprobs,
                "chunk.rollout_logprobs",
                dtypes=("float32",),
                shape=(len(tokens),),
            ).tolist()
        if chunk.HasField("routes"):
            dtypes, shape = ("uint8", "uint16"), (None, None, None)
            rows = codec.to_ndarray(chunk.routes, "chunk.routes", dtypes=dtypes, shape=shape)
            self.routes.append(rows)


@dataclass(frozen=True)
class Version:
    """Weights with a number, ready to be sent."""

    manifest: manifest_pb2.WeightManifest
    tensors: Weights

    @classmethod
    def build(
        cls, number: int, tensors: Weights, transport: manifest_pb2.WeightTransport = STREAM
    ) -> Version:
        """Hashes and names them."""
        entries = [
            manifest_pb2.TensorEntry(
                name=name, dtype=_DTYPES[t.dtype], shape=t.shape, xxh3=codec.xxh3(raw(t))
            )
            for name, t in tensors.items()
        ]
        manifest = manifest_pb2.WeightManifest(
            policy_version=number,
            fingerprint=codec.fingerprint(entries),
            tensors=entries,
            transport=transport,
        )
        return cls(manifest, tensors)


def raw(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


class EngineClient:
    """Calls of one run. `timeout_s` bounds each of them, LoadModel and updates excepted."""

    def __init__(
        self, address: str, channel: grpc.aio.Channel, run: str, token: int, timeout_s: float
    ) -> None:
        self.address = address
        self.stub = pb_grpc.RolloutServiceStub(channel)
        self.channel = channel
        self.run = run
        self.lease = pb.Lease(run=run, fencing_token=token)
        self.timeout_s = timeout_s

    async def capabilities(self) -> pb.GetCapabilitiesResponse:
        """GetCapabilities."""
        return await self.stub.GetCapabilities(pb.GetCapabilitiesRequest(), timeout=self.timeout_s)

    async def version(self) -> pb.GetWeightVersionResponse:
        """GetWeightVersion."""
        return await self.stub.GetWeightVersion(
            pb.GetWeightVersionRequest(), timeout=self.timeout_s
        )

    async def load(
        self, files: Mapping[str, bytes], precision: pb.EnginePrecision, *, anew: bool = False
    ) -> pb.ModelSignature:
        """LoadModel."""
        inline = [pb.ModelFile(name=name, data=data) for name, data in files.items()]
        call = pb.LoadModelRequest(lease=self.lease, files=inline, precision=precision, anew=anew)
        return (await self.stub.LoadModel(call, timeout=LOAD_S)).loaded

    async def begin(self, manifest: manifest_pb2.WeightManifest) -> bool:
        """BeginWeightUpdate; whether the version is served already."""
        call = pb.BeginWeightUpdateRequest(lease=self.lease, manifest=manifest)
        return (await self.stub.BeginWeightUpdate(call, timeout=self.timeout_s)).already_served

    def pieces(self, version: Version) -> Iterator[pb.UpdateWeightsRequest]:
        """The messages of an update by stream."""
        number = version.manifest.policy_version
        for name, tensor in version.tensors.items():
            data = bytes(raw(tensor))
            for begin in range(0, len(data), rpc.CHUNK_BYTES):
                part = data[begin : begin + rpc.CHUNK_BYTES]
                chunk = pb.TensorChunk(name=name, offset_bytes=begin, data=part)
                yield pb.UpdateWeightsRequest(lease=self.lease, policy_version=number, chunk=chunk)

    async def send(self, messages: Iterable[pb.UpdateWeightsRequest]) -> int:
        """UpdateWeights; bytes staged."""
        answer = await self.stub.UpdateWeights(iter(messages), timeout=LOAD_S)
        return answer.staged_bytes

    async def finish(
        self, manifest: manifest_pb2.WeightManifest, probe: Sequence[int] = ()
    ) -> npt.NDArray[np.float32]:
        """FinishWeightUpdate; the probe's log-probs [T - 1]."""
        call = pb.FinishWeightUpdateRequest(
            lease=self.lease,
            policy_version=manifest.policy_version,
            fingerprint=manifest.fingerprint,
        )
        if probe:
            call.probe_token_ids.CopyFrom(codec.to_tensor(np.array(probe, np.int32)))
        answer = await self.stub.FinishWeightUpdate(call, timeout=LOAD_S)
        if answer.policy_version != manifest.policy_version:
            raise Unmet(
                f"FinishWeightUpdate answered version {answer.policy_version}",
                str(manifest.policy_version),
            )
        if not probe:
            return np.zeros(0, np.float32)
        shape = (len(probe) - 1,)
        return codec.to_ndarray(
            answer.probe_logprobs, "probe_logprobs", dtypes=("float32",), shape=shape
        )

    async def update(self, version: Version, shared: Path | None = None) -> None:
        """A whole update, by the transport that its manifest names."""
        if await self.begin(version.manifest):
            raise Unmet(
                "already_served, for a version never sent before", "false for another version"
            )
        if version.manifest.transport == SAFETENSORS:
            assert shared is not None
            number = version.manifest.policy_version
            path = f"keel-conformance-{self.run}-{number}.safetensors"
            save_file(dict(version.tensors), shared / path)
            try:
                message = pb.UpdateWeightsRequest(
                    lease=self.lease, policy_version=number, safetensors_path=path
                )
                await self.send([message])
                await self.finish(version.manifest)
            finally:
                (shared / path).unlink()
        else:
            await self.send(self.pieces(version))
            await self.finish(version.manifest)

    async def pause(self, mode: pb.PauseMode) -> int:
        """Pause; sequences in flight."""
        call = pb.PauseRequest(lease=self.lease, mode=mode)
        return (await self.stub.Pause(call, timeout=self.timeout_s)).sequences_in_flight

    async def resume(self) -> None:
        """Resume."""
        await self.stub.Resume(pb.ResumeRequest(lease=self.lease), timeout=self.timeout_s)

    def request(
        self,
        prompt: Sequence[int],
        *,
        samples: int = 1,
        slot: int = 0,
        seed: int = 7,
        temperature: float = 1.0,
        max_tokens: int = 16,
        stop: Sequence[int] = (),
        cohort: tuple[str, int, int] | None = None,
        purpose: pb.Purpose = TRAINING,
        with_routes: bool = False,
        version: int | None = None,
        **sampling: Any,
    ) -> pb.GenerateRequest:
        """A GenerateRequest; `cohort` is (id, size, try)."""
        message = pb.GenerateRequest(
            id=sequence_pb2.SlotId(run=self.run, slot=slot),
            prompt_token_ids=codec.to_tensor(np.array(prompt, np.int32)),
            num_samples=samples,
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

    async def generate(self, prompt: Sequence[int], **options: Any) -> list[Sampled]:
        """Generate; see `request`."""
        return await self.collect(self.request(prompt, **options))

    async def collect(
        self, call: pb.GenerateRequest, timeout_s: float | None = None
    ) -> list[Sampled]:
        """All sequences of a request; Unmet if the stream is not what the contract says."""
        prompt = call.prompt_token_ids
        known = np.frombuffer(prompt.data, np.int32).tolist() if len(prompt.shape) == 1 else []
        group = [Sampled(list(known)) for _ in range(call.num_samples)]
        async for message in self.stub.Generate(call, timeout=timeout_s or self.timeout_s):
            try:
                _take(group, message)
            except WireError as error:
                raise Unmet(str(error), "as SequenceChunk says") from error
        for sample, sequence in enumerate(group):
            _check_end(sample, sequence)
        return group


def _take(group: list[Sampled], message: pb.GenerateResponse) -> None:
    kind = message.WhichOneof("event")
    if kind is None:
        raise Unmet("a message that is neither chunk nor complete", "one of them")
    event = message.chunk if kind == "chunk" else message.complete
    if event.sample >= len(group):
        raise Unmet(f"{kind}.sample: {event.sample}", f"0 to {len(group) - 1}")
    sequence = group[event.sample]
    if kind == "chunk":
        sequence.add(message.chunk)
    else:
        sequence.complete, sequence.completes = message.complete, sequence.completes + 1


def _check_end(sample: int, sequence: Sampled) -> None:
    """Lengths and hash that `complete` carries, against what came."""
    complete, rows = sequence.complete, sum(map(len, sequence.routes))
    if sequence.completes != 1:
        raise Unmet(f"sample {sample} ended {sequence.completes} times", "one complete each")
    hashed = codec.xxh3(sequence.routes_TLK) if rows else 0
    for field_name, told, came in (
        ("response_tokens", complete.response_tokens, len(sequence.tokens)),
        ("route_rows", complete.route_rows, rows),
        ("routes_xxh3", complete.routes_xxh3, hashed),
    ):
        if told != came:
            raise Unmet(f"sample {sample}: complete.{field_name} {told:#x}", f"{came:#x}, as sent")
    if not np.isfinite(sequence.logprobs).all() or max(sequence.logprobs, default=0) > 1e-4:
        raise Unmet(f"sample {sample}: log-probs that are not finite, or above 0", "0 or less")


async def refused(
    call: Any, codes: Sequence[grpc.StatusCode], *words: str, what: str = "the call"
) -> None:
    """Awaits a call that must fail with one of the codes, its details holding every word."""
    valid = " or ".join(code.name for code in codes)
    if words:
        valid += f", naming {' and '.join(words)}"
    try:
        await call
    except grpc.aio.AioRpcError as error:
        details = str(error.details())
        if error.code() not in codes or not all(word in details for word in words):
            raise Unmet(f"{what}: {error.code().name}: {details[:160]}", valid) from error
        return
    raise Unmet(f"{what}: accepted", valid)


@asynccontextmanager
async def connect(
    address: str, run: str, token: int, timeout_s: float
) -> AsyncIterator[EngineClient]:
    """A client on a channel of its own."""
    async with rpc.aio_channel(address) as channel:
        yield EngineClient(address, channel, run, token, timeout_s)
