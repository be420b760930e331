"""Refuses a job whose laps could be more than the queue may hold, before anything is sampled."""

from __future__ import annotations

from typing import NamedTuple

from keel.errors import InvalidField
from keel.sizes import (
    MESSAGE_BYTES,
    OTHER_BYTES,
    REDIS_VALUE_BYTES,
    lap_bytes,
    show_bytes,
    token_bytes,
)
from keel.spec import RunSpec
from keel_rollout.collector.engine_client import EngineModel
from keel_rollout.collector.room import QueueSettings


class _Bound(NamedTuple):
    groups: int
    most: int
    """Bytes that they may have."""
    what: str
    why: str
    remedy: str
    """With "{worst}" for the bytes that they could have."""


def check_lap_bytes(
    spec: RunSpec, model: EngineModel, prompt_tokens: int, settings: QueueSettings
) -> None:
    """InvalidField if a lap, or a group, could have more bytes than there is place for.

    Args:
        prompt_tokens: of the longest prompt.
    """
    signature = model.signature
    shape = {
        "layers": len(signature.moe_layers) if model.routed else 0,
        "top_k": signature.experts_per_token,
        "experts": signature.num_experts,
    }
    longest = min(prompt_tokens + spec.rollout.max_tokens, signature.max_sequence_tokens)
    group_size, slots = spec.rollout.group_size, spec.slots_per_lap
    what = f"group_size {group_size} sequences of up to {longest} tokens"
    limit = settings.queue_bytes
    bounds = [
        _Bound(
            slots,
            limit,
            f"a lap of recipe.off_policiness x groups_per_minibatch = {slots} groups of {what}",
            f"--queue-bytes of the collector is {show_bytes(limit)}",
            "a --queue-bytes of {worst} or more",
        ),
        _Bound(
            1,
            MESSAGE_BYTES,
            f"a group of {what}",
            f"no message may have more than {show_bytes(MESSAGE_BYTES)}",
            "a smaller rollout.group_size",
        ),
    ]
    if settings.blobs is None:
        bounds.append(
            _Bound(
                1,
                REDIS_VALUE_BYTES,
                f"a group of {what}",
                f"Redis takes no more than {show_bytes(REDIS_VALUE_BYTES)} at once",
                "a folder for --blobs of collector and trainer",
            )
        )
    for bound in bounds:
        worst = lap_bytes(bound.groups, group_size, longest, **shape)
        if worst > bound.most:
            one = bound.most // (bound.groups * group_size)
            fitting = (one - OTHER_BYTES) // token_bytes(**shape) - prompt_tokens
            shorter = f", or at most {fitting} tokens" if fitting > 0 else ""
            raise InvalidField(
                "rollout.max_tokens",
                spec.rollout.max_tokens,
                f"{bound.remedy.format(worst=worst)}{shorter}: {bound.what} is "
                f"{show_bytes(worst)} at worst, and {bound.why}",
            )
