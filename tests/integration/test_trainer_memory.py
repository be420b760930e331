"""Memory of a mini-batch at responses of 32,768 tokens with 48 x 8 routes: docs/limits.md."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from collector_peers import make_spec
from long_rollouts import EXPERTS, LAYERS, TOKENS, TOP_K, make_routes

from keel.codec import fill, xxh3
from keel.sizes import lap_bytes
from keel.types.v1 import sequence_pb2

GROUPS, GROUP_SIZE, PROMPT = 4, 4, 8
SPEC = make_spec(
    rollout={"group_size": GROUP_SIZE, "max_tokens": TOKENS},
    recipe={"off_policiness": 2, "groups_per_minibatch": GROUPS, "steps": 2, "replay": "R3"},
)
_MASKS_AND_TARGETS = 31
"""Bytes of a token in a micro-batch, routes aside: two int64, three float32, three bool."""


def write_group(path: Path, slot: int) -> int:
    """A group as the collector leaves it in the blob store; returns its size."""
    envelope = sequence_pb2.Envelope(id=sequence_pb2.SlotId(run="r", slot=slot))
    for sample in range(GROUP_SIZE):
        routes_TLK = make_routes(100 * slot + sample, PROMPT + TOKENS - 1)
        sequence = envelope.group.sequences.add(
            prompt_length=PROMPT,
            routes_valid=True,
            routes_xxh3=xxh3(routes_TLK),
            finish_reason=sequence_pb2.FINISH_REASON_LENGTH,
            reward=float(sample % 2),
        )
        sequence.id.slot.CopyFrom(envelope.id)
        sequence.id.sample = sample
        sequence.sampling.temperature = 1.0
        sequence.trainable.add(begin=PROMPT, end=PROMPT + TOKENS)
        sequence.policy_versions.add(span=sequence.trainable[0], policy_version=0)
        fill(sequence.token_ids, np.full(PROMPT + TOKENS, 5, np.int32))
        fill(sequence.rollout_logprobs, np.full(TOKENS, -0.5, np.float32))
        sequence.routes.codec = sequence_pb2.ROUTE_CODEC_DENSE
        fill(sequence.routes.inline, routes_TLK)
    return path.write_bytes(envelope.SerializeToString())


def test_a_mini_batch_is_in_memory_twice_and_a_group_twice_more(tmp_path: Path) -> None:
    files = [tmp_path / str(slot) for slot in range(GROUPS)]
    total = sum(write_group(path, slot) for slot, path in enumerate(files))
    done = subprocess.run(
        [sys.executable, "-m", "long_minibatch", SPEC.model_dump_json(), *map(str, files)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["valid_tokens"] == GROUPS * GROUP_SIZE * TOKENS
    shape = {"layers": LAYERS, "top_k": TOP_K, "experts": EXPERTS}
    minibatch = lap_bytes(GROUPS, GROUP_SIZE, PROMPT + TOKENS, **shape)
    assert minibatch >= total > 200e6
    assert told["tensors"] <= 1.1 * minibatch
    assert told["decoded"] <= minibatch + 2 * minibatch / GROUPS
    assert told["peak"] <= 2.1 * minibatch + 2 * minibatch / GROUPS
