"""Puts cohorts together. Arrival order decides nothing: a complete cohort is in slot order."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from keel.errors import InvalidField, OvertakenError, StateError
from keel_rollout.engines.torch.batch import Job

REMEMBERED = 65_536
"""Cohorts whose highest try is remembered; far more than a run has open at any time."""


@dataclass(eq=False)
class Cohort:
    """One try of one cohort."""

    id: str
    size: int
    try_number: int
    jobs: dict[int, Job] = field(default_factory=dict)
    """By slot."""
    complete: bool = False

    def in_order(self) -> list[Job]:
        """Jobs by slot."""
        return [self.jobs[slot] for slot in sorted(self.jobs)]

    def __str__(self) -> str:
        return f"cohort {self.id!r}, try {self.try_number}"


class CohortBook:
    """Every cohort seen lately, with its newest try."""

    def __init__(self) -> None:
        self._cohorts: OrderedDict[str, Cohort] = OrderedDict()

    def add(self, job: Job) -> tuple[Cohort, Cohort | None]:
        """Enters a job; returns its cohort, and the older try that it overtakes, if any.

        Raises OvertakenError (a newer try was seen), StateError (this try is complete already) or
        InvalidField (another size, or a slot twice).
        """
        key = job.request.cohort
        assert key is not None
        cohort, overtaken = self._cohorts.get(key.id), None
        if cohort is not None and key.try_number > cohort.try_number:
            cohort, overtaken = None, cohort
        if cohort is None:
            cohort = Cohort(key.id, key.size, key.try_number)
        if key.try_number < cohort.try_number:
            raise OvertakenError(
                f"cohort.try_number: {key.try_number} is overtaken; seen: {cohort.try_number}"
            )
        if cohort.complete:
            raise StateError(f"{cohort} is complete already; resend it with a higher try_number")
        if key.size != cohort.size:
            raise InvalidField("cohort.size", key.size, f"{cohort.size}, as its other groups say")
        if job.request.slot in cohort.jobs:
            raise InvalidField("id.slot", job.request.slot, f"a slot that {cohort} lacks")
        self._cohorts[key.id] = cohort
        self._cohorts.move_to_end(key.id)
        cohort.jobs[job.request.slot] = job
        cohort.complete = len(cohort.jobs) == cohort.size
        if len(self._cohorts) > REMEMBERED:
            self._cohorts.popitem(last=False)
        return cohort, overtaken

    def withdraw(self, job: Job) -> None:
        """Takes a job out of a cohort that is not complete, so that it may be sent again."""
        key = job.request.cohort
        cohort = self._cohorts.get(key.id) if key is not None else None
        if cohort is not None and not cohort.complete and cohort.jobs.get(job.request.slot) is job:
            del cohort.jobs[job.request.slot]

    def waiting(self) -> list[Job]:
        """Jobs of cohorts that are not complete."""
        partial = [cohort for cohort in self._cohorts.values() if not cohort.complete]
        return [job for cohort in partial for job in cohort.jobs.values()]

    def clear(self) -> None:
        """Forgets everything."""
        self._cohorts.clear()

    def finish(self, cohort: Cohort) -> None:
        """Lets go of a complete cohort's jobs; its try stays known."""
        cohort.jobs.clear()
