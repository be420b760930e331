"""A breaking change to the protos fails here.

`descriptors_v1.json` is what version 1 promised. Additions are recorded with
`python tests/contract/test_descriptors.py`, which refuses to record a removal.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from google.protobuf import descriptor

from keel.rollout.v1 import rollout_service_pb2
from keel.trainer.v1 import trainer_service_pb2
from keel.types.v1 import sequence_pb2, tensor_pb2
from keel.weights.v1 import manifest_pb2

SNAPSHOT = Path(__file__).with_name("descriptors_v1.json")
FILES = (tensor_pb2, sequence_pb2, manifest_pb2, rollout_service_pb2, trainer_service_pb2)


def promised() -> dict[str, Any]:
    """Everything on the wire: full name -> what readers and writers rely on."""
    flat: dict[str, Any] = {}
    for module in FILES:
        file = module.DESCRIPTOR
        for message in file.message_types_by_name.values():
            for field in message.fields:
                kind = field.message_type or field.enum_type
                flat[field.full_name] = [
                    field.number,
                    field.type,
                    bool(field.is_repeated),
                    kind.full_name if kind else "",
                    field.containing_oneof.name if field.containing_oneof else "",
                ]
        for enum in file.enum_types_by_name.values():
            for value in enum.values:
                flat[f"{enum.full_name}.{value.name}"] = value.number
        for service in file.services_by_name.values():
            for method in service.methods:
                flat[method.full_name] = [
                    method.input_type.full_name,
                    bool(method.client_streaming),
                    method.output_type.full_name,
                    bool(method.server_streaming),
                ]
    return flat


def broken(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What the old contract promised and the new one does not keep."""
    return [
        f"{name}: was {value}, is {new.get(name)}"
        for name, value in old.items()
        if new.get(name) != value
    ]


def test_no_promise_is_broken() -> None:
    assert broken(json.loads(SNAPSHOT.read_text()), promised()) == []


def test_every_addition_is_recorded() -> None:
    assert json.loads(SNAPSHOT.read_text()).keys() == promised().keys(), (
        "run: python tests/contract/test_descriptors.py"
    )


def test_a_renumbered_field_counts_as_broken() -> None:
    old = promised()
    name = "keel.types.v1.Tensor.data"
    assert broken(old, old | {name: [4, *old[name][1:]]}) == [
        f"{name}: was {old[name]}, is {[4, *old[name][1:]]}"
    ]
    assert broken(old, {key: value for key, value in old.items() if key != name})


def test_every_field_is_commented() -> None:
    """Who writes it and who reads it is part of the contract."""
    root = Path(tensor_pb2.__file__).parents[3]
    for module in FILES:
        lines = (root / module.DESCRIPTOR.name).read_text().splitlines()
        for number, line in enumerate(lines):
            text = line.strip()
            declares = text.endswith(";") and "=" in text and not text.startswith(("//", "syntax"))
            if declares or text.startswith(("rpc ", "message ", "enum ", "service ")):
                assert lines[number - 1].strip().startswith("//"), (
                    f"{module.DESCRIPTOR.name}:{number + 1} has no comment: {text}"
                )


def test_enums_begin_with_unspecified() -> None:
    """So that an unset field is seen."""
    for module in FILES:
        for enum in module.DESCRIPTOR.enum_types_by_name.values():
            assert isinstance(enum, descriptor.EnumDescriptor)
            assert enum.values_by_number[0].name.endswith("_UNSPECIFIED"), enum.full_name


if __name__ == "__main__":
    lost = broken(json.loads(SNAPSHOT.read_text()), promised()) if SNAPSHOT.exists() else []
    if lost:
        sys.exit("not recorded, this breaks readers of version 1:\n" + "\n".join(lost))
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in promised().items()]
    SNAPSHOT.write_text("{\n" + ",\n".join(lines) + "\n}\n")
