"""What every step needs of every row, as arrays in row order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from keel.types.v1 import sequence_pb2
from keel_rollout.engines.base import GroupRequest
from keel_rollout.engines.torch.sampling import Temperatures, stream_keys

FLUSH_TOKENS = 256
"""A row's tokens leave the batch in pieces of at most this many."""


@dataclass(frozen=True)
class Ended:
    """Which rows have something to send after a step."""

    full: Sequence[int]
    """Rows that go on, but whose gathered tokens must leave."""
    rows: Sequence[int]
    """Rows that have ended, ascending."""
    reasons: Sequence[sequence_pb2.FinishReason]


class Rows:
    """Arrays of R >= B rows, of which the first B are live.

    A row gathers its tokens, log-probs and rows of routes until `take`.
    """

    def __init__(self, layers: int, experts_per_token: int, routes_dtype: np.dtype) -> None:
        self.count = 0
        window = (0, FLUSH_TOKENS)
        self._arrays: dict[str, npt.NDArray] = {
            "last": np.zeros(0, np.int64),
            "position": np.zeros(0, np.int64),  # of the next token
            "limit": np.zeros(0, np.int64),  # position at which the row is as long as it may be
            "key": np.zeros(0, np.uint64),
            "temperature": np.zeros(0, np.float32),
            "top_p": np.zeros(0, np.float32),
            "top_k": np.zeros(0, np.int64),
            "stops": np.zeros((0, 1), np.int64),  # padded with -1
            "gathered": np.zeros(0, np.int64),
            "tokens": np.zeros(window, np.int32),
            "logprobs": np.zeros(window, np.float32),
            "routes": np.zeros((*window, layers, experts_per_token), routes_dtype),
        }

    def __getitem__(self, name: str) -> npt.NDArray:
        """The live rows of one array, as a view."""
        return self._arrays[name][: self.count]

    def append(self, request: GroupRequest) -> None:
        """Adds a row for each sample of a request."""
        begin, end = self.count, self.count + request.num_samples
        self._reserve(end, len(request.stop_token_ids))
        self.count = end
        prompt_tokens = len(request.prompt_P)
        stops_S = np.full(self._arrays["stops"].shape[1], -1, np.int64)
        stops_S[: len(request.stop_token_ids)] = request.stop_token_ids
        for name, value in (
            ("last", request.prompt_P[-1]),
            ("position", prompt_tokens),
            ("limit", prompt_tokens + request.max_tokens),
            ("key", stream_keys(request.seed, request.num_samples)),
            ("temperature", request.temperature),
            ("top_p", request.top_p),
            ("top_k", request.top_k),
            ("stops", stops_S),
            ("gathered", 0),
        ):
            self._arrays[name][begin:end] = value

    def _reserve(self, rows: int, stops: int) -> None:
        have = self._arrays["stops"].shape[1]
        if stops > have:
            wider = ((0, 0), (0, stops - have))
            self._arrays["stops"] = np.pad(self._arrays["stops"], wider, constant_values=-1)
        if rows > len(self._arrays["last"]):
            for name, array in self._arrays.items():
                fresh = np.empty((max(rows, 2 * self.count), *array.shape[1:]), array.dtype)
                fresh[: self.count] = array[: self.count]
                self._arrays[name] = fresh

    def parameters(self, device: torch.device) -> Temperatures:
        """How to draw for the live rows."""
        return Temperatures(self["temperature"], self["top_p"], self["top_k"], device)

    def record(
        self,
        tokens_B: npt.NDArray[np.int64],
        logprobs_B: npt.NDArray[np.float32],
        routes_BLK: npt.NDArray | None,
    ) -> Ended:
        """Adds a step's results to every row, and tells which rows must send."""
        every_B, place_B = np.arange(self.count), self["gathered"]
        self._arrays["tokens"][every_B, place_B] = tokens_B
        self._arrays["logprobs"][every_B, place_B] = logprobs_B
        if routes_BLK is not None:
            self._arrays["routes"][every_B, place_B] = routes_BLK
        self["last"][:] = tokens_B
        self["position"][:] += 1
        place_B += 1
        stopped_B = (tokens_B[:, None] == self["stops"]).any(1)
        ended_B = stopped_B | (self["position"] >= self["limit"])
        full = np.flatnonzero((place_B == FLUSH_TOKENS) & ~ended_B)
        ended = np.flatnonzero(ended_B)
        reasons = [
            sequence_pb2.FINISH_REASON_STOP if stopped else sequence_pb2.FINISH_REASON_LENGTH
            for stopped in stopped_B[ended].tolist()
        ]
        return Ended(full.tolist(), ended.tolist(), reasons)

    def gathered_tokens(self, row: int) -> npt.NDArray[np.int32]:
        """Tokens that `take` would return."""
        return self._arrays["tokens"][row, : self._arrays["gathered"][row]]

    def take(self, row: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray]:
        """Removes and returns a row's tokens [n], log-probs [n] and routes [n, L, K]."""
        n = int(self._arrays["gathered"][row])
        self._arrays["gathered"][row] = 0
        return (
            self._arrays["tokens"][row, :n].copy(),
            self._arrays["logprobs"][row, :n].copy(),
            self._arrays["routes"][row, :n].copy(),
        )

    def move(self, sources: Sequence[int], targets: Sequence[int], count: int) -> None:
        """Copies rows onto others, then keeps the first `count`."""
        if sources:
            for name, array in self._arrays.items():
                if name not in ("tokens", "logprobs", "routes"):
                    array[targets] = array[sources]
            widest = int(self._arrays["gathered"][sources].max())
            for name in ("tokens", "logprobs", "routes"):
                array = self._arrays[name]
                array[targets, :widest] = array[sources, :widest]
        self.count = count
