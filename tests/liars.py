"""Engines that lie: the torch engine behind the real servicer, with one thing wrong.

Each class or context below is one lie; the docstring says what it does to whom.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from keel import codec
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel_rollout import servicer as servicer_module
from keel_rollout.engines.base import Finished, GroupRequest, Piece, StagedTensor, VersionRun
from keel_rollout.engines.staging import Staging
from keel_rollout.engines.torch import batch as batch_module
from keel_rollout.engines.torch.batch import Batch
from keel_rollout.engines.torch.engine import TorchEngine
from keel_rollout.servicer import RolloutServicer

Tensors = Mapping[str, StagedTensor]


class Liar(TorchEngine):
    """Nothing wrong yet."""

    def __init__(self) -> None:
        super().__init__("cpu", 1)
        self.first: Tensors | None = None
        """Tensors of the first version since the model was loaded."""

    async def load(
        self, files: Mapping[str, bytes], precision: pb.EnginePrecision
    ) -> pb.ModelSignature:
        self.first = None
        return await super().load(files, precision)

    async def apply(self, version: int, tensors: Tensors) -> None:
        self.first = self.first or tensors
        await super().apply(version, self.applied(tensors))

    def applied(self, tensors: Tensors) -> Tensors:
        """What is loaded instead."""
        return tensors

    async def generate(self, request: GroupRequest) -> AsyncIterator[Piece | Finished]:
        async for event in super().generate(self.asked(request)):
            told = self.piece(event) if isinstance(event, Piece) else self.finished(event)
            yield told

    def asked(self, request: GroupRequest) -> GroupRequest:
        """What is computed instead."""
        return request

    def piece(self, piece: Piece) -> Piece:
        """What is told instead."""
        if piece.routes_RLK is None:
            return piece
        return replace(piece, routes_RLK=self.routes(piece.routes_RLK))

    def routes(self, routes_RLK: Any) -> Any:
        """What is told instead, of each piece."""
        return routes_RLK

    def finished(self, finished: Finished) -> Finished:
        """What is told instead."""
        return finished


class StaleWeights(Liar):
    """Every later version is applied by name only."""

    def applied(self, tensors: Tensors) -> Tensors:
        assert self.first is not None
        return self.first


class UnpackedExperts(Liar):
    """After a live update the experts' weights lie in memory in another order than is read.

    As in vLLM on a CPU, where experts are packed only at first load.
    """

    def applied(self, tensors: Tensors) -> Tensors:
        if tensors is self.first:
            return tensors
        return {
            name: replace(t, data=_misread(t)) if ".experts." in name else t
            for name, t in tensors.items()
        }


def _misread(tensor: StagedTensor) -> memoryview:
    """The bytes with their numbers in the order of the transpose."""
    width = codec.ITEMSIZE[tensor.dtype]
    numbers = np.frombuffer(tensor.data, np.uint32 if width == 4 else np.uint16)
    return np.ascontiguousarray(numbers.reshape(tensor.shape).T).reshape(-1).view(np.uint8).data


class ShiftedRoutes(Liar):
    """Routes one row late."""

    def routes(self, routes_RLK: Any) -> Any:
        return np.roll(routes_RLK, 1, axis=0)


class LastRowDropped(Liar):
    """Each piece lacks its last row."""

    def routes(self, routes_RLK: Any) -> Any:
        return routes_RLK[:-1]


class DuplicateExperts(Liar):
    """The best expert K times."""

    def routes(self, routes_RLK: Any) -> Any:
        return np.repeat(routes_RLK[..., :1], routes_RLK.shape[-1], axis=-1)


class NewestVersion(Liar):
    """Every token is said to be of the version that ended the sequence."""

    def finished(self, finished: Finished) -> Finished:
        runs = finished.versions
        if not runs:
            return finished
        return replace(
            finished, versions=(VersionRun(runs[0].begin, runs[-1].end, runs[-1].policy_version),)
        )


class SpanOffByOne(Liar):
    """The border between versions is told one token late."""

    def finished(self, finished: Finished) -> Finished:
        if len(finished.versions) != 2:
            return finished
        old, new = finished.versions
        late = (replace(old, end=old.end + 1), replace(new, begin=new.begin + 1))
        return replace(finished, versions=late)


class RandomSeeds(Liar):
    """Claims to be deterministic, and draws as it likes."""

    def asked(self, request: GroupRequest) -> GroupRequest:
        return replace(request, seed=secrets.randbits(63))


class OneSeed(Liar):
    """Every request is drawn with the same seed."""

    def asked(self, request: GroupRequest) -> GroupRequest:
        return replace(request, seed=0)


class Deaf(Liar):
    """Goes on for callers that have left."""

    def __init__(self) -> None:
        super().__init__()
        self._worker.cancel = lambda _job: None  # type: ignore[method-assign]


class KeepAborts(Liar):
    """Pause with mode keep is one with mode abort."""

    async def pause(self, mode: pb.PauseMode) -> int:
        return await super().pause(pb.PAUSE_MODE_ABORT if mode == pb.PAUSE_MODE_KEEP else mode)


def raw_logprobs(patch: pytest.MonkeyPatch) -> None:
    """Log-probs are those at temperature 1, as vLLM's are by default."""
    honest = batch_module.draw

    def lying(logits_BV: torch.Tensor, uniform_B: torch.Tensor, how: Any) -> Any:
        token_B, _ = honest(logits_BV, uniform_B, how)
        logprobs_BV = logits_BV.float().log_softmax(-1)
        return token_B, logprobs_BV.gather(-1, token_B[:, None])[:, 0]

    patch.setattr(batch_module, "draw", lying)


def no_temperature(patch: pytest.MonkeyPatch) -> None:
    """Tokens are drawn at temperature 1, whatever was asked; log-probs are right."""
    honest = batch_module.draw

    def lying(logits_BV: torch.Tensor, uniform_B: torch.Tensor, how: Any) -> Any:
        divisor = how.divisor_B1
        how.divisor_B1 = None
        token_B, _ = honest(logits_BV, uniform_B, how)
        how.divisor_B1 = divisor
        scaled_BV = logits_BV.float() if divisor is None else logits_BV.float() / divisor
        return token_B, scaled_BV.log_softmax(-1).gather(-1, token_B[:, None])[:, 0]

    patch.setattr(batch_module, "draw", lying)


def reused_numbers(patch: pytest.MonkeyPatch) -> None:
    """Any version number is taken."""
    patch.setattr(servicer_module, "check_number", lambda manifest, newest: None)


def never_anew(patch: pytest.MonkeyPatch) -> None:
    """A wrong engine cannot be repaired: what is loaded already is never loaded again."""
    honest = RolloutServicer.LoadModel

    async def lying(self: RolloutServicer, request: pb.LoadModelRequest, context: Any) -> Any:
        request.anew = False
        return await honest(self, request, context)

    patch.setattr(RolloutServicer, "LoadModel", lying)


def unverified(patch: pytest.MonkeyPatch) -> None:
    """Hashes are not looked at."""
    honest = Staging.verified

    def lying(self: Staging) -> Tensors:
        for slot in self._slots.values():
            slot.entry.xxh3 = slot.digest.intdigest()
        return honest(self)

    patch.setattr(Staging, "verified", lying)


def old_caches(patch: pytest.MonkeyPatch) -> None:
    """After an update in the middle, sequences go on with the old version's caches."""

    def lying(self: Batch, version: int) -> None:
        self.version = version
        for index, row in enumerate(self.rows):
            place = int(self.state["position"][index])
            if row.versions[-1][1] != version:
                row.versions.append((place, version))

    patch.setattr(Batch, "recompute", lying)


@dataclass(frozen=True)
class Lie:
    """An engine with something wrong, and the rows that must find it."""

    engine: type[Liar] = Liar
    patch: Callable[[pytest.MonkeyPatch], None] = lambda _patch: None
    found_by: frozenset[str] = frozenset()
    may_spoil: frozenset[str] = frozenset()
    """Rows that it spoils too where the machine is slow."""
    everywhere: bool = False
    """To be tried with every row of the kit."""


NUMBERS = ("logprobs", "logprobs-0.7", "logprobs-greedy", "probe", "routes-used")
STAGES = ("first", "aborted", "pause-abort", "pause-wait", "pause-keep", "update", "midway")
UPDATES = ("weights/safetensors", "weights/bfloat16", "weights/stream", "midway/spans")


def _all(row: str) -> list[str]:
    """One row of the suite, in every stage."""
    return [f"{stage}/{row}" for stage in STAGES]


def _lie(
    liar: Any, *rows: str, may_spoil: tuple[str, ...] = (), everywhere: bool = False
) -> tuple[str, Lie]:
    what: dict[str, Any] = {"engine" if isinstance(liar, type) else "patch": liar}
    lie = Lie(
        **what, found_by=frozenset(rows), may_spoil=frozenset(may_spoil), everywhere=everywhere
    )
    return liar.__name__, lie


LIES: dict[str, Lie] = dict(
    [
        # in the end the first version is published again, so that what is stale is right by chance
        _lie(StaleWeights, *UPDATES, *(f"update/{row}" for row in NUMBERS), everywhere=True),
        _lie(
            UnpackedExperts,
            *UPDATES,
            *(f"{stage}/{row}" for stage in ("update", "midway") for row in NUMBERS),
            everywhere=True,
        ),
        _lie(ShiftedRoutes, *_all("routes-used"), "midway/spans", everywhere=True),
        _lie(raw_logprobs, *_all("logprobs-0.7"), "sampling/truncation", everywhere=True),
        _lie(LastRowDropped, *_all("routes-shape"), "pause-abort/ends"),
        _lie(DuplicateExperts, *_all("routes-shape"), "midway/spans"),
        _lie(NewestVersion, "midway/spans"),
        _lie(SpanOffByOne, "midway/spans"),
        _lie(old_caches, "midway/spans"),
        _lie(RandomSeeds, "sampling/cohort-bits"),
        _lie(OneSeed, "sampling/samples"),
        _lie(no_temperature, "sampling/distribution"),
        # what nobody waits for any more may be in flight still when the next stage pauses
        _lie(Deaf, "requests/cancel", "requests/deadline", may_spoil=("pause-abort/ends",)),
        _lie(KeepAborts, "pause-keep/goes-on", "midway/spans"),
        _lie(reused_numbers, "weights/only-grow"),
        _lie(unverified, "aborted/hash"),
        _lie(never_anew, "engine/load-anew"),
    ]
)
