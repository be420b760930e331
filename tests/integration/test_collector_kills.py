"""The collector killed at each bad moment of an addition: Redis alone says where it goes on."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import redis
from collector_peers import ScriptedEngine, make_artifact, make_spec, write_run
from rediskit import RedisServer

from keel.blobs import BlobStore
from keel.queue import SlotKey, bytes_key, groups_key, run_key, slot_of, unpack

GROUPS = groups_key("r")
SLOTS = [SlotKey(0, 0, slot) for slot in range(8)]

_DIES = """
import os, signal, sys
from redis.asyncio.client import Pipeline
from keel.blobs import BlobStore
from keel_rollout.collector import streams
from keel_rollout.collector.main import main

streams._AT_ONCE = 1  # so that it is known how far the others are
done = 0

def at_the_third():
    global done
    done += 1
    if done == 3:
        os.kill(os.getpid(), signal.SIGKILL)

moment = sys.argv.pop(1)
put, execute = BlobStore.put, Pipeline.execute

def put_and_die(self, *arguments):
    ref = put(self, *arguments)
    at_the_third()
    return ref

async def die_in_transaction(self, *arguments):
    adds = [command for command, _ in self.command_stack if command[0] == "XADD"]
    if not adds or moment == "between blob and entry":
        return await execute(self, *arguments)
    if moment == "before EXEC" and done == 2:
        connection = await self.connection_pool.get_connection()
        commands = [("MULTI",), *(command for command, _ in self.command_stack)]
        await connection.send_packed_command(connection.pack_commands(commands))
        for _ in commands:
            await connection.read_response()
        at_the_third()
    replies = await execute(self, *arguments)
    at_the_third()
    return replies

if moment == "between blob and entry":
    BlobStore.put = put_and_die
Pipeline.execute = die_in_transaction
main()
"""
"""A collector that kills itself at its third addition."""


async def until(holds: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("moment", "there"),
    [("between blob and entry", 2), ("before EXEC", 2), ("after the entry", 3)],
)
async def test_each_slot_is_added_once_whenever_the_collector_was_killed(
    server: RedisServer, engine: ScriptedEngine, tmp_path: Path, moment: str, there: int
) -> None:
    """A collector dies at its third group; the next one adds what is missing, and no more."""
    blobs = BlobStore(str(tmp_path / "blobs"))
    flags = ["--redis", server.url, "--blobs", blobs.root, "--inline-limit", "1"]
    with redis.Redis.from_url(server.url) as client:
        artifact = make_artifact(tmp_path / "base")
        write_run(client, make_spec(), artifact, engine.address, policy_version=0)
        log = (tmp_path / "collector.log").open("wb")
        command = [sys.executable, "-c", _DIES, moment, *flags]
        dying = subprocess.Popen(command, stdout=log, stderr=log)
        await until(lambda: dying.poll() is not None)
        assert dying.returncode == -signal.SIGKILL, (tmp_path / "collector.log").read_text()
        before = client.xrange(GROUPS)
        assert len(before) == there
        check_bytes(client, blobs)

        command = [sys.executable, "-m", "keel_rollout.collector.main", *flags]
        again = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            await until(lambda: client.xlen(GROUPS) >= 8)
            time.sleep(0.3)
        finally:
            again.kill()
            again.wait()
        after = client.xrange(GROUPS)
        assert after[: len(before)] == before, "what was there is not touched"
        assert sorted(slot_of(fields) for _, fields in after) == SLOTS
        check_bytes(client, blobs)
        assert not client.hget(run_key("r"), "queue_full")
        # blobs of groups whose entry was not made are removed with those of their slots
        stored = blobs.slots("r", "groups")
        assert sorted(stored) == SLOTS
        blobs.remove("r", "groups", SLOTS)
        assert not blobs.slots("r", "groups")


def check_bytes(client: redis.Redis, blobs: BlobStore) -> None:
    """The bytes in flight are those of the entries, each readable, no more and no less."""
    sizes = Counter[str]()
    for _, fields in client.xrange(GROUPS):
        envelope = unpack(fields, run="r", read=lambda ref: blobs.get(ref, run="r"))
        sizes[str(SlotKey.of(envelope.id))] = envelope.ByteSize()
    found = {k.decode(): int(v) for k, v in client.hgetall(bytes_key(GROUPS)).items()}
    assert found == dict(sizes)
