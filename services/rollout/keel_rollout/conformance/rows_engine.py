"""The engine as a service: health, reflection, what it says of itself, fencing, versions."""

from __future__ import annotations

from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from keel import codec
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel_rollout.conformance.client import STREAM, EngineClient, refused
from keel_rollout.conformance.kit import Kit
from keel_rollout.conformance.verdicts import Found, NotRun, Row, Unmet

SERVICE = pb.DESCRIPTOR.services_by_name["RolloutService"].full_name
PRECONDITION = (grpc.StatusCode.FAILED_PRECONDITION,)
INVALID = (grpc.StatusCode.INVALID_ARGUMENT,)


def expect(field: str, seen: object, valid: object) -> None:
    """Unmet unless both are equal."""
    if seen != valid:
        raise Unmet(f"{field}: {seen!r}", repr(valid))


async def health(kit: Kit) -> Found:
    """grpc.health.v1 and reflection."""
    stub: Any = health_pb2_grpc.HealthStub(kit.client.channel)
    for name in ("", SERVICE):
        answer = await stub.Check(
            health_pb2.HealthCheckRequest(service=name), timeout=kit.client.timeout_s
        )
        expect(f"health of {name!r}", answer.status, health_pb2.HealthCheckResponse.SERVING)
    channel: Any = kit.client.channel
    reflect: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    names: set[str] = set()
    async for told in reflect.ServerReflectionInfo(iter([ask]), timeout=kit.client.timeout_s):
        names |= {service.name for service in told.list_services_response.service}
        break
    if SERVICE not in names:
        raise Unmet(f"reflection lists {sorted(names)}", f"{SERVICE} among them")
    return ["health SERVING, reflection on"]


async def load(kit: Kit) -> Found:
    """LOADED, until weights come."""
    signature = await kit.load()
    expect("LoadModel again", await kit.client.load(kit.model.files, kit.precision), signature)
    answer = await kit.client.version()
    if answer.state != pb.ENGINE_STATE_LOADED:
        raise NotRun(f"the engine was {pb.EngineState.Name(answer.state)} with this very model")
    if answer.HasField("policy_version"):
        raise Unmet(f"policy_version {answer.policy_version} while LOADED", "unset")
    await refused(kit.client.generate(kit.prompt(3)), PRECONDITION, what="Generate while LOADED")
    return ["LOADED, serves nothing, loading again changes nothing"]


async def capabilities(kit: Kit) -> Found:
    """Complete, and what the config says."""
    await kit.serving()
    answer = await kit.client.capabilities()
    can, loaded, model = answer.can, answer.loaded, kit.model
    for field in ("kind", "version", "device"):
        if not getattr(can, field):
            raise Unmet(f"can.{field}: empty", "words for people to read")
    architecture = model.config["architectures"][0]
    if can.architectures and architecture not in can.architectures:
        raise Unmet(f"can.architectures lacks {architecture}, which is loaded", "all it can load")
    if kit.precision.dtype not in can.dtypes:
        raise Unmet(f"can.dtypes: {list(can.dtypes)}", f"{kit.precision.dtype}, served now, too")
    if pb.QUANTIZATION_NONE not in can.quantizations:
        raise Unmet(f"can.quantizations: {list(can.quantizations)}", "QUANTIZATION_NONE among them")
    if STREAM not in can.transports:
        raise Unmet(f"can.transports: {list(can.transports)}", "WEIGHT_TRANSPORT_STREAM among them")
    if can.max_group_size < 2:
        raise Unmet(f"can.max_group_size: {can.max_group_size}", "2 or more: a group")
    if can.max_message_bytes < 2**20:
        raise Unmet(f"can.max_message_bytes: {can.max_message_bytes}", "1 MiB or more")
    if can.deterministic != bool(can.max_cohort_sequences):
        raise Unmet(
            f"can.max_cohort_sequences: {can.max_cohort_sequences}",
            "above 0 where deterministic, else 0",
        )
    files = model.files
    tokenizer = files.get("tokenizer.json")
    signature = pb.ModelSignature(
        architecture=architecture,
        config_xxh3=codec.config_hash(files["config.json"]),
        tokenizer_xxh3=codec.xxh3(tokenizer) if tokenizer is not None else 0,
        vocab_size=model.vocab_size,
        max_sequence_tokens=model.max_tokens,
        moe_layers=model.a.layers,
        experts_per_token=model.a.top_k,
        num_experts=model.a.num_experts,
    )
    for described in signature.DESCRIPTOR.fields:
        field = described.name
        seen, valid = getattr(loaded, field), getattr(signature, field)
        if described.is_repeated:
            seen, valid = list(seen), list(valid)
        expect(f"loaded.{field}", seen, valid)
    expect("precision", answer.precision, kit.precision)
    expect("state", pb.EngineState.Name(answer.state), "ENGINE_STATE_READY")
    expect("run", answer.run, kit.client.run)
    return [f"{can.kind} on {can.device}, {architecture}"]


async def policy_version(kit: Kit) -> Found:
    """GetWeightVersion, and require_policy_version."""
    version = await kit.serving()
    number = version.manifest.policy_version
    answer = await kit.client.version()
    expect("GetWeightVersion.policy_version", answer.policy_version, number)
    expect("GetWeightVersion.fingerprint", answer.fingerprint, version.manifest.fingerprint)
    await kit.client.generate(kit.prompt(3), max_tokens=1, version=number)
    other = kit.client.generate(kit.prompt(3), max_tokens=1, version=number + 1)
    await refused(other, PRECONDITION, what=f"require_policy_version {number + 1}")
    return [f"version {number}"]


async def fencing(kit: Kit) -> Found:
    """A token lower than the highest seen, and no lease at all."""
    version = await kit.serving()
    client = kit.client
    old = EngineClient(
        client.address,
        client.channel,
        client.run,
        client.lease.fencing_token - 1,
        client.timeout_s,
    )
    denied = (grpc.StatusCode.PERMISSION_DENIED,)
    message = next(old.pieces(version))
    try:
        for what, call in (
            ("LoadModel", lambda: old.load(kit.model.files, kit.precision)),
            ("BeginWeightUpdate", lambda: old.begin(version.manifest)),
            ("UpdateWeights", lambda: old.send([message])),
            ("FinishWeightUpdate", lambda: old.finish(version.manifest)),
            ("Pause", lambda: old.pause(pb.PAUSE_MODE_KEEP)),
            ("Resume", old.resume),
        ):
            await refused(call(), denied, what=f"{what} with an older token")
        bare = client.stub.Pause(pb.PauseRequest(mode=pb.PAUSE_MODE_KEEP), timeout=client.timeout_s)
        await refused(bare, INVALID, "lease", what="Pause without a lease")
    finally:
        await client.resume()
    return ["six calls with an older token, one without a lease"]


async def load_anew(kit: Kit) -> Found:
    """What a trainer does with an engine that it has found wrong."""
    await kit.serving()
    kit.served = None
    await kit.client.load(kit.model.files, kit.precision, anew=True)
    answer = await kit.client.version()
    expect("state", pb.EngineState.Name(answer.state), "ENGINE_STATE_LOADED")
    if answer.HasField("policy_version"):
        raise Unmet(f"policy_version {answer.policy_version} while LOADED", "unset")
    return ["LOADED, the version that was served is forgotten"]


ROWS = (
    Row(
        "health",
        "it can be found and watched: health SERVING, reflection on",
        "RolloutService: Health by grpc.health.v1, reflection on",
        health,
    ),
    Row(
        "load",
        "with a model and no weights it is LOADED and serves nothing; loading again is a no-op",
        "RolloutService.LoadModel: idempotent for the same model; weights follow by an update",
        load,
    ),
    Row(
        "capabilities",
        "capabilities are complete, and agree with the model's config",
        "EngineAbilities, ModelSignature: every field",
        capabilities,
    ),
    Row(
        "policy-version",
        "it says which version it serves, and refuses requests for any other",
        "GenerateRequest.require_policy_version; GetWeightVersionResponse",
        policy_version,
    ),
    Row(
        "fencing",
        "a lease that is over changes nothing",
        "Lease: the engine refuses a token lower than the highest it has seen",
        fencing,
    ),
    Row(
        "load-anew",
        "LoadModel with anew loads what is loaded already, and forgets the weights",
        "LoadModelRequest.anew: what is served was found wrong",
        load_anew,
    ),
)
