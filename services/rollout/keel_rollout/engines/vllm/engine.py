"""The vLLM engine: AsyncLLM behind the contract.

    generate ──▶ gate ──▶ vLLM: EngineCore process (scheduler) ──▶ worker process (model)
                  │ closed while paused                               ▲
    apply ────────┴── freeze, shared memory, new caches, mark, thaw ──┘

Equal requests agree in distribution, not bit for bit: arrival shapes vLLM's batches.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import vllm

from keel.errors import InvalidField, KeelError, OvertakenError, StateError
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.rpc import MAX_MESSAGE_BYTES
from keel.weights.v1 import manifest_pb2
from keel_rollout.engines.base import (
    BrokenModel,
    EngineFailed,
    Finished,
    GroupRequest,
    Piece,
    StagedTensor,
)
from keel_rollout.engines.torch.sampling import stream_keys
from keel_rollout.engines.vllm import plugin, processes
from keel_rollout.engines.vllm.client import Client
from keel_rollout.engines.vllm.group import Group
from keel_rollout.engines.vllm.plan import ARCHITECTURES, DTYPES, Plan
from keel_rollout.engines.vllm.settings import package
from keel_rollout.engines.vllm.shared import shared

log = logging.getLogger(__name__)

MAX_GROUP_SIZE = 1024
WATCH_S = 0.5
LEAST_TEMPERATURE = 0.01
"""vLLM raises what lies below, and log-probs would be at that temperature."""


class VllmEngine:
    """Implements `keel_rollout.engines.base.Engine`. Made on a running event loop."""

    def __init__(self, device: str) -> None:
        self._device = device
        plugin.register()
        self._plan: Plan | None = None
        self._client: Client | None = None
        self._version: int | None = None
        self._broken = False
        """An update failed half-way: the next one starts vLLM anew."""
        self._groups: set[Group] = set()
        self._control = asyncio.Lock()
        """Held while vLLM is frozen, thawed, updated or replaced."""
        self._gate = asyncio.Event()
        """Set while new groups may start."""
        self._gate.set()
        self._frozen = False
        self._closed = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._waiters: set[asyncio.Future[None]] = set()
        self._tasks: set[asyncio.Task] = set()
        self._spawn(self._watch())

    def _spawn(self, work: Any) -> asyncio.Task:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def abilities(self) -> pb.EngineAbilities:
        """See `Engine.abilities`."""
        return pb.EngineAbilities(
            kind="vllm",
            version=f"{package()} {vllm.__version__}, torch {torch.__version__}",
            architectures=ARCHITECTURES,
            routes=True,
            deterministic=False,
            dtypes=list(DTYPES),
            quantizations=[pb.QUANTIZATION_NONE],
            transports=[
                manifest_pb2.WEIGHT_TRANSPORT_STREAM,
                manifest_pb2.WEIGHT_TRANSPORT_SAFETENSORS,
            ],
            max_group_size=MAX_GROUP_SIZE,
            max_message_bytes=MAX_MESSAGE_BYTES,
            device=self._device,
        )

    # -- model -------------------------------------------------------------------------------

    async def load(
        self, files: Mapping[str, bytes], precision: pb.EnginePrecision
    ) -> pb.ModelSignature:
        """See `Engine.load`. BrokenModel where vLLM could not start, the old model being gone."""
        plan = await asyncio.to_thread(Plan, files, precision)
        async with self._control:
            if self._closed:
                raise EngineFailed("the engine is stopping")
            replacing = self._client is not None
            try:
                await self._end_all()
                await self._stop()
                self.resume_now()
                self._client = await asyncio.to_thread(plan.start)
            except Exception as error:  # of vLLM, the system, or Keel
                if replacing:
                    raise BrokenModel(f"{error}; the engine is EMPTY") from error
                if isinstance(error, KeelError):
                    raise
                raise EngineFailed(f"vLLM could not start: {_named(error)}") from error
            self._plan = plan
        return plan.signature

    async def _stop(self) -> None:
        client, self._client = self._client, None
        self._version, self._broken, self._frozen = None, False, False
        if client is not None:
            await asyncio.to_thread(client.shutdown)

    def tensors(self) -> Mapping[str, tuple[int, ...]]:
        """See `Engine.tensors`."""
        assert self._plan is not None, "the servicer asks only once a model is loaded"
        return self._plan.tensors

    @property
    def _vllm(self) -> Client:
        assert self._client is not None, "the servicer asks only once a model is loaded"
        return self._client

    # -- generation --------------------------------------------------------------------------

    async def generate(self, request: GroupRequest) -> AsyncIterator[Piece | Finished]:
        """See `Engine.generate`."""
        assert self._plan is not None
        if 0 < request.temperature < LEAST_TEMPERATURE:
            valid = f"0, or {LEAST_TEMPERATURE} and more: vLLM takes none between"
            raise InvalidField("sampling.temperature", request.temperature, valid)
        signature = self._plan.signature
        dtype = np.uint8 if signature.num_experts <= 256 else np.uint16
        group = Group(request, list(signature.moe_layers), dtype)
        self._groups.add(group)
        start = self._spawn(self._start(group))
        left = request.num_samples
        try:
            while left:
                item = await group.sink.get()
                if isinstance(item, KeelError):
                    raise item
                left -= isinstance(item, Finished)
                yield item
        finally:
            group.over = True
            self._groups.discard(group)
            self._check_idle()
            if not group.admitted:
                start.cancel()
            elif group.unfinished or group.failed:
                self._spawn(self._abort(group))

    async def _start(self, group: Group) -> None:
        """Submits a group once the gate is open."""
        while not self._gate.is_set():  # it may be shut again before this task wakes
            await self._gate.wait()
        refusal = self._refusal(group)
        if refusal is not None:
            group.fail(refusal)
            return
        assert self._version is not None
        group.mark(self._version)
        group.admitted = True
        self._idle.clear()
        seed = int(stream_keys(group.request.seed, 1)[0] >> np.uint64(2))
        try:
            group.handle = await self._vllm.submit(group.request, seed, self._sink(group))
        except Exception as error:
            log.exception("vLLM refused a request")
            group.fail(EngineFailed(f"vLLM refused the request: {_named(error)}"))
            return
        if group.over or not group.unfinished:  # ended while it was being submitted
            await self._abort(group)

    def _sink(self, group: Group) -> Any:
        def sink(output: Any) -> None:
            if isinstance(output, Exception):
                group.fail(EngineFailed(f"vLLM failed: {_named(output)}"))
            else:
                group.take(output)

        return sink

    def _refusal(self, group: Group) -> StateError | None:
        wanted = group.request.require_policy_version
        if self._version is not None and wanted in (None, self._version):
            return None
        return StateError(
            f"require_policy_version: {wanted} is not served; the engine serves {self._version}"
        )

    async def _abort(self, group: Group) -> None:
        if group.handle is not None and self._client is not None:
            with suppress(Exception):  # a dead vLLM has nothing to abort
                await self._client.abort(group.handle)
        group.abort()

    async def _end_all(self, error: KeelError | None = None) -> None:
        for group in list(self._groups):
            if error is None:
                await self._abort(group)
            else:
                group.fail(error)

    def _check_idle(self) -> None:
        if not any(group.admitted for group in self._groups):
            self._idle.set()

    # -- pause -------------------------------------------------------------------------------

    async def pause(self, mode: pb.PauseMode) -> int:
        """See `Engine.pause`."""
        self._gate.clear()
        if mode == pb.PAUSE_MODE_WAIT and not self._frozen:
            await self._drained()
            return 0
        async with self._control:
            if mode == pb.PAUSE_MODE_KEEP and not self._frozen:
                await self._vllm.freeze()
                self._frozen = True
            if mode != pb.PAUSE_MODE_ABORT:
                return self._vllm.unfinished
            running = [group for group in self._groups if group.admitted]
            count = sum(group.unfinished for group in running)
            for group in running:
                await self._abort(group)
        return count

    async def _drained(self) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        idle = asyncio.ensure_future(self._idle.wait())
        try:
            await asyncio.wait((idle, waiter), return_when=asyncio.FIRST_COMPLETED)
            if waiter.done():
                waiter.result()
        finally:
            self._waiters.discard(waiter)
            idle.cancel()

    def resume_now(self) -> None:
        """Opens the gate; a pause that still waits is called off."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_exception(OvertakenError("Resume came before generation had stopped"))
        self._gate.set()

    async def resume(self) -> None:
        """See `Engine.resume`."""
        async with self._control:
            if self._frozen:
                await self._vllm.thaw()
                self._frozen = False
            self.resume_now()

    # -- weights -----------------------------------------------------------------------------

    async def apply(self, version: int, tensors: Mapping[str, StagedTensor]) -> None:
        """See `Engine.apply`."""
        async with self._control:
            if self._broken:
                await self._start_anew()
            memory = shared(tensors)
            described = await asyncio.to_thread(memory.__enter__)
            try:
                await self._apply(version, described)
            finally:
                memory.__exit__(None, None, None)

    async def _apply(self, version: int, described: Mapping[str, Any]) -> None:
        frozen = self._frozen
        try:
            if not frozen:
                await self._vllm.freeze()
            await self._vllm.update(described)
            self._version = version
            for group in self._groups:
                self._cross(group, version)
            if not frozen:
                await self._vllm.thaw()
        except Exception as error:
            log.exception("an update failed half-way")
            self._version, self._broken = None, True
            await self._end_all(StateError(f"the engine is STALE: {error}"))
            raise BrokenModel(
                f"applying version {version} failed half-way ({_named(error)}); send a full update"
            ) from error

    def _cross(self, group: Group, version: int) -> None:
        """Moves an admitted group over to a version, or refuses it if it wanted another."""
        if not group.admitted:
            return
        refusal = None if group.started else self._refusal(group)
        if refusal is None:
            group.mark(version)
        else:
            self._spawn(self._refuse(group, refusal))

    async def _refuse(self, group: Group, refusal: StateError) -> None:
        group.fail(refusal)
        await self._abort(group)

    async def _start_anew(self) -> None:
        """vLLM after a broken update: its layers may be in any state."""
        assert self._plan is not None
        log.info("starting vLLM anew")
        client, self._client = self._client, None
        try:
            if client is not None:
                await asyncio.to_thread(client.shutdown)
            self._client = await asyncio.to_thread(self._plan.start)
        except Exception as error:
            raise EngineFailed(f"vLLM could not start anew: {_named(error)}") from error
        self._broken = False
        self._frozen = False

    async def probe(self, token_ids_T: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """See `Engine.probe`."""
        assert self._plan is not None
        limit = self._plan.signature.max_sequence_tokens - 1
        if len(token_ids_T) > limit:
            raise InvalidField(
                "probe_token_ids", f"{len(token_ids_T)} tokens", f"at most {limit} for vLLM"
            )
        try:
            return await self._vllm.probe(token_ids_T)
        except Exception as error:
            raise EngineFailed(f"vLLM failed: {_named(error)}") from error

    # -- end ---------------------------------------------------------------------------------

    async def close(self) -> None:
        """See `Engine.close`."""
        self._closed = True
        async with self._control:
            await self._end_all()
            await self._stop()
        processes.clear_scratch()

    async def _watch(self) -> None:
        """Ends the process when a process of vLLM has ended: no deaf engine looks healthy.

        Its supervisor starts it again, EMPTY, and the trainer loads and publishes anew. Whoever
        ends vLLM on purpose takes `_client` away first. A call under which vLLM dies never returns.
        """
        while True:
            await asyncio.sleep(WATCH_S)
            client = self._client
            if client is None or not client.dead:
                continue
            log.critical("vLLM died; so does this process")
            await self._end_all(EngineFailed("vLLM died; the engine starts again"))
            await asyncio.sleep(WATCH_S)  # callers hear of it
            await self._stop()
            logging.shutdown()
            processes.end_self()


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
