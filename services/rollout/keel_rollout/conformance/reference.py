"""The model as transformers computes it: what an engine's numbers are held against."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion

from keel.errors import InvalidField
from keel.presets import PRESETS
from keel.types.v1 import tensor_pb2
from keel_rollout.conformance.replay import Replay
from keel_rollout.conformance.verdicts import Number
from keel_rollout.engines.torch.routers import RouterTap

DTYPES = {
    "float32": tensor_pb2.D_TYPE_FLOAT32,
    "bfloat16": tensor_pb2.D_TYPE_BFLOAT16,
    "float16": tensor_pb2.D_TYPE_FLOAT16,
}
"""Wire type by name."""
FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "chat_template.jinja", "vocab.json", "merges.txt"),
)
"""What LoadModel sends of a folder, as a trainer does."""
PRESET = "preset:"

FLOORS = {"float32": 1e-3, "bfloat16": 4e-3, "float16": 2e-3}
"""Gaps in nats that are never held against an engine."""
MEAN_FLOOR = 4e-3
"""Of means, in every dtype: where a router's scores nearly tie, a batch of another size may fall
the other way, and one token carries the mean (0.0019 seen in float32, over a median of 1e-6)."""
MEDIAN_FACTOR, MEAN_FACTOR, PLACE_FACTOR = 3.0, 6.0, 3.0
"""An engine's gap may be this times what rounding the reference to its dtype does on the same
tokens. Median: every token counts alike. Mean: a few flipped experts may carry most of it. One
place: the median over sequences, times the median's limit. See docs/conformance.md for what was
measured."""

transformers.utils.logging.disable_progress_bar()

Floats = npt.NDArray[np.float32]
Routes = npt.NDArray[np.integer[Any]]


class Reference:
    """One version of the model in float32, and beside it rounded to the engine's dtype.

    The gap of the two is what the dtype alone does to log-probs; an engine's may be some times it.
    """

    def __init__(self, model: Any, dtype: str) -> None:
        self.model = model.eval()
        self._rounded = self.model
        if dtype != "float32":
            self._rounded = copy.deepcopy(model)
            for parameter in self._rounded.parameters():  # buffers stay: rotary frequencies, biases
                parameter.data = parameter.data.to(getattr(torch, dtype))
        self._replay = Replay(self.model)
        self._rounded_tap = RouterTap(self._rounded)
        self.dtype = dtype

    @property
    def layers(self) -> list[int]:
        """Global numbers of the MoE layers."""
        return self._replay.tap.layers

    @property
    def num_experts(self) -> int:
        """0 for a dense model."""
        return self._replay.tap.num_experts

    @property
    def top_k(self) -> int:
        """0 for a dense model."""
        return self._replay.tap.top_k

    def tensors(self) -> dict[str, torch.Tensor]:
        """The checkpoint: Hugging Face names, one tensor for each expert, tied ones once."""
        tied = self.model.all_tied_weights_keys
        state = {name: t for name, t in self.model.state_dict().items() if name not in tied}
        found = revert_weight_conversion(self.model, state)
        return {name: tensor.detach().contiguous() for name, tensor in found.items()}

    def logits(self, sequences: Sequence[Sequence[int]], *, rounded: bool = False) -> torch.Tensor:
        """float32 [N, T, V]; shorter sequences are padded at their end, which changes nothing."""
        width = max(map(len, sequences))
        ids_NT = torch.tensor([[*s, *[0] * (width - len(s))] for s in sequences])
        model = self._rounded if rounded else self.model
        with torch.no_grad():
            return model(input_ids=ids_NT, use_cache=False).logits.float()

    def logprobs(
        self,
        sequences: Sequence[Sequence[int]],
        temperature: float = 1.0,
        *,
        rounded: bool = False,
        routes: Sequence[Routes] | None = None,
        replayed: Sequence[slice] | None = None,
    ) -> list[Floats]:
        """Log-probs [T - 1] of tokens 1..T-1 of each sequence, at a temperature above 0.

        Args:
            rounded: of the model rounded to the engine's dtype.
            routes: [T - 1, L, K] of each sequence, to be replayed.
            replayed: rows of each that are; None: all.
        """
        if routes is None:
            logits_NTV = self.logits(sequences, rounded=rounded)
        else:
            assert not rounded, "the rounded model has no hooks of its own"
            routes_NTLK, mask_NT = self._packed(sequences, routes, replayed)
            with self._replay.of(routes_NTLK, mask_NT):
                logits_NTV = self.logits(sequences)
        logprobs_NTV = torch.log_softmax(logits_NTV / temperature, -1)
        found = []
        for row_TV, tokens in zip(logprobs_NTV, sequences, strict=True):
            ids_T = torch.tensor(tokens[1:])
            found.append(row_TV[: len(tokens) - 1].gather(-1, ids_T[:, None])[:, 0].numpy())
        return found

    def natural_routes(
        self, sequences: Sequence[Sequence[int]], *, rounded: bool = False
    ) -> list[npt.NDArray[np.int64]]:
        """Expert ids [T - 1, L, K] that the routers choose by themselves."""
        width = max(map(len, sequences))
        self.logits(sequences, rounded=rounded)
        tap = self._rounded_tap if rounded else self._replay.tap
        ids_NTLK = tap.last_NLK().unflatten(0, (len(sequences), width)).numpy()
        return [ids_NTLK[i, : len(tokens) - 1] for i, tokens in enumerate(sequences)]

    def _packed(
        self,
        sequences: Sequence[Sequence[int]],
        routes: Sequence[Routes],
        replayed: Sequence[slice] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(map(len, sequences))
        ids_NTLK = np.zeros((len(sequences), width, len(self.layers), self.top_k), np.int64)
        mask_NT = np.zeros((len(sequences), width), bool)
        for i, rows_TLK in enumerate(routes):
            ids_NTLK[i, : len(rows_TLK)] = rows_TLK
            mask_NT[i, : len(rows_TLK)][replayed[i] if replayed else slice(None)] = True
        return torch.from_numpy(ids_NTLK), torch.from_numpy(mask_NT)


class Model:
    """The folder's model as version A, and B: the same config with other, random weights."""

    def __init__(self, path: str, dtype: str) -> None:
        self.files, first = _preset(path) if path.startswith(PRESET) else _folder(Path(path))
        self.config: dict[str, Any] = json.loads(self.files["config.json"])
        second = spread(copy.deepcopy(first), seed=2)  # before hooks, which would be copied along
        self.a, self.b = Reference(first, dtype), Reference(second, dtype)
        self.vocab_size = int(first.config.vocab_size)
        self.max_tokens = int(first.config.max_position_embeddings)

    @property
    def sparse(self) -> bool:
        """Whether it has MoE layers."""
        return bool(self.a.layers)


def spread(model: Any, seed: int) -> Any:
    """Gives a model random weights under which routes and distributions are not flat: normal, of
    variance 1 / inputs. Norms stay. Returns the model.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # as wide as the sigmoids it is added to
                buffer.normal_(0, 0.2, generator=generator)
    return model


def _preset(path: str) -> tuple[dict[str, bytes], Any]:
    preset = PRESETS.get(path.removeprefix(PRESET))
    if preset is None:
        raise InvalidField("--model", path, f"preset: and one of {', '.join(PRESETS)}, or a folder")
    cls = getattr(transformers, preset.config["architectures"][0])
    model = spread(cls(cls.config_class.from_dict(dict(preset.config))), seed=1)
    return {"config.json": json.dumps(preset.config).encode()}, model


def _folder(folder: Path) -> tuple[dict[str, bytes], Any]:
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise InvalidField(
            "--model",
            str(folder),
            "a Hugging Face folder with config.json and *.safetensors, or preset:NAME",
        )
    files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InvalidField(
            "--model", str(folder), f"one that transformers loads: {error}"
        ) from error
    return files, model


def gaps(ours: Sequence[Floats], theirs: Sequence[Floats]) -> Floats:
    """|d log p| of every token, nats; NaN where it is not finite."""
    found = np.concatenate([np.abs(np.subtract(a, b)) for a, b in zip(ours, theirs, strict=True)])
    return np.where(np.isfinite(found), found, np.float32("nan")).astype(np.float32)


def mean_gap(ours: Sequence[Floats], theirs: Sequence[Floats]) -> float:
    """Mean |d log p| over all tokens, nats."""
    return float(gaps(ours, theirs).mean())


def limits(dtype: str, noise: Floats) -> tuple[float, float]:
    """The most that the median and the mean |d log p| of an engine may be, nats.

    Args:
        noise: |d log p| of the reference rounded to `dtype`, on the same tokens.
    """
    floor = FLOORS[dtype]
    return (
        max(floor, MEDIAN_FACTOR * float(np.median(noise))),
        max(floor, MEAN_FLOOR, MEAN_FACTOR * float(noise.mean())),
    )


def replay_limit(dtype: str, noise: Floats) -> float:
    """The most that the mean |d log p| may be once an engine's routes are replayed, nats: no
    flipped expert is left, so the mean may be held as tightly as the median.
    """
    return max(FLOORS[dtype], MEDIAN_FACTOR * float(noise.mean()))


def gap_numbers(dtype: str, found: Floats, noise: Floats, part: str = "") -> list[Number]:
    """Median and mean of an engine's |d log p|, with their limits."""
    median, mean = limits(dtype, noise)
    return [
        Number(f"{part}|d log p| median", float(np.median(found)), median),
        Number(f"{part}mean", float(found.mean()), mean),
    ]
