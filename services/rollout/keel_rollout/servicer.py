"""The RolloutService over any engine: fencing, states, staging of weights, streaming.

      LoadModel            Begin/Update/FinishWeightUpdate
EMPTY ---------> LOADED ------------------------------------> READY <--> PAUSED
                                                                |  failure while applying
                                                                v
                                                              STALE (serves nothing)
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar

import grpc
import numpy as np
import numpy.typing as npt

from keel import codec
from keel.errors import FencedError, IntegrityError, InvalidField, StateError
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.rollout.v1 import rollout_service_pb2_grpc as pb_grpc
from keel.weights.v1 import manifest_pb2
from keel_rollout.engine_metrics import PAUSES, UPDATE_SECONDS, GroupCount
from keel_rollout.engines.base import BrokenModel, Engine
from keel_rollout.engines.messages import GroupMessages
from keel_rollout.engines.requests import checked_files, checked_request, checked_tokens
from keel_rollout.engines.staging import Staging, check_manifest, check_number

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext
T = TypeVar("T")


class RolloutServicer(pb_grpc.RolloutServiceServicer):
    """Serves one engine. Every method is the RPC of its name; errors are KeelErrors.

    Args:
        engine: computes; starts EMPTY.
        shared: root of the storage shared with trainers; None refuses safetensors by reference.
    """

    def __init__(self, engine: Engine, shared: Path | None) -> None:
        self._engine = engine
        self._shared = shared
        self._token = 0
        self._run = ""
        self._model_key: bytes | None = None
        self._loaded: pb.ModelSignature | None = None
        self._precision = pb.EnginePrecision()
        self._served: tuple[int, int] | None = None
        """Version and fingerprint."""
        self._newest: tuple[int, int] | None = None
        """The last one served; differs from `_served` while STALE."""
        self._stale = False
        self._paused = False
        self._staging: Staging | None = None
        self._changing = asyncio.Lock()
        """Held while model or weights change."""

    # -- state -------------------------------------------------------------------------------

    def state(self) -> pb.EngineState:
        """The engine's state now."""
        if self._loaded is None:
            return pb.ENGINE_STATE_EMPTY
        if self._stale:
            return pb.ENGINE_STATE_STALE
        if self._served is None:
            return pb.ENGINE_STATE_LOADED
        return pb.ENGINE_STATE_PAUSED if self._paused else pb.ENGINE_STATE_READY

    def served_version(self) -> int:
        """The policy version that is served now; -1: none."""
        return self._served[0] if self._served else -1

    def _fence(self, request: Any) -> pb.Lease:
        if not request.HasField("lease") or not request.lease.run:
            raise InvalidField("lease", "unset", "the run that holds the engine, and its token")
        token = request.lease.fencing_token
        if token < self._token:
            raise FencedError(
                f"lease.fencing_token: {token} is too old; valid: {self._token} or more"
            )
        self._token = token
        return request.lease

    def _holder(self, request: Any) -> pb.ModelSignature:
        """Fences, and checks that the caller's run loaded the model; returns its signature."""
        lease = self._fence(request)
        if self._loaded is None:
            raise StateError("the engine is EMPTY; valid: after LoadModel")
        if lease.run != self._run:
            raise StateError(
                f"lease.run: the model was loaded by run {self._run!r}, not {lease.run!r}; "
                "valid: after LoadModel by this run"
            )
        return self._loaded

    async def GetCapabilities(
        self, request: pb.GetCapabilitiesRequest, context: Context
    ) -> pb.GetCapabilitiesResponse:
        answer = pb.GetCapabilitiesResponse(can=self._engine.abilities(), state=self.state())
        if self._loaded is not None:
            answer.loaded.CopyFrom(self._loaded)
            answer.precision.CopyFrom(self._precision)
            answer.run = self._run
        return answer

    async def GetWeightVersion(
        self, request: pb.GetWeightVersionRequest, context: Context
    ) -> pb.GetWeightVersionResponse:
        answer = pb.GetWeightVersionResponse(state=self.state())
        if self._served is not None:
            answer.policy_version, answer.fingerprint = self._served
        return answer

    async def LoadModel(
        self, request: pb.LoadModelRequest, context: Context
    ) -> pb.LoadModelResponse:
        lease = self._fence(request)
        files = checked_files(request.files)
        key = pb.LoadModelRequest(
            lease=pb.Lease(run=lease.run),
            files=[pb.ModelFile(name=name, data=files[name]) for name in sorted(files)],
            precision=request.precision,
        ).SerializeToString(deterministic=True)
        if request.anew:
            self._model_key = None
        loaded = await _to_the_end(self._load(key, lease.run, files, request.precision))
        return pb.LoadModelResponse(loaded=loaded)

    async def _load(
        self, key: bytes, run: str, files: dict[str, bytes], precision: pb.EnginePrecision
    ) -> pb.ModelSignature:
        async with self._changing:
            if self._loaded is not None and key == self._model_key:
                return self._loaded
            served, self._served = self._served, None  # no request for one model meets the other
            try:
                loaded = await self._engine.load(files, precision)
            except BrokenModel:
                self._loaded = self._model_key = self._newest = self._staging = None
                raise
            except BaseException:
                self._served = served
                raise
            self._loaded, self._model_key, self._run = loaded, key, run
            self._precision.CopyFrom(precision)
            if precision.quantize == pb.QUANTIZATION_UNSPECIFIED:
                self._precision.quantize = pb.QUANTIZATION_NONE
            self._served = self._newest = self._staging = None
            self._stale = self._paused = False
            log.info("run %s loaded %s", run, loaded.architecture)
            return loaded

    # -- generation --------------------------------------------------------------------------

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        """Writes to the context rather than yields: a cancelled call then frees its sequences."""
        if self._loaded is None or self._served is None:
            raise StateError(
                f"the engine is {pb.EngineState.Name(self.state())}; valid: READY or PAUSED"
            )
        if request.id.run != self._run:
            raise StateError(
                f"id.run: the model was loaded by run {self._run!r}, not {request.id.run!r}"
            )
        group = checked_request(request, self._engine.abilities(), self._loaded)
        stream = GroupMessages(group.num_samples)
        events: Any = self._engine.generate(group)
        with GroupCount(group.num_samples) as count:
            async with aclosing(events):
                async for event in events:
                    count.event(event)
                    for message in stream.messages(event):
                        await context.write(message)

    async def Pause(self, request: pb.PauseRequest, context: Context) -> pb.PauseResponse:
        self._holder(request)
        modes = (pb.PAUSE_MODE_ABORT, pb.PAUSE_MODE_WAIT, pb.PAUSE_MODE_KEEP)
        if request.mode not in modes:
            valid = ", ".join(pb.PauseMode.Name(mode) for mode in modes)
            raise InvalidField("mode", request.mode, valid)
        PAUSES.labels(pb.PauseMode.Name(request.mode).removeprefix("PAUSE_MODE_").lower()).inc()
        in_flight = await _to_the_end(self._pause(request.mode))
        return pb.PauseResponse(sequences_in_flight=in_flight)

    async def _pause(self, mode: pb.PauseMode) -> int:
        in_flight = await self._engine.pause(mode)
        self._paused = True
        return in_flight

    async def Resume(self, request: pb.ResumeRequest, context: Context) -> pb.ResumeResponse:
        self._holder(request)
        await _to_the_end(self._resume())
        return pb.ResumeResponse()

    async def _resume(self) -> None:
        await self._engine.resume()
        self._paused = False

    # -- weights -----------------------------------------------------------------------------

    async def BeginWeightUpdate(
        self, request: pb.BeginWeightUpdateRequest, context: Context
    ) -> pb.BeginWeightUpdateResponse:
        self._holder(request)
        manifest = request.manifest
        async with self._changing:
            if (manifest.policy_version, manifest.fingerprint) == self._served:
                self._staging = None
                return pb.BeginWeightUpdateResponse(already_served=True)
            check_number(manifest, self._newest)
            if manifest.transport not in self._engine.abilities().transports:
                raise InvalidField(
                    "manifest.transport", manifest.transport, "one of can.transports"
                )
            if (
                manifest.transport == manifest_pb2.WEIGHT_TRANSPORT_SAFETENSORS
                and self._shared is None
            ):
                raise InvalidField(
                    "manifest.transport", "SAFETENSORS", "STREAM: this engine shares no storage"
                )
            check_manifest(manifest, self._engine.tensors())
            self._staging = Staging(manifest)
            return pb.BeginWeightUpdateResponse()

    def _staged(self, version: int) -> Staging:
        staging = self._staging
        if staging is None:
            raise StateError("no update is open; valid: after BeginWeightUpdate")
        if version != staging.policy_version:
            raise InvalidField(
                "policy_version", version, f"{staging.policy_version}, as BeginWeightUpdate said"
            )
        return staging

    async def UpdateWeights(
        self, request_iterator: AsyncIterator[pb.UpdateWeightsRequest], context: Context
    ) -> pb.UpdateWeightsResponse:
        staging: Staging | None = None
        async for request in request_iterator:
            if staging is None:
                self._holder(request)
                staging = self._staged(request.policy_version)
            if staging is not self._staged(request.policy_version):
                raise StateError("a newer BeginWeightUpdate dropped this update")
            kind = request.WhichOneof("payload")
            if kind == "chunk" and staging.transport == manifest_pb2.WEIGHT_TRANSPORT_STREAM:
                staging.write(request.chunk)
            elif kind == "safetensors_path" and self._shared is not None:
                path = request.safetensors_path
                await asyncio.to_thread(staging.read_safetensors, self._shared, path)
            else:
                name = manifest_pb2.WeightTransport.Name(staging.transport)
                raise InvalidField("payload", kind, f"what the manifest's {name} brings")
        if staging is None:
            raise InvalidField("payload", "an empty stream", "at least one message")
        return pb.UpdateWeightsResponse(staged_bytes=staging.staged_bytes)

    async def FinishWeightUpdate(
        self, request: pb.FinishWeightUpdateRequest, context: Context
    ) -> pb.FinishWeightUpdateResponse:
        loaded = self._holder(request)
        probe_T = None
        if request.HasField("probe_token_ids"):
            probe_T = checked_tokens(request.probe_token_ids, "probe_token_ids", loaded, least=2)
        return await _to_the_end(self._finish(request, probe_T))

    async def _finish(
        self, request: pb.FinishWeightUpdateRequest, probe_T: npt.NDArray[np.int32] | None
    ) -> pb.FinishWeightUpdateResponse:
        async with self._changing:
            target = (request.policy_version, request.fingerprint)
            if target != self._served:
                await self._apply(*target)
            answer = pb.FinishWeightUpdateResponse(policy_version=request.policy_version)
            if probe_T is not None:
                answer.probe_logprobs.CopyFrom(codec.to_tensor(await self._engine.probe(probe_T)))
            return answer

    async def _apply(self, version: int, fingerprint: int) -> None:
        staging = self._staged(version)
        if fingerprint != staging.fingerprint:
            raise IntegrityError(
                f"fingerprint: {fingerprint:#x} is not the manifest's {staging.fingerprint:#x}; "
                "the old version is kept"
            )
        try:
            tensors = staging.verified()
        except IntegrityError:
            self._staging = None
            raise
        self._staging = None
        try:
            await self._engine.apply(version, tensors)
        except BrokenModel:
            self._served, self._stale = None, True
            raise
        self._served = self._newest = (version, fingerprint)
        self._stale = False
        UPDATE_SECONDS.observe(time.perf_counter() - staging.began_s)
        log.info("serving version %d, fingerprint %#x", version, fingerprint)


async def _to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Awaits `work`, which goes on to its end even if the caller hangs up: no half-done state."""
    return await asyncio.shield(asyncio.ensure_future(work))
