"""How many bytes sequences, laps and cohorts take at most, and sizes as people write them."""

from __future__ import annotations

import re

from keel.codec import routes_dtype
from keel.errors import InvalidField

_TOKEN_BYTES = 4 + 4
"""A token id and a log-prob."""
OTHER_BYTES = 1024
"""The rest of a sequence's message: ids, sampling, versions, reward and its parts, shapes."""
MESSAGE_BYTES = 2**31 - 1
"""The largest protobuf message, so the largest group."""
REDIS_VALUE_BYTES = 512 * 2**20
"""The largest value that Redis takes as it comes, so the largest group without a blob store."""

_UNITS = {
    "": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate(("", "K", "M", "G", "T"))},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate(("K", "M", "G", "T"), start=1)},
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


def token_bytes(*, layers: int, top_k: int, experts: int) -> int:
    """Bytes of one token: 4 + 4 + L x K x itemsize; see `sequence_bytes`."""
    return _TOKEN_BYTES + (layers * top_k * routes_dtype(experts).itemsize if layers else 0)


def sequence_bytes(tokens: int, *, layers: int, top_k: int, experts: int) -> int:
    """Most bytes of one sequence on the wire: tokens x (4 + 4 + L x K x itemsize), and a little.

    Args:
        tokens: T, prompt and response.
        layers: L, MoE layers whose routes come with it; 0 for none.
        top_k: K, experts a token.
        experts: E, which decides whether an id takes one byte or two.

    Example:
        sequence_bytes(32768, layers=48, top_k=8, experts=128) == 12_846_080
    """
    return tokens * token_bytes(layers=layers, top_k=top_k, experts=experts) + OTHER_BYTES


def lap_bytes(
    slots: int, group_size: int, tokens: int, *, layers: int, top_k: int, experts: int
) -> int:
    """Most bytes of the envelopes of a lap of `slots` groups of sequences of `tokens`.

    Example:
        lap_bytes(4 * 64, 16, 33_000, layers=48, top_k=8, experts=128) == 52_990_050_304  # 53 GB
    """
    one = sequence_bytes(tokens, layers=layers, top_k=top_k, experts=experts)
    return slots * group_size * one


def parse_bytes(text: str, field: str) -> int:
    """A size from "500MB", "2 GiB" or "1048576"; InvalidField, naming `field`, for any other.

    kB, MB, GB and TB are powers of 1000; KiB, MiB, GiB and TiB of 1024. Case does not count.
    """
    match = _SIZE.fullmatch(text.strip())
    units = {name.lower(): factor for name, factor in _UNITS.items()}
    if match is None or match[2].lower() not in units:
        raise InvalidField(field, text, "bytes, such as 1048576, 500MB or 2GiB")
    return int(float(match[1]) * units[match[2].lower()])


def show_bytes(size: float) -> str:
    """A size in the largest unit that keeps it at 1 or more, three digits: "8.59 GB"."""
    size = float(f"{size:.3g}")
    for power, prefix in ((4, "T"), (3, "G"), (2, "M"), (1, "k")):
        if size >= 1000**power:
            number = size / 1000**power
            digits = 2 if number < 10 else 1 if number < 100 else 0
            return f"{number:.{digits}f} {prefix}B"
    return f"{size:.0f} bytes"
