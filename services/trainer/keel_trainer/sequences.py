"""From messages to checked sequences.

A malformed message raises WireError. A bad rollout is data: it comes out with `valid = False` and
the reason, and everything downstream masks it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from keel import codec
from keel.errors import WireError
from keel.types.v1 import sequence_pb2, tensor_pb2

_ROWS = 1024
"""Rows of routes that are sorted at once: a copy of them all would be as large as the sequence."""
_LARGEST_REWARD = float(np.finfo(np.float32).max)
"""Rewards are trained on in float32: above this they would be infinite there."""


@dataclass(frozen=True)
class RouteShape:
    """What routes must look like for the model in training."""

    moe_layers: int
    """L: MoE layers, in depth order."""
    top_k: int
    """K: experts a token."""
    num_experts: int
    """E."""


@dataclass(frozen=True)
class TrainSequence:
    """One prompt and one response, checked. T tokens, P of them the prompt, R = T - P.

    Example:
        token_ids_T = [5, 6, 7, 8], prompt_length = 2: the trainer feeds [5, 6, 7]; the log-probs of
        7 and 8 stand at fed positions 1 and 2; routes_TLK has 3 rows.
    """

    token_ids_T: npt.NDArray[np.int32]
    prompt_length: int
    rollout_logprobs_R: npt.NDArray[np.float32]  # log mu_old of each response token
    routes_TLK: npt.NDArray | None  # [T-1, L, K] e^mu_old; None: dense, unwanted, or invalid
    policy_versions_R: npt.NDArray[np.int64]  # version that sampled each response token
    reward: float
    reward_parts: dict[str, float]  # before weighting
    truncated: bool
    valid: bool
    invalid_reason: str  # empty iff valid
    slot: int
    sample: int

    @property
    def fed_length(self) -> int:
        """Tokens that go into the model: all but the last."""
        return len(self.token_ids_T) - 1

    @property
    def response_length(self) -> int:
        """Tokens of the response, its ending token included."""
        return len(self.token_ids_T) - self.prompt_length


def decode_sequence(
    proto: sequence_pb2.Sequence,
    *,
    vocab_size: int,
    routes: RouteShape | None,
    field: str = "sequence",
) -> TrainSequence:
    """Checks everything that the trainer relies on.

    Invalid, with a reason: the collector said so, aborted, a non-finite or positive log-prob, a
    non-finite reward, and where routes are wanted: none, not vouched for, another checksum than the
    engine's, ids out of range or repeated.

    Args:
        vocab_size: token ids must lie below it.
        routes: their shape, or None to ignore them (a dense model).
        field: prefix of the names in error messages.

    Raises:
        WireError: an array of another dtype or shape, a token id, prompt length, span or version
            list that cannot be.
    """
    token_ids_T = _token_ids(proto.token_ids, f"{field}.token_ids", vocab_size)
    prompt_length = _prompt_length(proto.prompt_length, len(token_ids_T), field)
    spans = [(span.begin, span.end) for span in proto.trainable]
    if spans != [(prompt_length, len(token_ids_T))]:
        raise WireError(
            f"{field}.trainable: {spans} is not valid; "
            f"valid: the response, [({prompt_length}, {len(token_ids_T)})]"
        )
    logprobs_R = codec.to_ndarray(
        proto.rollout_logprobs,
        f"{field}.rollout_logprobs",
        dtypes=("float32",),
        shape=(len(token_ids_T) - prompt_length,),
    )
    reason = proto.invalid_reason
    if proto.finish_reason == sequence_pb2.FINISH_REASON_ABORTED:
        reason = reason or "the engine aborted it"
    # a log-prob just above 0 is rounding; one well above is no log-prob
    if not np.isfinite(logprobs_R).all() or (logprobs_R > 1e-3).any():
        reason = reason or "a rollout log-prob is not finite or above 0"
    if not abs(proto.reward) <= _LARGEST_REWARD:
        reason = reason or f"the reward is {proto.reward}"
    routes_TLK = None
    if routes is not None:
        routes_TLK, route_fault = _decode_routes(proto, routes, len(token_ids_T), field)
        reason = reason or route_fault
    return TrainSequence(
        token_ids_T=token_ids_T,
        prompt_length=prompt_length,
        rollout_logprobs_R=logprobs_R,
        routes_TLK=routes_TLK,
        policy_versions_R=_policy_versions(proto, prompt_length, len(token_ids_T), field),
        reward=proto.reward,
        reward_parts={part.name: part.value for part in proto.reward_parts},
        truncated=proto.finish_reason == sequence_pb2.FINISH_REASON_LENGTH,
        valid=not reason,
        invalid_reason=reason,
        slot=proto.id.slot.slot,
        sample=proto.id.sample,
    )


def decode_demonstration(
    proto: sequence_pb2.Demonstration, *, vocab_size: int, field: str = "demonstration"
) -> TrainSequence:
    """A demonstration as a valid sequence without routes, reward or rollout log-probs (zeros).

    Raises:
        WireError: as `decode_sequence`.
    """
    token_ids_T = _token_ids(proto.token_ids, f"{field}.token_ids", vocab_size)
    prompt_length = _prompt_length(proto.prompt_length, len(token_ids_T), field)
    response_length = len(token_ids_T) - prompt_length
    return TrainSequence(
        token_ids_T=token_ids_T,
        prompt_length=prompt_length,
        rollout_logprobs_R=np.zeros(response_length, np.float32),
        routes_TLK=None,
        policy_versions_R=np.zeros(response_length, np.int64),
        reward=0.0,
        reward_parts={},
        truncated=False,
        valid=True,
        invalid_reason="",
        slot=0,
        sample=0,
    )


def _token_ids(tensor: tensor_pb2.Tensor, field: str, vocab_size: int) -> npt.NDArray[np.int32]:
    ids_T = codec.to_ndarray(tensor, field, dtypes=("int32",), shape=(None,))
    if len(ids_T) and not (ids_T.min() >= 0 and ids_T.max() < vocab_size):
        raise WireError(
            f"{field}: ids {ids_T.min()} to {ids_T.max()} are not valid; "
            f"valid: 0 to {vocab_size - 1}"
        )
    return ids_T


def _prompt_length(prompt_length: int, tokens: int, field: str) -> int:
    if not 1 <= prompt_length < tokens:
        raise WireError(
            f"{field}.prompt_length: {prompt_length} is not valid; "
            f"valid: 1 to {tokens - 1} for {tokens} tokens"
        )
    return prompt_length


def _policy_versions(
    proto: sequence_pb2.Sequence, prompt_length: int, tokens: int, field: str
) -> npt.NDArray[np.int64]:
    versions_R = np.zeros(tokens - prompt_length, np.int64)
    position = prompt_length
    for entry in proto.policy_versions:
        if entry.span.begin != position or not position < entry.span.end <= tokens:
            break
        versions_R[position - prompt_length : entry.span.end - prompt_length] = entry.policy_version
        position = entry.span.end
    else:
        if position == tokens:
            return versions_R
    got = [(entry.span.begin, entry.span.end) for entry in proto.policy_versions]
    raise WireError(
        f"{field}.policy_versions: spans {got} are not valid; "
        f"valid: ascending and gapless over [{prompt_length}, {tokens})"
    )


def _decode_routes(
    proto: sequence_pb2.Sequence, shape: RouteShape, tokens: int, field: str
) -> tuple[npt.NDArray | None, str]:
    """The routes, or None with what is wrong with them."""
    if not proto.HasField("routes"):
        return None, "it has no routes"
    if not proto.routes_valid:
        return None, "the engine does not vouch for its routes"
    if proto.routes.codec != sequence_pb2.ROUTE_CODEC_DENSE:
        raise WireError(f"{field}.routes.codec: {proto.routes.codec} is not valid; valid: DENSE")
    if proto.routes.WhichOneof("place") != "inline":
        raise WireError(
            f"{field}.routes.place: {proto.routes.WhichOneof('place')} is not valid; valid: inline"
        )
    routes_TLK = codec.to_ndarray(
        proto.routes.inline,
        f"{field}.routes.inline",
        dtypes=(codec.routes_dtype(shape.num_experts).name,),
        shape=(tokens - 1, shape.moe_layers, shape.top_k),
    )
    if codec.xxh3(routes_TLK) != proto.routes_xxh3:
        return None, "its routes differ from the engine's checksum"
    if int(routes_TLK.max(initial=0)) >= shape.num_experts:
        return None, f"an expert id is {routes_TLK.max()}, of {shape.num_experts} experts"
    if any(_repeats(routes_TLK[row : row + _ROWS]) for row in range(0, tokens - 1, _ROWS)):
        return None, "an expert id is repeated within a row"
    # torch has little arithmetic on uint16; ids stay far below 2^15
    return routes_TLK if routes_TLK.dtype == np.uint8 else routes_TLK.astype(np.int16), ""


def _repeats(routes_TLK: npt.NDArray) -> bool:
    ordered_TLK = np.sort(routes_TLK, axis=-1)
    return bool((ordered_TLK[..., 1:] == ordered_TLK[..., :-1]).any())
