"""What the wire costs: encode + decode of one sequence of 4,096 tokens with 48 x 8 routes.

`make bench-wire`. Prints nanoseconds a token, medians of interleaved rounds on one thread, beside
two peers (JSON, protobuf `repeated` fields in place of bytes) and a limit (copying the same bytes).
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import numpy as np

from keel import codec
from keel.queue import pack, unpack
from keel.types.v1 import sequence_pb2
from keel.weights.v1 import manifest_pb2

TOKENS, PROMPT, LAYERS, TOP_K, EXPERTS = 4096, 256, 48, 8, 128
ROUNDS = 15


def arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids int32 [T], log-probs float32 [T - P], routes uint8 [T - 1, L, K]."""
    rng = np.random.default_rng(0)
    scores = rng.random((TOKENS - 1, LAYERS, EXPERTS), dtype=np.float32)
    routes = np.argpartition(scores, TOP_K, axis=-1)[..., :TOP_K].astype(np.uint8)
    tokens = rng.integers(0, 151_936, TOKENS).astype(np.int32)
    return tokens, -rng.random(TOKENS - PROMPT).astype(np.float32), routes


def encode(tokens: np.ndarray, logprobs: np.ndarray, routes: np.ndarray) -> bytes:
    """A whole envelope, as the collector makes it, checksum included."""
    envelope = sequence_pb2.Envelope(id=sequence_pb2.SlotId(run="bench"))
    sequence = envelope.group.sequences.add(
        prompt_length=PROMPT,
        trainable=[sequence_pb2.Span(begin=PROMPT, end=TOKENS)],
        routes_valid=True,
        routes_xxh3=codec.xxh3(routes),
    )
    codec.fill(sequence.token_ids, tokens)
    codec.fill(sequence.rollout_logprobs, logprobs)
    sequence.routes.codec = sequence_pb2.ROUTE_CODEC_DENSE
    codec.fill(sequence.routes.inline, routes)
    return pack(envelope)


def decode(fields: dict[bytes, bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The arrays again, checksum verified."""
    (sequence,) = unpack(fields, run="bench").group.sequences
    tokens = codec.to_ndarray(sequence.token_ids, "tokens", dtypes=("int32",), shape=(None,))
    logprobs = codec.to_ndarray(
        sequence.rollout_logprobs, "logprobs", dtypes=("float32",), shape=(None,)
    )
    routes = codec.to_ndarray(
        sequence.routes.inline, "routes", dtypes=("uint8",), shape=(len(tokens) - 1, LAYERS, TOP_K)
    )
    assert codec.xxh3(routes) == sequence.routes_xxh3
    return tokens, logprobs, routes


def json_round_trip(tokens: np.ndarray, logprobs: np.ndarray, routes: np.ndarray) -> object:
    """The peer that many services use."""
    text = json.dumps([tokens.tolist(), logprobs.tolist(), routes.tolist()])
    return [np.array(part) for part in json.loads(text)]


def repeated_round_trip(tokens: np.ndarray, logprobs: np.ndarray, routes: np.ndarray) -> object:
    """Protobuf with `repeated int64` in place of bytes (TensorEntry.shape serves as the field)."""
    message = manifest_pb2.TensorEntry(shape=routes.reshape(-1).tolist())
    back = manifest_pb2.TensorEntry.FromString(message.SerializeToString())
    return np.array(back.shape, dtype=np.uint8)


def seconds(action: Callable[[], object]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def main() -> None:
    """Checks correctness, then times."""
    parts = arrays()
    data = encode(*parts)
    for sent, received in zip(parts, decode(data), strict=True):
        assert np.array_equal(sent, received)
    payload = b"".join(part.tobytes() for part in parts)
    contenders: dict[str, tuple[Callable[[], object], int]] = {
        "keel: encode + decode, with checksums": (lambda: decode(encode(*parts)), 1),
        "keel: encode": (lambda: encode(*parts), 1),
        "keel: decode": (lambda: decode(data), 1),
        "limit: copy of the same bytes": (lambda: bytearray(payload), 1),
        "peer: protobuf repeated, routes only": (lambda: repeated_round_trip(*parts), 5),
        "peer: JSON": (lambda: json_round_trip(*parts), 5),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(ROUNDS):
        for name, (action, every) in contenders.items():
            if round_number % every == 0:
                times[name].append(seconds(action))
    print(f"{TOKENS} tokens, {LAYERS} x {TOP_K} routes, {len(data) / 2**20:.2f} MiB on the wire")
    ours = statistics.median(times["keel: encode + decode, with checksums"])
    for name, measured in times.items():
        median = statistics.median(measured)
        print(f"  {name:40s} {median / TOKENS * 1e9:10.1f} ns/token {median / ours:9.2f} x")


if __name__ == "__main__":
    main()
