"""A rollout engine as small as it can be, on Keel's generated protobuf code and nothing else of it.

This file is the service: who may call, what waits for what, in which order. `compute.py` is what
computes. The asyncio loop owns all state; one worker thread computes. Its queue is first in, first
out: groups share the model fairly, and what is queued after a change of weights uses the new ones.
"""

import argparse
import asyncio
import functools
import math
import signal
from concurrent.futures import ThreadPoolExecutor

import compute
import grpc
import torch
import transformers
from compute import FLUSH_TOKENS, LOST, STATE, Group, Model, Refusal, need, pack, token_ids
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.rollout.v1 import rollout_service_pb2_grpc as pb_grpc
from keel.types.v1 import tensor_pb2 as ten
from keel.weights.v1 import manifest_pb2 as man

DENIED, ABORTED = grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.ABORTED
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
CAN = pb.EngineAbilities(
    kind="minimal",
    version=f"transformers {transformers.__version__}",
    architectures=compute.ARCHITECTURES,
    routes=True,
    dtypes=[ten.D_TYPE_FLOAT32, ten.D_TYPE_BFLOAT16],
    quantizations=[pb.QUANTIZATION_NONE],
    transports=[man.WEIGHT_TRANSPORT_STREAM],
    max_group_size=1024,
    max_message_bytes=64 * 2**20,
    device="cpu",
)


def answers(method):
    """Turns a Refusal into the status of the call."""

    @functools.wraps(method)
    async def rpc(self, request, context):
        try:
            return await method(self, request, context)
        except Refusal as refusal:
            await context.abort(*refusal.args)

    return rpc


class Engine(pb_grpc.RolloutServiceServicer):
    """The RolloutService. It is never STALE: see `Model.version`."""

    def __init__(self):
        self.worker = ThreadPoolExecutor(1)
        self.token, self.run, self.key, self.model, self.served = 0, "", b"", None, None
        self.precision, self.manifest, self.staged = pb.EnginePrecision(), None, {}
        self.changing = asyncio.Lock()  # held while model or weights change
        self.moved = asyncio.Condition()  # told whenever one of the next three changes
        self.pause, self.running, self.epoch = None, set(), 0  # a new epoch aborts what is old

    async def compute(self, work, *arguments):
        """Runs `work` on the worker thread, after all that was queued before."""
        return await asyncio.get_running_loop().run_in_executor(self.worker, work, *arguments)

    async def move(self, **changes):
        """Sets attributes and wakes who waits for that."""
        async with self.moved:
            self.__dict__.update(changes)
            self.moved.notify_all()

    async def until(self, predicate):
        """Waits for a move that makes it true."""
        async with self.moved:
            await self.moved.wait_for(predicate)

    def state(self):
        """As drawn in the contract."""
        if self.model is None:
            return pb.ENGINE_STATE_EMPTY
        if self.served is None:
            return pb.ENGINE_STATE_LOADED
        waits = self.pause == pb.PAUSE_MODE_WAIT and self.running
        return pb.ENGINE_STATE_PAUSED if self.pause and not waits else pb.ENGINE_STATE_READY

    def fence(self, request):
        """Refuses a lease that another has overtaken."""
        need(request.lease.run, "lease", "unset", "the run that holds the engine")
        token = request.lease.fencing_token
        need(token >= self.token, "lease.fencing_token", token, f"{self.token} or more", DENIED)
        self.token = token

    def holder(self, request):
        """Fences, and refuses who has not loaded the model."""
        self.fence(request)
        need(self.model is not None, "state", "EMPTY", "after LoadModel", STATE)
        need(request.lease.run == self.run, "lease.run", request.lease.run, self.run, STATE)

    @answers
    async def GetCapabilities(self, request, context):
        answer = pb.GetCapabilitiesResponse(can=CAN, state=self.state(), run=self.run)
        if self.model is not None:
            answer.loaded.CopyFrom(self.model.signature)
            answer.precision.CopyFrom(self.precision)
        return answer

    @answers
    async def GetWeightVersion(self, request, context):
        answer = pb.GetWeightVersionResponse(state=self.state())
        if self.served is not None:
            answer.policy_version = self.served.version
            answer.fingerprint = self.served.mark
        return answer

    @answers
    async def LoadModel(self, request, context):
        self.fence(request)
        files = {file.name: file.data for file in request.files}
        for name in files:
            need(name.strip(".") and not {*name} & {*"/\\\0"}, "files.name", name, "a base name")
        need(len(files) == len(request.files), "files.name", sorted(files), "each name once")
        need("config.json" in files, "files", sorted(files), "config.json among them")
        asked, none = request.precision, (pb.QUANTIZATION_UNSPECIFIED, pb.QUANTIZATION_NONE)
        need(asked.dtype in CAN.dtypes, "precision.dtype", asked.dtype, CAN.dtypes)
        need(asked.quantize in none, "precision.quantize", asked.quantize, "QUANTIZATION_NONE")
        key = pb.LoadModelRequest(files=request.files, precision=asked).SerializeToString()
        async with self.changing:
            if request.anew or (self.run, self.key) != (request.lease.run, key):
                model = await self.compute(Model, files, asked)
                self.run, self.key, self.manifest = request.lease.run, key, None
                self.precision.CopyFrom(asked)
                self.precision.quantize = pb.QUANTIZATION_NONE
                await self.move(model=model, served=None, pause=None, epoch=self.epoch + 1)
        return pb.LoadModelResponse(loaded=self.model.signature)

    def checked(self, request):
        """The prompt of a request that obeys the contract."""
        state = pb.EngineState.Name(self.state())
        need(self.served is not None, "state", state, "READY or PAUSED", STATE)
        need(request.id.run == self.run, "id.run", request.id.run, self.run, STATE)
        how, loaded, samples = request.sampling, self.model.signature, request.num_samples
        prompt = token_ids(request.prompt_token_ids, "prompt_token_ids", loaded, 1)
        top_p = how.top_p if how.HasField("top_p") else 1
        warm = math.isfinite(how.temperature) and how.temperature >= 0
        longest, vocabulary = loaded.max_sequence_tokens, range(loaded.vocab_size)
        fits = len(prompt) + how.max_tokens <= longest
        routable = loaded.moe_layers or not request.with_routes
        need(request.purpose in (1, 2), "purpose", request.purpose, "TRAINING or EVALUATION")
        need(warm, "sampling.temperature", how.temperature, "0 or more, finite")
        need(0 < top_p <= 1, "sampling.top_p", top_p, "more than 0, at most 1")
        need(how.max_tokens > 0, "sampling.max_tokens", 0, "1 or more")
        need(fits, "sampling.max_tokens", how.max_tokens, f"{longest} with the prompt, at most")
        for token in how.stop_token_ids:
            need(token in vocabulary, "sampling.stop_token_ids", token, vocabulary)
        need(samples > 0, "num_samples", samples, "1 or more")
        need(samples <= CAN.max_group_size, "num_samples", samples, CAN.max_group_size, EXHAUSTED)
        need(routable, "with_routes", True, "false: a dense model has none")
        if request.purpose == pb.PURPOSE_TRAINING:  # truncation would bias pi / mu
            need(top_p == 1, "sampling.top_p", top_p, "1 for training")
            need(how.top_k == 0, "sampling.top_k", how.top_k, "0 for training")
            need(how.temperature > 0, "sampling.temperature", 0, "more than 0 for training")
        return prompt

    @answers
    async def Generate(self, request, context):
        group, epoch = Group(request, self.checked(request)), self.epoch
        await self.until(lambda: self.pause is None or self.epoch > epoch)
        if self.epoch == epoch and request.HasField("require_policy_version"):
            wanted, version = request.require_policy_version, self.served.version
            need(wanted == version, "require_policy_version", wanted, version, STATE)
        self.running.add(group)
        try:
            while group.alive:
                alive = group.alive
                await self.until(lambda: self.pause != pb.PAUSE_MODE_KEEP or self.epoch > epoch)
                if self.pause == pb.PAUSE_MODE_ABORT or self.epoch > epoch:
                    group.abort()
                else:
                    await self.compute(group.step, self.served)
                for s in alive:
                    if s.reason or len(s.logprobs) - s.sent >= FLUSH_TOKENS:
                        for chunk in s.chunks():
                            await context.write(chunk)
                    if s.reason:
                        await context.write(s.complete())
        finally:  # also where the caller has hung up
            self.running.discard(group)
            await self.move()

    @answers
    async def Pause(self, request, context):
        self.holder(request)
        mode, modes = request.mode, (pb.PAUSE_MODE_ABORT, pb.PAUSE_MODE_WAIT, pb.PAUSE_MODE_KEEP)
        need(mode in modes, "mode", mode, "ABORT, WAIT or KEEP")
        aborted = sum(len(group.alive) for group in self.running)
        await self.move(pause=mode)
        if mode != pb.PAUSE_MODE_KEEP:
            await self.until(lambda: not self.running or self.pause != mode)
        need(self.pause == mode, "mode", mode, "no other call after it", ABORTED)
        await self.compute(int)  # after the steps that were queued
        frozen = sum(len(group.alive) for group in self.running)
        return pb.PauseResponse(sequences_in_flight=aborted if mode == modes[0] else frozen)

    @answers
    async def Resume(self, request, context):
        self.holder(request)
        await self.move(pause=None)
        return pb.ResumeResponse()

    def serves(self, version, mark):
        """Whether it is this version, number and fingerprint, that is served."""
        served = self.served
        return served is not None and (served.version, served.mark) == (version, mark)

    @answers
    async def BeginWeightUpdate(self, request, context):
        self.holder(request)
        manifest, number = request.manifest, request.manifest.policy_version
        async with self.changing:
            self.manifest = None
            if self.serves(number, manifest.fingerprint):
                return pb.BeginWeightUpdateResponse(already_served=True)
            newer, valid = (
                self.served is None or number > self.served.version,
                "more: it only grows",
            )
            need(newer, "manifest.policy_version", number, valid, STATE)
            self.model.check(manifest)
            self.manifest, self.staged = manifest, {t.name: bytearray() for t in manifest.tensors}
        return pb.BeginWeightUpdateResponse()

    def opened(self, version):
        """The update under way, which must be of this version."""
        need(self.manifest is not None, "state", "no update open", "after BeginWeightUpdate", STATE)
        number = self.manifest.policy_version
        need(version == number, "policy_version", version, number)
        return self.manifest

    @answers
    async def UpdateWeights(self, requests, context):
        manifest, refusal = None, None
        async for request in requests:  # to the end: a caller still writing would miss the reason
            try:
                if manifest is None and refusal is None:
                    self.holder(request)
                    manifest = self.opened(request.policy_version)
                if refusal is None:
                    need(manifest is self.manifest, "state", "overtaken", "one update", STATE)
                    self.stage(request)
            except Refusal as error:
                refusal = error
        if refusal is not None:
            raise refusal
        need(manifest is not None, "payload", "an empty stream", "at least one message")
        return pb.UpdateWeightsResponse(staged_bytes=sum(map(len, self.staged.values())))

    def stage(self, request):
        """Adds one piece of a tensor."""
        need(request.HasField("chunk"), "payload", "no chunk", "a chunk")
        chunk, name = request.chunk, request.chunk.name
        need(name in self.staged, "chunk.name", name, "a tensor of the manifest")
        came = len(self.staged[name])
        need(chunk.offset_bytes == came, f"chunk[{name}].offset_bytes", chunk.offset_bytes, came)
        self.staged[name] += chunk.data

    @answers
    async def FinishWeightUpdate(self, request, context):
        self.holder(request)
        ids, number, mark = None, request.policy_version, request.fingerprint
        if request.HasField("probe_token_ids"):
            ids = token_ids(request.probe_token_ids, "probe_token_ids", self.model.signature, 2)
        async with self.changing:
            if not self.serves(number, mark):
                manifest = self.opened(number)
                need(mark == manifest.fingerprint, "fingerprint", mark, manifest.fingerprint, LOST)
                try:
                    self.served = await self.compute(self.model.version, manifest, self.staged)
                    self.manifest, self.staged = None, {}
                except Refusal as refusal:
                    if refusal.args[0] == LOST:  # what is only incomplete may still be completed
                        self.manifest = None
                    raise
            answer = pb.FinishWeightUpdateResponse(policy_version=number)
            logprobs_T = await self.compute(compute.probe, self.served, ids or [0, 0])
            if ids is not None:  # without, it was a wait for the steps that were queued
                answer.probe_logprobs.CopyFrom(pack(logprobs_T, ten.D_TYPE_FLOAT32))
        return answer


async def serve(listen):
    """Until SIGTERM or SIGINT; sequences in flight then end ABORTED."""
    name = pb.DESCRIPTOR.services_by_name["RolloutService"].full_name
    options = [
        ("grpc.max_receive_message_length", CAN.max_message_bytes),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),  # Keel's clients ping every 30 s
        ("grpc.so_reuseport", 0),
    ]
    server, engine, stop = grpc.aio.server(options=options), Engine(), asyncio.Event()
    pb_grpc.add_RolloutServiceServicer_to_server(engine, server)
    healthy = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    reflection.enable_server_reflection([name, health.SERVICE_NAME], server)
    port = server.add_insecure_port(listen)
    await server.start()
    for service in ("", name):
        await healthy.set(service, health_pb2.HealthCheckResponse.SERVING)
    print(f"listens on {listen.rpartition(':')[0]}:{port}", flush=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
    await engine.move(epoch=engine.epoch + 1)
    await server.stop(5)


if __name__ == "__main__":
    parse = argparse.ArgumentParser(description="A minimal rollout engine for Keel.")
    parse.add_argument("--listen", default="127.0.0.1:50051", metavar="HOST:PORT")
    parse.add_argument("--threads", default=1, type=int)
    arguments = parse.parse_args()
    torch.set_num_threads(arguments.threads)
    asyncio.run(serve(arguments.listen))
