"""The job file: TOML in which every choice says why, and what to try next."""

from __future__ import annotations

import json
import os
import textwrap
from pathlib import Path

from keel.errors import InvalidField
from keel.spec import RunSpec, load_spec
from keel_gateway.init.choose import Choices
from keel_gateway.init.data import Data
from keel_gateway.init.model import PLAIN_TEMPLATE, Model


def write(out: Path, text: str) -> RunSpec:
    """Writes a new job file that is proved to be one; returns what it says.

    Raises:
        InvalidField: `out` exists, or its folder does not.
    """
    if out.exists():
        raise InvalidField("--out", str(out), "a new file: this one exists")
    temporary = out.with_name(f".{out.name}.new")
    temporary.write_text(text, encoding="utf-8")
    try:
        spec = load_spec(temporary)
        os.link(temporary, out)  # unlike a rename, never over a file that came meanwhile
    except FileExistsError:
        raise InvalidField("--out", str(out), "a new file: this one exists") from None
    finally:
        temporary.unlink()
    return spec


def job_file(data: Data, model: Model, chosen: Choices, out: Path) -> str:
    """The text of a job file that is to lie at `out`."""
    lines = [
        *_comment(f"A job for Keel, by keel init from {data.path.name}: {_summary(data)}."),
        "# Run it:",
        f"#   keel run {out.name} --out runs/{_name(data)}",
        "# or, where keel up runs:",
        f"#   keel submit {out.name} --watch",
        "#   keel export latest --out model",
        "# Every key: docs/run-schema.md. Lines that begin with #> are keys to try next.",
        "",
        f"name = {_quoted(_name(data))}",
        "seed = 1                      # same file, same seed, same weights",
        *_model(model, chosen),
        *_task(data, chosen, out),
        *_engine(chosen),
        *_recipe(chosen),
    ]
    return "\n".join(lines) + "\n"


def _summary(data: Data) -> str:
    kind = "chat messages" if data.chat else "text"
    some = "" if data.looked_at == data.rows else f" (of {data.looked_at:,} rows looked at)"
    return (
        f"{data.rows:,} rows, prompts are {kind} of {data.prompt_characters[0]} characters, at "
        f"most {data.prompt_characters[1]}, answers of {data.answer_characters[0]}, at most "
        f"{data.answer_characters[1]}{some}"
    )


def _name(data: Data) -> str:
    """The file's name as the name of a run."""
    kept = "".join(c if c.isascii() and c.isalnum() else "-" for c in data.path.stem.lower())
    return kept.strip("-")[:40].strip("-") or "job"


def _model(model: Model, chosen: Choices) -> list[str]:
    about = "random weights, to see that everything runs: put in the folder of your model"
    if model.parameters:
        experts = f", {model.experts} experts" if model.experts else ", dense"
        about = f"{model.architecture}, {model.parameters / 1e6:,.1f} M parameters{experts}"
    lines = ["", "[model]", f"# {about}", f"path = {_quoted(str(model.path))}"]
    if chosen.plain_template:
        lines += _with_reason("chat_template", _quoted(PLAIN_TEMPLATE), "model", chosen)
    if chosen.dtype != "float32":
        lines += _with_reason("dtype", _quoted(chosen.dtype), "model", chosen)
    return lines


def _task(data: Data, chosen: Choices, out: Path) -> list[str]:
    path = data.path.absolute()
    near = path.is_relative_to(out.absolute().parent)
    shown = str(path.relative_to(out.absolute().parent)) if near else str(path)
    lines = ["", "[task]", f"dataset = {_quoted(shown)}"]
    lines += _with_reason("verifier", _quoted(chosen.verifier), "task", chosen)
    if chosen.chat:
        lines += _with_reason("chat", "true", "task", chosen)
    if (data.chat or chosen.chat) and not data.system:
        hint = "Think step by step; put the final answer in \\boxed{}."
        if chosen.verifier != "math":
            hint = "Give the answer alone."
        lines.append(f"#> system = {_quoted(hint)}   # before every prompt")
    lines.append("#> held_out = 0.05           # share of the prompts kept for evaluation")
    return lines


def _engine(chosen: Choices) -> list[str]:
    lines = ["", "[engine]"]
    if chosen.dtype == "bfloat16":
        lines.append('dtype = "bfloat16"            # as the trainer')
    lines += [
        '#> quantize = "fp8"          # as the paper samples; mismatch/k3 shows what it costs',
        "",
        "[rollout]",
        f"group_size = {chosen.group_size}                # responses to a prompt; paper: 16",
    ]
    return lines + _with_reason("max_tokens", str(chosen.max_tokens), "rollout", chosen)


def _recipe(chosen: Choices) -> list[str]:
    lines = [
        *("", "[recipe]"),
        'replay = "auto"               # R3 from N = 4 on, R2 at 2 and 3, none at 1 or if dense',
        *_with_reason("off_policiness", str(chosen.off_policiness), "recipe", chosen),
        *_with_reason("groups_per_minibatch", str(chosen.groups), "recipe", chosen),
        *_with_reason("steps", str(chosen.steps), "recipe", chosen),
        *_with_reason("learning_rate", repr(chosen.learning_rate), "recipe", chosen),
        "#> warmup_steps = 10         # if the first steps shake it (grad_norm, staleness/k3)",
        *("", "[evaluation]"),
        f"every = {chosen.evaluate_every}                     # steps; in whole laps of N",
        f"samples = {chosen.evaluate_samples}                 # held-out prompts, greedy; or all",
        "#> k = 8                     # responses to each: avg@8 and pass@8",
        "#> temperature = 0.6         # above 0 for k above 1",
        *("", "[checkpoint]"),
        f"every = {chosen.checkpoint_every}                     # steps a crash can cost, at most",
    ]
    return lines


def _with_reason(key: str, value: str, section: str, chosen: Choices) -> list[str]:
    return [*_comment(chosen.reasons[f"{section}.{key}"]), f"{key} = {value}"]


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, 98, initial_indent="# ", subsequent_indent="# ")


def _quoted(text: str) -> str:
    """A TOML basic string: JSON's, which has the same escapes; DEL is its own."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
