"""RunSpec: the one schema of a run. The TOML file, the REST body and the trainer's input are it.

Frozen and closed: an unknown key is an error, so a renamed field cannot pass unseen. Defaults are
the paper's (arXiv 2512.01374) where it states them, and marked as Keel's own where it does not.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from keel.errors import InvalidField
from keel.presets import PRESETS
from keel.spec_base import ACROSS, NonNegativeInt, PositiveFloat, PositiveInt
from keel.spec_base import Section as _Section
from keel.spec_base import across as _across
from keel.spec_data import (
    DEFAULT_HELD_OUT,
    HELD_OUT,
    ColdStartSpec,
    EvaluationSpec,
)
from keel.spec_data import MULTIPLICATION as MULTIPLICATION
from keel.spec_data import EvaluationSet as EvaluationSet
from keel.spec_data import TaskSpec as TaskSpec
from keel.spec_data import VerifierSpec as VerifierSpec
from keel.spec_data import answers_for as answers_for
from keel.spec_data import is_custom_verifier as is_custom_verifier
from keel.spec_recipe import RecipeSpec as RecipeSpec

COHORT_SEQUENCES = 256
"""Most sequences of a cohort, unless one group is larger: a batch that computes well."""
COHORT_TOKENS = 2**20
"""Most response tokens of a cohort, unless one group has more: what engine and collector hold at
once stays bounded for long responses. Up to 4,096 tokens each, COHORT_SEQUENCES cuts."""


EngineKind = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]


def is_template(text: str) -> bool:
    """Whether a model.chat_template is the template itself, not the path of one."""
    return "{{" in text or "{%" in text


class ModelSpec(_Section):
    """[model]: what is trained."""

    path: str
    """A Hugging Face folder with config.json, weights and tokenizer.json on the trainer's disk, or
    "preset:NAME" for a small model with random weights (docs/models.md)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the trainer's forward and of the published weights. bfloat16 keeps float32 masters;
    the paper trains in bfloat16."""
    chat_template: str | None = None
    """Jinja template for chat messages: its text, or an absolute path that the collector can read
    (in a job file also one relative to it). Left out: the model folder's own."""

    @field_validator("path")
    @classmethod
    def _known_preset(cls, path: str) -> str:
        kind, _, name = path.partition(":")
        if not path.strip() or (kind == "preset" and name not in PRESETS):
            known = ", ".join(f"preset:{preset}" for preset in sorted(PRESETS))
            raise ValueError(f"a model folder, or one of {known}")
        return path

    @field_validator("chat_template")
    @classmethod
    def _template(cls, template: str | None) -> str | None:
        if template is not None and not (is_template(template) or Path(template).is_absolute()):
            raise ValueError("a Jinja template, or an absolute path of one")
        return template


class EngineSpec(_Section):
    """[engine]: the inference engine that the run asks for."""

    kind: EngineKind | Annotated[tuple[EngineKind, ...], Field(min_length=1)] = "torch"
    """Which engine: the kind that it names in its capabilities ("torch", "vllm", your own). Several
    kinds in a list: at least one of each is leased. Only "torch" gives the same bits again."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of weights and activations in the engine."""
    quantize: Literal["none", "fp8", "fp4"] = "none"
    """Low-precision inference: fp8 is e4m3 with block scales (the paper infers in FP8), fp4 is
    NVFP4: e2m1 with an e4m3 scale for every 16 numbers."""
    quantize_inputs: bool = True
    """With quantize: also the inputs of linear layers."""
    quantize_router: bool = False
    """With quantize: also the routers."""
    count: PositiveInt | None = None
    """Engines leased at once. Left out: one of each kind."""

    @field_validator("kind")
    @classmethod
    def _once(cls, kind: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if len(set(kinds := _kinds(kind))) < len(kinds):
            raise ValueError("each kind once; engine.count says how many engines")
        return kind

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        if self.engines < len(self.kinds):
            valid = f"{len(self.kinds)} or more: one of each kind in engine.kind"
            raise _across("engine.count", self.engines, valid)
        return self

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds that suit, each of them wanted."""
        return _kinds(self.kind)

    @property
    def engines(self) -> int:
        """Engines leased at once."""
        return self.count or len(self.kinds)


def _kinds(kind: str | tuple[str, ...]) -> tuple[str, ...]:
    return (kind,) if isinstance(kind, str) else kind


class TrainerSpec(_Section):
    """[trainer]: the training backend."""

    backend: Literal["torch"] = "torch"
    """Which backend."""
    micro_batch_tokens: PositiveInt = 8192
    """Most tokens (padding counted) of one forward and backward. It enters the rounding, so it is
    part of the run, not of the machine."""


class ParallelSpec(_Section):
    """[parallel]: how the model is laid out over ranks. The torch backend takes one rank."""

    data: Literal[1] = 1
    """Data-parallel replicas."""
    tensor: Literal[1] = 1
    """Tensor-parallel ranks."""
    expert: Literal[1] = 1
    """Expert-parallel ranks."""
    pipeline: Literal[1] = 1
    """Pipeline stages."""


class RolloutSpec(_Section):
    """[rollout]: how responses are sampled."""

    group_size: Annotated[int, Field(ge=2, le=1024)] = 16
    """Responses to each prompt, G. The paper: 16."""
    temperature: PositiveFloat = 1.0
    """Softmax temperature of sampling and of all three log-probs."""
    max_tokens: PositiveInt = 32
    """Most response tokens. The paper: 32,768."""
    max_staleness: Literal[0] = 0
    """Laps that sampling may run ahead of training. 0: synchronous, as in the paper."""


class CheckpointSpec(_Section):
    """[checkpoint]: what a crash can cost."""

    every: NonNegativeInt = 0
    """Optimizer steps between checkpoints, a multiple of off_policiness. 0: only after the cold
    start and after the last step."""
    keep: PositiveInt = 2
    """Checkpoints kept."""


class RunSpec(_Section):
    """A run, whole.

    Example:
        RunSpec.model_validate({"name": "first", "model": {"path": "preset:tiny-qwen3-moe"},
                                "recipe": {"steps": 8, "off_policiness": 4}})
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
    """For people: letters, digits, '.', '_' and '-', at most 63."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Everything random in the run follows from it."""
    model: ModelSpec
    task: TaskSpec = TaskSpec()
    cold_start: ColdStartSpec = ColdStartSpec()
    engine: EngineSpec = EngineSpec()
    trainer: TrainerSpec = TrainerSpec()
    parallel: ParallelSpec = ParallelSpec()
    rollout: RolloutSpec = RolloutSpec()
    recipe: RecipeSpec
    evaluation: EvaluationSpec = EvaluationSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()

    @model_validator(mode="after")
    def _version_boundaries(self) -> Self:
        for section in ("evaluation", "checkpoint"):
            every = getattr(self, section).every
            if every % self.recipe.off_policiness:
                raise _across(
                    f"{section}.every",
                    every,
                    f"a multiple of recipe.off_policiness = {self.recipe.off_policiness}, since "
                    "it falls on version boundaries",
                )
        return self

    @model_validator(mode="after")
    def _data_fits(self) -> Self:
        if self.cold_start.steps and self.task.file and self.cold_start.dataset is None:
            raise _across(
                "cold_start.dataset",
                "missing",
                "a JSONL file of prompts and responses: the built-in demonstrations do not fit "
                "task.dataset; or cold_start.steps = 0",
            )
        if self.evaluation.every and self.task.file and self.held_out == 0:
            for index, each in enumerate(self.evaluation_sets):
                if each.dataset is None:
                    raise _across(
                        f"evaluation.sets.{index}.dataset"
                        if self.evaluation.sets
                        else "task.held_out",
                        "missing" if self.evaluation.sets else 0,
                        "a JSONL file, or a task.held_out above 0: nothing is kept from training",
                    )
        return self

    @property
    def held_out(self) -> float:
        """Share of the task's file that is kept from training."""
        if self.task.held_out is not None:
            return self.task.held_out
        return DEFAULT_HELD_OUT if any(s.dataset is None for s in self.evaluation_sets) else 0.0

    @property
    def evaluation_sets(self) -> tuple[EvaluationSet, ...]:
        """What is evaluated, in order; the first one's mean is accuracy/eval."""
        return self.evaluation.sets or (EvaluationSet(name=HELD_OUT),)

    def verifiers_of(self, evaluated: EvaluationSet) -> tuple[VerifierSpec, ...]:
        """What judges the responses of an evaluation set."""
        return evaluated.verifier or self.task.verifiers

    @property
    def evaluation_max_tokens(self) -> int:
        """Most tokens of a response in evaluation."""
        return self.evaluation.max_tokens or self.rollout.max_tokens

    @property
    def laps(self) -> int:
        """Laps of the run; each makes one policy version."""
        return self.recipe.steps // self.recipe.off_policiness

    @property
    def slots_per_lap(self) -> int:
        """Groups of a lap: N x B."""
        return self.recipe.off_policiness * self.recipe.groups_per_minibatch

    def cohorts(self, groups: int) -> list[range]:
        """Cuts consecutive slots into cohorts: a function of the spec, never of engines."""
        return _cut(groups, self.rollout.group_size, self.rollout.max_tokens)

    def evaluation_cohorts(self, prompts: int) -> list[range]:
        """Cuts prompts of an evaluation set, k responses each, in the same way."""
        return _cut(prompts, self.evaluation.k, self.evaluation_max_tokens)

    def evaluated_steps(self) -> list[int]:
        """Steps after which the held-out prompts are evaluated, ascending; step 0 is version 0."""
        every = self.evaluation.every
        if every == 0:
            return []
        return sorted({*range(0, self.recipe.steps, every), self.recipe.steps})


def _cut(groups: int, group_size: int, max_tokens: int) -> list[range]:
    size = max(1, min(COHORT_SEQUENCES, COHORT_TOKENS // max_tokens) // group_size)
    return [range(begin, min(begin + size, groups)) for begin in range(0, groups, size)]


def parse_spec(data: Any) -> RunSpec:
    """A RunSpec from decoded TOML or JSON, or InvalidField for the first thing wrong with it."""
    try:
        return RunSpec.model_validate(data)
    except ValidationError as error:
        raise spec_errors(error)[0] from error


def spec_errors(error: ValidationError) -> list[InvalidField]:
    """Every complaint of pydantic as field, value and what would be valid."""
    return [_complaint(item) for item in error.errors(include_url=False)]


def _complaint(item: ErrorDetails) -> InvalidField:
    if item["type"] == ACROSS:
        return InvalidField(item["ctx"]["field"], item["ctx"]["value"], item["msg"])
    field = ".".join(str(part) for part in item["loc"]) or "spec"
    value = "missing" if item["type"] == "missing" else item["input"]
    return InvalidField(field, value, _valid(field, item["type"], item["msg"]))


def _valid(field: str, kind: str, message: str) -> str:
    if field in ("rollout.top_p", "rollout.top_k", "rollout.min_p"):
        return (
            "leave it out: rollouts sample from the full vocabulary, truncated sampling would bias "
            "pi / mu"
        )
    if kind == "extra_forbidden":
        return "no such key; docs/run-schema.md has the keys"
    if kind == "missing":
        return "a value: this key is required"
    return message.removeprefix("Value error, ").removeprefix("Input should be ")


def load_spec(path: Path, settings: Iterable[str] = ()) -> RunSpec:
    """Reads a job file (TOML).

    Data files that it names may be relative to its folder; a chat template's file is read into the
    spec, so that the job holds it.

    Args:
        settings: keys that replace those of the file, "section.key=value"; the value is TOML, and a
            string where it is none.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise InvalidField(str(path), str(error), "a TOML file; see examples/") from error
    except UnicodeDecodeError as error:
        raise InvalidField(str(path), str(error), "a TOML file in UTF-8") from error
    for setting in settings:
        _set(data, setting)
    _settle_paths(data, path.parent.absolute())
    return parse_spec(data)


def _set(data: dict[str, Any], setting: str) -> None:
    """Puts one "section.key=value" into decoded TOML; whether there is such a key is seen later."""
    name, equals, text = setting.partition("=")
    *sections, key = name.strip().split(".")
    if not equals or not all((*sections, key)):
        raise InvalidField("--set", setting, "KEY=VALUE, such as recipe.steps=8")
    try:
        parsed = tomllib.loads(f"value = {text}")
        value = parsed["value"] if len(parsed) == 1 else text
    except tomllib.TOMLDecodeError:
        value = text.strip()
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise InvalidField("--set", setting, f"a key of a section, and {section} is none")
    data[key] = value


def _settle_paths(data: dict[str, Any], folder: Path) -> None:
    """Makes the file names in decoded TOML absolute; what is no name is left to the checks."""
    for section, key, file in _file_names(data):
        if key == "chat_template":
            if not is_template(file):
                section[key] = _read_template(folder / Path(file).expanduser())
        elif file != MULTIPLICATION:
            section[key] = os.path.normpath(folder / Path(file).expanduser())


def _file_names(data: dict[str, Any]) -> list[tuple[dict[str, Any], str, str]]:
    evaluation = data.get("evaluation")
    sets = evaluation.get("sets") if isinstance(evaluation, dict) else None
    sections = [
        (data.get("model"), "chat_template"),
        (data.get("task"), "dataset"),
        (data.get("cold_start"), "dataset"),
        *((each, "dataset") for each in (sets if isinstance(sets, list) else [])),
    ]
    return [
        (section, key, section[key])
        for section, key in sections
        if isinstance(section, dict) and isinstance(section.get(key), str) and section[key].strip()
    ]


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidField(
            "model.chat_template", str(path), f"a readable file ({error})"
        ) from error
