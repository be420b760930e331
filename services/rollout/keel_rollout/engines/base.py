"""The seam between servicer and engine: what an engine must do, in nine methods.

The servicer (engine-agnostic) checks requests, fences callers, stages and verifies weights, cuts
the stream into messages and hashes routes. An engine computes. To add one: a folder beside
`torch/` whose `create(device, threads)` returns an `Engine`, and a line in `engine_main.KINDS`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import grpc
import numpy as np
import numpy.typing as npt

from keel.errors import KeelError
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.types.v1 import sequence_pb2


class BrokenModel(KeelError):
    """An update failed while it was being applied: what the engine holds is no version at all.

    Recovery: a full update of a version that is not lower.
    """

    status = grpc.StatusCode.INTERNAL


class EngineFailed(KeelError):
    """The engine failed while computing. A resend may succeed."""

    status = grpc.StatusCode.UNAVAILABLE


@dataclass(frozen=True)
class CohortKey:
    """Which isolated batch a request belongs to (`Cohort` of the contract)."""

    id: str
    size: int
    """Groups in it."""
    try_number: int


@dataclass(frozen=True, eq=False)
class GroupRequest:
    """One prompt, G responses: a GenerateRequest that the servicer has found valid.

    Example:
        GroupRequest(slot=3, prompt_P=np.array([5, 9]), num_samples=8, temperature=1.0, top_p=1.0,
                     top_k=0, max_tokens=32, stop_token_ids=(1,), seed=42)
    """

    slot: int
    """Place in the lap; orders the rows of a cohort."""
    prompt_P: npt.NDArray[np.int32]
    num_samples: int
    temperature: float
    """0 means greedy."""
    top_p: float
    top_k: int
    """0 means all."""
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    seed: int
    cohort: CohortKey | None = None
    with_routes: bool = False
    require_policy_version: int | None = None


@dataclass(frozen=True, eq=False)
class Piece:
    """The next tokens of one sequence."""

    sample: int
    token_ids_T: npt.NDArray[np.int32]
    rollout_logprobs_T: npt.NDArray[np.float32]
    routes_RLK: npt.NDArray[np.uint8] | npt.NDArray[np.uint16] | None
    """The next R rows of routes, the prompt's first; None where none were asked for."""


@dataclass(frozen=True)
class VersionRun:
    """Positions [begin, end) of a sequence got their log-probs from one policy version."""

    begin: int
    end: int
    policy_version: int


@dataclass(frozen=True)
class Finished:
    """The end of one sequence; its pieces have all been sent."""

    sample: int
    reason: sequence_pb2.FinishReason
    versions: tuple[VersionRun, ...] = field(default=())
    routes_valid: bool = False
    """Each row of routes belongs to the forward pass that gave the log-prob beside it."""


@dataclass(frozen=True)
class StagedTensor:
    """One tensor of a version whose hash has been verified."""

    dtype: int
    """keel.types.v1.DType."""
    shape: tuple[int, ...]
    data: memoryview
    """Raw little-endian bytes."""


class Engine(Protocol):
    """Computes one model. All methods are called on the event loop and must not block it.

    The servicer calls `load`, `tensors`, `apply` and `probe` one at a time, and nothing but
    `abilities` and `load` before a model is loaded. Versions: `apply` names them; sequences report
    them.
    """

    def abilities(self) -> pb.EngineAbilities:
        """What the engine can do, whatever it has loaded."""
        ...

    async def load(
        self, files: Mapping[str, bytes], precision: pb.EnginePrecision
    ) -> pb.ModelSignature:
        """Takes an architecture without weights, in place of any other.

        Every request in flight or waiting ends ABORTED. Raises ModelError or InvalidField, the
        old model then being kept; BrokenModel if it is gone too, the engine then being EMPTY.
        """
        ...

    def tensors(self) -> Mapping[str, tuple[int, ...]]:
        """Name and shape of every tensor that a version must have, as in the HF checkpoint."""
        ...

    def generate(self, request: GroupRequest) -> AsyncIterator[Piece | Finished]:
        """Samples a group: pieces of each sequence in order, then its `Finished`.

        Closing the iterator early frees what it holds. Raises OvertakenError for a cohort whose
        newer try has been seen, StateError for a version that is not served.
        """
        ...

    async def pause(self, mode: pb.PauseMode) -> int:
        """Stops generation and returns the number of sequences frozen or aborted."""
        ...

    async def resume(self) -> None:
        """Lets generation go on; sequences frozen across an update get new caches."""
        ...

    async def apply(self, version: int, tensors: Mapping[str, StagedTensor]) -> None:
        """Serves `version` from the next token on. Later tokens fit it in log-prob and routes.

        Raises BrokenModel if it failed half-way; any other error means the old version is intact.
        """
        ...

    async def probe(self, token_ids_T: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Log-probs [T - 1] of tokens 1..T-1 at temperature 1, routed live."""
        ...

    async def close(self) -> None:
        """Ends every request ABORTED and frees the model."""
        ...
