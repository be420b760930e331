"""From the engine's messages to responses: what is data, and what breaks the contract."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from keel.codec import fill, to_tensor, xxh3
from keel.errors import WireError
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.types.v1 import sequence_pb2
from keel_rollout.collector.responses import AbortedResponse, GroupReader, Response

SIGNATURE = pb.ModelSignature(
    vocab_size=64, max_sequence_tokens=512, moe_layers=[0, 2], experts_per_token=2, num_experts=8
)
PROMPT, TOKENS = 3, 4
ROUTES = np.random.default_rng(0).permuted(np.tile(np.arange(8), (6, 2, 1)), axis=-1)[..., :2]
ROUTES = ROUTES.astype(np.uint8)  # [3 + 4 - 1, L = 2, K = 2]


def messages() -> list[pb.GenerateResponse]:
    """One response in three chunks (the last brings routes alone) and its end."""
    first, second, third, end = (pb.GenerateResponse() for _ in range(4))
    for message, ids, rows in ((first, [5, 6], ROUTES[:1]), (second, [7, 1], ROUTES[1:4])):
        fill(message.chunk.token_ids, np.array(ids, np.int32))
        fill(message.chunk.rollout_logprobs, np.array([-0.5, -0.25], np.float32))
        fill(message.chunk.routes, rows)
    fill(third.chunk.routes, ROUTES[4:])
    end.complete.finish_reason = sequence_pb2.FINISH_REASON_STOP
    end.complete.response_tokens = TOKENS
    end.complete.route_rows = PROMPT + TOKENS - 1
    end.complete.routes_valid = True
    end.complete.routes_xxh3 = xxh3(ROUTES)
    for begin, stop, version in ((3, 5, 8), (5, 7, 9)):
        end.complete.policy_versions.add(
            span=sequence_pb2.Span(begin=begin, end=stop), policy_version=version
        )
    return [first, second, third, end]


def read(stream: list[pb.GenerateResponse], *, with_routes: bool = True) -> Response:
    reader = GroupReader(SIGNATURE, samples=1, prompt_tokens=PROMPT, with_routes=with_routes)
    for message in stream:
        reader.add(message)
    (response,) = reader.responses()
    return response


def test_chunks_become_one_response() -> None:
    response = read(messages())
    assert response.token_ids_R.tolist() == [5, 6, 7, 1]
    assert response.rollout_logprobs_R.tolist() == [-0.5, -0.25, -0.5, -0.25]
    assert response.routes_TLK is not None
    assert np.array_equal(response.routes_TLK, ROUTES)
    assert [v.policy_version for v in response.policy_versions] == [8, 9]
    assert response.fault == ""


def test_samples_may_interleave() -> None:
    reader = GroupReader(SIGNATURE, samples=2, prompt_tokens=PROMPT, with_routes=True)
    for one, other in zip(messages(), messages(), strict=True):
        other.WhichOneof("event")
        (other.complete if other.HasField("complete") else other.chunk).sample = 1
        reader.add(other)
        reader.add(one)
    assert [r.token_ids_R.tolist() for r in reader.responses()] == [[5, 6, 7, 1]] * 2


def repeated(stream: list[pb.GenerateResponse]) -> None:
    routes = ROUTES.copy()
    routes[2, 1] = 3
    for message, rows in zip(stream, (routes[:1], routes[1:4], routes[4:]), strict=False):
        fill(message.chunk.routes, rows)
    stream[-1].complete.routes_xxh3 = xxh3(routes)


def out_of_range(stream: list[pb.GenerateResponse]) -> None:
    routes = ROUTES.copy()
    routes[0, 0, 0] = 8
    fill(stream[0].chunk.routes, routes[:1])
    stream[-1].complete.routes_xxh3 = xxh3(routes)


def missing_row(stream: list[pb.GenerateResponse]) -> None:
    fill(stream[2].chunk.routes, ROUTES[5:])


def flipped(stream: list[pb.GenerateResponse]) -> None:
    fill(stream[0].chunk.routes, ROUTES[:1, :, ::-1])


def unvouched(stream: list[pb.GenerateResponse]) -> None:
    stream[-1].complete.routes_valid = False


def one_layer(stream: list[pb.GenerateResponse]) -> None:
    fill(stream[2].chunk.routes, ROUTES[4:, :1])


def not_finite(stream: list[pb.GenerateResponse]) -> None:
    fill(stream[0].chunk.rollout_logprobs, np.array([-math.inf, -1], np.float32))


def positive(stream: list[pb.GenerateResponse]) -> None:
    fill(stream[0].chunk.rollout_logprobs, np.array([0.5, -1], np.float32))


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (repeated, "invalid routes: an expert is repeated in a row"),
        (out_of_range, "invalid routes: expert 8 of 8"),
        (missing_row, "invalid routes: 5 rows sent, 6 said, 6 due"),
        (flipped, "invalid routes: they differ from the engine's checksum"),
        (unvouched, "the engine does not vouch for its routes"),
        (one_layer, "invalid routes: chunk.routes.shape: [2, 1, 2] is not valid"),
        (not_finite, "a rollout log-prob is not finite"),
        (positive, "a rollout log-prob is 0.5, above 0"),
    ],
)
def test_bad_numbers_are_data(
    spoil: Callable[[list[pb.GenerateResponse]], None], fault: str
) -> None:
    stream = messages()
    spoil(stream)
    assert read(stream).fault.startswith(fault)


def test_routes_that_nobody_asked_for_are_not_looked_at() -> None:
    stream = messages()
    repeated(stream)
    response = read(stream, with_routes=False)
    assert (response.routes_TLK, response.fault) == (None, "")


def chunk_after_the_end(stream: list[pb.GenerateResponse]) -> None:
    stream.append(stream[0])


def unknown_sample(stream: list[pb.GenerateResponse]) -> None:
    stream[0].chunk.sample = 1


def no_end(stream: list[pb.GenerateResponse]) -> None:
    stream.pop()


def miscounted(stream: list[pb.GenerateResponse]) -> None:
    stream[-1].complete.response_tokens = 3


def foreign_token(stream: list[pb.GenerateResponse]) -> None:
    fill(stream[0].chunk.token_ids, np.array([5, 64], np.int32))


def gap_in_versions(stream: list[pb.GenerateResponse]) -> None:
    stream[-1].complete.policy_versions[1].span.begin = 6


def no_versions(stream: list[pb.GenerateResponse]) -> None:
    stream[-1].complete.ClearField("policy_versions")


def too_few_logprobs(stream: list[pb.GenerateResponse]) -> None:
    stream[0].chunk.rollout_logprobs.CopyFrom(to_tensor(np.array([-1], np.float32)))


def wide_tokens(stream: list[pb.GenerateResponse]) -> None:
    fill(stream[0].chunk.token_ids, np.array([5, 6], np.int64))


def nothing(stream: list[pb.GenerateResponse]) -> None:
    del stream[:-1]


def unset(stream: list[pb.GenerateResponse]) -> None:
    stream[0].Clear()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (chunk_after_the_end, "sample: 0 is not valid"),
        (unknown_sample, "sample: 1 is not valid"),
        (no_end, "the stream ended with 0 complete sequences; valid: 1"),
        (miscounted, "complete.response_tokens: 3 is not valid; valid: 4"),
        (foreign_token, "chunk.token_ids: 1 to 64 is not valid; valid: 0 to 63"),
        (gap_in_versions, "complete.policy_versions: "),
        (no_versions, "complete.policy_versions: "),
        (too_few_logprobs, "chunk.rollout_logprobs.shape: "),
        (wide_tokens, "chunk.token_ids.dtype: int64 is not valid"),
        (nothing, "complete: it comes before any token"),
        (unset, "response.event: unset"),
    ],
)
def test_what_cannot_be_breaks_the_contract(
    spoil: Callable[[list[pb.GenerateResponse]], None], message: str
) -> None:
    stream = messages()
    spoil(stream)
    with pytest.raises(WireError) as error:
        read(stream)
    assert str(error.value).startswith(message)


def test_an_aborted_response_is_for_the_caller_to_send_again() -> None:
    stream = messages()
    stream[-1].complete.finish_reason = sequence_pb2.FINISH_REASON_ABORTED
    with pytest.raises(AbortedResponse):
        read(stream)
