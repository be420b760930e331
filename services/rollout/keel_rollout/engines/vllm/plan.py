"""A model as the trainer sent it: what vLLM is started with, and what the contract says of it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from keel.errors import InvalidField, ModelError
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.types.v1 import tensor_pb2
from keel_rollout.engines.torch.model import Model
from keel_rollout.engines.vllm.client import Client
from keel_rollout.engines.vllm.processes import SCRATCH
from keel_rollout.engines.vllm.settings import engine_arguments

ARCHITECTURES = (
    *("Qwen3MoeForCausalLM", "MixtralForCausalLM", "OlmoeForCausalLM"),
    *("Qwen3ForCausalLM", "Qwen2ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM"),
)
"""Compared with a transformers forward: log-probs, routes, live updates (tests/vllm)."""
DTYPES = {
    tensor_pb2.D_TYPE_FLOAT32: "float32",
    tensor_pb2.D_TYPE_BFLOAT16: "bfloat16",
}


class Plan:
    """A model that vLLM can start. Made in any thread; raises ModelError or InvalidField."""

    def __init__(self, files: Mapping[str, bytes], precision: pb.EnginePrecision) -> None:
        if precision.dtype not in DTYPES:
            valid = ", ".join(tensor_pb2.DType.Name(code) for code in DTYPES)
            raise InvalidField("precision.dtype", precision.dtype, valid)
        if precision.quantize not in (pb.QUANTIZATION_UNSPECIFIED, pb.QUANTIZATION_NONE):
            raise InvalidField("precision.quantize", precision.quantize, "QUANTIZATION_NONE")
        _check_agreement(files["config.json"])
        # the torch engine's reading of a config: signature, names and shapes; no memory on "meta"
        shape = Model(files, precision, torch.device("meta"))
        self.signature, self.tensors = shape.signature, shape.tensors()
        self._dtype = DTYPES[precision.dtype]
        self._fields = json.loads(files["config.json"])
        with self._folder() as folder:
            self._config(folder)

    def start(self) -> Client:
        """Starts vLLM's processes, some 20 s. Raises ModelError."""
        try:
            with self._folder() as folder:
                return Client(self._config(folder))
        except RuntimeError as error:
            raise ModelError(
                f"vLLM could not start {self.signature.architecture}: {error}; its log says why"
            ) from error

    def _folder(self) -> tempfile.TemporaryDirectory:
        """A private folder with config.json, which vLLM reads at its start and never again."""
        folder = tempfile.TemporaryDirectory(dir=os.environ[SCRATCH])
        (Path(folder.name) / "config.json").write_text(json.dumps(self._fields))
        return folder

    def _config(self, folder: str) -> Any:
        arguments = engine_arguments(
            folder,
            self._dtype,
            routes=bool(self.signature.moe_layers),
            max_tokens=self.signature.max_sequence_tokens,
        )
        try:
            return arguments.create_engine_config()
        except Exception as error:  # vLLM validates with many types of its own
            raise ModelError(f"config.json: vLLM refuses it: {error}") from error


def _check_agreement(config: bytes) -> None:
    """Refuses what vLLM would compute otherwise than transformers, and what is not compared."""
    try:
        fields = json.loads(config)
        architecture = fields["architectures"][0]
    except (ValueError, KeyError, IndexError, TypeError):
        return  # no config at all, which `Model` says better
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"config.json: architectures: {architecture!r} is not one that this engine can load; "
            f"valid: {', '.join(ARCHITECTURES)}"
        )
    if architecture == "OlmoeForCausalLM" and fields.get("rms_norm_eps", 1e-5) != 1e-5:
        raise ModelError(
            f"config.json: rms_norm_eps: {fields['rms_norm_eps']} is not valid; valid: 1e-05, "
            "which vLLM's OLMoE takes whatever the config says"
        )
