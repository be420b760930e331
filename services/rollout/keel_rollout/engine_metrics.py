"""What an engine tells Prometheus: counted where it happens, in `servicer`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Self

from prometheus_client import Counter, Gauge, Summary

from keel.rollout.v1 import rollout_service_pb2 as pb
from keel_rollout.engines.base import Finished, Piece

TOKENS = Counter("keel_engine_tokens", "Response tokens sampled")
GROUPS = Counter(
    "keel_engine_groups",
    "Groups: complete, or dropped (its caller hung up, it was aborted, or it failed)",
    ["outcome"],
)
IN_FLIGHT = Gauge("keel_engine_sequences_in_flight", "Responses asked for and not yet complete")
POLICY_VERSION = Gauge("keel_engine_policy_version", "Policy version served; -1: none")
STATE = Gauge("keel_engine_state", "1 for the engine's state, 0 for the others", ["state"])
UPDATE_SECONDS = Summary(
    "keel_engine_update_seconds", "From BeginWeightUpdate until the version is served"
)
PAUSES = Counter("keel_engine_pauses", "Pauses by mode", ["mode"])

for _outcome in ("complete", "dropped"):
    GROUPS.labels(_outcome)  # there from the start, so that a rate is 0 and not absent


def tell(state: Callable[[], pb.EngineState], served_version: Callable[[], int]) -> None:
    """Makes the gauges of state and version those of an engine: there is one a process."""
    POLICY_VERSION.set_function(served_version)
    for number in pb.EngineState.values()[1:]:
        name = pb.EngineState.Name(number).removeprefix("ENGINE_STATE_").lower()
        STATE.labels(name).set_function(partial(_is, number, state))


def _is(number: int, state: Callable[[], pb.EngineState]) -> float:
    return float(state() == number)


class GroupCount:
    """Counts one group from its request to its end, however it ends.

    Example:
        with GroupCount(8) as count:
            count.event(Piece(...))
            count.event(Finished(...))
    """

    def __init__(self, num_samples: int) -> None:
        self._left = num_samples

    def __enter__(self) -> Self:
        IN_FLIGHT.inc(self._left)
        return self

    def event(self, event: Piece | Finished) -> None:
        """Takes what the engine said."""
        if isinstance(event, Finished):
            self._left -= 1
            IN_FLIGHT.dec()
        else:
            TOKENS.inc(len(event.token_ids_T))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        IN_FLIGHT.dec(self._left)
        GROUPS.labels("dropped" if self._left else "complete").inc()
