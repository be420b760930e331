"""One group's samples: what has come for each, and which version made it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from keel.errors import KeelError
from keel.types.v1 import sequence_pb2
from keel_rollout.engines.base import EngineFailed, Finished, GroupRequest, Piece, VersionRun

FLUSH_TOKENS = 256
"""Tokens leave in pieces of this many."""

REASONS = {
    "stop": sequence_pb2.FINISH_REASON_STOP,
    "length": sequence_pb2.FINISH_REASON_LENGTH,
    "abort": sequence_pb2.FINISH_REASON_ABORTED,
}

Routes = npt.NDArray[np.uint8] | npt.NDArray[np.uint16] | None


@dataclass(eq=False)
class _Sample:
    index: int
    begin: int
    """Place of the first token that has not left."""
    starts: list[tuple[int, int]] = field(default_factory=list)
    """(place, version) where each version began."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False

    @property
    def end(self) -> int:
        return self.begin + len(self.tokens)

    def mark(self, version: int) -> None:
        """Tokens from here on are of `version`."""
        if self.starts and self.starts[-1][0] == self.end:
            self.starts.pop()
        if not self.starts or self.starts[-1][1] != version:
            self.starts.append((self.end, version))

    def versions(self) -> tuple[VersionRun, ...]:
        ends = [place for place, _ in self.starts[1:]] + [self.end]
        runs = zip(self.starts, ends, strict=True)
        return tuple(VersionRun(a, b, version) for (a, version), b in runs if a < b)

    def take(self, routes_RLK: Routes = None) -> Piece:
        tokens_T = np.array(self.tokens, np.int32)
        logprobs_T = np.array(self.logprobs, np.float32)
        self.begin = self.end
        self.tokens, self.logprobs = [], []
        return Piece(self.index, tokens_T, logprobs_T, routes_RLK)


class Group:
    """Takes vLLM's outputs as they come and turns them into pieces.

    Every method is called on the event loop, `take` by vLLM's output handler.

    Args:
        layers: global numbers of the MoE layers; vLLM gives a row for every layer.
        dtype: of expert ids.
    """

    def __init__(self, request: GroupRequest, layers: list[int], dtype: type[np.integer]) -> None:
        self.request = request
        self.sink: asyncio.Queue[Piece | Finished | KeelError] = asyncio.Queue()
        self.admitted = False
        """Whether it has passed the gate."""
        self.handle: str | None = None
        """vLLM's name of the request, a moment later."""
        self.over = False
        self.failed = False
        self._layers, self._dtype = layers, dtype
        prompt = len(request.prompt_P)
        self._samples = [_Sample(i, prompt) for i in range(request.num_samples)]

    @property
    def unfinished(self) -> int:
        """Samples that have not ended."""
        return sum(not sample.finished for sample in self._samples)

    @property
    def started(self) -> bool:
        """Whether a token has come."""
        return any(s.end > len(self.request.prompt_P) for s in self._samples)

    def mark(self, version: int) -> None:
        """Tokens from here on are of `version`."""
        for sample in self._samples:
            if not sample.finished:
                sample.mark(version)

    def take(self, output: Any) -> None:
        """A `RequestOutput` of deltas."""
        for completion in output.outputs:
            sample = self._samples[completion.index]
            if sample.finished:
                continue
            sample.tokens += completion.token_ids
            if completion.logprobs:
                sample.logprobs += [_logprob(entry) for entry in completion.logprobs]
            if completion.finish_reason == "error":
                self.fail(EngineFailed("vLLM failed at this request; its log says why"))
            elif completion.finish_reason is not None:
                self._finish(sample, completion.finish_reason, completion.routed_experts)
            elif len(sample.tokens) >= FLUSH_TOKENS:
                self.sink.put_nowait(sample.take())

    def _finish(self, sample: _Sample, reason: str, routed: Any) -> None:
        routes_RLK = None
        if self.request.with_routes and routed is not None:
            routes_RLK = np.ascontiguousarray(routed[: sample.end - 1, self._layers], self._dtype)
        if sample.tokens or routes_RLK is not None:
            self.sink.put_nowait(sample.take(routes_RLK))
        rows = 0 if routes_RLK is None else len(routes_RLK)
        sample.finished = True
        self.sink.put_nowait(
            Finished(
                sample.index,
                REASONS[reason],
                sample.versions(),
                routes_valid=rows > 0 and rows == sample.end - 1,
            )
        )

    def abort(self) -> None:
        """Ends what has not ended, without routes."""
        for sample in self._samples:
            if not sample.finished:
                self._finish(sample, "abort", None)

    def fail(self, error: KeelError) -> None:
        """Ends the group with an error; what vLLM still has of it is to be aborted."""
        self.failed = True
        for sample in self._samples:
            sample.finished = True
        self.sink.put_nowait(error)


def _logprob(entry: dict[int, Any]) -> float:
    """The sampled token's, which `logprobs=0` puts first and alone."""
    return next(iter(entry.values())).logprob
