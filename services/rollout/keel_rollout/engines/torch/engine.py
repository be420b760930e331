"""The torch engine: transformers models on a CPU or one CUDA device.

Equal requests give equal bits, on one type of machine and one thread count, if they come in
cohorts: nothing but a cohort's own requests shapes its batch.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import Future
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from keel.errors import InvalidField, KeelError
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.rpc import MAX_MESSAGE_BYTES
from keel.weights.v1 import manifest_pb2
from keel_rollout.engines.base import Finished, GroupRequest, Piece, StagedTensor
from keel_rollout.engines.torch.batch import Job
from keel_rollout.engines.torch.model import ARCHITECTURES, DTYPES, QUANTIZATIONS, Model
from keel_rollout.engines.torch.worker import Delivery, Worker

MAX_COHORT_SEQUENCES = 4096
MAX_GROUP_SIZE = 1024


class TorchEngine:
    """Implements `keel_rollout.engines.base.Engine`. Made on a running event loop."""

    def __init__(self, device: str, threads: int) -> None:
        self._device = _device(device)
        self._loop = asyncio.get_running_loop()
        self._worker = Worker(threads, self._deliver)
        self._worker.start()

    def _deliver(self, items: list[Delivery]) -> None:
        def put() -> None:
            for job, item in items:
                job.sink.put_nowait(item)

        self._loop.call_soon_threadsafe(put)

    def abilities(self) -> pb.EngineAbilities:
        """See `Engine.abilities`."""
        return pb.EngineAbilities(
            kind="torch",
            version=f"torch {torch.__version__}, transformers {transformers.__version__}",
            architectures=ARCHITECTURES,
            routes=True,
            deterministic=True,
            dtypes=list(DTYPES),  # type: ignore[arg-type]
            quantizations=QUANTIZATIONS,
            transports=[
                manifest_pb2.WEIGHT_TRANSPORT_STREAM,
                manifest_pb2.WEIGHT_TRANSPORT_SAFETENSORS,
            ],
            max_cohort_sequences=MAX_COHORT_SEQUENCES,
            max_group_size=MAX_GROUP_SIZE,
            max_message_bytes=MAX_MESSAGE_BYTES,
            device=str(self._device),
        )

    async def load(
        self, files: Mapping[str, bytes], precision: pb.EnginePrecision
    ) -> pb.ModelSignature:
        """See `Engine.load`."""
        model = await asyncio.to_thread(Model, files, precision, self._device)
        await self._call(self._worker.load, model)
        return model.signature

    def tensors(self) -> Mapping[str, tuple[int, ...]]:
        """See `Engine.tensors`."""
        return self._model.tensors()

    @property
    def _model(self) -> Model:
        assert self._worker.model is not None, "the servicer asks only once a model is loaded"
        return self._worker.model

    async def generate(self, request: GroupRequest) -> AsyncIterator[Piece | Finished]:
        """See `Engine.generate`."""
        job = Job(request, sink=asyncio.Queue())
        left = request.num_samples
        try:
            await self._call(self._worker.submit, job)
            while left:
                item = await job.sink.get()
                if isinstance(item, KeelError):
                    left = 0
                    raise item
                left -= isinstance(item, Finished)
                yield item
        finally:
            if left:
                self._worker.post(lambda: self._worker.cancel(job))

    async def pause(self, mode: pb.PauseMode) -> int:
        """See `Engine.pause`."""
        stopped: Future[int] = await self._call(self._worker.pause, mode)
        return await asyncio.shield(asyncio.wrap_future(stopped))

    async def resume(self) -> None:
        """See `Engine.resume`."""
        await self._call(self._worker.resume)

    async def apply(self, version: int, tensors: Mapping[str, StagedTensor]) -> None:
        """See `Engine.apply`. Conversion runs beside generation; only the copy interrupts it."""
        state = await asyncio.to_thread(self._model.convert, tensors)
        await self._call(self._worker.apply, version, state)

    async def probe(self, token_ids_T: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """See `Engine.probe`."""
        return await self._call(self._model.probe, token_ids_T)

    async def close(self) -> None:
        """See `Engine.close`."""
        await self._call(self._worker.close)
        await asyncio.to_thread(self._worker.join)

    async def _call(self, method: Any, *arguments: Any) -> Any:
        return await asyncio.wrap_future(self._worker.call(lambda: method(*arguments)))


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidField("device", name, "cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda") or (
        device.type == "cuda" and not torch.cuda.is_available()
    ):
        raise InvalidField("device", name, "cpu, or cuda where torch sees a CUDA device")
    return device
