"""Weight updates that succeed: by every transport, by number, and in the middle of a generation."""

from __future__ import annotations

import torch

from keel_rollout.conformance.client import SAFETENSORS, Version, refused
from keel_rollout.conformance.kit import FIT_TOKENS, Batch, Kit
from keel_rollout.conformance.reference import FLOORS, Reference, mean_gap
from keel_rollout.conformance.rows_engine import PRECONDITION, policy_version
from keel_rollout.conformance.verdicts import Found, NotRun, Number, Row, Unmet


async def by_stream(kit: Kit) -> Found:
    """B in chunks of up to 1 MiB."""
    await kit.publish(kit.model.b)
    return [*await policy_version(kit), *await kit.fits()]


async def by_reference(kit: Kit) -> Found:
    """A safetensors file on shared storage."""
    if kit.shared is None:
        raise NotRun("needs storage shared with the engine: --shared DIR")
    await kit.serving()
    try:
        await kit.publish(kit.other(), transport=SAFETENSORS)
    except PermissionError as error:
        raise NotRun(f"--shared {kit.shared}: {error.strerror}") from error
    return [*await policy_version(kit), *await kit.fits()]


async def bfloat16(kit: Kit) -> Found:
    """The same weights rounded by the sender; the engine takes another dtype than its own."""
    await kit.serving()
    reference = kit.other()
    rounded = {
        name: tensor if "correction_bias" in name else tensor.to(torch.bfloat16)
        for name, tensor in reference.tensors().items()
    }
    kit.newest += 1
    version, kit.served = Version.build(kit.newest, rounded), None
    await kit.client.update(version)
    group = await kit.client.generate(
        kit.prompt(5), samples=kit.samples(4), max_tokens=kit.tokens(FIT_TOKENS)
    )
    batch = Batch(group, 1.0, Reference(_rounded(reference), reference.dtype))
    return batch.numbers()


def _rounded(reference: Reference) -> torch.nn.Module:
    """A copy without hooks whose parameters went through bfloat16."""
    cls = type(reference.model)
    model = cls(reference.model.config)
    model.load_state_dict(reference.model.state_dict())
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    return model


async def same_again(kit: Kit) -> Found:
    """Number and fingerprint that are served."""
    version = await kit.serving()
    if not await kit.client.begin(version.manifest):
        raise Unmet("already_served = false for the version served", "true: send nothing, finish")
    await kit.client.finish(version.manifest)
    return await policy_version(kit)


async def only_grow(kit: Kit) -> Found:
    """A lower number, and the same number for other bits; the probe tells what is served then."""
    version, tokens = await kit.serving(), kit.prompt(32, seed=1)
    before = await kit.probed(tokens)
    number, tensors = version.manifest.policy_version, kit.other().tensors()
    cases = [(number, "the number served, for other bits")]
    if number > 0:
        cases.append((number - 1, "a lower number"))
    try:
        for wanted, what in cases:
            await refused(_update(kit, Version.build(wanted, tensors)), PRECONDITION, what=what)
        moved = mean_gap([await kit.probed(tokens)], [before])
        note = await policy_version(kit)
    except Unmet:
        kit.served = None  # who knows what is served now
        raise
    return [Number("the probe has moved by", moved, FLOORS[kit.reference.dtype]), *note]


async def _update(kit: Kit, version: Version) -> None:
    if not await kit.client.begin(version.manifest):
        await kit.client.send(kit.client.pieces(version))
    await kit.client.finish(version.manifest)


def shares_storage(kit: Kit) -> str:
    """Of updates by reference."""
    return "" if SAFETENSORS in kit.can.transports else "can.transports has no SAFETENSORS"


ROWS = (
    Row(
        "safetensors",
        "weights come by reference to shared storage",
        "UpdateWeightsRequest.safetensors_path; WEIGHT_TRANSPORT_SAFETENSORS",
        by_reference,
        shares_storage,
    ),
    Row(
        "bfloat16",
        "float32 weights that come as bfloat16 are taken",
        "TensorEntry.dtype: element type as sent",
        bfloat16,
    ),
    Row(
        "stream",
        "weights come in chunks, and the version that they make is served",
        "RolloutService.UpdateWeights, FinishWeightUpdate",
        by_stream,
    ),
    Row(
        "same-again",
        "the version that is served, sent again, is a no-op",
        "BeginWeightUpdateResponse.already_served",
        same_again,
    ),
    Row(
        "only-grow",
        "a lower number, or a number again for other bits, is refused",
        "WeightManifest.policy_version: grows only; a number is never reused for other bits",
        only_grow,
    ),
)
