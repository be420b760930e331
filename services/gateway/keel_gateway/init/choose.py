"""Values for a job, each with its reason: the same data and model give the same file."""

from __future__ import annotations

from dataclasses import dataclass, field

from keel.presets import PRESETS
from keel_gateway.init.data import MATH_SHARE, Data
from keel_gateway.init.model import PRESET, Model

PAPER_GROUPS = 64
LAPS_AN_EPOCH = 8
"""At least, if there are rows enough for mini-batches of two groups."""
MATH_TOKENS, MOST_TOKENS = 512, 1024
SMALL_PARAMETERS, LARGE_PARAMETERS = 20_000_000, 1_000_000_000
CHARACTERS_A_TOKEN = 3
"""Of an answer, few rather than many: numbers and formulas have short tokens."""


@dataclass(slots=True)
class Choices:
    """What the job file will say."""

    verifier: str
    chat: bool = False
    plain_template: bool = False
    dtype: str = "float32"
    group_size: int = 8
    max_tokens: int = MATH_TOKENS
    off_policiness: int = 1
    groups: int = PAPER_GROUPS
    steps: int = 0
    learning_rate: float = 1e-6
    evaluate_every: int = 0
    evaluate_samples: int = 128
    checkpoint_every: int = 0
    reasons: dict[str, str] = field(default_factory=dict)
    """By dotted key."""
    warnings: list[str] = field(default_factory=list)


def choose(data: Data, model: Model, verifier: str | None, steps: int | None) -> Choices:
    """The choices for a file and a model."""
    chosen = Choices(verifier=verifier or "exact")
    if not model.parameters:
        chosen.warnings.append(_no_model(data))
    _judge(chosen, data, given=verifier is not None)
    _template(chosen, data, model)
    _lengths(chosen, data, model)
    _recipe(chosen, data, model, steps)
    _size(chosen, model)
    return chosen


def _no_model(data: Data) -> str:
    text = (
        "without --model the job has random weights, and learns nothing from rewards alone: it "
        "shows that everything runs"
    )
    strange = sorted(data.characters - set(PRESETS[PRESET].alphabet))
    if strange:
        shown = "".join(strange[:20])
        text += f". Its tokenizer does not know {len(strange)} characters of yours: {shown!r}"
    return text


def _judge(chosen: Choices, data: Data, *, given: bool) -> None:
    share = f"{data.math:.0%} of the answers look like mathematics"
    if given:
        why = "as asked for"
    elif data.math >= MATH_SHARE:
        chosen.verifier, why = "math", f"{share}: 1/2, 0.5 and \\frac{{1}}{{2}} are the same to it"
    else:
        why = f"{share}, so the response must be the answer, white space aside"
    chosen.reasons["task.verifier"] = why
    if chosen.verifier == "exact" and not given and data.answer_characters[1] > 200:
        chosen.warnings.append(
            f"answers have up to {data.answer_characters[1]:,} characters, and exact wants each of "
            "them: a regex or a function of yours may judge better (docs/verifiers.md)"
        )


def _template(chosen: Choices, data: Data, model: Model) -> None:
    chosen.chat = model.chat_template and not data.chat
    if chosen.chat:
        chosen.reasons["task.chat"] = (
            "prompts are text and the model has a chat template: each becomes a user message"
        )
    if data.chat and not model.chat_template:
        chosen.plain_template = True
        chosen.reasons["model.chat_template"] = (
            "prompts are chat messages and the model has no template: a plain one; put in the one "
            "that your model was trained with, if there is one"
        )


def _lengths(chosen: Choices, data: Data, model: Model) -> None:
    most = data.answer_characters[1]
    if chosen.verifier == "math":
        chosen.max_tokens, why = MATH_TOKENS, "room for working it out before the answer"
    else:
        needed = 2 * most // CHARACTERS_A_TOKEN + 16
        chosen.max_tokens = min(MOST_TOKENS, 2 ** (needed - 1).bit_length())
        why = f"the longest answer has {most} characters; twice that, at 3 a token"
    if model.positions is not None:
        room = model.positions - model.prompt_tokens
        total = f"the longest prompt has {model.prompt_tokens} tokens, the model {model.positions}"
        if room < chosen.max_tokens:
            chosen.warnings.append(
                f"prompts and {chosen.max_tokens} tokens of response do not fit: {total}, which "
                f"leaves {room}; prompts that do not fit are left out of training (groups/void)"
            )
            chosen.max_tokens = max(1, room)
            why = f"what the model's positions leave: {total}"
    chosen.reasons["rollout.max_tokens"] = f"{why}; watch response/truncated"


def _recipe(chosen: Choices, data: Data, model: Model, steps: int | None) -> None:
    chosen.off_policiness = 4 if model.experts else 1
    chosen.reasons["recipe.off_policiness"] = (
        "a Mixture of Experts: N = 4 with the engine's routes replayed (R3), the paper's finding"
        if model.experts
        else "a dense model: on-policy is the paper's most stable setting"
    )
    lap = chosen.off_policiness
    chosen.groups = min(PAPER_GROUPS, max(2, _power_of_two(data.rows // (LAPS_AN_EPOCH * lap))))
    chosen.reasons["recipe.groups_per_minibatch"] = (
        "as in the paper"
        if chosen.groups == PAPER_GROUPS
        else f"{data.rows:,} rows are few: small mini-batches, so that an epoch has some laps"
    )
    if steps is None:
        epoch = data.rows // chosen.groups
        chosen.steps = _multiple(max(10 * lap, min(500, epoch)), lap)
        why = f"about {chosen.steps * chosen.groups / data.rows:.1f} epochs"
    else:
        chosen.steps, why = _multiple(steps, lap), "as asked for, in whole laps of N"
    chosen.reasons["recipe.steps"] = why
    chosen.evaluate_every = _multiple(max(1, chosen.steps // 10), lap)
    chosen.checkpoint_every = _multiple(max(1, chosen.steps // 5), lap)


def _size(chosen: Choices, model: Model) -> None:
    if model.parameters < SMALL_PARAMETERS:
        chosen.learning_rate, why = 5e-4, "a small model (under 20 M parameters) wants large steps"
    elif model.parameters < LARGE_PARAMETERS:
        chosen.learning_rate, why = 5e-6, "usual below a billion parameters"
    else:
        chosen.learning_rate, why = 1e-6, "usual for models of this size; the paper does not say"
        chosen.dtype = "bfloat16"
        chosen.reasons["model.dtype"] = "as in the paper, with float32 masters"
    chosen.reasons["recipe.learning_rate"] = why


def _power_of_two(number: int) -> int:
    """The largest that is not above it; 0 of 0."""
    return 1 << number.bit_length() - 1 if number else 0


def _multiple(steps: int, lap: int) -> int:
    """At least one lap, in whole laps."""
    return max(lap, -(-steps // lap) * lap)
