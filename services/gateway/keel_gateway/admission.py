"""Judges a spec: against its model at once, against what engines can do as soon as one is known.

A job that no engine can do is refused when it is submitted, naming for each engine what it lacks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from keel.errors import InvalidField
from keel.presets import PRESETS, Preset
from keel.rollout.v1 import rollout_service_pb2
from keel.spec import RunSpec
from keel.types.v1 import tensor_pb2
from keel_gateway.registry import Capabilities

R3_FROM = 4
"""replay = "auto" means R3 from this off-policiness on, for Mixture-of-Experts models."""


def model_lacks(spec: RunSpec) -> list[InvalidField]:
    """What the spec asks of its model that the model cannot give, whatever the engine."""
    preset = _preset(spec)
    if preset is None:
        return []
    lacks = []
    positions = preset.config["max_position_embeddings"]
    if spec.rollout.max_tokens >= positions:
        takes = f"{spec.model.path} takes {positions} positions, prompt included"
        valid = f"1 to {positions - 1}: {takes}"
        lacks.append(InvalidField("rollout.max_tokens", spec.rollout.max_tokens, valid))
    if not preset.experts and spec.recipe.replay not in ("auto", "none"):
        valid = f"'auto' or 'none': {spec.model.path} has no experts to replay"
        lacks.append(InvalidField("recipe.replay", spec.recipe.replay, valid))
    return lacks


def engines_lack(
    spec: RunSpec, engines: Mapping[str, Capabilities], unknown: int = 0
) -> list[InvalidField]:
    """Empty if `engines` (by address) can do the run, or none is known yet; else why not.

    Of each kind that is asked for one must be able to, and in all as many as are asked for. One
    complaint a field; its `valid` says what each engine that falls short would take.

    Args:
        unknown: engines that have not said yet what they can do. One may be of a kind that no other
            is; of a kind that is known it is taken to be no better.
    """
    if not engines:
        return []
    lacks = {address: list(engine_lacks(spec, said)) for address, said in engines.items()}
    found: dict[str, InvalidField] = {}
    for kind in spec.engine.kinds:
        of_kind = [address for address, said in engines.items() if said.can.kind == kind]
        if of_kind and all(lacks[address] for address in of_kind):
            _tell(found, {address: lacks[address] for address in of_kind})
        elif not of_kind and not unknown:
            theirs = {
                address: [InvalidField("engine.kind", kind, repr(said.can.kind))]
                for address, said in engines.items()
            }
            _tell(found, theirs)
    able = sum(not lacking for lacking in lacks.values()) + unknown
    if not found and able < spec.engine.engines:
        valid = f"at most {able}: no more of the gateway's engines can do the run"
        found["engine.count"] = InvalidField("engine.count", spec.engine.engines, valid)
    return list(found.values())


def _tell(found: dict[str, InvalidField], lacks: Mapping[str, list[InvalidField]]) -> None:
    for address, lacking in lacks.items():
        for lack in lacking:
            told = f"{address} takes {lack.valid}"
            if earlier := found.get(lack.field):
                told = f"{earlier.valid}; {told}"
            found[lack.field] = InvalidField(lack.field, lack.value, told)


def engine_lacks(spec: RunSpec, capabilities: Capabilities) -> Iterator[InvalidField]:
    """Every field of the spec that one engine cannot do, with what it would take."""
    can, asked = capabilities.can, spec.engine
    if can.kind not in asked.kinds:
        yield InvalidField("engine.kind", asked.kind, repr(can.kind))
    dtypes = [_plain(tensor_pb2.DType.Name(dtype), "D_TYPE_") for dtype in can.dtypes]
    if asked.dtype not in dtypes:
        yield InvalidField("engine.dtype", asked.dtype, _listed(dtypes))
    quantizations = [
        _plain(rollout_service_pb2.Quantization.Name(value), "QUANTIZATION_")
        for value in can.quantizations
    ]
    if asked.quantize not in quantizations:
        yield InvalidField("engine.quantize", asked.quantize, _listed(quantizations))
    architectures = list(can.architectures) or [capabilities.loaded.architecture]
    preset = _preset(spec)
    if preset is not None and not set(preset.config["architectures"]) & set(architectures):
        yield InvalidField("model.path", spec.model.path, f"models of {_listed(architectures)}")
    if needs_routes(spec) and not can.routes:
        yield InvalidField(
            "recipe.replay",
            spec.recipe.replay,
            "'none' or 'R2': it reports no routes, and R3 replays the engine's",
        )
    if spec.rollout.group_size > can.max_group_size:
        yield InvalidField(
            "rollout.group_size", spec.rollout.group_size, f"2 to {can.max_group_size}"
        )
    if spec.evaluation.every and spec.evaluation.k > can.max_group_size:
        yield InvalidField("evaluation.k", spec.evaluation.k, f"1 to {can.max_group_size}")
    largest = max(map(len, spec.cohorts(spec.slots_per_lap))) * spec.rollout.group_size
    if can.deterministic and largest > can.max_cohort_sequences:
        yield InvalidField(
            "rollout.group_size",
            spec.rollout.group_size,
            f"cohorts of up to {can.max_cohort_sequences} sequences, and this makes {largest}",
        )


def needs_routes(spec: RunSpec) -> bool:
    """Whether the recipe replays the engine's routes.

    "auto" is judged for presets only: whether a folder on the trainer's disk has experts, the
    gateway cannot know.
    """
    if spec.recipe.replay == "auto":
        preset = _preset(spec)
        sparse = preset is not None and preset.experts > 0
        return sparse and spec.recipe.off_policiness >= R3_FROM
    return spec.recipe.replay == "R3"


def _preset(spec: RunSpec) -> Preset | None:
    kind, _, name = spec.model.path.partition(":")
    return PRESETS[name] if kind == "preset" else None


def _plain(name: str, prefix: str) -> str:
    return name.removeprefix(prefix).lower()


def _listed(names: list[str]) -> str:
    return " or ".join(map(repr, names)) if any(names) else "nothing that it has said"
