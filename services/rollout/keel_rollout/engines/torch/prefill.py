"""Computes prefixes: the keys, values and routes of tokens that are known already."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers.cache_utils import DynamicCache

from keel_rollout.engines.torch.model import Model

BUDGET_TOKENS = 8192
"""Prefixes are computed in parts of about this many tokens, padding included."""


@dataclass(frozen=True, eq=False)
class Prefix:
    """Tokens (possibly none) that `rows` rows begin with."""

    tokens_P: npt.NDArray[np.int32]
    rows: int


@dataclass(frozen=True, eq=False)
class Part:
    """Some prefixes, computed; each repeated for its rows."""

    pad_N: torch.Tensor
    """Columns of padding on the left of each row."""
    blocks: list[tuple[torch.Tensor, torch.Tensor]]
    """Keys and values of each layer, [N, H, W, D]."""
    routes: list[npt.NDArray[np.int64] | None]
    """Expert ids [P, L, K] of each prefix, not repeated; None for a dense model."""


def prefill(model: Model, prefixes: Sequence[Prefix]) -> Iterator[Part]:
    """Computes prefixes in order. How they are cut into parts depends on their lengths alone."""
    part: list[Prefix] = []
    width = 1
    for prefix in prefixes:
        wider = max(width, len(prefix.tokens_P))
        if part and wider * (len(part) + 1) > BUDGET_TOKENS:
            yield _compute(model, part, width)
            part, wider = [], max(1, len(prefix.tokens_P))
        part.append(prefix)
        width = wider
    if part:
        yield _compute(model, part, width)


def _compute(model: Model, prefixes: Sequence[Prefix], width: int) -> Part:
    lengths_n = np.array([len(prefix.tokens_P) for prefix in prefixes])
    tokens_nW = np.zeros((len(prefixes), width), np.int64)
    for row, prefix in enumerate(prefixes):
        tokens_nW[row, width - lengths_n[row] :] = prefix.tokens_P
    pad_n = torch.from_numpy(width - lengths_n).to(model.device)
    column_W = torch.arange(width, device=model.device)
    causal_WW = column_W[:, None] >= column_W
    # padding looks at itself, or its softmax over nothing would be NaN
    itself_WW = column_W[:, None] == column_W
    mask_n1WW = (causal_WW & (column_W >= pad_n[:, None, None]) | itself_WW)[:, None]
    cache = DynamicCache()
    model.net.base_model(
        input_ids=torch.from_numpy(tokens_nW).to(model.device),
        position_ids=(column_W - pad_n[:, None]).clamp_(min=0),
        attention_mask=mask_n1WW,
        past_key_values=cache,
        use_cache=True,
    )
    routes: list[npt.NDArray[np.int64] | None] = [None] * len(prefixes)
    if model.tap.layers:
        routes_NLK = model.tap.last_NLK().cpu().numpy()
        routes_nWLK = routes_NLK.reshape(len(prefixes), width, *routes_NLK.shape[1:])
        routes = [routes_nWLK[row, width - length :] for row, length in enumerate(lengths_n)]
    row_N = torch.from_numpy(
        np.repeat(np.arange(len(prefixes)), [prefix.rows for prefix in prefixes])
    ).to(model.device)
    layers: Any = cache.layers
    blocks = [(layer.keys[row_N], layer.values[row_N]) for layer in layers]
    return Part(pad_n[row_N], blocks, routes)
