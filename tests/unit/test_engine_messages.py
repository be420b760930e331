"""Pieces become chunks of bounded size; counts and hashes are kept over all of them."""

from __future__ import annotations

import numpy as np

from keel import codec
from keel.rpc import CHUNK_BYTES
from keel.types.v1 import sequence_pb2
from keel_rollout.engines.base import Finished, Piece, VersionRun
from keel_rollout.engines.messages import CHUNK_TOKENS, GroupMessages


def test_routes_of_a_large_model_are_cut_at_one_mebibyte() -> None:
    """2,000 tokens after a prompt of 6,000, 48 x 8 routes: 3 MB; tokens and rows come in order."""
    rng = np.random.default_rng(0)
    routes = rng.integers(0, 128, (7999, 48, 8), np.uint8)
    tokens, logprobs = np.arange(2000, dtype=np.int32), rng.normal(size=2000).astype(np.float32)
    messages = GroupMessages(2)
    chunks = [m.chunk for m in messages.messages(Piece(1, tokens, logprobs, routes))]
    assert all(chunk.ByteSize() <= CHUNK_BYTES + 20_000 for chunk in chunks)
    assert all(len(chunk.token_ids.data) <= 4 * CHUNK_TOKENS for chunk in chunks)
    assert b"".join(chunk.token_ids.data for chunk in chunks) == tokens.tobytes()
    assert b"".join(chunk.rollout_logprobs.data for chunk in chunks) == logprobs.tobytes()
    assert b"".join(chunk.routes.data for chunk in chunks) == routes.tobytes()
    ending = Finished(1, sequence_pb2.FINISH_REASON_STOP, (VersionRun(6000, 8000, 3),), True)
    (complete,) = [m.complete for m in messages.messages(ending)]
    assert (complete.response_tokens, complete.route_rows) == (2000, 7999)
    assert complete.routes_xxh3 == codec.xxh3(routes)
    assert complete.policy_versions[0].span.end == 8000


def test_a_sequence_that_never_began_carries_nothing() -> None:
    """Aborted before its first token: zero counts, hash 0, routes not valid."""
    ending = Finished(0, sequence_pb2.FINISH_REASON_ABORTED)
    (complete,) = [m.complete for m in GroupMessages(1).messages(ending)]
    assert (complete.response_tokens, complete.route_rows, complete.routes_xxh3) == (0, 0, 0)
    assert not complete.routes_valid
