"""A transformers model whose weights come by versions.

Parameters keep their memory for life: a version is converted beside them by transformers' own
checkpoint conversion, then copied in. So loading a version whole gives the same bits as updating
to it, and a version that cannot be converted never touches the one served.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    convert_and_load_state_dict_in_model,
    revert_weight_conversion,
)
from transformers.initialization import no_init_weights
from transformers.modeling_utils import LoadStateDictConfig

from keel import codec
from keel.errors import InvalidField, ModelError
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.types.v1 import tensor_pb2
from keel_rollout.engines.base import BrokenModel, StagedTensor
from keel_rollout.engines.torch.quantize import (
    FORMATS,
    quantized_weights,
    round_inputs,
    round_weight,
)
from keel_rollout.engines.torch.routers import RouterTap

log = logging.getLogger(__name__)

ARCHITECTURES = (
    *("Qwen3MoeForCausalLM", "MixtralForCausalLM", "OlmoeForCausalLM", "DeepseekV3ForCausalLM"),
    *("Qwen3ForCausalLM", "Qwen2ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM"),
)
QUANTIZATIONS = (pb.QUANTIZATION_NONE, *FORMATS)
DTYPES: dict[int, torch.dtype] = {
    tensor_pb2.D_TYPE_FLOAT32: torch.float32,
    tensor_pb2.D_TYPE_BFLOAT16: torch.bfloat16,
}
_WIRE_DTYPES = {**DTYPES, tensor_pb2.D_TYPE_FLOAT16: torch.float16}

transformers.utils.logging.disable_progress_bar()


class Model:
    """One architecture in one precision on one device.

    Everything but `convert` belongs to the compute thread.
    """

    def __init__(
        self, files: Mapping[str, bytes], precision: pb.EnginePrecision, device: torch.device
    ) -> None:
        self.dtype = _dtype(precision)
        self.device = device
        config = _config(files)
        with torch.device("meta"):
            self._skeleton = _build(config, self.dtype)
        with torch.device(device), no_init_weights():
            self.net = _build(config, self.dtype).eval()
        self.net.tie_weights()
        self.tap = RouterTap(self.net)
        self.signature = self._signature(files, config)
        self._rounded: frozenset[str] = frozenset()
        self._format = FORMATS.get(precision.quantize)
        if self._format is not None:
            routers = precision.quantize_router
            self._rounded = frozenset(quantized_weights(self.net, self.tap, routers=routers))
            if precision.quantize_inputs:
                round_inputs(self._format, self.net, self.tap, routers=routers)

    def _signature(self, files: Mapping[str, bytes], config: Any) -> pb.ModelSignature:
        tokenizer = files.get("tokenizer.json")
        return pb.ModelSignature(
            architecture=type(self.net).__name__,
            config_xxh3=codec.config_hash(files["config.json"]),
            tokenizer_xxh3=codec.xxh3(tokenizer) if tokenizer is not None else 0,
            vocab_size=config.vocab_size,
            max_sequence_tokens=config.max_position_embeddings,
            moe_layers=self.tap.layers,
            experts_per_token=self.tap.top_k,
            num_experts=self.tap.num_experts,
        )

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the checkpoint: one per expert, tied ones once."""
        tied = self._skeleton.all_tied_weights_keys
        state = {k: v for k, v in self._skeleton.state_dict().items() if k not in tied}
        checkpoint = revert_weight_conversion(self._skeleton, state)
        return {name: tuple(tensor.shape) for name, tensor in checkpoint.items()}

    def convert(self, tensors: Mapping[str, StagedTensor]) -> dict[str, torch.Tensor]:
        """A version in the model's own layout (experts fused) and dtype, on the CPU.

        Runs in any thread while the model computes. Raises ModelError if anything is left over.
        """
        checkpoint = {
            name: torch.frombuffer(staged.data, dtype=_WIRE_DTYPES[staged.dtype]).reshape(
                staged.shape
            )
            for name, staged in tensors.items()
        }
        mapping: Any = get_model_conversion_mapping(self._skeleton)
        plan = self._skeleton._get_dtype_plan(self.dtype)
        config = LoadStateDictConfig(weight_mapping=mapping, dtype=self.dtype, dtype_plan=plan)
        try:
            info, _ = convert_and_load_state_dict_in_model(self._skeleton, checkpoint, config)
            tied = set(self._skeleton.all_tied_weights_keys)
            faults = sorted(map(str, (info.missing_keys - tied) | info.unexpected_keys))
            faults += sorted(map(str, info.mismatched_keys)) + sorted(info.conversion_errors)
            if faults:
                raise ModelError(f"weights do not fit the model: {faults[:3]}")
            state = self._skeleton.state_dict()
            return {name: state[name] for name in state.keys() - tied}
        finally:
            self._skeleton.to("meta")

    @torch.no_grad()
    def apply(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copies a converted version into the parameters, rounding what the precision rounds."""
        try:
            own = self.net.state_dict()
            for name in sorted(state):
                value = state[name].to(self.device)
                if self._format is not None and name in self._rounded:
                    value = round_weight(self._format, name, value)
                own[name].copy_(value)
        except Exception as error:
            raise BrokenModel(
                f"applying a version failed half-way ({type(error).__name__}: {error}); "
                "send a full update"
            ) from error

    def probe(self, token_ids_T: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Log-probs [T - 1] of tokens 1..T-1 at temperature 1."""
        tokens_1T = torch.from_numpy(token_ids_T.astype(np.int64))[None].to(self.device)
        logits_TV = self.net(input_ids=tokens_1T, use_cache=False).logits[0, :-1].float()
        logprobs_TV = torch.log_softmax(logits_TV, dim=-1)
        return logprobs_TV.gather(-1, tokens_1T[0, 1:, None])[:, 0].cpu().numpy()


def _dtype(precision: pb.EnginePrecision) -> torch.dtype:
    if precision.dtype not in DTYPES:
        valid = ", ".join(tensor_pb2.DType.Name(code) for code in DTYPES)
        raise InvalidField("precision.dtype", precision.dtype, valid)
    if precision.quantize not in (pb.QUANTIZATION_UNSPECIFIED, *QUANTIZATIONS):
        valid = ", ".join(pb.Quantization.Name(code) for code in QUANTIZATIONS)
        raise InvalidField("precision.quantize", precision.quantize, valid)
    return DTYPES[precision.dtype]


def _config(files: Mapping[str, bytes]) -> Any:
    try:
        fields = json.loads(files["config.json"])
        architecture = fields["architectures"][0]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ModelError(
            f"config.json must be a JSON object with architectures: {type(error).__name__}: {error}"
        ) from error
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"config.json: architectures: {architecture!r} is not one that this engine can load; "
            f"valid: {', '.join(ARCHITECTURES)}"
        )
    try:
        config = getattr(transformers, architecture).config_class.from_dict(fields)
    except Exception as error:  # transformers validates with many types of its own
        raise ModelError(f"config.json: {type(error).__name__}: {error}") from error
    if getattr(config, "sliding_window", None) is not None:
        raise ModelError(
            f"config.json: sliding_window: {config.sliding_window} is not valid; "
            "valid: null, this engine attends to everything"
        )
    return config


def _build(config: Any, dtype: torch.dtype) -> Any:
    try:
        net = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    except Exception as error:  # a config that no module can be built from
        raise ModelError(f"config.json: {type(error).__name__}: {error}") from error
    for name, tensor in net.state_dict(keep_vars=True).items():
        if _stays_float32(net, name):
            tensor.data = tensor.data.float()
    return net


def _stays_float32(net: Any, name: str) -> bool:
    """Whether a tensor is float32 in every model dtype, as DeepSeek's selection bias is."""
    return any(kept in name for kept in net._keep_in_fp32_modules_strict or ())
