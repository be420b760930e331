from keel.types.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WeightTransport(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WEIGHT_TRANSPORT_UNSPECIFIED: _ClassVar[WeightTransport]
    WEIGHT_TRANSPORT_STREAM: _ClassVar[WeightTransport]
    WEIGHT_TRANSPORT_SAFETENSORS: _ClassVar[WeightTransport]
WEIGHT_TRANSPORT_UNSPECIFIED: WeightTransport
WEIGHT_TRANSPORT_STREAM: WeightTransport
WEIGHT_TRANSPORT_SAFETENSORS: WeightTransport

class TensorEntry(_message.Message):
    __slots__ = ("name", "dtype", "shape", "xxh3")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    XXH3_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: _tensor_pb2.DType
    shape: _containers.RepeatedScalarFieldContainer[int]
    xxh3: int
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[_Union[_tensor_pb2.DType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., xxh3: _Optional[int] = ...) -> None: ...

class WeightManifest(_message.Message):
    __slots__ = ("policy_version", "base_version", "fingerprint", "tensors", "transport")
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    BASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    policy_version: int
    base_version: int
    fingerprint: int
    tensors: _containers.RepeatedCompositeFieldContainer[TensorEntry]
    transport: WeightTransport
    def __init__(self, policy_version: _Optional[int] = ..., base_version: _Optional[int] = ..., fingerprint: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[TensorEntry, _Mapping]]] = ..., transport: _Optional[_Union[WeightTransport, str]] = ...) -> None: ...
