"""From the engine's stream to whole responses, checked against what `complete` says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from keel import codec
from keel.errors import WireError
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.types.v1 import sequence_pb2
from keel_rollout.collector.routes import RoutesReader

POSITIVE_LOGPROB = 1e-3
"""A log-prob just above 0 is rounding; one above this is no log-prob."""


class AbortedResponse(Exception):
    """The engine gave up a response: an engine failure, to be sent again."""


@dataclass(frozen=True, eq=False, slots=True)
class Response:
    """One sampled response of R tokens to a prompt of P."""

    token_ids_R: npt.NDArray[np.int32]
    rollout_logprobs_R: npt.NDArray[np.float32]
    routes_TLK: npt.NDArray[np.uint8] | npt.NDArray[np.uint16] | None  # T = P + R - 1 rows
    routes_xxh3: int
    policy_versions: Sequence[sequence_pb2.VersionSpan]
    finish_reason: sequence_pb2.FinishReason
    fault: str
    """Not empty: bad data (log-probs, routes) that makes the sequence invalid."""


@dataclass(slots=True)
class _Parts:
    token_ids: list[npt.NDArray]
    logprobs: list[npt.NDArray]
    routes: RoutesReader
    response: Response | None = None


class GroupReader:
    """Takes the messages of one Generate stream in; gives G responses out.

    What cannot be (a chunk after its `complete`, a wrong count, a token outside the vocabulary)
    breaks the contract and raises WireError. Bad numbers are data: `Response.fault`.
    """

    def __init__(
        self, signature: pb.ModelSignature, *, samples: int, prompt_tokens: int, with_routes: bool
    ) -> None:
        self._signature = signature
        self._prompt_tokens = prompt_tokens
        self._with_routes = with_routes
        self._parts = [_Parts([], [], RoutesReader(signature)) for _ in range(samples)]

    def add(self, message: pb.GenerateResponse) -> None:
        """Takes one message."""
        kind = message.WhichOneof("event")
        if kind == "chunk":
            self._chunk(message.chunk)
        elif kind == "complete":
            self._complete(message.complete)
        else:
            raise WireError("response.event: unset; valid: chunk or complete")

    def responses(self) -> list[Response]:
        """The responses in sample order, once the stream has ended."""
        whole = [parts.response for parts in self._parts if parts.response is not None]
        if len(whole) < len(self._parts):
            raise WireError(
                f"the stream ended with {len(whole)} complete sequences; valid: {len(self._parts)}"
            )
        return whole

    def _open(self, sample: int) -> _Parts:
        if sample >= len(self._parts) or self._parts[sample].response is not None:
            raise WireError(
                f"sample: {sample} is not valid; valid: one not yet complete, "
                f"below {len(self._parts)}"
            )
        return self._parts[sample]

    def _chunk(self, chunk: pb.SequenceChunk) -> None:
        parts = self._open(chunk.sample)
        if chunk.HasField("token_ids"):
            ids = codec.to_ndarray(
                chunk.token_ids, "chunk.token_ids", dtypes=("int32",), shape=(None,)
            )
            logprobs = codec.to_ndarray(
                chunk.rollout_logprobs,
                "chunk.rollout_logprobs",
                dtypes=("float32",),
                shape=(len(ids),),
            )
            parts.token_ids.append(ids)
            parts.logprobs.append(logprobs)
        if self._with_routes and chunk.HasField("routes"):
            parts.routes.add(chunk.routes)

    def _complete(self, complete: pb.SequenceComplete) -> None:
        parts = self._open(complete.sample)
        if complete.finish_reason == sequence_pb2.FINISH_REASON_ABORTED:
            raise AbortedResponse("the engine aborted a response")
        if not parts.token_ids:
            raise WireError("complete: it comes before any token; valid: at least one token")
        ids_R = np.concatenate(parts.token_ids)
        logprobs_R = np.concatenate(parts.logprobs)
        if len(ids_R) != complete.response_tokens or not len(ids_R):
            raise WireError(
                f"complete.response_tokens: {complete.response_tokens} is not valid; "
                f"valid: {len(ids_R)}, as sent, and at least 1"
            )
        vocab_size = self._signature.vocab_size
        if not (ids_R.min() >= 0 and ids_R.max() < vocab_size):
            raise WireError(
                f"chunk.token_ids: {ids_R.min()} to {ids_R.max()} is not valid; "
                f"valid: 0 to {vocab_size - 1}"
            )
        self._check_versions(complete, self._prompt_tokens + len(ids_R))
        routes_TLK, fault = None, ""
        if self._with_routes:
            rows = self._prompt_tokens + len(ids_R) - 1
            routes_TLK, fault = parts.routes.read(complete, rows)
        if not np.isfinite(logprobs_R).all():
            fault = "a rollout log-prob is not finite"
        elif logprobs_R.max() > POSITIVE_LOGPROB:
            fault = f"a rollout log-prob is {logprobs_R.max():g}, above 0"
        self._parts[complete.sample] = _Parts([], [], RoutesReader(self._signature))
        self._parts[complete.sample].response = Response(
            token_ids_R=ids_R,
            rollout_logprobs_R=logprobs_R,
            routes_TLK=routes_TLK,
            routes_xxh3=complete.routes_xxh3,
            policy_versions=complete.policy_versions,
            finish_reason=complete.finish_reason,
            fault=fault,
        )

    def _check_versions(self, complete: pb.SequenceComplete, end: int) -> None:
        at = self._prompt_tokens
        for entry in complete.policy_versions:
            if entry.span.begin != at or entry.span.end <= at:
                break
            at = entry.span.end
        else:
            if at == end:
                return
        raise WireError(
            "complete.policy_versions: "
            f"{[(entry.span.begin, entry.span.end) for entry in complete.policy_versions]} is not "
            f"valid; valid: ascending and gapless over [{self._prompt_tokens}, {end})"
        )
