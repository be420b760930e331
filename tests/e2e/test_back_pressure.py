"""A queue of two laps, groups in the blob store: the weights are those of a large queue."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import redis
from jobs import FINAL, Jobs, job_spec, model_bytes

from keel.ledger import FILE, audit, read
from keel.queue import bytes_key, groups_key
from keel_gateway.stack import Stack

QUEUE_BYTES = 45_000
"""A lap of 4 groups of 8 is 42 kB at worst, and about 15 in truth."""


def test_a_run_goes_on_though_its_queue_holds_two_laps_at_most(
    jobs: Jobs, taught: dict[str, Any], tmp_path: Path
) -> None:
    """Without checkpoints of its own the run would fill the queue for ever: it makes them when the
    collector holds back, and nothing is left behind at the end."""
    limits = ["--queue-bytes", str(QUEUE_BYTES), "--inline-limit", "100"]
    recipe = {"off_policiness": 1, "steps": 8, "replay": "none"}
    spec = job_spec(model=taught, recipe=recipe, checkpoint={"every": 0})
    undisturbed = jobs.run(spec)
    most = blobs = 0
    with Stack(tmp_path, args={"collector": limits}) as stack:
        small = Jobs(stack.url)
        job = small.submit(spec)
        deadline = time.monotonic() + 180
        with redis.Redis.from_url(stack.redis_url) as client:
            key = groups_key(job)
            while (state := small.get(job))["phase"] not in FINAL:
                assert time.monotonic() < deadline, state
                most = max(most, sum(map(int, client.hvals(bytes_key(key)))))
                blobs = max(blobs, sum(1 for _ in stack.blobs.rglob("groups-*")))
                time.sleep(0.02)
            assert state["phase"] == "SUCCEEDED", state["error"]
            left = list(client.keys("keel:*:bytes"))
        assert not left
        assert not [path for path in stack.blobs.rglob("*") if path.is_file()]
        log = stack.log_file("collector").read_text()
        assert "a checkpoint out of turn" in stack.log_file("trainer").read_text()
        assert audit(read(stack.jobs / job / FILE)).problems == []
    assert 0 < most <= QUEUE_BYTES
    assert blobs >= 4
    assert "is held back: " in log
    assert "are more than --queue-bytes 45.0 kB" in log
    assert model_bytes(state) == model_bytes(undisturbed)
