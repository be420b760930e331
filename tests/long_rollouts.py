"""Synthetic responses of 32,768 tokens with the routes of 48 MoE layers, 8 of 128 experts each."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import numpy as np
import numpy.typing as npt
from collector_peers import ScriptedEngine

from keel.codec import fill, to_ndarray, xxh3
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.types.v1 import sequence_pb2

TOKENS = 32768
LAYERS, TOP_K, EXPERTS = 48, 8, 128
_CHUNK_TOKENS = 2048
"""768 KiB of routes: messages stay below 1 MiB, as an engine's do."""


def make_routes(seed: int, rows: int) -> npt.NDArray[np.uint8]:
    """[rows, 48, 8], the ids of a cell distinct: one from each sixteen, in random order."""
    offsets_TL = np.random.default_rng(seed).integers(0, 16, (rows, LAYERS), np.uint8)
    places_K = np.random.default_rng(seed + 1).permutation(TOP_K).astype(np.uint8) * 16
    return offsets_TL[..., None] + places_K


class LongEngine(ScriptedEngine):
    """Answers every prompt with full-length responses, and remembers their hashes."""

    def __init__(self) -> None:
        super().__init__()
        self.max_sequence_tokens = TOKENS + 100
        self.hashes: dict[tuple[int, int, int], tuple[int, int, int]] = {}
        """Of response tokens, log-probs and routes, by lap, slot and sample."""

    async def GetCapabilities(
        self, request: pb.GetCapabilitiesRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetCapabilitiesResponse:
        reply = await super().GetCapabilities(request, context)
        reply.loaded.moe_layers[:] = range(LAYERS)
        reply.loaded.experts_per_token, reply.loaded.num_experts = TOP_K, EXPERTS
        return reply

    def _answer(self, request: pb.GenerateRequest, sample: int) -> Iterator[pb.GenerateResponse]:  # type: ignore[override]
        prompt_P = to_ndarray(request.prompt_token_ids, "p", dtypes=("int32",), shape=(None,))
        tokens = request.sampling.max_tokens
        seed = 10_000 * request.id.lap + 100 * request.id.slot + sample
        rng = np.random.default_rng(seed)
        ids_R = rng.integers(2, 60, tokens, np.int32)
        logprobs_R = -rng.random(tokens, np.float32)
        routes_TLK = make_routes(seed, len(prompt_P) + tokens - 1)
        hashes = tuple(map(xxh3, (ids_R, logprobs_R, routes_TLK)))
        self.hashes[request.id.lap, request.id.slot, sample] = hashes
        for begin in range(0, len(routes_TLK), _CHUNK_TOKENS):
            places = slice(begin, begin + _CHUNK_TOKENS)
            message = pb.GenerateResponse()
            message.chunk.sample = sample
            if begin < tokens:
                fill(message.chunk.token_ids, ids_R[places])
                fill(message.chunk.rollout_logprobs, logprobs_R[places])
            fill(message.chunk.routes, routes_TLK[places])
            yield message
        end = pb.GenerateResponse()
        end.complete.sample = sample
        end.complete.route_rows = len(routes_TLK)
        end.complete.routes_valid = True
        end.complete.routes_xxh3 = xxh3(routes_TLK)
        end.complete.finish_reason = sequence_pb2.FINISH_REASON_LENGTH
        end.complete.response_tokens = tokens
        end.complete.policy_versions.add(
            span=sequence_pb2.Span(begin=len(prompt_P), end=len(prompt_P) + tokens),
            policy_version=request.require_policy_version,
        )
        yield end
