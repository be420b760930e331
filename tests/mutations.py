"""Seeded mutations of protobuf messages: of their bytes, of their fields, of their values.

A message is taken apart as anybody can who has its bytes: fields of a number, a wire type and a
value, and within those that are messages themselves, theirs. What is put together again has right
lengths, so that what is wrong lies deep and a parser lets it pass.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
ODD_INTEGERS = (
    *(0, 1, 2, 3, 7, 15, 16, 17, 63, 64, 65, 127, 128, 255, 256, 511, 512, 513, 1023, 1024, 1025),
    *(65_535, 65_536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1),
)
ODD_FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 3.4e38, float("inf"), float("-inf"), float("nan"))
ODD_TEXTS = ("", "\0", "..", "../../etc/passwd", "a" * 300, "\u202e\U0001f600", "%s{0}")
DEEP = 200
"""Levels of nesting; protobuf takes 100."""

Field = tuple[int, int, Any]
"""Number, wire type, and int or bytes."""
Rng = random.Random


def mutated(data: bytes, others: Sequence[bytes], make: type[Message], rng: Rng) -> bytes:
    """`data`, a message of type `make`, with one to three mutations.

    Args:
        others: serialized messages, of this type or another, to splice with.
    """
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kind = rng.random()
        if kind < 0.4:
            data = _odd_value(data, make, rng)
        elif kind < 0.75:
            data = _odd_fields(data, rng)
        elif kind < 0.85:
            data = _spliced(data, rng.choice(others), rng)
        else:
            data = rng.choice(BYTE_MUTATIONS)(data, rng)
    return data


# -- of bytes ----------------------------------------------------------------------------------


def _flipped(data: bytes, rng: Rng) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8) if changed else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _truncated(data: bytes, rng: Rng) -> bytes:
    return data[: rng.randint(0, len(data))]


def _stuffed(data: bytes, rng: Rng) -> bytes:
    at = rng.randint(0, len(data))
    return data[:at] + rng.randbytes(rng.randint(1, 64)) + data[at:]


def _random(data: bytes, rng: Rng) -> bytes:
    return rng.randbytes(rng.choice((0, 1, 2, 8, 64, 1024)))


def _huge_length(data: bytes, rng: Rng) -> bytes:
    """A field that says it has more bytes than there are."""
    length = rng.choice((len(data) + 1, 2**28, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1))
    return data + varint(rng.randint(1, 10) << 3 | BYTES) + varint(length) + rng.randbytes(4)


def _nested(data: bytes, rng: Rng) -> bytes:
    """A message in a message in a message."""
    number = rng.randint(1, 6)
    for _ in range(DEEP):
        data = encoded([(number, BYTES, data)])
    return data


BYTE_MUTATIONS: Sequence[Callable[[bytes, Rng], bytes]] = (
    *(_flipped, _truncated, _stuffed, _random, _huge_length, _nested),
)


def _spliced(data: bytes, other: bytes, rng: Rng) -> bytes:
    """The beginning of one and the end of another, or one after the other: their fields merge."""
    if rng.random() < 0.5:
        return data + other
    return data[: rng.randint(0, len(data))] + other[rng.randint(0, len(other)) :]


# -- of fields ---------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    """An unsigned integer below 2^64 as protobuf writes it."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def decoded(data: bytes) -> list[Field] | None:
    """The fields of a message; None if these bytes are none."""
    fields: list[Field] = []
    at = 0
    try:
        while at < len(data):
            tag, at = _read_varint(data, at)
            number, wire = tag >> 3, tag & 7
            if not number:
                return None
            if wire == VARINT:
                value, at = _read_varint(data, at)
                fields.append((number, wire, value))
                continue
            size = {FIXED64: 8, FIXED32: 4}.get(wire)
            if wire == BYTES:
                size, at = _read_varint(data, at)
            if size is None or at + size > len(data):
                return None
            fields.append((number, wire, data[at : at + size]))
            at += size
    except IndexError:
        return None
    return fields


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128 or shift > 63:
            return value & (2**64 - 1), at


def encoded(fields: Sequence[Field]) -> bytes:
    """The bytes of a message, whatever its fields are."""
    out = bytearray()
    for number, wire, value in fields:
        out += varint(number << 3 | wire)
        if wire == VARINT:
            out += varint(value)
        else:
            out += (varint(len(value)) if wire == BYTES else b"") + value
    return bytes(out)


def _odd_fields(data: bytes, rng: Rng) -> bytes:
    fields = decoded(data)
    if not fields:
        return data + encoded([_odd_field(rng)])
    place = rng.randrange(len(fields))
    number, wire, value = fields[place]
    if wire == BYTES and decoded(value) and rng.random() < 0.6:
        fields[place] = (number, wire, _odd_fields(value, rng))
        return encoded(fields)
    match rng.randrange(7):
        case 0:
            del fields[place]
        case 1:
            fields.insert(rng.randrange(len(fields)), fields[place])
        case 2:
            fields += [fields[place]] * rng.randint(1, 30)
        case 3:
            rng.shuffle(fields)
        case 4:
            fields[place] = _odd_field(rng, number)
        case 5:
            fields[place] = (rng.randint(1, 20), wire, value)
        case 6:
            fields.insert(place, _odd_field(rng))
    return encoded(fields)


def _odd_field(rng: Rng, number: int = 0) -> Field:
    number = number or rng.choice((*range(1, 15), 1000, 2**29 - 1))
    wire = rng.choice((VARINT, FIXED64, BYTES, FIXED32))
    if wire == VARINT:
        return number, wire, rng.choice(ODD_INTEGERS)
    size = {FIXED64: 8, FIXED32: 4}.get(wire, rng.choice((0, 1, 4, 8, 100)))
    return number, wire, rng.randbytes(size)


# -- of values ---------------------------------------------------------------------------------


def _odd_value(data: bytes, make: type[Message], rng: Rng) -> bytes:
    """One value, anywhere, replaced by one that its type allows."""
    message = make()
    try:
        message.ParseFromString(data)
    except DecodeError:
        return data
    _set_odd(message, rng)
    return message.SerializeToString()


def _set_odd(message: Any, rng: Rng) -> None:
    fields: Sequence[FieldDescriptor] = message.DESCRIPTOR.fields
    if not fields:
        return
    field = rng.choice(fields)
    if field.is_repeated:
        _set_odd_item(message, field, rng)
    elif field.message_type is not None:
        inner = getattr(message, field.name)
        if rng.random() < 0.1:
            message.ClearField(field.name)
        else:
            inner.SetInParent()
            _set_odd(inner, rng)
    else:
        setattr(message, field.name, odd(field, rng))


def _set_odd_item(message: Any, field: FieldDescriptor, rng: Rng) -> None:
    items = getattr(message, field.name)
    if rng.random() < 0.3 or not len(items):
        if field.message_type is not None:
            _set_odd(items.add(), rng)
        else:
            items.append(odd(field, rng))
        return
    place = rng.randrange(len(items))
    if rng.random() < 0.2:
        del items[place]
    elif field.message_type is not None:
        _set_odd(items[place], rng)
    else:
        items[place] = odd(field, rng)


def odd(field: FieldDescriptor, rng: Rng) -> Any:
    """A value that the field's type can hold, at or beyond an edge of what is sensible."""
    kind = field.cpp_type
    if kind in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return rng.choice((*ODD_FLOATS, struct.unpack("<f", rng.randbytes(4))[0]))
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return rng.randint(-1, 9)
    if kind == FieldDescriptor.CPPTYPE_STRING:
        if field.type == FieldDescriptor.TYPE_BYTES:
            return rng.randbytes(rng.choice((0, 1, 3, 4, 8, 1000)))
        return rng.choice(ODD_TEXTS)
    bits, signed = {
        FieldDescriptor.CPPTYPE_INT32: (31, True),
        FieldDescriptor.CPPTYPE_INT64: (63, True),
        FieldDescriptor.CPPTYPE_UINT32: (32, False),
        FieldDescriptor.CPPTYPE_UINT64: (64, False),
    }[kind]
    value = rng.choice([number for number in ODD_INTEGERS if number < 2**bits])
    return -value if signed and rng.random() < 0.4 else value
