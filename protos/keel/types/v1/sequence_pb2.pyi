from keel.types.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RouteCodec(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROUTE_CODEC_UNSPECIFIED: _ClassVar[RouteCodec]
    ROUTE_CODEC_DENSE: _ClassVar[RouteCodec]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_ABORTED: _ClassVar[FinishReason]
ROUTE_CODEC_UNSPECIFIED: RouteCodec
ROUTE_CODEC_DENSE: RouteCodec
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_ABORTED: FinishReason

class SlotId(_message.Message):
    __slots__ = ("run", "attempt", "lap", "slot")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    LAP_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    run: str
    attempt: int
    lap: int
    slot: int
    def __init__(self, run: _Optional[str] = ..., attempt: _Optional[int] = ..., lap: _Optional[int] = ..., slot: _Optional[int] = ...) -> None: ...

class SequenceId(_message.Message):
    __slots__ = ("slot", "sample")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    slot: SlotId
    sample: int
    def __init__(self, slot: _Optional[_Union[SlotId, _Mapping]] = ..., sample: _Optional[int] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "max_tokens", "stop_token_ids")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., max_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Span(_message.Message):
    __slots__ = ("begin", "end")
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    begin: int
    end: int
    def __init__(self, begin: _Optional[int] = ..., end: _Optional[int] = ...) -> None: ...

class VersionSpan(_message.Message):
    __slots__ = ("span", "policy_version")
    SPAN_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    span: Span
    policy_version: int
    def __init__(self, span: _Optional[_Union[Span, _Mapping]] = ..., policy_version: _Optional[int] = ...) -> None: ...

class BlobRef(_message.Message):
    __slots__ = ("uri", "size_bytes", "xxh3")
    URI_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    XXH3_FIELD_NUMBER: _ClassVar[int]
    uri: str
    size_bytes: int
    xxh3: int
    def __init__(self, uri: _Optional[str] = ..., size_bytes: _Optional[int] = ..., xxh3: _Optional[int] = ...) -> None: ...

class Routes(_message.Message):
    __slots__ = ("codec", "inline", "blob")
    CODEC_FIELD_NUMBER: _ClassVar[int]
    INLINE_FIELD_NUMBER: _ClassVar[int]
    BLOB_FIELD_NUMBER: _ClassVar[int]
    codec: RouteCodec
    inline: _tensor_pb2.Tensor
    blob: BlobRef
    def __init__(self, codec: _Optional[_Union[RouteCodec, str]] = ..., inline: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., blob: _Optional[_Union[BlobRef, _Mapping]] = ...) -> None: ...

class RewardPart(_message.Message):
    __slots__ = ("name", "value")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: float
    def __init__(self, name: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...

class Sequence(_message.Message):
    __slots__ = ("id", "token_ids", "prompt_length", "trainable", "rollout_logprobs", "sampling", "routes", "routes_valid", "routes_xxh3", "policy_versions", "finish_reason", "reward", "reward_parts", "invalid_reason")
    ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    TRAINABLE_FIELD_NUMBER: _ClassVar[int]
    ROLLOUT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    ROUTES_FIELD_NUMBER: _ClassVar[int]
    ROUTES_VALID_FIELD_NUMBER: _ClassVar[int]
    ROUTES_XXH3_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    REWARD_FIELD_NUMBER: _ClassVar[int]
    REWARD_PARTS_FIELD_NUMBER: _ClassVar[int]
    INVALID_REASON_FIELD_NUMBER: _ClassVar[int]
    id: SequenceId
    token_ids: _tensor_pb2.Tensor
    prompt_length: int
    trainable: _containers.RepeatedCompositeFieldContainer[Span]
    rollout_logprobs: _tensor_pb2.Tensor
    sampling: SamplingParams
    routes: Routes
    routes_valid: bool
    routes_xxh3: int
    policy_versions: _containers.RepeatedCompositeFieldContainer[VersionSpan]
    finish_reason: FinishReason
    reward: float
    reward_parts: _containers.RepeatedCompositeFieldContainer[RewardPart]
    invalid_reason: str
    def __init__(self, id: _Optional[_Union[SequenceId, _Mapping]] = ..., token_ids: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., prompt_length: _Optional[int] = ..., trainable: _Optional[_Iterable[_Union[Span, _Mapping]]] = ..., rollout_logprobs: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., routes: _Optional[_Union[Routes, _Mapping]] = ..., routes_valid: bool = ..., routes_xxh3: _Optional[int] = ..., policy_versions: _Optional[_Iterable[_Union[VersionSpan, _Mapping]]] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., reward: _Optional[float] = ..., reward_parts: _Optional[_Iterable[_Union[RewardPart, _Mapping]]] = ..., invalid_reason: _Optional[str] = ...) -> None: ...

class Group(_message.Message):
    __slots__ = ("sequences", "generate_s", "engine")
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    GENERATE_S_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    sequences: _containers.RepeatedCompositeFieldContainer[Sequence]
    generate_s: float
    engine: str
    def __init__(self, sequences: _Optional[_Iterable[_Union[Sequence, _Mapping]]] = ..., generate_s: _Optional[float] = ..., engine: _Optional[str] = ...) -> None: ...

class VoidSlot(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Demonstration(_message.Message):
    __slots__ = ("token_ids", "prompt_length")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    token_ids: _tensor_pb2.Tensor
    prompt_length: int
    def __init__(self, token_ids: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., prompt_length: _Optional[int] = ...) -> None: ...

class DemonstrationBatch(_message.Message):
    __slots__ = ("demonstrations",)
    DEMONSTRATIONS_FIELD_NUMBER: _ClassVar[int]
    demonstrations: _containers.RepeatedCompositeFieldContainer[Demonstration]
    def __init__(self, demonstrations: _Optional[_Iterable[_Union[Demonstration, _Mapping]]] = ...) -> None: ...

class Envelope(_message.Message):
    __slots__ = ("id", "group", "void", "demonstrations")
    ID_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    VOID_FIELD_NUMBER: _ClassVar[int]
    DEMONSTRATIONS_FIELD_NUMBER: _ClassVar[int]
    id: SlotId
    group: Group
    void: VoidSlot
    demonstrations: DemonstrationBatch
    def __init__(self, id: _Optional[_Union[SlotId, _Mapping]] = ..., group: _Optional[_Union[Group, _Mapping]] = ..., void: _Optional[_Union[VoidSlot, _Mapping]] = ..., demonstrations: _Optional[_Union[DemonstrationBatch, _Mapping]] = ...) -> None: ...
