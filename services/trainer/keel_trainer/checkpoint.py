"""Checkpoints: a folder each, written whole or not at all.

    step-00000120/state.safetensors   float32 masters, optimizer moments, step count, RNG
    step-00000120/progress.json       where the run stands, and the hash of the other file

A folder is written under a temporary name, synced, and renamed. No pickle anywhere.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from keel.checkpoints import CheckpointInfo
from keel.codec import xxh3
from keel.disk import sync
from keel_trainer.storage import StorageError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands at a checkpoint.

    Checkpoints fall on lap boundaries (and between supervised steps), so `step` and
    `cold_start_step` name the consumed slots: every one of the laps before.
    """

    attempt: int
    cold_start_step: int
    """Supervised steps done."""
    step: int
    """Optimizer steps of the recipe done; a multiple of N."""
    first_gaps: dict[str, float] = field(default_factory=dict)
    """Probe gap at first load, nats, by kind of engine."""


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep

    def save(self, progress: Progress, state: dict[str, torch.Tensor]) -> Path:
        """Returns once the checkpoint is on disk; older ones beyond `keep` are removed.

        Raises:
            StorageError: it could not be written, and nothing of it is left. May be repeated.
        """
        temporary = self._folder / f".{_name(progress)}"
        try:
            return self._save(temporary, progress, state)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            size = sum(tensor.nbytes for tensor in state.values())
            raise StorageError(self._folder, size, error) from error

    def _save(self, temporary: Path, progress: Progress, state: dict[str, torch.Tensor]) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        final = self._folder / _name(progress)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        save_file(state, temporary / "state.safetensors")
        content = asdict(progress) | {"xxh3": f"{_hash(temporary / 'state.safetensors'):016x}"}
        (temporary / "progress.json").write_text(json.dumps(content), encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        sync(self._folder)
        for old in self._all()[: -self._keep]:
            shutil.rmtree(old)
        return final

    def before(self, progress: Progress) -> Progress | None:
        """Where the run stood at the checkpoint before this one: the one to fall back on."""
        older = [folder for folder in self._all() if folder.name < _name(progress)]
        try:
            return _progress(older[-1])[0] if older else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def load_latest(self) -> tuple[Progress, dict[str, torch.Tensor]] | None:
        """The newest checkpoint that is whole, or None."""
        for folder in reversed(self._all()):
            try:
                progress, digest = _progress(folder)
                if f"{_hash(folder / 'state.safetensors'):016x}" != digest:
                    raise ValueError("state.safetensors differs from its hash")
                state = load_file(folder / "state.safetensors")
                return progress, state
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                log.error("%s cannot be used, taking the one before: %s", folder, error)
                self._set_aside(folder)
        return None

    def _set_aside(self, folder: Path) -> None:
        """Keeps a broken checkpoint to be looked at, where it is neither used nor counted."""
        aside = folder.with_name(f"broken-{folder.name}")
        try:
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
        except OSError as error:
            log.warning("%s stays where it is: %s", folder, error)

    def existing(self, off_policiness: int, cold_start_steps: int) -> list[CheckpointInfo]:
        """What is on disk, the oldest first; folders that cannot be read are left out.

        Args:
            off_policiness: N, steps a version.
            cold_start_steps: supervised steps in all; before them there is no version.
        """
        found = []
        for folder in self._all():
            try:
                content = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
                files = [path.stat() for path in folder.iterdir()]
                step, cold_start_step = int(content["step"]), int(content["cold_start_step"])
                in_cold_start = cold_start_step < cold_start_steps
                found.append(
                    CheckpointInfo(
                        attempt=content["attempt"],
                        step=step,
                        cold_start_step=cold_start_step,
                        policy_version=None if in_cold_start else step // off_policiness,
                        created_at=datetime.fromtimestamp(max(f.st_mtime for f in files), UTC),
                        size_bytes=sum(file.st_size for file in files),
                        folder=str(folder.resolve()),
                    )
                )
            except (OSError, ValueError, KeyError, TypeError) as error:
                log.error("%s is not listed: %s", folder, error)
        return found

    def _all(self) -> list[Path]:
        return sorted(self._folder.glob("step-*"))


def _name(progress: Progress) -> str:
    # cold-start checkpoints sort before step 1
    if progress.step == 0:
        return f"step-{0:08d}-cold-{progress.cold_start_step:08d}"
    return f"step-{progress.step:08d}"


def _progress(folder: Path) -> tuple[Progress, str]:
    """What progress.json says, and the hash of the other file."""
    content = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
    digest = content.pop("xxh3")
    if (gap := content.pop("first_gap", None)) is not None:
        content["first_gaps"] = {"torch": gap}  # written when that was the only kind
    return Progress(**content), digest


def _hash(path: Path) -> int:
    return xxh3(path.read_bytes())
