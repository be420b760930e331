"""What a user's model folder is like: looked at in a process of its own, since it takes
transformers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from keel.errors import InvalidField
from keel.presets import PRESETS
from keel.rows import Prompt
from keel_gateway.init.data import text_of

FIELD = "--model"
PRESET = "tiny-qwen3-moe"
PROBE_S = 300.0
NEEDED = ("config.json", "tokenizer.json")

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "assistant: "
)
"""For a model whose folder has no chat template."""

_PROBE = """
import json, sys
from pathlib import Path
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer
asked = json.load(sys.stdin)
folder = Path(asked["folder"])
config = AutoConfig.from_pretrained(folder, local_files_only=True)
tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
text = config.get_text_config()
parameters = 0
for file in folder.glob("*.safetensors"):
    with safe_open(file, "np") as weights:
        for name in weights.keys():
            size = 1
            for length in weights.get_slice(name).get_shape():
                size *= length
            parameters += size
template = tokenizer.chat_template
def tokens(prompt):
    if isinstance(prompt, str) and not (asked["chat"] and template):
        return len(tokenizer(prompt)["input_ids"])
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    text = tokenizer.apply_chat_template(
        messages, chat_template=template or asked["template"], tokenize=False,
        add_generation_prompt=True)
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])
experts = next((getattr(text, name) for name in ("num_experts", "num_local_experts",
    "n_routed_experts") if getattr(text, name, None)), 0)
print(json.dumps({
    "architecture": (config.architectures or [config.model_type])[0],
    "parameters": parameters,
    "experts": experts,
    "positions": getattr(text, "max_position_embeddings", None),
    "chat_template": bool(template),
    "prompt_tokens": max(map(tokens, asked["prompts"])),
}))
"""


@dataclass(frozen=True, slots=True)
class Model:
    """A model folder that transformers can read."""

    path: Path
    architecture: str
    parameters: int
    """0: random weights, of a preset."""
    experts: int
    """0: dense."""
    positions: int | None
    """Most tokens of prompt and response; None: the configuration does not say."""
    chat_template: bool
    """Its tokenizer has one."""
    prompt_tokens: int
    """Of the longest prompt, in its chat template if it is chat."""


def preset(prompts: Sequence[Prompt]) -> Model:
    """The preset, where no model is given: one token a character, no chat template."""
    config = PRESETS[PRESET].config
    template = "" if all(isinstance(prompt, str) for prompt in prompts) else PLAIN_TEMPLATE
    return Model(
        path=Path(f"preset:{PRESET}"),
        architecture=config["architectures"][0],
        parameters=0,
        experts=PRESETS[PRESET].experts,
        positions=config["max_position_embeddings"],
        chat_template=False,
        prompt_tokens=max(len(text_of(prompt)) for prompt in prompts) + len(template),
    )


def look(path: Path, prompts: Sequence[Prompt], *, chat: bool) -> Model:
    """Checks a model folder, and counts the prompts' tokens.

    Args:
        chat: prompts that are text are put into the chat template, if there is one.

    Raises:
        InvalidField: it is no model folder; says what it lacks.
    """
    folder = path.expanduser().absolute()
    if not folder.is_dir():
        raise InvalidField(FIELD, str(path), "a Hugging Face folder on the trainer's disk")
    lacking = [name for name in NEEDED if not (folder / name).is_file()]
    if not any(folder.glob("*.safetensors")):
        lacking.append("*.safetensors")
    if lacking:
        raise InvalidField(FIELD, str(path), f"a model folder; it lacks {', '.join(lacking)}")
    asked = {
        "folder": str(folder),
        "prompts": list(prompts),
        "chat": chat,
        "template": PLAIN_TEMPLATE,
    }
    done = subprocess.run(
        [sys.executable, "-c", _PROBE],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=PROBE_S,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    if done.returncode:
        error = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InvalidField(FIELD, str(path), f"a folder that transformers reads ({error})")
    found = json.loads(done.stdout.splitlines()[-1])
    return Model(path=folder, **found)
