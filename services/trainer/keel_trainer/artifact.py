"""The base artifact: a Hugging Face folder with config, weights and tokenizer."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from keel.errors import InvalidField, ModelError
from keel.presets import END, PAD, PRESETS, Preset
from keel.seeds import derive_seed
from keel.spec import RunSpec, is_template
from keel_trainer.backends.base import Backend
from keel_trainer.storage import StorageError

log = logging.getLogger(__name__)

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt", "tokenizer.model"),
)
_PRESET_BYTES = 5 * 2**20
"""About what one takes."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def prepare_artifact(spec: RunSpec, folder: Path) -> Path:
    """The folder that engine, collector and trainer start from: `folder` made from a preset, or the
    user's own, checked. Made again from the same spec it has the same bits.

    Raises:
        ModelError: the user's folder is not a model folder; says what is missing.
        InvalidField: the job asks for longer responses than the model takes.
        StorageError: the disk takes no more. May be repeated.
    """
    kind, _, name = spec.model.path.partition(":")
    if kind == "preset":
        if not (folder / "config.json").is_file():
            try:
                _make_preset(PRESETS[name], spec, folder)
            except (OSError, SafetensorError) as error:
                raise StorageError(folder, _PRESET_BYTES, error) from error
        path = folder
    else:
        path = check_model_folder(Path(spec.model.path).expanduser())
    limit = read_config(path).get("max_position_embeddings")
    if limit is not None and spec.rollout.max_tokens >= limit:
        raise InvalidField(
            "rollout.max_tokens",
            spec.rollout.max_tokens,
            f"below the model's {limit} positions, prompt included",
        )
    return path


def check_model_folder(path: Path) -> Path:
    """The folder's absolute path, or ModelError saying what it lacks."""
    valid = (
        "a Hugging Face folder with config.json, tokenizer.json and *.safetensors, or preset:NAME"
    )
    if not path.is_dir():
        raise ModelError(f"model.path: {str(path)!r} is not a folder; valid: {valid}")
    missing = [file for file in ("config.json", "tokenizer.json") if not (path / file).is_file()]
    if not any(path.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise ModelError(
            f"model.path: {str(path)!r} is not a model folder, it lacks {', '.join(missing)}; "
            f"valid: {valid}"
        )
    try:
        AutoConfig.from_pretrained(path, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(f"model.path: {str(path / 'config.json')!r}: {error}") from error
    return path.resolve()


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a model folder."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    assert isinstance(config, dict)
    return config


def save_model(
    backend: Backend, artifact: Path, folder: Path, *, chat_template: str | None = None
) -> Path:
    """Writes the weights as a Hugging Face folder with the artifact's tokenizer; returns it.

    Args:
        chat_template: the job's own, its text or a path: it goes along, in place of the artifact's.

    Raises:
        StorageError: the disk takes no more. May be repeated.
    """
    try:
        backend.save_pretrained(folder)
        for name in _TOKENIZER_FILES:
            if (artifact / name).is_file():
                shutil.copyfile(artifact / name, folder / name)
    except (OSError, SafetensorError) as error:
        size = sum(tensor.nbytes for _, tensor in backend.weights())
        raise StorageError(folder, size, error) from error
    if chat_template is not None:
        try:
            given = is_template(chat_template)
            text = chat_template if given else Path(chat_template).read_text(encoding="utf-8")
            (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
        except OSError as error:  # only the collector needs to see it
            log.warning("model.chat_template is not beside the model: %s", error)
    return folder


def _make_preset(preset: Preset, spec: RunSpec, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.for_model(**preset.config)
    config.architectures = preset.config["architectures"]
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(spec.seed, "weights") % 2**63)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _tokenizer(preset).save_pretrained(folder)
    # config.json last: its presence says that the folder is whole
    model.to(_DTYPES[spec.model.dtype]).save_pretrained(folder / "weights")
    for file in sorted((folder / "weights").iterdir(), key=lambda f: f.name == "config.json"):
        file.rename(folder / file.name)
    (folder / "weights").rmdir()
    log.info("made %s, %d parameters", spec.model.path, sum(p.numel() for p in model.parameters()))


def _tokenizer(preset: Preset) -> PreTrainedTokenizerFast:
    """One token a character."""
    vocabulary = {token: index for index, token in enumerate([PAD, END, *preset.alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([PAD, END])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END)
