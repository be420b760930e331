"""Weight updates that fail: refused with the right status, and the old version is still served."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import grpc

from keel.rollout.v1 import rollout_service_pb2 as pb
from keel_rollout.conformance.client import Version, refused
from keel_rollout.conformance.kit import Kit
from keel_rollout.conformance.rows_engine import PRECONDITION, policy_version
from keel_rollout.conformance.verdicts import Body, Found, Row, Unmet

INVALID = (grpc.StatusCode.INVALID_ARGUMENT,)
LOST = (grpc.StatusCode.DATA_LOSS,)

Fault = Callable[[Version, list[pb.UpdateWeightsRequest]], str]
"""Spoils a version or its messages; returns a word that the refusal must hold."""


def _middle(version: Version) -> int:
    return len(version.manifest.tensors) // 2


def _wrong_hash(version: Version, messages: list[pb.UpdateWeightsRequest]) -> str:
    chunk = messages[len(messages) // 2].chunk
    chunk.data = bytes([chunk.data[0] ^ 1]) + chunk.data[1:]
    return ""


def _wrong_fingerprint(version: Version, messages: list[pb.UpdateWeightsRequest]) -> str:
    version.manifest.fingerprint ^= 1
    return "fingerprint"


def _wrong_shape(version: Version, messages: list[pb.UpdateWeightsRequest]) -> str:
    entry = version.manifest.tensors[_middle(version)]
    entry.shape[:] = [entry.shape[0] * 2, *entry.shape[1:]]
    return entry.name


def _missing(version: Version, messages: list[pb.UpdateWeightsRequest]) -> str:
    entry = version.manifest.tensors[_middle(version)]
    name = entry.name
    version.manifest.tensors.remove(entry)
    return name


def _unsent(version: Version, messages: list[pb.UpdateWeightsRequest]) -> str:
    del messages[len(messages) // 2]
    return ""


def _row(fault: Fault, codes: tuple[grpc.StatusCode, ...]) -> Body:
    async def body(kit: Kit) -> Found:
        await kit.serving()
        version = kit.next_version(kit.model.b)
        messages = list(kit.client.pieces(version))
        word = fault(version, messages)

        async def attempt() -> None:
            await kit.client.begin(version.manifest)
            await kit.client.send(messages)
            await kit.client.finish(version.manifest)

        return await _kept(kit, refused(attempt(), codes, word, what="the update"))

    return body


async def cut_off(kit: Kit) -> Found:
    """The sender dies half-way through the stream."""
    await kit.serving()
    version = kit.next_version(kit.model.b)
    messages = list(kit.client.pieces(version))

    async def breaking() -> AsyncIterator[pb.UpdateWeightsRequest]:
        for message in messages[: len(messages) // 2]:
            yield message
        await asyncio.sleep(0.1)
        call.cancel()
        await asyncio.sleep(60)

    await kit.client.begin(version.manifest)
    call = kit.client.stub.UpdateWeights(breaking())
    await asyncio.gather(call, return_exceptions=True)
    finishing = kit.client.finish(version.manifest)
    return await _kept(kit, refused(finishing, PRECONDITION, what="FinishWeightUpdate"))


async def _kept(kit: Kit, refusal: object) -> Found:
    """Awaits the refusal, then proves that the old version is served."""
    try:
        await refusal  # type: ignore[misc]
        return [*await policy_version(kit), *await kit.fits()]
    except Unmet:
        kit.served = None  # who knows what is served now
        raise


STAGED = (
    "An update is staged, all hashes verified, then applied: failure before keeps the old version"
)

ROWS = (
    Row(
        "hash",
        "bytes that differ from their hash are DATA_LOSS, and the old version is kept",
        f"TensorEntry.xxh3; {STAGED}",
        _row(_wrong_hash, LOST),
    ),
    Row(
        "fingerprint",
        "a fingerprint that is not that of its tensors is DATA_LOSS",
        f"WeightManifest.fingerprint; {STAGED}",
        _row(_wrong_fingerprint, LOST),
    ),
    Row(
        "shape",
        "a tensor of another shape is refused by its name",
        f"TensorEntry: the engine checks every field; {STAGED}",
        _row(_wrong_shape, INVALID),
    ),
    Row(
        "missing",
        "a manifest without every tensor is refused",
        f"WeightManifest.tensors: every tensor of the model; {STAGED}",
        _row(_missing, INVALID),
    ),
    Row(
        "unsent",
        "an update whose bytes have not all come cannot be finished",
        f"FinishWeightUpdate verifies every hash; {STAGED}",
        _row(_unsent, PRECONDITION),
    ),
    Row(
        "cut-off",
        "a stream that is cut off leaves the staging incomplete",
        f"RolloutService.UpdateWeights; {STAGED}",
        cut_off,
    ),
)
