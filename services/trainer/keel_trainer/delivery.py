"""One engine, as the trainer sees it: the calls that give it a model and a version of the weights.

LoadModel (when the engine has no model) -> Pause -> Begin -> Update -> Finish + probe -> Resume
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np

from keel.codec import config_hash, to_ndarray, to_tensor
from keel.errors import KeelError
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.rollout.v1 import rollout_service_pb2_grpc as pb_grpc
from keel.rpc import CHUNK_BYTES, channel
from keel.spec import EngineSpec
from keel.types.v1 import tensor_pb2
from keel.weights.v1 import manifest_pb2
from keel_trainer.backends.base import ModelInfo
from keel_trainer.version import SharedWeights, Version

log = logging.getLogger(__name__)

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


class EngineError(KeelError):
    """An engine refused or failed a call; the message is the engine's."""


class Payload:
    """What every engine of a run is given: the model's files, its precision, the probe.

    Args:
        artifact: model folder.
        info: the model in training.
        probe_token_ids: int32 [T].
        needs_routes: the recipe replays the engine's routes.
    """

    def __init__(
        self,
        artifact: Path,
        engine: EngineSpec,
        info: ModelInfo,
        probe_token_ids: np.ndarray,
        *,
        needs_routes: bool,
    ) -> None:
        names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
        config = artifact / "config.json"
        files = [config, *(artifact / name for name in names)]
        self.files = [pb.ModelFile(name=f.name, data=f.read_bytes()) for f in files if f.is_file()]
        self.precision = pb.EnginePrecision(
            dtype=_PRECISIONS[engine.dtype],
            quantize=_QUANTIZATIONS[engine.quantize],
            quantize_inputs=engine.quantize_inputs,
            quantize_router=engine.quantize_router,
        )
        self.probe = to_tensor(probe_token_ids)
        self._config_xxh3 = config_hash(config.read_bytes())
        self._info = info
        self._needs_routes = needs_routes

    def check(self, address: str, loaded: pb.GetCapabilitiesResponse) -> None:
        """EngineError unless the engine has loaded what it was given, and can do what it must."""
        if self._needs_routes and not loaded.can.routes:
            raise EngineError(
                f"engine {address}: it reports no routes, and recipe.replay is R3, which replays "
                "the engine's"
            )
        wanted, got = self.precision, loaded.precision
        for name, theirs, ours in (
            ("config_xxh3", loaded.loaded.config_xxh3, self._config_xxh3),
            # one that takes less would make the length of its prompts decide which slots are VOID
            ("max_sequence_tokens", loaded.loaded.max_sequence_tokens, self._info.max_positions),
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


class EngineLink:
    """A channel to one engine. Every method may raise grpc.RpcError."""

    def __init__(self, address: str, payload: Payload, shared: SharedWeights | None) -> None:
        """
        Args:
            shared: weights go by reference where the engine takes them so.
        """
        self.address = address
        self._payload, self._shared = payload, shared
        self._channel = channel(address)
        self._stub = pb_grpc.RolloutServiceStub(self._channel)

    def close(self) -> None:
        """Closes the channel; a call under way fails."""
        self._channel.close()

    def serving(self) -> pb.GetWeightVersionResponse:
        """What it serves, and its state."""
        return self._stub.GetWeightVersion(pb.GetWeightVersionRequest(), timeout=_ASK_TIMEOUT_S)

    def bring(
        self, version: Version, lease: pb.Lease, *, anew: bool, before_change: Callable[[], None]
    ) -> tuple[str, np.ndarray]:
        """Makes it serve `version`; returns its kind and its log-probs of the probe, [T - 1].

        Args:
            anew: load the model again, whatever it has loaded.
            before_change: called before anything that ends what it serves now.
        """
        loaded = self._loaded()
        if anew or loaded.run != lease.run or loaded.state == pb.ENGINE_STATE_EMPTY:
            before_change()
            log.info("%s: loading the model", self.address)
            self._stub.LoadModel(
                pb.LoadModelRequest(
                    lease=lease,
                    files=self._payload.files,
                    precision=self._payload.precision,
                    anew=anew,
                ),
                timeout=_RPC_TIMEOUT_S,
            )
            loaded = self._loaded()
        self._payload.check(self.address, loaded)
        if serves(self.serving(), version):
            return loaded.can.kind, self._update(version, lease, by_reference=False)
        before_change()
        by_reference = manifest_pb2.WEIGHT_TRANSPORT_SAFETENSORS in loaded.can.transports
        return loaded.can.kind, self._update(version, lease, by_reference=by_reference)

    def _loaded(self) -> pb.GetCapabilitiesResponse:
        return self._stub.GetCapabilities(pb.GetCapabilitiesRequest(), timeout=_ASK_TIMEOUT_S)

    def _update(self, version: Version, lease: pb.Lease, *, by_reference: bool) -> np.ndarray:
        self._stub.Pause(
            pb.PauseRequest(lease=lease, mode=pb.PAUSE_MODE_WAIT), timeout=_RPC_TIMEOUT_S
        )
        try:
            if not (by_reference and self._staged_by_reference(version, lease)):
                self._stage(version.manifest, lease, _chunks(lease, version))
            finished = self._stub.FinishWeightUpdate(
                pb.FinishWeightUpdateRequest(
                    lease=lease,
                    policy_version=version.number,
                    fingerprint=version.manifest.fingerprint,
                    probe_token_ids=self._payload.probe,
                ),
                timeout=_RPC_TIMEOUT_S,
            )
        finally:
            # also after a refused update: the engine goes on serving its old version
            self._stub.Resume(pb.ResumeRequest(lease=lease), timeout=_RPC_TIMEOUT_S)
        return to_ndarray(
            finished.probe_logprobs,
            "probe_logprobs",
            dtypes=("float32",),
            shape=(len(version.probe_logprobs),),
        )

    def _staged_by_reference(self, version: Version, lease: pb.Lease) -> bool:
        """False if the engine does not see our folder: weights then go by stream, from now on."""
        if self._shared is None:
            return False
        manifest = manifest_pb2.WeightManifest()
        manifest.CopyFrom(version.manifest)
        manifest.transport = manifest_pb2.WEIGHT_TRANSPORT_SAFETENSORS
        why: object
        try:
            with self._shared.file(version) as path:
                reference = pb.UpdateWeightsRequest(
                    lease=lease, policy_version=version.number, safetensors_path=path
                )
                self._stage(manifest, lease, iter([reference]))
            return True
        except OSError as error:
            why = error
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.INVALID_ARGUMENT:
                raise
            why = error.details()
        log.warning("%s: weights go by stream from now on, not by reference: %s", self.address, why)
        self._shared = None
        return False

    def _stage(
        self,
        manifest: manifest_pb2.WeightManifest,
        lease: pb.Lease,
        messages: Iterator[pb.UpdateWeightsRequest],
    ) -> None:
        begun = self._stub.BeginWeightUpdate(
            pb.BeginWeightUpdateRequest(lease=lease, manifest=manifest), timeout=_RPC_TIMEOUT_S
        )
        if not begun.already_served:
            self._stub.UpdateWeights(messages, timeout=_RPC_TIMEOUT_S)


def serves(serving: pb.GetWeightVersionResponse, version: Version) -> bool:
    """An engine that says `serving` serves these very weights."""
    return serving.HasField("policy_version") and (
        (serving.policy_version, serving.fingerprint)
        == (version.number, version.manifest.fingerprint)
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
