"""What an engine says of a group, as the messages of the stream."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import xxhash

from keel import codec
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.rpc import CHUNK_BYTES
from keel_rollout.engines.base import Finished, Piece

CHUNK_TOKENS = 512
"""Most tokens of one chunk, so that a reader sees progress."""


class GroupMessages:
    """Cuts pieces into chunks, and keeps the counts and hashes that `complete` carries."""

    def __init__(self, num_samples: int) -> None:
        self._tokens = [0] * num_samples
        self._rows = [0] * num_samples
        self._digests = [xxhash.xxh3_64() for _ in range(num_samples)]

    def messages(self, event: Piece | Finished) -> Iterator[pb.GenerateResponse]:
        """The messages for one event, in order."""
        if isinstance(event, Finished):
            yield self._complete(event)
        else:
            yield from self._chunks(event)

    def _chunks(self, piece: Piece) -> Iterator[pb.GenerateResponse]:
        sample, routes_RLK = piece.sample, None
        self._tokens[sample] += len(piece.token_ids_T)
        rows, rows_a_chunk = 0, CHUNK_TOKENS
        if piece.routes_RLK is not None:
            routes_RLK = np.ascontiguousarray(piece.routes_RLK)
            rows = len(routes_RLK)
            self._rows[sample] += rows
            self._digests[sample].update(routes_RLK.data)
            row_bytes = max(1, routes_RLK[:1].nbytes)
            rows_a_chunk = max(1, min(CHUNK_TOKENS, CHUNK_BYTES // row_bytes))
        for begin in range(0, max(len(piece.token_ids_T), rows), rows_a_chunk):
            end = begin + rows_a_chunk
            message = pb.GenerateResponse()
            chunk = message.chunk
            chunk.sample = sample
            if begin < len(piece.token_ids_T):
                codec.fill(chunk.token_ids, piece.token_ids_T[begin:end])
                codec.fill(chunk.rollout_logprobs, piece.rollout_logprobs_T[begin:end])
            if routes_RLK is not None and begin < rows:
                codec.fill(chunk.routes, routes_RLK[begin:end])
            yield message

    def _complete(self, finished: Finished) -> pb.GenerateResponse:
        sample = finished.sample
        message = pb.GenerateResponse()
        complete = message.complete
        complete.sample, complete.finish_reason = sample, finished.reason
        complete.response_tokens, complete.route_rows = self._tokens[sample], self._rows[sample]
        complete.routes_valid = finished.routes_valid
        if self._rows[sample]:
            complete.routes_xxh3 = self._digests[sample].intdigest()
        for run in finished.versions:
            entry = complete.policy_versions.add(policy_version=run.policy_version)
            entry.span.begin, entry.span.end = run.begin, run.end
        return message
