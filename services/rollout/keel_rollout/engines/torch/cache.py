"""Keys and values of a batch that grows to the right, and whose finished rows leave.

    column:   0 . . . . . length       rows are right-aligned: padding stands on the left
    row 0     . . p p p r r r
    row 1     p p p p p r r r

Buffers have room to spare: appending a column writes one column, where transformers' DynamicCache
copies everything (80 % of a decoding step on a CPU). A row that leaves is replaced by the last.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

_SPARE_COLUMNS = 64


class _Layer(DynamicLayer):
    """One layer's buffers [R, H, C, D]; `update` appends one column to the first B rows.

    Keys and values may differ in H and D: DeepSeek caches its latent as the one, its rotary key as
    the other.
    """

    def __init__(self, owner: RowCache) -> None:
        super().__init__()
        # a cycle would keep a finished batch's memory until some later collection of garbage
        self.owner: RowCache = weakref.proxy(owner)

    def get_seq_length(self) -> int:
        return self.owner.length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, end = self.owner.rows, self.owner.length + 1
        assert self.keys is not None
        assert self.values is not None
        assert key_states.shape[0] == rows
        self.keys[:rows, :, end - 1 : end] = key_states
        self.values[:rows, :, end - 1 : end] = value_states
        return self.keys[:rows, :, :end], self.values[:rows, :, :end]


class RowCache(Cache):
    """Keys and values of B rows, `length` columns each, right-aligned.

    Before each forward pass of one token a row: `reserve()`; after it: `advance()`.
    """

    def __init__(self, layers: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows = 0
        self.length = 0
        self._options: dict[str, Any] = {"dtype": dtype, "device": device}
        # heads and width of keys and of values; the first rows tell
        self._shapes: dict[str, tuple[int, int]] = {}
        self._capacity = (0, 0)
        self._visible_RC = torch.zeros(0, 0, dtype=torch.bool, device=device)
        self._layers = [_Layer(self) for _ in range(layers)]
        super().__init__(layers=list(self._layers))

    def mask_B11T(self) -> torch.Tensor:
        """True where a row's next token may look: its own columns, the one to come included."""
        return self._visible_RC[: self.rows, None, None, : self.length + 1]

    def reserve(self) -> None:
        """Makes sure that one more column fits."""
        if self.length >= self._capacity[1]:
            self._resize(self.rows, self.length + 1, shift=0)

    def advance(self) -> None:
        """Counts the column that a forward pass has written."""
        self.length += 1

    def common_padding(self) -> int:
        """Columns of padding that all rows share."""
        return int((~self._visible_RC[: self.rows, : self.length]).all(0).sum())

    def add(self, pad_N: torch.Tensor, blocks: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Adds N rows, right-aligned; older, shorter ones move right.

        Args:
            pad_N: columns of padding on the left of each new row.
            blocks: a layer's keys and values, each [N, H, W, D].
        """
        count, width = blocks[0][0].shape[0], blocks[0][0].shape[2]
        for name, block in zip(("keys", "values"), blocks[0], strict=True):
            self._shapes[name] = (block.shape[1], block.shape[3])
        shift = max(0, width - self.length) if self.rows else 0
        if not self.rows:
            self.length = width
        first, rows = self.rows, self.rows + count
        length = self.length + shift
        if shift or rows > self._capacity[0] or length >= self._capacity[1]:
            self._resize(rows, length + 1, shift=shift)
        begin = length - width
        for layer, (keys, values) in zip(self._layers, blocks, strict=True):
            assert layer.keys is not None
            assert layer.values is not None
            # what lies left of a row is masked, but must be finite: 0 x NaN is NaN
            layer.keys[first:rows, :, :begin] = 0
            layer.values[first:rows, :, :begin] = 0
            layer.keys[first:rows, :, begin:length] = keys
            layer.values[first:rows, :, begin:length] = values
        columns_C = torch.arange(self._capacity[1], device=pad_N.device)
        self._visible_RC[first:rows] = columns_C >= (pad_N + begin)[:, None]
        self.rows, self.length = rows, length

    def move(self, sources: torch.Tensor, targets: torch.Tensor, rows: int) -> None:
        """Copies rows onto rows that have ended, then keeps the first `rows`."""
        if sources.numel():
            end = self.length
            for layer in self._layers:
                assert layer.keys is not None
                assert layer.values is not None
                layer.keys[targets, :, :end] = layer.keys[sources, :, :end]
                layer.values[targets, :, :end] = layer.values[sources, :, :end]
            self._visible_RC[targets] = self._visible_RC[sources]
        self.rows = rows

    def clear(self) -> None:
        """Forgets every row, keeping the memory."""
        self.rows = self.length = 0

    def trim(self, columns: int) -> None:
        """Drops `columns` columns of padding on the left of every row."""
        for layer in self._layers:
            assert layer.keys is not None
            assert layer.values is not None
            layer.keys = layer.keys[:, :, columns:].contiguous()
            layer.values = layer.values[:, :, columns:].contiguous()
        self._visible_RC = self._visible_RC[:, columns:].contiguous()
        self._capacity = (self._capacity[0], self._capacity[1] - columns)
        self.length -= columns

    def _resize(self, rows: int, columns: int, *, shift: int) -> None:
        """Moves what there is into buffers for `rows` rows and some more columns."""
        rows = max(rows, self._capacity[0])
        columns = columns + max(_SPARE_COLUMNS, columns // 4)
        kept = (slice(0, self.rows), slice(None), slice(shift, shift + self.length))
        for layer in self._layers:
            for name, (heads, head_dim) in self._shapes.items():
                fresh = torch.zeros((rows, heads, columns, head_dim), **self._options)
                if self.rows:
                    fresh[kept] = getattr(layer, name)[: self.rows, :, : self.length]
                setattr(layer, name, fresh)
            layer.is_initialized = True
        visible_RC = torch.ones(rows, columns, dtype=torch.bool, device=self._options["device"])
        visible_RC[:, : self.length + shift] = False
        if self.rows:
            visible_RC[kept[0], kept[2]] = self._visible_RC[: self.rows, : self.length]
        self._visible_RC = visible_RC
        self._capacity = (rows, columns)
