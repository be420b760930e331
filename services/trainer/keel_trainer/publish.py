"""Publishes weights to the leased engines, and proves that they serve them.

    LoadModel (when the engine has no model) -> Pause -> Begin -> Update -> Finish + probe -> Resume

Hashes prove what arrived; the probe proves what was loaded: log-probs of a few fixed tokens, engine
against trainer, with a tolerance relative to the gap at first load.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import grpc
import numpy as np
import torch

from keel.codec import config_hash, fingerprint, to_ndarray, to_tensor, xxh3
from keel.errors import IntegrityError, KeelError
from keel.record import RunRecord
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.rollout.v1 import rollout_service_pb2_grpc as pb_grpc
from keel.rpc import CHUNK_BYTES, channel
from keel.spec import EngineSpec
from keel.types.v1 import tensor_pb2
from keel.weights.v1 import manifest_pb2
from keel_trainer.backends.base import ModelInfo

log = logging.getLogger(__name__)

T = TypeVar("T")

PROBE_TOKENS = 64
"""Length of the probe."""
PROBE_FACTOR, PROBE_FLOOR = 5.0, 0.02
"""A version is proved if the median |d log p| of the probe is at most max(factor x gap at first
load, floor in nats). The median, because a few unlikely tokens carry most of a coarse engine's
mean gap."""
FIRST_GAP_LIMITS = {"none": 0.5, "fp8": 0.5, "fp4": 2.0}
"""Largest median gap at first load, nats, by `engine.quantize`. Seen on the tiny preset after its
cold start, inputs and routers rounded too: fp8 up to 0.22, fp4 up to 0.79, other weights 7.2."""

_DTYPES = {
    torch.float32: tensor_pb2.D_TYPE_FLOAT32,
    torch.bfloat16: tensor_pb2.D_TYPE_BFLOAT16,
    torch.float16: tensor_pb2.D_TYPE_FLOAT16,
}
_PRECISIONS = {
    "float32": tensor_pb2.D_TYPE_FLOAT32,
    "bfloat16": tensor_pb2.D_TYPE_BFLOAT16,
    "float16": tensor_pb2.D_TYPE_FLOAT16,
}
_QUANTIZATIONS = {
    "none": pb.QUANTIZATION_NONE,
    "fp8": pb.QUANTIZATION_FP8,
    "fp4": pb.QUANTIZATION_FP4,
}
_RPC_TIMEOUT_S = 600.0
_ASK_TIMEOUT_S = 10.0
_RETRIES_OF_STATE = 5
_AGAIN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


class EngineError(KeelError):
    """An engine refused or failed a call; the message is the engine's."""


@dataclass(frozen=True, slots=True)
class Version:
    """A version of the weights, ready to be sent."""

    number: int
    tensors: dict[str, memoryview]
    """Raw bytes by Hugging Face name."""
    manifest: manifest_pb2.WeightManifest
    probe_logprobs: list[float]
    """The trainer's own log-probs of the probe tokens, [T - 1]."""

    @classmethod
    def build(
        cls, number: int, weights: Iterator[tuple[str, torch.Tensor]], probe_logprobs: list[float]
    ) -> Version:
        """Brings the weights to the host, hashes them, and names the result.

        On the CPU the bytes stay the model's own: to be published before its next step.
        """
        tensors, entries = {}, []
        for name, weight in weights:
            host = weight.detach().cpu().contiguous()
            data = host.reshape(-1).view(torch.uint8).numpy().data
            tensors[name] = data
            entries.append(
                manifest_pb2.TensorEntry(
                    name=name, dtype=_DTYPES[weight.dtype], shape=weight.shape, xxh3=xxh3(data)
                )
            )
        manifest = manifest_pb2.WeightManifest(
            policy_version=number,
            fingerprint=fingerprint(entries),
            tensors=entries,
            transport=manifest_pb2.WEIGHT_TRANSPORT_STREAM,
        )
        return cls(number, tensors, manifest, probe_logprobs)


def probe_tokens(vocab_size: int) -> np.ndarray:
    """The fixed tokens of every probe: int32 [T], spread over the vocabulary."""
    return np.random.default_rng(0).integers(0, vocab_size, PROBE_TOKENS).astype(np.int32)


class Publisher:
    """Keeps the leased engines at the version that the run has reached."""

    def __init__(
        self,
        record: RunRecord,
        artifact: Path,
        info: ModelInfo,
        probe_token_ids: np.ndarray,
        first_gap: float | None = None,
    ) -> None:
        """
        Args:
            info: the model in training.
            probe_token_ids: int32 [T].
            first_gap: gap at first load, nats, as a checkpoint remembers it.
        """
        self._lease = pb.Lease(run=record.run, fencing_token=record.fencing_token)
        self._engines = [_Engine(address) for address in record.engines]
        self._load = _load_request(self._lease, artifact, record.spec.engine)
        self._config_xxh3 = config_hash((artifact / "config.json").read_bytes())
        self._info = info
        self._probe = to_tensor(probe_token_ids)
        self.first_gap = first_gap
        self._first_gap_limit = FIRST_GAP_LIMITS[record.spec.engine.quantize]

    def routes_available(self, check: Callable[[], object]) -> bool:
        """Every engine reports routes. Waits as `publish` does."""
        return all(
            engine.until_available(engine.capabilities, check).can.routes
            for engine in self._engines
        )

    def publish(self, version: Version, check: Callable[[], object]) -> None:
        """Returns once every engine serves `version`, proved by hash and probe.

        Args:
            check: called between tries while an engine is unreachable; raises to stop.

        Raises:
            IntegrityError: an engine's log-probs are not those of the weights it was sent.
            EngineError: an engine refused.
        """
        for engine in self._engines:
            engine.until_available(partial(self._publish_to, engine, version), check)

    def behind(self, version: int) -> list[str]:
        """Addresses of engines that do not serve `version` or more: they were restarted, or an
        update broke off. Those that do not answer are not among them.
        """
        late = []
        for engine in self._engines:
            with suppress(grpc.RpcError):
                if engine.served_version() < version:
                    late.append(engine.address)
        return late

    def close(self) -> None:
        """Closes the channels."""
        for engine in self._engines:
            engine.channel.close()

    def _publish_to(self, engine: _Engine, version: Version) -> None:
        loaded = engine.capabilities()
        if loaded.run != self._lease.run or loaded.state == pb.ENGINE_STATE_EMPTY:
            log.info("%s: loading the model", engine.address)
            engine.stub.LoadModel(self._load, timeout=_RPC_TIMEOUT_S)
            loaded = engine.capabilities()
        self._check_loaded(engine.address, loaded)
        engine.stub.Pause(
            pb.PauseRequest(lease=self._lease, mode=pb.PAUSE_MODE_WAIT), timeout=_RPC_TIMEOUT_S
        )
        try:
            begun = engine.stub.BeginWeightUpdate(
                pb.BeginWeightUpdateRequest(lease=self._lease, manifest=version.manifest),
                timeout=_RPC_TIMEOUT_S,
            )
            if not begun.already_served:
                engine.stub.UpdateWeights(_chunks(self._lease, version), timeout=_RPC_TIMEOUT_S)
            finished = engine.stub.FinishWeightUpdate(
                pb.FinishWeightUpdateRequest(
                    lease=self._lease,
                    policy_version=version.number,
                    fingerprint=version.manifest.fingerprint,
                    probe_token_ids=self._probe,
                ),
                timeout=_RPC_TIMEOUT_S,
            )
        finally:
            # also after a refused update: the engine goes on serving its old version
            engine.stub.Resume(pb.ResumeRequest(lease=self._lease), timeout=_RPC_TIMEOUT_S)
        self._prove(engine.address, finished, version)

    def _check_loaded(self, address: str, loaded: pb.GetCapabilitiesResponse) -> None:
        """What the engine says it has loaded is what it was given."""
        wanted, got = self._load.precision, loaded.precision
        for name, theirs, ours in (
            ("config_xxh3", loaded.loaded.config_xxh3, self._config_xxh3),
            ("moe_layers", tuple(loaded.loaded.moe_layers), self._info.moe_layer_numbers),
            ("precision.dtype", got.dtype, wanted.dtype),
            ("precision.quantize", got.quantize, wanted.quantize),
            ("precision.quantize_inputs", got.quantize_inputs, wanted.quantize_inputs),
            ("precision.quantize_router", got.quantize_router, wanted.quantize_router),
        ):
            if theirs != ours:
                raise EngineError(
                    f"engine {address}: {name} of the loaded model: {theirs!r} is not valid; "
                    f"valid: {ours!r}"
                )

    def _prove(
        self, address: str, finished: pb.FinishWeightUpdateResponse, version: Version
    ) -> None:
        ours = version.probe_logprobs
        theirs = to_ndarray(
            finished.probe_logprobs, "probe_logprobs", dtypes=("float32",), shape=(len(ours),)
        )
        gap = statistics.median(abs(a - float(b)) for a, b in zip(ours, theirs, strict=True))
        if self.first_gap is None:
            if not gap <= self._first_gap_limit:
                raise IntegrityError(
                    f"engine {address}: the median log-prob gap at first load is {gap:.3g} nats, "
                    f"valid: at most {self._first_gap_limit}: it computes another model"
                )
            self.first_gap = gap
        log.info("%s: version %d, probe gap %.2g nats", address, version.number, gap)
        limit = max(PROBE_FACTOR * self.first_gap, PROBE_FLOOR)
        if not gap <= limit:
            raise IntegrityError(
                f"engine {address} has loaded version {version.number}, but its log-probs are not "
                f"those of these weights: median gap {gap:.3g} nats, valid: at most {limit:.3g}"
            )


class _Engine:
    """One leased engine."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.channel = channel(address)
        self.stub = pb_grpc.RolloutServiceStub(self.channel)

    def capabilities(self) -> pb.GetCapabilitiesResponse:
        """What it can do and has loaded."""
        return self.stub.GetCapabilities(pb.GetCapabilitiesRequest(), timeout=_ASK_TIMEOUT_S)

    def served_version(self) -> int:
        """The version that it serves; -1 while it serves none."""
        reply = self.stub.GetWeightVersion(pb.GetWeightVersionRequest(), timeout=_ASK_TIMEOUT_S)
        return reply.policy_version if reply.HasField("policy_version") else -1

    def until_available(self, action: Callable[[], T], check: Callable[[], object]) -> T:
        """The result of `action`, tried again as long as the engine is unreachable; and a few times
        where its state forbids a call, since it may just have been restarted.
        """
        delay_s, forbidden = 0.1, 0
        while True:
            try:
                return action()
            except grpc.RpcError as error:
                code = error.code()
                forbidden += code == grpc.StatusCode.FAILED_PRECONDITION
                if code not in _AGAIN and not 0 < forbidden <= _RETRIES_OF_STATE:
                    raise EngineError(
                        f"engine {self.address}: {code.name}: {error.details()}"
                    ) from error
                log.warning(
                    "%s: %s, trying again in %.1f s", self.address, error.details(), delay_s
                )
            check()
            time.sleep(delay_s)
            delay_s = min(2 * delay_s, 2.0)


def _load_request(lease: pb.Lease, artifact: Path, engine: EngineSpec) -> pb.LoadModelRequest:
    files = [artifact / "config.json"]
    files += [
        artifact / name
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    ]
    return pb.LoadModelRequest(
        lease=lease,
        files=[pb.ModelFile(name=f.name, data=f.read_bytes()) for f in files if f.is_file()],
        precision=pb.EnginePrecision(
            dtype=_PRECISIONS[engine.dtype],
            quantize=_QUANTIZATIONS[engine.quantize],
            quantize_inputs=engine.quantize_inputs,
            quantize_router=engine.quantize_router,
        ),
    )


def _chunks(lease: pb.Lease, version: Version) -> Iterator[pb.UpdateWeightsRequest]:
    for name, data in version.tensors.items():
        for offset in range(0, max(len(data), 1), CHUNK_BYTES):
            yield pb.UpdateWeightsRequest(
                lease=lease,
                policy_version=version.number,
                chunk=pb.TensorChunk(
                    name=name,
                    offset_bytes=offset,
                    data=bytes(data[offset : offset + CHUNK_BYTES]),
                ),
            )
