"""Writes of the collector into a run: only where Redis still has the run's record.

A Redis that has lost a run would otherwise get half a record back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import redis.asyncio

from keel.queue import IF_KNOWN, run_key
from keel.record import pack_fields
from keel_rollout.collector.backoff import insist


async def tell(client: redis.asyncio.Redis, run: str, **fields: object) -> bool:
    """Sets fields of the record (`keel.record.pack_fields`), however long Redis is away.

    False where there is no record: nothing is written, and its follower drops the run.
    """
    return await set_fields(client, run, run_key(run), pack_fields(**fields))


async def set_fields(
    client: redis.asyncio.Redis, run: str, key: str, fields: Mapping[Any, Any]
) -> bool:
    """As `tell`, of another hash of the run."""
    return await _if_known(
        client, run, "HSET", key, *(part for pair in fields.items() for part in pair)
    )


async def set_first(
    client: redis.asyncio.Redis, run: str, key: str, field: str, value: str
) -> bool:
    """As `set_fields`, of one field that stays as it is where it is there."""
    return await _if_known(client, run, "HSETNX", key, field, value)


async def _if_known(
    client: redis.asyncio.Redis, run: str, command: str, key: str, *arguments: Any
) -> bool:
    script: Any = client.eval
    found = await insist(
        f"run {run}", lambda: script(IF_KNOWN, 2, run_key(run), key, command, *arguments)
    )
    return found != -1
