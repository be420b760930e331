"""Jobs whose laps or groups could be too large are refused; what the message offers is taken."""

from __future__ import annotations

import re

import pytest
from collector_peers import make_spec
from hypothesis import assume, given
from hypothesis import strategies as st

from keel.blobs import BlobStore
from keel.errors import InvalidField
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.sizes import MESSAGE_BYTES, REDIS_VALUE_BYTES, lap_bytes
from keel.spec import RunSpec
from keel_rollout.collector.bounds import check_lap_bytes
from keel_rollout.collector.engine_client import EngineModel
from keel_rollout.collector.room import QueueSettings

STORE = BlobStore("memory://blobs")


def model(*, layers: int = 48, longest: int = 2**20, routes: bool = True) -> EngineModel:
    signature = pb.ModelSignature(
        moe_layers=range(layers),
        experts_per_token=8,
        num_experts=128,
        max_sequence_tokens=longest,
    )
    return EngineModel(pb.EngineAbilities(routes=routes), signature)


def spec(max_tokens: int, group_size: int = 16, groups: int = 64, steps: int = 4) -> RunSpec:
    return make_spec(
        rollout={"group_size": group_size, "max_tokens": max_tokens},
        recipe={"off_policiness": 4, "groups_per_minibatch": groups, "steps": steps},
    )


def refusal(job: RunSpec, engine: EngineModel, settings: QueueSettings) -> str:
    try:
        check_lap_bytes(job, engine, 1000, settings)
    except InvalidField as error:
        return str(error)
    return ""


@given(
    max_tokens=st.integers(100, 50_000),
    groups=st.integers(1, 64),
    limit=st.integers(10**6, 10**11),
)
def test_a_lap_is_refused_just_where_it_could_exceed_the_limit_and_with_a_remedy(
    max_tokens: int, groups: int, limit: int
) -> None:
    job = spec(max_tokens, groups=groups)
    settings = QueueSettings(queue_bytes=limit, blobs=STORE)
    worst = lap_bytes(4 * groups, 16, 1000 + max_tokens, layers=48, top_k=8, experts=128)
    told = refusal(job, model(), settings)
    assert bool(told) == (worst > limit)
    if told:
        enough = int(re.search(r"a --queue-bytes of (\d+) or more", told)[1])
        assert enough == worst
        assert not refusal(job, model(), QueueSettings(queue_bytes=enough, blobs=STORE))


@given(max_tokens=st.integers(2000, 50_000), share=st.floats(0.3, 0.99))
def test_the_shorter_responses_that_it_offers_are_taken(max_tokens: int, share: float) -> None:
    worst = lap_bytes(256, 16, 1000 + max_tokens, layers=48, top_k=8, experts=128)
    settings = QueueSettings(queue_bytes=int(worst * share), blobs=STORE)
    told = refusal(spec(max_tokens), model(), settings)
    offered = re.search(r"or at most (\d+) tokens", told)
    assume(offered)
    fitting = int(offered[1])
    assert not refusal(spec(fitting), model(), settings)
    assert refusal(spec(fitting + 1), model(), settings)


def test_prompt_and_response_are_at_most_what_the_model_takes() -> None:
    job, settings = spec(50_000), QueueSettings(queue_bytes=2 * 10**10, blobs=STORE)
    assert refusal(job, model(), settings)
    assert not refusal(job, model(longest=8000), settings)


@pytest.mark.parametrize("engine", [model(layers=0), model(routes=False)])
def test_without_routes_sequences_are_small(engine: EngineModel) -> None:
    """4,096 sequences of 33,768 tokens: 53 GB with routes, 1.1 without."""
    assert refusal(spec(32_768), model(), QueueSettings(blobs=STORE))
    assert not refusal(spec(32_768), engine, QueueSettings(blobs=STORE))


def test_a_group_must_fit_a_message_and_without_a_blob_store_an_entry() -> None:
    large = QueueSettings(queue_bytes=2**50, blobs=STORE)
    inline = QueueSettings(queue_bytes=2**50)
    one = lap_bytes(1, 1, 1000 + 32_768, layers=48, top_k=8, experts=128)
    fits, entry = MESSAGE_BYTES // one, REDIS_VALUE_BYTES // one
    assert (fits, entry) == (162, 40)
    assert not refusal(spec(32_768, fits), model(), large)
    assert "no message may have more than 2.15 GB" in refusal(
        spec(32_768, fits + 1), model(), large
    )
    assert not refusal(spec(32_768, entry), model(), inline)
    told = refusal(spec(32_768, entry + 1), model(), inline)
    assert "a folder for --blobs of collector and trainer" in told
    assert "Redis takes no more than 537 MB at once" in told
