"""What `fuzz` sends to: a real engine, a real trainer, and a valid message for every method."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Self

import grpc
import numpy as np
import redis
from enginekit import (
    CONFIG,
    EngineClient,
    Sampled,
    checkpoint,
    collect,
    manifest,
    random_model,
    request,
)
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from rediskit import RedisServer

from keel import codec, rpc
from keel.queue import run_key
from keel.record import Phase, RunRecord
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.spec import parse_spec
from keel.trainer.v1 import trainer_service_pb2 as trainer_pb
from keel.types.v1 import tensor_pb2
from keel.weights.v1 import manifest_pb2

START_S = 120.0
RUN, TOKEN = "fuzz", 5
WORK_TOKENS = 2_048
"""Most tokens asked for by one Generate: more is valid, and would be work, not a mutation."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method of one server, and the valid messages that mutations start from."""

    path: str
    request: type[Message]
    kind: str
    """As grpc calls it: unary_unary, unary_stream, stream_unary or stream_stream."""
    channel: Callable[[], grpc.aio.Channel]
    make: Callable[[Random], list[bytes]]
    """The messages of one valid call."""
    may_wait: Callable[[Sequence[bytes]], bool] = lambda messages: False
    """By contract this call may have no end."""
    others: Sequence[bytes] = ()
    """Messages of other types, to splice with."""
    weight: float = 1.0
    messages_a_call: int = 1

    def type_of(self, place: int, messages: int) -> type[Message]:
        """Type of message `place` of a call of so many."""
        return self.request

    async def send(
        self, channel: grpc.aio.Channel, messages: Sequence[bytes], timeout_s: float
    ) -> None:
        """Sends, and reads the answer to its end."""
        make = getattr(channel, self.kind)
        sent = _stream(messages) if self.kind.startswith("stream") else messages[0]
        answer = make(self.path)(sent, timeout=timeout_s)
        if self.kind.endswith("stream"):
            async for _ in answer:
                pass
        else:
            await answer


class UpdateSequence(Method):
    """Begin, the stream and Finish in turn: the first message and the last are theirs."""

    def type_of(self, place: int, messages: int) -> type[Message]:
        """See `Method.type_of`."""
        ends = {0: pb.BeginWeightUpdateRequest, messages - 1: pb.FinishWeightUpdateRequest}
        return ends.get(place, pb.UpdateWeightsRequest)

    async def send(
        self, channel: grpc.aio.Channel, messages: Sequence[bytes], timeout_s: float
    ) -> None:
        """Goes on after a refusal, as a confused caller would; raises the last one."""
        begin, *chunks, finish = messages
        refusal: grpc.aio.AioRpcError | None = None
        for name, kind, sent in (
            ("BeginWeightUpdate", "unary_unary", begin),
            ("UpdateWeights", "stream_unary", _stream(chunks)),
            ("FinishWeightUpdate", "unary_unary", finish),
        ):
            path = f"/keel.rollout.v1.RolloutService/{name}"
            try:
                await getattr(channel, kind)(path)(sent, timeout=timeout_s)
            except grpc.aio.AioRpcError as error:
                if error.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
                    raise
                refusal = error
        if refusal is not None:
            raise refusal


async def _stream(messages: Sequence[bytes]) -> AsyncIterator[bytes]:
    for message in messages:
        yield message


class Server:
    """A service as a process, with its log in a file."""

    def __init__(self, process: subprocess.Popen[bytes], log_file: Path, address: str) -> None:
        self.process, self._log_file, self.address = process, log_file, address
        self.open: grpc.aio.Channel = rpc.aio_channel(address)

    @classmethod
    def start(cls, folder: Path, name: str, *argv: str, **options: Any) -> Self:
        """Starts `python -m argv`; returns once its log says where it listens."""
        log_file = folder / f"{name}.log"
        with log_file.open("wb") as log:
            process = subprocess.Popen([sys.executable, "-m", *argv], stderr=log)
        deadline = time.monotonic() + START_S
        pattern = r"(?:listens on \S+:|listening on \S+, port )(\d+)"
        while not (found := re.search(pattern, log_file.read_text())):
            assert process.poll() is None, log_file.read_text()
            assert time.monotonic() < deadline, log_file.read_text()
            time.sleep(0.05)
        return cls(process, log_file, f"127.0.0.1:{found[1]}", **options)

    async def stop(self) -> None:
        """Ends it."""
        await self.open.close()
        self.process.terminate()
        self.process.wait(20)

    def channel(self) -> grpc.aio.Channel:
        """A channel to it."""
        return self.open

    def log(self) -> str:
        """The end of its log."""
        return self._log_file.read_text(errors="replace")[-4000:]


class Engine(Server):
    """A torch engine with the tiny model, and the bits that it gives."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.tensors = checkpoint(random_model())
        self.client = EngineClient(self.open, RUN, TOKEN)
        self._checks = 0
        self._bits: list[Any] = []

    @classmethod
    @asynccontextmanager
    async def started(cls, folder: Path) -> AsyncIterator[Engine]:
        """Serving version 0, and asked for its bits."""
        engine = cls.start(
            *(folder, "engine", "keel_rollout.engine_main", "--listen", "127.0.0.1:0"),
            *("--shared", str(folder)),
        )
        try:
            await engine.restore()
            yield engine
        finally:
            await engine.stop()

    async def restore(self) -> None:
        """Serving again, whatever it has been told; AssertionError if its bits have changed."""
        can = await self.client.stub.GetCapabilities(pb.GetCapabilitiesRequest())
        serving = can.state in (pb.ENGINE_STATE_READY, pb.ENGINE_STATE_PAUSED)
        as_before = can.run == RUN and can.precision.quantize == pb.QUANTIZATION_NONE
        if not serving or not as_before or can.loaded != await self._load(anew=False):
            await self._load(anew=True)
            await self.client.publish(0, self.tensors)
        await self.client.resume()
        bits = [sequence.bits() for sequence in await self._sample()]
        self._bits = self._bits or bits
        assert bits == self._bits, "the engine gives other tokens or log-probs than at the start"

    async def _load(self, *, anew: bool) -> pb.ModelSignature:
        files = [pb.ModelFile(name="config.json", data=json.dumps(CONFIG).encode())]
        precision = pb.EnginePrecision(dtype=tensor_pb2.D_TYPE_FLOAT32)
        answer = await self.client.stub.LoadModel(
            pb.LoadModelRequest(
                lease=self.client.lease, files=files, precision=precision, anew=anew
            )
        )
        return answer.loaded

    async def _sample(self) -> list[Sampled]:
        self._checks += 1
        cohort = (f"check-{self._checks}", 1, 0)
        return await collect(
            self.client.stub, request(RUN, [5, 9, 2, 7], num_samples=3, cohort=cohort)
        )

    def methods(self) -> list[Method]:
        """Every method of its service."""
        lease = self.client.lease
        man = manifest(1, self.tensors)
        name, tensor = min(self.tensors.items(), key=lambda item: item[1].numel())
        chunk = pb.TensorChunk(name=name, data=tensor.numpy().tobytes())
        probe = codec.to_tensor(np.array([5, 9, 2, 7, 11], np.int32))
        pieces = [piece.SerializeToString() for piece in self.client.pieces(1, self.tensors)]

        def load(rng: Random) -> list[bytes]:
            files = [pb.ModelFile(name="config.json", data=json.dumps(CONFIG).encode())]
            if rng.random() < 0.3:
                files.append(pb.ModelFile(name="tokenizer.json", data=b"{}"))
            precision = pb.EnginePrecision(
                dtype=rng.choice((tensor_pb2.D_TYPE_FLOAT32, tensor_pb2.D_TYPE_BFLOAT16)),
                quantize=rng.choice((pb.QUANTIZATION_NONE, pb.QUANTIZATION_FP8)),
            )
            message = pb.LoadModelRequest(lease=lease, files=files, precision=precision)
            return [message.SerializeToString()]

        def generate(rng: Random) -> list[bytes]:
            purpose = rng.choice((pb.PURPOSE_TRAINING, pb.PURPOSE_EVALUATION))
            cut = {"top_p": 0.9, "top_k": 5} if purpose == pb.PURPOSE_EVALUATION else {}
            cohort = (f"c{rng.randrange(10**9)}", rng.choice((1, 1, 2)), 0)
            message = request(
                RUN,
                [rng.randrange(64) for _ in range(rng.randint(1, 20))],
                num_samples=rng.randint(1, 3),
                max_tokens=rng.randint(1, 6),
                stop=[rng.randrange(64)],
                purpose=purpose,
                slot=rng.randrange(4),
                seed=rng.randrange(2**64),
                with_routes=rng.random() < 0.7,
                cohort=cohort if rng.random() < 0.4 else None,
                version=rng.choice((None, None, 0)),
                **cut,
            )
            return [message.SerializeToString()]

        def update(rng: Random) -> list[bytes]:
            message = pb.UpdateWeightsRequest(lease=lease, policy_version=1, chunk=chunk)
            by_reference = pb.UpdateWeightsRequest(
                lease=lease, policy_version=1, safetensors_path="weights.safetensors"
            )
            sent = message if rng.random() < 0.7 else by_reference
            return [sent.SerializeToString()] * rng.randint(1, 4)

        def sequence(rng: Random) -> list[bytes]:
            begin = pb.BeginWeightUpdateRequest(lease=lease, manifest=man)
            finish = pb.FinishWeightUpdateRequest(
                lease=lease, policy_version=1, fingerprint=man.fingerprint, probe_token_ids=probe
            )
            middle = rng.sample(pieces, rng.randint(1, 3)) if rng.random() < 0.7 else pieces
            return [begin.SerializeToString(), *middle, finish.SerializeToString()]

        transports = (
            *(manifest_pb2.WEIGHT_TRANSPORT_STREAM, manifest_pb2.WEIGHT_TRANSPORT_SAFETENSORS),
        )

        def begin(rng: Random) -> list[bytes]:
            message = pb.BeginWeightUpdateRequest(lease=lease, manifest=man)
            message.manifest.transport = rng.choice(transports)
            message.manifest.policy_version = rng.choice((0, 1, 2))
            return [message.SerializeToString()]

        def finish(rng: Random) -> list[bytes]:
            message = pb.FinishWeightUpdateRequest(
                lease=lease,
                policy_version=rng.choice((0, 1)),
                fingerprint=man.fingerprint,
                probe_token_ids=probe,
            )
            return [message.SerializeToString()]

        def pause(rng: Random) -> list[bytes]:
            mode = rng.choice((pb.PAUSE_MODE_ABORT, pb.PAUSE_MODE_WAIT, pb.PAUSE_MODE_KEEP))
            return [pb.PauseRequest(lease=lease, mode=mode).SerializeToString()]

        def method(name: str, make: Callable[[Random], list[bytes]], **options: Any) -> Method:
            kind = options.pop("kind", "unary_unary")
            message_type = getattr(pb, f"{name}Request")
            return Method(
                path=f"/keel.rollout.v1.RolloutService/{name}",
                request=message_type,
                kind=kind,
                channel=self.channel,
                make=make,
                others=others,
                **options,
            )

        others = [one for make in (load, generate, update, begin, finish) for one in make(Random())]
        return [
            method("GetCapabilities", lambda rng: [b""], weight=0.5),
            method("GetWeightVersion", lambda rng: [b""], weight=0.5),
            method("Generate", generate, kind="unary_stream", weight=6, may_wait=_waits),
            method("BeginWeightUpdate", begin, weight=3),
            method("UpdateWeights", update, kind="stream_unary", weight=3, messages_a_call=2),
            method("FinishWeightUpdate", finish, weight=2),
            UpdateSequence(
                path="/keel.rollout.v1.RolloutService/Begin+Update+Finish",
                request=pb.UpdateWeightsRequest,
                kind="",
                channel=self.channel,
                make=sequence,
                weight=4,
                messages_a_call=len(pieces) // 3,
            ),
            method("Pause", pause, weight=1.5),
            method(
                "Resume",
                lambda rng: [pb.ResumeRequest(lease=lease).SerializeToString()],
                weight=0.5,
            ),
            method("LoadModel", load, weight=2),
        ]


class Trainer(Server):
    """A trainer with a Redis of its own and two runs, neither of which can train."""

    def __init__(self, *args: Any, redis_url: str) -> None:
        super().__init__(*args)
        self._redis = redis.Redis.from_url(redis_url)

    @classmethod
    @asynccontextmanager
    async def started(cls, folder: Path) -> AsyncIterator[Trainer]:
        """With its runs in Redis."""
        server = RedisServer(folder)
        server.start()
        trainer = cls.start(
            *(folder, "trainer", "keel_trainer.main", "--listen", "127.0.0.1:0"),
            *("--redis", server.url, "--runs", str(folder / "runs")),
            redis_url=server.url,
        )
        try:
            trainer.restore()
            yield trainer
        finally:
            await trainer.stop()
            trainer._redis.close()
            server.stop()

    def restore(self) -> None:
        """One run is over, the other waits: as at the start."""
        for run, phase in (("over", Phase.SUCCEEDED), ("held", Phase.QUEUED)):
            spec = parse_spec({"name": run, "model": {"path": "/nowhere"}, "recipe": {"steps": 1}})
            record = RunRecord(run, spec, 0.0, fencing_token=TOKEN, phase=phase)
            self._redis.delete(run_key(run))
            self._redis.hset(run_key(run), mapping=record.to_hash())  # type: ignore[arg-type]

    def methods(self) -> list[Method]:
        """Every method of its service. StartRun asks for the run that is over: no child."""

        def method(name: str, runs: Sequence[str], **options: Any) -> Method:
            message_type = getattr(trainer_pb, f"{name}Request")
            known = {field.name for field in message_type.DESCRIPTOR.fields}

            def make(rng: Random) -> list[bytes]:
                fields = {"run": rng.choice(runs), "fencing_token": TOKEN}
                kept = {key: value for key, value in fields.items() if key in known}
                return [message_type(**kept).SerializeToString()]

            return Method(
                path=f"/keel.trainer.v1.TrainerService/{name}",
                request=message_type,
                kind=options.pop("kind", "unary_unary"),
                channel=self.channel,
                make=make,
                others=make(Random()),
                **options,
            )

        both = ("over", "held")
        return [
            method("StartRun", ("over",)),
            method("PauseRun", both),
            method("ResumeRun", both),
            method("CancelRun", both),
            method("GetRun", both),
            method("WatchRun", both, kind="unary_stream", may_wait=lambda _: True, weight=0.3),
        ]


def everything(engine: Engine, trainer: Trainer) -> list[Method]:
    """Every method of both, health and reflection among them."""
    methods = [*engine.methods(), *trainer.methods()]
    for server, service in (
        (engine, "keel.rollout.v1.RolloutService"),
        (trainer, "keel.trainer.v1.TrainerService"),
    ):
        methods += _common(server, service)
    return methods


def _common(server: Server, service: str) -> list[Method]:
    def check(rng: Random) -> list[bytes]:
        return [health_pb2.HealthCheckRequest(service=service).SerializeToString()]

    def reflect(rng: Random) -> list[bytes]:
        questions = (
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=service),
            reflection_pb2.ServerReflectionRequest(file_by_filename="keel/types/v1/tensor.proto"),
            reflection_pb2.ServerReflectionRequest(
                all_extension_numbers_of_type="keel.types.v1.Tensor"
            ),
        )
        # one: beside a refusal, the client's next write would fail as INTERNAL of its own
        return [rng.choice(questions).SerializeToString()]

    health: dict[str, Any] = {"channel": server.channel, "make": check}
    return [
        Method(
            path="/grpc.health.v1.Health/Check",
            request=health_pb2.HealthCheckRequest,
            kind="unary_unary",
            others=check(Random()),
            weight=0.5,
            **health,
        ),
        Method(
            path="/grpc.health.v1.Health/Watch",
            request=health_pb2.HealthCheckRequest,
            kind="unary_stream",
            others=check(Random()),
            may_wait=lambda _: True,
            weight=0.2,
            **health,
        ),
        Method(
            path="/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            request=reflection_pb2.ServerReflectionRequest,
            kind="stream_stream",
            channel=server.channel,
            make=reflect,
            others=reflect(Random()),
            weight=0.5,
        ),
    ]


def _waits(messages: Sequence[bytes]) -> bool:
    """A group of a cohort waits for the cohort's others."""
    try:
        return pb.GenerateRequest.FromString(messages[0]).cohort.size > 1
    except DecodeError:
        return False


def bounded(data: bytes, message_type: type[Message], rng: Random) -> bytes:
    """Takes back what would be valid and stop all the rest: a newer lease, hours of work."""
    message: Any = message_type()
    try:
        message.ParseFromString(data)
    except DecodeError:
        return data
    changed = False
    if "lease" in message.DESCRIPTOR.fields_by_name and message.lease.fencing_token > TOKEN:
        message.lease.fencing_token, changed = rng.choice((0, TOKEN, TOKEN, TOKEN)), True
    if isinstance(message, pb.GenerateRequest):
        samples, tokens = message.num_samples, message.sampling.max_tokens
        if samples <= 1024 and tokens <= 512 and samples * tokens > WORK_TOKENS:
            message.num_samples, changed = 2, True
    return message.SerializeToString() if changed else data
