"""A queue with room for little more than a lap, and groups by reference: the run goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from jobs import FINAL, Jobs, job_spec

from keel.blobs import BlobStore
from keel.ledger import FILE, audit, read
from keel.queue import bytes_key, demos_key, groups_key
from keel_gateway.stack import Stack

LIMIT = 200_000
"""A lap is 16 groups of 8 responses: 170 kB at worst, about 60 kB in fact."""


@pytest.fixture
def narrow(tmp_path: Path) -> Iterator[Stack]:
    limits = ["--queue-bytes", str(LIMIT), "--inline-limit", "3000"]
    blobs = ["--blobs", str(tmp_path / "blobs")]
    with Stack(tmp_path, args={"collector": [*limits, *blobs], "trainer": blobs}) as stack:
        yield stack


def in_flight(client: redis.Redis, job: str) -> int:
    keys = (bytes_key(groups_key(job)), bytes_key(demos_key(job)))
    return sum(int(size) for key in keys for size in client.hvals(key))


def test_a_full_queue_makes_the_trainer_checkpoint_and_nothing_is_lost(
    narrow: Stack,
) -> None:
    """No checkpoint is due before the end; 6 laps need twice the room that there is."""
    spec = job_spec(
        cold_start={"steps": 0},
        recipe={"steps": 24},
        evaluation={"every": 0},
        checkpoint={"every": 0},
    )
    jobs = Jobs(narrow.url)
    blobs = BlobStore(str(narrow.dir / "blobs"))
    job = jobs.submit(spec)
    most, stored = 0, False
    with redis.Redis.from_url(narrow.redis_url) as client:
        while (state := jobs.get(job))["phase"] not in FINAL:
            most = max(most, in_flight(client, job))
            stored = stored or bool(blobs.slots(job, "groups"))
            time.sleep(0.02)
    assert state["phase"] == "SUCCEEDED", state["error"]
    log = narrow.log_file("trainer").read_text()
    assert log.count("a checkpoint out of turn") >= 1
    assert 0 < most <= LIMIT
    assert stored
    assert blobs.runs() == []
    result = audit(read(narrow.jobs / job / FILE))
    assert result.problems == []
    assert (result.steps, result.trained + result.void) == (24, 96)
