"""Generate as a stream: shape, ends, refusals, cancellation, many at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np

from keel import codec
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.rollout.v1 import rollout_service_pb2_grpc as pb_grpc
from keel.types.v1 import sequence_pb2, tensor_pb2
from keel_rollout.conformance.client import EVALUATION, EngineClient, refused
from keel_rollout.conformance.kit import Batch, Kit
from keel_rollout.conformance.verdicts import Found, NotRun, Row, Unmet

INVALID = grpc.StatusCode.INVALID_ARGUMENT
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
LENGTH, STOP = sequence_pb2.FINISH_REASON_LENGTH, sequence_pb2.FINISH_REASON_STOP
OVERSIZED_BYTES = 256 * 2**20
GROUPS = 64


async def stream(kit: Kit) -> Found:
    """Order, lengths, hash (checked while reading); spans and reasons here."""
    number = (await kit.serving()).manifest.policy_version
    samples, wanted = kit.samples(4), kit.tokens(64)
    prompt = kit.prompt(5)
    group = await kit.client.generate(
        prompt, samples=samples, max_tokens=wanted, with_routes=kit.routes
    )
    for sequence in group:
        _ended(sequence.complete, LENGTH, wanted)
        valid = [(len(prompt), len(prompt) + wanted, number)]
        if sequence.spans != valid:
            raise Unmet(f"policy_versions {sequence.spans}", f"{valid}")
        outside = [t for t in sequence.tokens if not 0 <= t < kit.model.vocab_size]
        if outside:
            raise Unmet(f"token {outside[0]}", f"0 to {kit.model.vocab_size - 1}")
    if kit.routes:
        plain = await kit.client.generate(prompt, max_tokens=2)
        if plain[0].complete.route_rows:
            raise Unmet(f"{plain[0].complete.route_rows} route rows, not asked for", "0")
    return [f"{samples} sequences of {wanted} tokens, one complete each"]


async def stop(kit: Kit) -> Found:
    """A stop token ends and belongs to the response; nothing else but max_tokens does."""
    await kit.serving()
    prompt = kit.prompt(5)
    sampling = {"max_tokens": kit.tokens(24), "purpose": EVALUATION, "temperature": 0.0}
    for _ in range(3):  # rounding may take another greedy path, which need not meet the token
        (free,) = await kit.client.generate(prompt, **sampling)
        token = free.tokens[min(3, len(free.tokens) - 1)]
        (cut,) = await kit.client.generate(prompt, stop=[token], **sampling)
        if cut.tokens[:4] == free.tokens[: len(cut.tokens[:4])]:
            break
    if cut.tokens[-1] != token or token in cut.tokens[:-1]:
        raise Unmet(f"{cut.tokens} with stop token {token}", "it comes once, as the last token")
    _ended(cut.complete, STOP, len(cut.tokens))
    return [f"stopped at the {len(cut.tokens)}th token"]


def _ended(complete: pb.SequenceComplete, reason: int, tokens: int) -> None:
    seen = (complete.finish_reason, complete.response_tokens)
    if seen != (reason, tokens):
        name = sequence_pb2.FinishReason.Name
        raise Unmet(f"{name(seen[0])} after {seen[1]} tokens", f"{name(reason)} after {tokens}")


@dataclass(frozen=True)
class Bad:
    """A request that must be refused."""

    what: str
    spoil: Callable[[pb.GenerateRequest, Kit], object]
    names: str
    """Word that the refusal holds."""
    codes: tuple[grpc.StatusCode, ...] = (INVALID,)


def _tokens(request: pb.GenerateRequest, *tokens: int) -> None:
    request.prompt_token_ids.CopyFrom(codec.to_tensor(np.array(tokens, np.int32)))


def _tensor(request: pb.GenerateRequest, dtype: int, shape: list[int], size: int) -> None:
    odd = tensor_pb2.Tensor(dtype=dtype, shape=shape, data=bytes(size))  # type: ignore[arg-type]
    request.prompt_token_ids.CopyFrom(odd)


def _sampling(field: str, value: object) -> Callable[[pb.GenerateRequest, Kit], None]:
    return lambda request, _kit: setattr(request.sampling, field, value)


_I32, _I64 = tensor_pb2.D_TYPE_INT32, tensor_pb2.D_TYPE_INT64
MALFORMED = (
    Bad("no prompt", lambda r, _: r.ClearField("prompt_token_ids"), "prompt_token_ids"),
    Bad("an empty prompt", lambda r, _: _tokens(r), "prompt_token_ids"),
    Bad("a token below 0", lambda r, _: _tokens(r, -1), "prompt_token_ids"),
    Bad("a token above all", lambda r, k: _tokens(r, k.model.vocab_size), "prompt_token_ids"),
    Bad("int64 tokens", lambda r, _: _tensor(r, _I64, [1], 8), "prompt_token_ids"),
    Bad("two dimensions", lambda r, _: _tensor(r, _I32, [1, 1], 4), "prompt_token_ids"),
    Bad("too few bytes", lambda r, _: _tensor(r, _I32, [2], 4), "prompt_token_ids"),
    Bad("no samples", lambda r, _: setattr(r, "num_samples", 0), "num_samples"),
    Bad("no response", _sampling("max_tokens", 0), "max_tokens"),
    Bad("a negative temperature", _sampling("temperature", -1.0), "temperature"),
    Bad("temperature NaN", _sampling("temperature", float("nan")), "temperature"),
    Bad("top_p of 1.5", _sampling("top_p", 1.5), "top_p"),
    Bad("no purpose", lambda r, _: r.ClearField("purpose"), "purpose"),
    Bad(
        "a stop token above all",
        lambda r, k: r.sampling.stop_token_ids.append(k.model.vocab_size),
        "stop_token_ids",
    ),
)
TRAINING_RULES = (
    Bad("top_p below 1", _sampling("top_p", 0.9), "top_p"),
    Bad("top_k", _sampling("top_k", 5), "top_k"),
    Bad("temperature 0", _sampling("temperature", 0.0), "temperature"),
)
TOO_LARGE = (
    Bad(
        "one sample too many",
        lambda r, k: setattr(r, "num_samples", k.can.max_group_size + 1),
        "num_samples",
        (EXHAUSTED,),
    ),
    Bad(
        "prompt and response too long together",
        lambda r, k: setattr(r.sampling, "max_tokens", _longest(k)),
        "max_tokens",
        (INVALID, EXHAUSTED),
    ),
    Bad(
        "a prompt that is too long",
        lambda r, k: _tokens(r, *[1] * (_longest(k) + 1)),
        "prompt_token_ids",
        (INVALID, EXHAUSTED),
    ),
)


def _longest(kit: Kit) -> int:
    return kit.loaded.max_sequence_tokens if kit.loaded else kit.model.max_tokens


async def _each(kit: Kit, cases: tuple[Bad, ...]) -> Found:
    await kit.serving()
    for case in cases:
        request = kit.client.request(kit.prompt(3), max_tokens=2)
        case.spoil(request, kit)
        await refused(kit.client.collect(request), case.codes, case.names, what=case.what)
    await kit.client.generate(kit.prompt(3), max_tokens=2)
    return [f"{len(cases)} requests refused, and it goes on"]


async def malformed(kit: Kit) -> Found:
    """Each field on its own; bytes that are no message; routes of a model without them."""
    found = await _each(kit, MALFORMED)
    path = f"/{pb.DESCRIPTOR.services_by_name['RolloutService'].full_name}/Generate"
    channel: Any = kit.client.channel
    garbage = channel.unary_stream(path)(b"\xff\xff\xff\xff\x01", timeout=30)
    # most servers decode before the service sees anything, and then say INTERNAL, Python's UNKNOWN
    codes = (INVALID, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
    await refused(garbage.read(), codes, what="bytes of no message")
    if not kit.routes:
        asked = kit.client.generate(kit.prompt(3), max_tokens=2, with_routes=True)
        await refused(asked, (INVALID,), "with_routes", what="with_routes, which it has not")
    await kit.client.generate(kit.prompt(3), max_tokens=2)
    return found


async def training_rules(kit: Kit) -> Found:
    """No truncation in training."""
    return await _each(kit, TRAINING_RULES)


async def limits(kit: Kit) -> Found:
    """Over what it advertises."""
    return await _each(kit, TOO_LARGE)


async def oversized(kit: Kit) -> Found:
    """A message above max_message_bytes."""
    await kit.serving()
    if kit.can.max_message_bytes > OVERSIZED_BYTES:
        raise NotRun(f"can.max_message_bytes is {kit.can.max_message_bytes}: too much to send")
    request = kit.client.request(kit.prompt(3))
    request.prompt_token_ids.data = bytes(kit.can.max_message_bytes + 1)
    unlimited = [("grpc.max_send_message_length", -1)]
    address = kit.client.address
    async with grpc.aio.insecure_channel(address, options=unlimited) as channel:
        call = pb_grpc.RolloutServiceStub(channel).Generate(request, timeout=60)
        await refused(call.read(), (EXHAUSTED,), what=f"{kit.can.max_message_bytes + 1} bytes")
    await kit.client.generate(kit.prompt(3), max_tokens=2)
    return [f"over {kit.can.max_message_bytes} bytes; it goes on"]


async def cancel(kit: Kit) -> Found:
    """A caller that hangs up frees what it held."""

    async def hang_up(request: pb.GenerateRequest, after_s: float) -> None:
        running = asyncio.ensure_future(kit.client.collect(request))
        await asyncio.sleep(after_s)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    note = await kit.freed(hang_up)
    return [*await kit.fits(), note]


async def deadline(kit: Kit) -> Found:
    """So does one whose deadline has passed."""

    async def hang_up(request: pb.GenerateRequest, after_s: float) -> None:
        call = kit.client.collect(request, timeout_s=max(0.02, after_s))
        await refused(call, (grpc.StatusCode.DEADLINE_EXCEEDED,))

    note = await kit.freed(hang_up)
    return [*await kit.fits(), note]


async def concurrent(kit: Kit) -> Found:
    """64 groups at once."""
    await kit.serving()
    samples = kit.samples(2)

    async def one(client: EngineClient, slot: int) -> Batch:
        group = await client.generate(
            kit.prompt(1 + slot % 23, seed=slot), samples=samples, slot=slot, seed=slot,
            max_tokens=kit.tokens(8), with_routes=kit.routes,
        )  # fmt: skip
        return Batch(group, 1.0, kit.reference)

    batches = await asyncio.gather(*(one(kit.client, slot) for slot in range(GROUPS)))
    together = Batch([s for b in batches for s in b.sequences], 1.0, kit.reference)
    return [*together.numbers(), f"{GROUPS} groups of {samples}"]


STATUS = "RolloutService: INVALID_ARGUMENT names the field, the value and what would be valid"
FREED = "RolloutService.Generate, gRPC cancellation: the stream belongs to the request"

ROWS = (
    Row(
        "stream",
        "chunks in order, lengths and hashes right, one complete each, version spans exact",
        "SequenceChunk, SequenceComplete",
        stream,
    ),
    Row(
        "stop",
        "a stop token ends a response and is its last token; nothing else ends one early",
        "SamplingParams.stop_token_ids, max_tokens; FinishReason",
        stop,
    ),
    Row("malformed", "each malformed request is refused by its field", STATUS, malformed),
    Row(
        "training-rules",
        "truncated and greedy sampling is refused for training",
        "Purpose.PURPOSE_TRAINING: top_p = 1, top_k = 0 and temperature > 0 are required",
        training_rules,
    ),
    Row(
        "limits",
        "what exceeds an advertised limit is refused",
        "RolloutService: RESOURCE_EXHAUSTED, over an advertised limit",
        limits,
    ),
    Row(
        "oversized",
        "a message over max_message_bytes is refused",
        "EngineAbilities.max_message_bytes",
        oversized,
    ),
    Row("cancel", "a cancelled request is freed, and the engine goes on", FREED, cancel),
    Row("deadline", "so is one whose deadline has passed", FREED, deadline),
    Row(
        "concurrent",
        "64 groups at once, each its own stream with its own log-probs",
        "RolloutService.Generate: those of different sequences interleave",
        concurrent,
    ),
)
