"""vLLM's schedulers, with one thing added: a probe runs while everything else is frozen."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.request_queue import create_request_queue
from vllm.v1.core.sched.scheduler import Scheduler

PROBE = "keel-probe-"
"""Beginning of the ids of probes."""


class _Probing:
    """Mixed into a scheduler: while it is paused by `keep`, requests named PROBE still run."""

    waiting: Any
    running: list[Any]
    policy: Any
    _pause_state: PauseState

    def schedule(self, *arguments: Any, **options: Any) -> Any:
        """One step; while paused, of the probes alone."""
        if self._pause_state != PauseState.PAUSED_ALL or not self._probes():
            return super().schedule(*arguments, **options)  # type: ignore[misc]
        frozen_waiting = [r for r in self.waiting if not _is_probe(r)]
        frozen_running = [r for r in self.running if not _is_probe(r)]
        everything, self.waiting = self.waiting, create_request_queue(self.policy)
        for request in everything:
            if _is_probe(request):
                self.waiting.add_request(request)
        self.running = [r for r in self.running if _is_probe(r)]
        self._pause_state = PauseState.UNPAUSED
        try:
            return super().schedule(*arguments, **options)  # type: ignore[misc]
        finally:
            self._pause_state = PauseState.PAUSED_ALL
            for request in frozen_waiting:
                self.waiting.add_request(request)
            self.running = frozen_running + self.running

    def get_num_unfinished_requests(self) -> int:
        """Requests that can be worked on now."""
        if self._pause_state == PauseState.PAUSED_ALL:
            return self._probes()
        return super().get_num_unfinished_requests()  # type: ignore[misc]

    def _probes(self) -> int:
        return sum(map(_is_probe, self.waiting)) + sum(map(_is_probe, self.running))


def _is_probe(request: Any) -> bool:
    return request.request_id.startswith(PROBE)


class ProbingScheduler(_Probing, Scheduler):
    """For CPUs."""


class ProbingAsyncScheduler(_Probing, AsyncScheduler):
    """For GPUs, where scheduling overlaps with computing."""
