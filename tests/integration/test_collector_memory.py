"""Memory of the collector at responses of 32,768 tokens with 48 x 8 routes: docs/limits.md."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import redis
from collector_peers import make_artifact, make_spec, write_run
from long_rollouts import EXPERTS, LAYERS, TOKENS, TOP_K, LongEngine
from rediskit import RedisServer

from keel.blobs import BlobStore
from keel.codec import to_ndarray, xxh3
from keel.queue import groups_key, run_key, unpack
from keel.sizes import lap_bytes

GROUP_SIZE, SLOTS, PROMPT_TOKENS = 4, 12, 8
"""Two cohorts, of 8 and 4 groups, and prompts of 8 tokens at most."""
SPEC = make_spec(
    rollout={"group_size": GROUP_SIZE, "max_tokens": TOKENS},
    recipe={"off_policiness": 2, "groups_per_minibatch": 6, "steps": 2},
)


def memory(pid: int, field: str) -> int:
    """Bytes of a process: VmHWM is the most it had, VmRSS what it has."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


async def test_memory_stays_within_the_stated_bound_and_every_byte_arrives(
    server: RedisServer, tmp_path: Path
) -> None:
    """A real collector, 617 MB in two cohorts in flight at one engine, to a blob store."""
    engine = LongEngine()
    address = await engine.start()
    engine.go.clear()
    blobs = BlobStore(str(tmp_path / "blobs"))
    log = (tmp_path / "collector.log").open("wb")
    command = ["keel_rollout.collector.main", "--redis", server.url, "--blobs", blobs.root]
    collector = subprocess.Popen([sys.executable, "-m", *command], stdout=log, stderr=log)
    try:
        with redis.Redis.from_url(server.url) as client:
            artifact = make_artifact(tmp_path / "base")
            write_run(client, SPEC, artifact, address, policy_version=0)
            async with asyncio.timeout(120):
                while len(engine.requests) < SLOTS:
                    await asyncio.sleep(0.1)
                before = memory(collector.pid, "VmRSS")
                engine.go.set()
                while client.xlen(groups_key("r")) < SLOTS:
                    assert not client.hget(run_key("r"), "collector_error")
                    await asyncio.sleep(0.1)
            peak = memory(collector.pid, "VmHWM") - before
            entries = client.xrange(groups_key("r"))
    finally:
        collector.kill()
        collector.wait()
        await engine.stop()
    found = {}
    total = 0
    for _, fields in entries:
        envelope = unpack(fields, run="r", read=lambda ref: blobs.get(ref, run="r"))
        total += envelope.ByteSize()
        for sequence in envelope.group.sequences:
            assert not sequence.invalid_reason
            ids_T = to_ndarray(sequence.token_ids, "t", dtypes=("int32",), shape=(None,))
            place = envelope.id.lap, envelope.id.slot, sequence.id.sample
            found[place] = (
                xxh3(ids_T[sequence.prompt_length :]),
                xxh3(sequence.rollout_logprobs.data),
                xxh3(sequence.routes.inline.data),
            )
    assert found == engine.hashes
    assert len(found) == SLOTS * GROUP_SIZE
    shape = {"layers": LAYERS, "top_k": TOP_K, "experts": EXPERTS}
    cohorts = lap_bytes(SLOTS, GROUP_SIZE, TOKENS + PROMPT_TOKENS, **shape)
    group = lap_bytes(1, GROUP_SIZE, TOKENS + PROMPT_TOKENS, **shape)
    assert cohorts > total > 600e6
    assert peak <= 1.25 * cohorts + 2 * group, f"{peak / 1e6:.0f} MB for {total / 1e6:.0f} MB"
