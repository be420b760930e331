from keel.types.v1 import sequence_pb2 as _sequence_pb2
from keel.types.v1 import tensor_pb2 as _tensor_pb2
from keel.weights.v1 import manifest_pb2 as _manifest_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Quantization(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    QUANTIZATION_UNSPECIFIED: _ClassVar[Quantization]
    QUANTIZATION_NONE: _ClassVar[Quantization]
    QUANTIZATION_FP8: _ClassVar[Quantization]
    QUANTIZATION_FP4: _ClassVar[Quantization]

class EngineState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENGINE_STATE_UNSPECIFIED: _ClassVar[EngineState]
    ENGINE_STATE_EMPTY: _ClassVar[EngineState]
    ENGINE_STATE_LOADED: _ClassVar[EngineState]
    ENGINE_STATE_READY: _ClassVar[EngineState]
    ENGINE_STATE_PAUSED: _ClassVar[EngineState]
    ENGINE_STATE_STALE: _ClassVar[EngineState]

class Purpose(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PURPOSE_UNSPECIFIED: _ClassVar[Purpose]
    PURPOSE_TRAINING: _ClassVar[Purpose]
    PURPOSE_EVALUATION: _ClassVar[Purpose]

class PauseMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PAUSE_MODE_UNSPECIFIED: _ClassVar[PauseMode]
    PAUSE_MODE_ABORT: _ClassVar[PauseMode]
    PAUSE_MODE_WAIT: _ClassVar[PauseMode]
    PAUSE_MODE_KEEP: _ClassVar[PauseMode]
QUANTIZATION_UNSPECIFIED: Quantization
QUANTIZATION_NONE: Quantization
QUANTIZATION_FP8: Quantization
QUANTIZATION_FP4: Quantization
ENGINE_STATE_UNSPECIFIED: EngineState
ENGINE_STATE_EMPTY: EngineState
ENGINE_STATE_LOADED: EngineState
ENGINE_STATE_READY: EngineState
ENGINE_STATE_PAUSED: EngineState
ENGINE_STATE_STALE: EngineState
PURPOSE_UNSPECIFIED: Purpose
PURPOSE_TRAINING: Purpose
PURPOSE_EVALUATION: Purpose
PAUSE_MODE_UNSPECIFIED: PauseMode
PAUSE_MODE_ABORT: PauseMode
PAUSE_MODE_WAIT: PauseMode
PAUSE_MODE_KEEP: PauseMode

class Lease(_message.Message):
    __slots__ = ("run", "fencing_token")
    RUN_FIELD_NUMBER: _ClassVar[int]
    FENCING_TOKEN_FIELD_NUMBER: _ClassVar[int]
    run: str
    fencing_token: int
    def __init__(self, run: _Optional[str] = ..., fencing_token: _Optional[int] = ...) -> None: ...

class EnginePrecision(_message.Message):
    __slots__ = ("dtype", "quantize", "quantize_inputs", "quantize_router")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    QUANTIZE_FIELD_NUMBER: _ClassVar[int]
    QUANTIZE_INPUTS_FIELD_NUMBER: _ClassVar[int]
    QUANTIZE_ROUTER_FIELD_NUMBER: _ClassVar[int]
    dtype: _tensor_pb2.DType
    quantize: Quantization
    quantize_inputs: bool
    quantize_router: bool
    def __init__(self, dtype: _Optional[_Union[_tensor_pb2.DType, str]] = ..., quantize: _Optional[_Union[Quantization, str]] = ..., quantize_inputs: bool = ..., quantize_router: bool = ...) -> None: ...

class ModelSignature(_message.Message):
    __slots__ = ("architecture", "config_xxh3", "tokenizer_xxh3", "vocab_size", "max_sequence_tokens", "moe_layers", "experts_per_token", "num_experts")
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    CONFIG_XXH3_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_XXH3_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MOE_LAYERS_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    architecture: str
    config_xxh3: int
    tokenizer_xxh3: int
    vocab_size: int
    max_sequence_tokens: int
    moe_layers: _containers.RepeatedScalarFieldContainer[int]
    experts_per_token: int
    num_experts: int
    def __init__(self, architecture: _Optional[str] = ..., config_xxh3: _Optional[int] = ..., tokenizer_xxh3: _Optional[int] = ..., vocab_size: _Optional[int] = ..., max_sequence_tokens: _Optional[int] = ..., moe_layers: _Optional[_Iterable[int]] = ..., experts_per_token: _Optional[int] = ..., num_experts: _Optional[int] = ...) -> None: ...

class EngineAbilities(_message.Message):
    __slots__ = ("kind", "version", "architectures", "routes", "deterministic", "dtypes", "quantizations", "transports", "max_cohort_sequences", "max_group_size", "max_message_bytes", "device")
    KIND_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURES_FIELD_NUMBER: _ClassVar[int]
    ROUTES_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    DTYPES_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATIONS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    MAX_COHORT_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    MAX_GROUP_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    kind: str
    version: str
    architectures: _containers.RepeatedScalarFieldContainer[str]
    routes: bool
    deterministic: bool
    dtypes: _containers.RepeatedScalarFieldContainer[_tensor_pb2.DType]
    quantizations: _containers.RepeatedScalarFieldContainer[Quantization]
    transports: _containers.RepeatedScalarFieldContainer[_manifest_pb2.WeightTransport]
    max_cohort_sequences: int
    max_group_size: int
    max_message_bytes: int
    device: str
    def __init__(self, kind: _Optional[str] = ..., version: _Optional[str] = ..., architectures: _Optional[_Iterable[str]] = ..., routes: bool = ..., deterministic: bool = ..., dtypes: _Optional[_Iterable[_Union[_tensor_pb2.DType, str]]] = ..., quantizations: _Optional[_Iterable[_Union[Quantization, str]]] = ..., transports: _Optional[_Iterable[_Union[_manifest_pb2.WeightTransport, str]]] = ..., max_cohort_sequences: _Optional[int] = ..., max_group_size: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., device: _Optional[str] = ...) -> None: ...

class GetCapabilitiesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetCapabilitiesResponse(_message.Message):
    __slots__ = ("can", "loaded", "precision", "state", "run")
    CAN_FIELD_NUMBER: _ClassVar[int]
    LOADED_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    can: EngineAbilities
    loaded: ModelSignature
    precision: EnginePrecision
    state: EngineState
    run: str
    def __init__(self, can: _Optional[_Union[EngineAbilities, _Mapping]] = ..., loaded: _Optional[_Union[ModelSignature, _Mapping]] = ..., precision: _Optional[_Union[EnginePrecision, _Mapping]] = ..., state: _Optional[_Union[EngineState, str]] = ..., run: _Optional[str] = ...) -> None: ...

class ModelFile(_message.Message):
    __slots__ = ("name", "data")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    name: str
    data: bytes
    def __init__(self, name: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class LoadModelRequest(_message.Message):
    __slots__ = ("lease", "files", "precision", "anew")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    ANEW_FIELD_NUMBER: _ClassVar[int]
    lease: Lease
    files: _containers.RepeatedCompositeFieldContainer[ModelFile]
    precision: EnginePrecision
    anew: bool
    def __init__(self, lease: _Optional[_Union[Lease, _Mapping]] = ..., files: _Optional[_Iterable[_Union[ModelFile, _Mapping]]] = ..., precision: _Optional[_Union[EnginePrecision, _Mapping]] = ..., anew: bool = ...) -> None: ...

class LoadModelResponse(_message.Message):
    __slots__ = ("loaded",)
    LOADED_FIELD_NUMBER: _ClassVar[int]
    loaded: ModelSignature
    def __init__(self, loaded: _Optional[_Union[ModelSignature, _Mapping]] = ...) -> None: ...

class Cohort(_message.Message):
    __slots__ = ("id", "size", "try_number")
    ID_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    TRY_NUMBER_FIELD_NUMBER: _ClassVar[int]
    id: str
    size: int
    try_number: int
    def __init__(self, id: _Optional[str] = ..., size: _Optional[int] = ..., try_number: _Optional[int] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("id", "prompt_token_ids", "num_samples", "sampling", "seed", "cohort", "purpose", "with_routes", "require_policy_version")
    ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    COHORT_FIELD_NUMBER: _ClassVar[int]
    PURPOSE_FIELD_NUMBER: _ClassVar[int]
    WITH_ROUTES_FIELD_NUMBER: _ClassVar[int]
    REQUIRE_POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    id: _sequence_pb2.SlotId
    prompt_token_ids: _tensor_pb2.Tensor
    num_samples: int
    sampling: _sequence_pb2.SamplingParams
    seed: int
    cohort: Cohort
    purpose: Purpose
    with_routes: bool
    require_policy_version: int
    def __init__(self, id: _Optional[_Union[_sequence_pb2.SlotId, _Mapping]] = ..., prompt_token_ids: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., num_samples: _Optional[int] = ..., sampling: _Optional[_Union[_sequence_pb2.SamplingParams, _Mapping]] = ..., seed: _Optional[int] = ..., cohort: _Optional[_Union[Cohort, _Mapping]] = ..., purpose: _Optional[_Union[Purpose, str]] = ..., with_routes: bool = ..., require_policy_version: _Optional[int] = ...) -> None: ...

class SequenceChunk(_message.Message):
    __slots__ = ("sample", "token_ids", "rollout_logprobs", "routes")
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    ROLLOUT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ROUTES_FIELD_NUMBER: _ClassVar[int]
    sample: int
    token_ids: _tensor_pb2.Tensor
    rollout_logprobs: _tensor_pb2.Tensor
    routes: _tensor_pb2.Tensor
    def __init__(self, sample: _Optional[int] = ..., token_ids: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., rollout_logprobs: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., routes: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class SequenceComplete(_message.Message):
    __slots__ = ("sample", "finish_reason", "response_tokens", "route_rows", "routes_valid", "routes_xxh3", "policy_versions")
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ROUTE_ROWS_FIELD_NUMBER: _ClassVar[int]
    ROUTES_VALID_FIELD_NUMBER: _ClassVar[int]
    ROUTES_XXH3_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    sample: int
    finish_reason: _sequence_pb2.FinishReason
    response_tokens: int
    route_rows: int
    routes_valid: bool
    routes_xxh3: int
    policy_versions: _containers.RepeatedCompositeFieldContainer[_sequence_pb2.VersionSpan]
    def __init__(self, sample: _Optional[int] = ..., finish_reason: _Optional[_Union[_sequence_pb2.FinishReason, str]] = ..., response_tokens: _Optional[int] = ..., route_rows: _Optional[int] = ..., routes_valid: bool = ..., routes_xxh3: _Optional[int] = ..., policy_versions: _Optional[_Iterable[_Union[_sequence_pb2.VersionSpan, _Mapping]]] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("chunk", "complete")
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    chunk: SequenceChunk
    complete: SequenceComplete
    def __init__(self, chunk: _Optional[_Union[SequenceChunk, _Mapping]] = ..., complete: _Optional[_Union[SequenceComplete, _Mapping]] = ...) -> None: ...

class PauseRequest(_message.Message):
    __slots__ = ("lease", "mode")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    lease: Lease
    mode: PauseMode
    def __init__(self, lease: _Optional[_Union[Lease, _Mapping]] = ..., mode: _Optional[_Union[PauseMode, str]] = ...) -> None: ...

class PauseResponse(_message.Message):
    __slots__ = ("sequences_in_flight",)
    SEQUENCES_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    sequences_in_flight: int
    def __init__(self, sequences_in_flight: _Optional[int] = ...) -> None: ...

class ResumeRequest(_message.Message):
    __slots__ = ("lease",)
    LEASE_FIELD_NUMBER: _ClassVar[int]
    lease: Lease
    def __init__(self, lease: _Optional[_Union[Lease, _Mapping]] = ...) -> None: ...

class ResumeResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class BeginWeightUpdateRequest(_message.Message):
    __slots__ = ("lease", "manifest")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    lease: Lease
    manifest: _manifest_pb2.WeightManifest
    def __init__(self, lease: _Optional[_Union[Lease, _Mapping]] = ..., manifest: _Optional[_Union[_manifest_pb2.WeightManifest, _Mapping]] = ...) -> None: ...

class BeginWeightUpdateResponse(_message.Message):
    __slots__ = ("already_served",)
    ALREADY_SERVED_FIELD_NUMBER: _ClassVar[int]
    already_served: bool
    def __init__(self, already_served: bool = ...) -> None: ...

class TensorChunk(_message.Message):
    __slots__ = ("name", "offset_bytes", "data")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    name: str
    offset_bytes: int
    data: bytes
    def __init__(self, name: _Optional[str] = ..., offset_bytes: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class UpdateWeightsRequest(_message.Message):
    __slots__ = ("lease", "policy_version", "chunk", "safetensors_path")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    SAFETENSORS_PATH_FIELD_NUMBER: _ClassVar[int]
    lease: Lease
    policy_version: int
    chunk: TensorChunk
    safetensors_path: str
    def __init__(self, lease: _Optional[_Union[Lease, _Mapping]] = ..., policy_version: _Optional[int] = ..., chunk: _Optional[_Union[TensorChunk, _Mapping]] = ..., safetensors_path: _Optional[str] = ...) -> None: ...

class UpdateWeightsResponse(_message.Message):
    __slots__ = ("staged_bytes",)
    STAGED_BYTES_FIELD_NUMBER: _ClassVar[int]
    staged_bytes: int
    def __init__(self, staged_bytes: _Optional[int] = ...) -> None: ...

class FinishWeightUpdateRequest(_message.Message):
    __slots__ = ("lease", "policy_version", "fingerprint", "probe_token_ids")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    PROBE_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    lease: Lease
    policy_version: int
    fingerprint: int
    probe_token_ids: _tensor_pb2.Tensor
    def __init__(self, lease: _Optional[_Union[Lease, _Mapping]] = ..., policy_version: _Optional[int] = ..., fingerprint: _Optional[int] = ..., probe_token_ids: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class FinishWeightUpdateResponse(_message.Message):
    __slots__ = ("policy_version", "probe_logprobs")
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    PROBE_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    policy_version: int
    probe_logprobs: _tensor_pb2.Tensor
    def __init__(self, policy_version: _Optional[int] = ..., probe_logprobs: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class GetWeightVersionRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetWeightVersionResponse(_message.Message):
    __slots__ = ("policy_version", "fingerprint", "state")
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    policy_version: int
    fingerprint: int
    state: EngineState
    def __init__(self, policy_version: _Optional[int] = ..., fingerprint: _Optional[int] = ..., state: _Optional[_Union[EngineState, str]] = ...) -> None: ...
