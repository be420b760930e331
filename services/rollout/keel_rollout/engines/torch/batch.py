"""Rows that are decoded together, one token each per step.

A row's cache covers all its tokens but the last, so that every step is the same: feed the last
token, note the experts that processed it, draw the next one. Token, log-prob and row of routes of
one step thus come from one forward pass. Rows join (`add`), move to new weights (`recompute`), and
leave when they end, the last row taking their place.

What happens to a batch depends on its rows and their order alone. No clock, no arrival.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from keel import codec
from keel.types.v1 import sequence_pb2
from keel_rollout.engines.base import Finished, GroupRequest, Piece, VersionRun
from keel_rollout.engines.torch.cache import RowCache
from keel_rollout.engines.torch.model import Model
from keel_rollout.engines.torch.prefill import Prefix, prefill
from keel_rollout.engines.torch.rows import Ended, Rows
from keel_rollout.engines.torch.sampling import Temperatures, draw, uniforms

TRIM_COLUMNS = 64
"""Padding common to all rows is dropped once it is this wide."""


@dataclass(eq=False)
class Job:
    """A request on its way through the engine."""

    request: GroupRequest
    sink: Any
    """Where its events go; opaque to the batch."""
    cancelled: bool = False
    """Nobody listens any more."""


Event = tuple[Job, Piece | Finished]


@dataclass(eq=False)
class _Row:
    """What a row needs rarely; what it needs at every step is in the batch's arrays."""

    job: Job
    sample: int
    prefix_routes_PLK: npt.NDArray | None
    """Routes of all prompt tokens but the last, until the first flush."""
    sent: list[npt.NDArray[np.int32]] = field(default_factory=list)
    """Response tokens that have left."""
    versions: list[tuple[int, int]] = field(default_factory=list)
    """(first position, policy version)."""


class Batch:
    """Rows decoded together. Belongs to the compute thread."""

    def __init__(self, model: Model, version: int) -> None:
        self.model, self.version = model, version
        self.device = model.device
        self.cache = RowCache(model.net.config.num_hidden_layers, model.dtype, model.device)
        self._routes_dtype = codec.routes_dtype(model.signature.num_experts)
        signature = model.signature
        self.state = Rows(
            len(signature.moe_layers), signature.experts_per_token, self._routes_dtype
        )
        self.rows: list[_Row] = []
        self._sampling: Temperatures | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, jobs: Sequence[Job]) -> None:
        """Takes in G rows for each job, in this order. A group's prompt is computed once."""
        if not jobs:
            return
        prefixes = [Prefix(job.request.prompt_P[:-1], job.request.num_samples) for job in jobs]
        routes = self._fill(prefixes)
        for job, routes_PLK in zip(jobs, routes, strict=True):
            request = job.request
            begin = (len(request.prompt_P), self.version)
            self.state.append(request)
            self.rows += [
                _Row(job, sample, routes_PLK if request.with_routes else None, versions=[begin])
                for sample in range(request.num_samples)
            ]
        self._sampling = None

    def _fill(self, prefixes: Sequence[Prefix]) -> list[npt.NDArray | None]:
        """Computes and caches prefixes; returns the routes [P, L, K] of each."""
        routes: list[npt.NDArray | None] = []
        for part in prefill(self.model, prefixes):
            self.cache.add(part.pad_N, part.blocks)
            routes += [None if r is None else r.astype(self._routes_dtype) for r in part.routes]
        padding = self.cache.common_padding()
        if padding >= TRIM_COLUMNS:
            self.cache.trim(padding)
        return routes

    def recompute(self, version: int) -> None:
        """Rebuilds every cache under the weights loaded now; tokens and routes so far stay."""
        self.version = version
        if not self.rows:
            return
        self.cache.clear()
        prefixes = []
        for index, row in enumerate(self.rows):
            tokens_T = np.concatenate(
                [row.job.request.prompt_P, *row.sent, self.state.gathered_tokens(index)]
            )
            prefixes.append(Prefix(tokens_T[:-1], 1))
            if row.versions[-1][0] == len(tokens_T):  # the last version gave this row nothing
                row.versions.pop()
            if not row.versions or row.versions[-1][1] != version:
                row.versions.append((len(tokens_T), version))
        self._fill(prefixes)

    def step(self) -> list[Event]:
        """Gives every row its next token; returns what leaves the batch."""
        state = self.state
        self.cache.reserve()
        if self._sampling is None:
            self._sampling = state.parameters(self.device)
        output = self.model.net(
            input_ids=self._to_device(state["last"][:, None]),
            position_ids=self._to_device(state["position"][:, None] - 1),
            attention_mask=self.cache.mask_B11T(),
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache.advance()
        uniform_B = self._to_device(uniforms(state["key"], state["position"]))
        token_B, logprob_B = draw(output.logits[:, -1], uniform_B, self._sampling)
        routes_BLK = self.model.tap.last_NLK().cpu().numpy() if self.model.tap.layers else None
        ended = state.record(token_B.cpu().numpy(), logprob_B.cpu().numpy(), routes_BLK)
        return self._leave(ended)

    def _to_device(self, array: npt.NDArray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

    def _leave(self, ended: Ended) -> list[Event]:
        events: list[Event] = []
        for index in ended.full:
            events += self._flush(index)
        for index, reason in zip(ended.rows, ended.reasons, strict=True):
            events += self._flush(index)
            events += self._finish(index, reason)
        self._remove(ended.rows)
        return events

    def _flush(self, index: int) -> Iterator[Event]:
        """What has gathered since the last flush, as a piece."""
        row = self.rows[index]
        tokens_T, logprobs_T, routes_TLK = self.state.take(index)
        routes_RLK: npt.NDArray | None = routes_TLK
        if len(tokens_T) == 0:
            return
        row.sent.append(tokens_T)
        if row.job.cancelled:
            return
        if not row.job.request.with_routes:
            routes_RLK = None
        elif row.prefix_routes_PLK is not None:
            routes_RLK = np.concatenate([row.prefix_routes_PLK, routes_TLK])
            row.prefix_routes_PLK = None
        yield row.job, Piece(row.sample, tokens_T, logprobs_T, routes_RLK)

    def _finish(self, index: int, reason: sequence_pb2.FinishReason) -> Iterator[Event]:
        row = self.rows[index]
        if row.job.cancelled:
            return
        end = int(self.state["position"][index])
        edges = [*row.versions, (end, 0)]
        versions = tuple(
            VersionRun(begin, after, version)
            for (begin, version), (after, _) in pairwise(edges)
            if after > begin
        )
        routed = row.job.request.with_routes and bool(row.sent)
        yield row.job, Finished(row.sample, reason, versions, routes_valid=routed)

    def _remove(self, gone: Sequence[int]) -> None:
        """Drops rows, filling the holes with the last rows."""
        if not gone:
            return
        total = len(self.rows)
        left = total - len(gone)
        leaving = set(gone)
        targets = sorted(index for index in gone if index < left)
        sources = [index for index in range(left, total) if index not in leaving]
        for target, source in zip(targets, sources, strict=True):
            self.rows[target] = self.rows[source]
        del self.rows[left:]
        self.state.move(sources, targets, left)
        moved = torch.tensor([sources, targets], dtype=torch.int64, device=self.device)
        self.cache.move(moved[0], moved[1], left)
        self._sampling = None

    def abort(self) -> list[Event]:
        """Ends every row at once, with what it has."""
        every = list(range(len(self.rows)))
        aborted = [sequence_pb2.FINISH_REASON_ABORTED] * len(every)
        return self._leave(Ended([], every, aborted))

    def drop(self, job: Job) -> None:
        """Forgets a job's rows without a word."""
        self._remove([index for index, row in enumerate(self.rows) if row.job is job])
