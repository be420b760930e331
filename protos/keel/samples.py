"""Samples of a run: single responses as people look at them, and how they lie in Redis.

The trainer writes some sequences of some laps into a hash (`keel.queue.samples_key`), under
(attempt, step, index), so that a step trained again replaces its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pydantic import BaseModel, ConfigDict, model_validator


class Sample(BaseModel):
    """One response with its reward and, token by token, what engine and trainer made of it.

    R response tokens, the ending token included. Long responses have their first tokens in the
    lists, the same number in each; `response` is whole. Where a value is not finite, it is null.

    Example:
        gap_R = [p - r for p, r in zip(sample.proximal_logprobs, sample.rollout_logprobs)]
    """

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    attempt: int
    """Attempt of the run."""
    step: int
    """Optimizer step that trained on it, from 1."""
    lap: int
    """The paper's global step, from 0."""
    slot: int
    """Its group's place in the lap."""
    sample: int
    """Its place in the group."""
    policy_version: int
    """Newest version that sampled any of its tokens."""
    reward: float | None
    """Total reward; meaningless where `valid` is false."""
    reward_parts: dict[str, float | None]
    """The reward's parts by name, before weighting."""
    advantage: float
    """A: reward minus the group's mean, as the recipe has it; 0 where `valid` is false."""
    truncated: bool
    """It reached max_tokens."""
    valid: bool
    """It was trained on."""
    invalid_reason: str
    """Why it was not; else empty."""
    prompt: str
    """The prompt's text, special tokens shown."""
    response: str
    """The response's text, special tokens shown."""
    tokens: list[str]
    """[R] text of each response token. A character of several tokens stands at its last one."""
    rollout_logprobs: list[float | None]
    """[R] log mu_old: the engine, when sampling; nats, to 6 decimals."""
    proximal_logprobs: list[float | None] | None
    """[R] log pi_old: the trainer at theta_old; null where it was never computed. The gap of engine
    and trainer is this minus `rollout_logprobs`."""
    experts_differ: list[int] | None
    """[R] MoE layers whose set of experts differed, engine against the trainer's live router, at
    the position that predicted the token; null where one of them has no routes."""

    @model_validator(mode="after")
    def _one_length(self) -> Sample:
        lists = (self.rollout_logprobs, self.proximal_logprobs, self.experts_differ)
        if any(values is not None and len(values) != len(self.tokens) for values in lists):
            raise ValueError(f"every list of tokens has {len(self.tokens)} entries, as `tokens`")
        return self


def sample_field(attempt: int, step: int, index: int) -> str:
    """Hash field of a step's sample number `index`, in the order of slot and sample."""
    return f"{attempt}:{step}:{index}"


def fields_by_step(fields: Iterable[bytes], *, off_policiness: int) -> dict[int, list[str]]:
    """Hash fields of samples by step, ascending, in the order of slot and sample.

    A lap that a later attempt sampled again has that attempt's alone.
    """
    places = [(*map(int, field.split(b":")),) for field in fields]
    newest: dict[int, int] = {}
    for attempt, step, _ in places:
        lap = (step - 1) // off_policiness
        newest[lap] = max(attempt, newest.get(lap, 0))
    steps: dict[int, list[str]] = {}
    for attempt, step, index in sorted(places, key=lambda place: place[1:]):
        if attempt == newest[(step - 1) // off_policiness]:
            steps.setdefault(step, []).append(sample_field(attempt, step, index))
    return steps


def parse_samples(values: Sequence[bytes | None]) -> list[Sample]:
    """The samples of hash values; what went meanwhile is left out."""
    return [Sample.model_validate_json(value) for value in values if value is not None]
