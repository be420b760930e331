"""Refuses a job whose laps could be more than the queue may hold, before anything is sampled."""

from __future__ import annotations

from keel.errors import InvalidField
from keel.sizes import MESSAGE_BYTES, REDIS_VALUE_BYTES, lap_bytes, show_bytes
from keel.spec import RunSpec
from keel_rollout.collector.engine_client import EngineModel
from keel_rollout.collector.room import QueueSettings


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
    group = lap_bytes(1, group_size, longest, **shape)
    lap = lap_bytes(slots, group_size, longest, **shape)
    what = f"group_size {group_size} sequences of up to {longest} tokens"
    if lap > settings.queue_bytes:
        _refuse(
            spec,
            f"a lap of recipe.off_policiness x groups_per_minibatch = {slots} groups of {what} is "
            f"{show_bytes(lap)} at worst, and --queue-bytes of the collector is "
            f"{show_bytes(settings.queue_bytes)}",
            f"a --queue-bytes of {lap} or more",
            spec.rollout.max_tokens * settings.queue_bytes // lap,
        )
    if group > MESSAGE_BYTES:
        _refuse(
            spec,
            f"a group of {what} is {show_bytes(group)} at worst, and no message may have more than "
            f"{show_bytes(MESSAGE_BYTES)}",
            "a smaller rollout.group_size",
            spec.rollout.max_tokens * MESSAGE_BYTES // group,
        )
    if settings.blobs is None and group > REDIS_VALUE_BYTES:
        _refuse(
            spec,
            f"a group of {what} is {show_bytes(group)} at worst, and Redis takes no more than "
            f"{show_bytes(REDIS_VALUE_BYTES)} at once",
            "a folder for --blobs of collector and trainer",
            spec.rollout.max_tokens * REDIS_VALUE_BYTES // group,
        )


def _refuse(spec: RunSpec, why: str, remedy: str, fitting: int) -> None:
    tokens = spec.rollout.max_tokens
    shorter = f", or about {fitting} tokens and less" if fitting else ""
    raise InvalidField("rollout.max_tokens", tokens, f"{remedy}{shorter}: {why}")
