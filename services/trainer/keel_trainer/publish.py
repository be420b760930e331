"""Keeps the leased engines at the version that the run has reached, each on its own.

    publish(v) --> v, for every engine --> one thread an engine: bring, probe --> record.proved
                   ^ an older one is forgotten      ^ restarted, or lost v: again

Hashes prove what arrived; the probe proves what was loaded: log-probs of a few fixed tokens, engine
against trainer, with a tolerance relative to the gap at first load. The run goes on with the first
engine that has proved a version; the others follow in the background, from the host's copy of it.
"""

from __future__ import annotations

import logging
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from keel.errors import IntegrityError
from keel.record import RunRecord
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel_trainer.backends.base import ModelInfo
from keel_trainer.delivery import EngineLink, Payload
from keel_trainer.engine_worker import EngineWorker
from keel_trainer.version import SharedWeights, Version

log = logging.getLogger(__name__)

PROBE_FACTOR, PROBE_FLOOR = 5.0, 0.02
"""A version is proved if the median |d log p| of the probe is at most max(factor x gap at first
load, floor in nats). The median, because a few unlikely tokens carry most of a coarse engine's
mean gap."""
FIRST_GAP_LIMITS = {"none": 0.5, "fp8": 0.5, "fp4": 2.0}
"""Largest median gap at first load, nats, by `engine.quantize`. Seen on the tiny preset after its
cold start, inputs and routers rounded too: fp8 up to 0.22, fp4 up to 0.79, other weights 7.2."""
_CHECK_S = 0.5
_TELL_S = 10.0
_CLOSE_S = 5.0
Check = Callable[[], RunRecord]
"""Reads the record; raises to stop what waits."""


class Publisher:
    """The engines of one run, as its record names them at each moment.

    Memory: one copy of the weights on the host, from `publish` to `release`, and one more for each
    older version that a slow engine still takes.
    """

    def __init__(
        self,
        record: RunRecord,
        artifact: Path,
        info: ModelInfo,
        probe_token_ids: np.ndarray,
        first_gaps: Mapping[str, float] | None = None,
        *,
        read: Check,
        write: Callable[..., None],
        needs_routes: bool = False,
        shared: SharedWeights | None = None,
    ) -> None:
        """
        Args:
            info: the model in training.
            probe_token_ids: int32 [T].
            first_gaps: as a checkpoint remembers them.
            read: the run record now.
            write: sets fields of the run record.
            needs_routes: an engine without routes is refused.
            shared: weights go by reference to the engines that take them so.
        """
        self._run, self._read, self._write, self._shared = record.run, read, write, shared
        self._payload = Payload(
            artifact,
            record.spec.engine,
            info,
            probe_token_ids,
            needs_routes=needs_routes,
        )
        self._first_gap_limit = FIRST_GAP_LIMITS[record.spec.engine.quantize]
        self.first_gaps = dict(first_gaps or {})
        """Probe gap at first load, nats, by kind of engine: the smallest of those that loaded the
        kind's first version. By kind, so that an engine is judged as the one that it replaces."""
        self._first_at: dict[str, int] = {}
        self.changed = threading.Condition(threading.RLock())
        """Guards everything below; notified when any of it changes."""
        self.version: Version | None = None
        """What the engines are to serve."""
        self._workers: dict[str, EngineWorker] = {}
        self._proved = dict(record.proved)
        self._stale = dict(record.stale)
        self._token = record.engine_token or record.fencing_token
        self._settled = True
        """Every engine that the run asks for is leased, and none is about to leave."""
        self._crash: BaseException | None = None
        self.follow(record)

    # -- for the training loop -----------------------------------------------------------------

    def publish(self, version: Version, check: Check) -> None:
        """Returns once an engine serves `version`, proved by hash and probe.

        Args:
            check: called about twice a second while waiting.

        Raises:
            IntegrityError: no engine's log-probs are those of the weights that it was sent.
            EngineError: every engine refused.
        """
        with self.changed:
            self.version = version
            self.changed.notify_all()
        told_s = time.monotonic()
        while not self._ready(version):
            self.follow(check())
            if time.monotonic() - told_s > _TELL_S:
                told_s = time.monotonic()
                log.warning("no engine serves version %d yet: %s", version.number, self._told())

    def follow(self, record: RunRecord) -> None:
        """Takes in engines that have joined, lets go those that have left.

        Raises what `publish` raises when no engine is left that could serve the version, and none
        is to come.
        """
        with self.changed:
            token = record.engine_token or record.fencing_token
            # one may have left and joined again unseen: the gateway has then cut what it had proved
            joined = set(record.engines) - record.proved.keys() if token > self._token else set()
            self._token = token
            for address in self._workers.keys() - (set(record.engines) - joined):
                log.info("%s has left the run", address)
                self._workers.pop(address).stop()
            self._note(dict.fromkeys(joined), dict.fromkeys(joined))
            for address in record.engines:
                if address not in self._workers:
                    link = EngineLink(address, self._payload, self._shared)
                    self._workers[address] = EngineWorker(self, link)
                self._workers[address].draining = address in record.draining
            gone = (self._proved.keys() | self._stale.keys()) - set(record.engines)
            if gone:
                self._note(dict.fromkeys(gone), dict.fromkeys(gone))
            whole = len(record.engines) >= record.spec.engine.engines
            self._settled = whole and not record.draining
            self.changed.notify_all()
            if self._crash is not None:
                raise self._crash
            self._raise_if_all_failed()

    def release(self) -> None:
        """Forgets the version: the weights are about to be another one."""
        with self.changed:
            self.version = None
            self.changed.notify_all()

    def close(self) -> None:
        """Ends the threads and closes the channels. May be repeated."""
        with self.changed:
            workers, self._workers = list(self._workers.values()), {}
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.thread.join(_CLOSE_S)
        if self._shared is not None:
            self._shared.close()

    # -- for the workers -----------------------------------------------------------------------

    def lease(self) -> pb.Lease:
        """The engines' lease now."""
        return pb.Lease(run=self._run, fencing_token=self._token)

    def leases(self, address: str) -> bool:
        """Whether the run still has the engine, by the record as it is now."""
        return address in self._read().engines

    def judge(self, address: str, kind: str, theirs: np.ndarray, version: Version) -> None:
        """IntegrityError unless the engine's log-probs of the probe are those of the version."""
        ours = version.probe_logprobs
        gap = statistics.median(abs(a - float(b)) for a, b in zip(ours, theirs, strict=True))
        with self.changed:
            known = self.first_gaps.get(kind)
            if known is None and not gap <= self._first_gap_limit:
                raise IntegrityError(
                    f"engine {address}: the median log-prob gap at first load is {gap:.3g} nats, "
                    f"valid: at most {self._first_gap_limit}: it computes another model"
                )
            if known is None or (gap < known and self._first_at.get(kind) == version.number):
                self.first_gaps[kind] = known = gap
                self._first_at[kind] = version.number
        log.info("%s: version %d, probe gap %.2g nats", address, version.number, gap)
        limit = max(PROBE_FACTOR * known, PROBE_FLOOR)
        if not gap <= limit:
            raise IntegrityError(
                f"engine {address} has loaded version {version.number}, but its log-probs are not "
                f"those of these weights: median gap {gap:.3g} nats, valid: at most {limit:.3g}"
            )

    def note_proved(self, address: str, version: Version) -> None:
        """The engine may be given groups."""
        self._note({address: version.number}, {address: None})

    def note_changing(self, address: str) -> None:
        """It may not, from now on: what it serves is about to end."""
        self._note({address: None}, {})

    def note_stale(self, address: str, why: str) -> None:
        """It may not: it computes something else than it was sent, or refuses."""
        self._note({address: None}, {address: why})

    def note_crash(self, error: BaseException) -> None:
        """A worker has ended by a fault of ours; the training loop will raise it."""
        with self.changed:
            self._crash = error
            self.changed.notify_all()

    # -- private -------------------------------------------------------------------------------

    def _note(self, proved: Mapping[str, int | None], stale: Mapping[str, str | None]) -> None:
        """Writes what has changed; None removes. One engine's news never undoes another's."""
        with self.changed:
            fields: dict[str, Mapping[str, object]] = {}
            for name, known, news in (
                ("proved", self._proved, proved),
                ("stale", self._stale, stale),
            ):
                merged = {a: v for a, v in (known | news).items() if v is not None}  # type: ignore[operator]
                if merged != known:
                    fields[name] = merged
            if fields:
                self._write(**fields)
                self._proved = dict(fields.get("proved", self._proved))  # type: ignore[arg-type]
                self._stale = dict(fields.get("stale", self._stale))  # type: ignore[arg-type]
            self.changed.notify_all()

    def _ready(self, version: Version) -> bool:
        """An engine has proved the version; waits a moment for that."""
        with self.changed:
            return self.changed.wait_for(
                lambda: any(w.proved == version.number for w in self._workers.values()), _CHECK_S
            )

    def _raise_if_all_failed(self) -> None:
        failures = [w.failure for w in self._workers.values()]
        errors = [failure for failure in failures if failure is not None]
        if not self._settled or not errors or len(errors) < len(failures):
            return
        if len(errors) == 1:
            raise errors[0]
        told = "; ".join(map(str, errors))
        raise type(errors[0])(f"none of the {len(errors)} engines can go on: {told}")

    def _told(self) -> str:
        with self.changed:
            told = [f"{a} {w.told()}" for a, w in self._workers.items()]
        return ", ".join(told) or "no engine is leased"
