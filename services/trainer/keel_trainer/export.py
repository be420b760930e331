"""`python -m keel_trainer.export`: a checkpoint as a Hugging Face folder.

A checkpoint holds float32 masters under the names of the loaded model's parameters. So the base
artifact is loaded as training loads it, the masters are rounded into it, and it is saved as the
final model is: the last checkpoint gives the final model's bits.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from keel.codec import xxh3
from keel.errors import IntegrityError, InvalidField, KeelError
from keel_trainer.artifact import save_model
from keel_trainer.backends.torch import TorchBackend


def export(
    artifact: Path, checkpoint: Path, out: Path, *, dtype: str, chat_template: str | None = None
) -> Path:
    """Writes the model of a checkpoint to `out`, whole or not at all; returns `out`.

    Args:
        artifact: the run's base: config, weights, tokenizer.
        checkpoint: a folder `step-...` of the run.
        out: must not exist, or be an empty folder.
        dtype: of the model, as the job had it: float32 or bfloat16.
        chat_template: the job's own, as in `save_model`.

    Raises:
        InvalidField: `out` has something in it, or `checkpoint` is no checkpoint.
        IntegrityError: the checkpoint is damaged, or of another model.
        ModelError: the artifact cannot be loaded.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidField("--out", str(out), "a new or empty folder")
    state = _checked_state(checkpoint)
    backend = TorchBackend.from_pretrained(artifact, dtype=dtype)
    try:
        with safe_open(state, "pt") as masters, torch.no_grad():
            for name, parameter in backend.model.named_parameters():
                parameter.copy_(masters.get_tensor(f"master/{name}"))
    except (SafetensorError, RuntimeError) as error:  # no such name, another shape
        raise IntegrityError(f"{checkpoint} does not fit {artifact}: {error}") from error
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.exporting")
    shutil.rmtree(temporary, ignore_errors=True)
    save_model(backend, artifact, temporary, chat_template=chat_template)
    if out.is_dir():
        out.rmdir()
    return temporary.rename(out)


def _checked_state(checkpoint: Path) -> Path:
    state = checkpoint / "state.safetensors"
    try:
        digest = json.loads((checkpoint / "progress.json").read_text(encoding="utf-8"))["xxh3"]
        found = f"{xxh3(state.read_bytes()):016x}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidField("checkpoint", str(checkpoint), f"a checkpoint ({error})") from error
    if found != digest:
        raise IntegrityError(f"{state} differs from its hash; take another checkpoint")
    return state


def main(argv: list[str] | None = None) -> int:
    """Exits with 2 and one sentence for what the caller can mend, with 1 for the rest."""
    parser = argparse.ArgumentParser(
        prog="python -m keel_trainer.export",
        description="Writes the model of a checkpoint as a Hugging Face folder; `keel export` asks "
        "the gateway for the paths.",
    )
    parser.add_argument("--artifact", required=True, type=Path, help="the run's base model folder")
    parser.add_argument("--checkpoint", required=True, type=Path, help="the run's folder step-...")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--chat-template", help="the job's own: its text, or a path")
    parser.add_argument("--out", required=True, type=Path, help="new or empty folder")
    args = parser.parse_args(argv)
    try:
        export(
            args.artifact,
            args.checkpoint,
            args.out,
            dtype=args.dtype,
            chat_template=args.chat_template,
        )
    except KeelError as error:
        sys.stderr.write(f"{error}\n")
        return 2 if isinstance(error, InvalidField) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
