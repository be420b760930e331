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

import grpc
import numpy as np

from keel.errors import IntegrityError, KeelError
from keel.record import RunRecord
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel_trainer.backends.base import ModelInfo
from keel_trainer.delivery import EngineError, EngineLink, Payload, serves
from keel_trainer.version import SharedWeights, Version

log = logging.getLogger(__name__)

PROBE_FACTOR, PROBE_FLOOR = 5.0, 0.02
"""A version is proved if the median |d log p| of the probe is at most max(factor x gap at first
load, floor in nats). The median, because a few unlikely tokens carry most of a coarse engine's
mean gap."""
FIRST_GAP_LIMITS = {"none": 0.5, "fp8": 0.5, "fp4": 2.0}
"""Largest median gap at first load, nats, by `engine.quantize`. Seen on the tiny preset after its
cold start, inputs and routers rounded too: fp8 up to 0.22, fp4 up to 0.79, other weights 7.2."""
REPAIRS = 3
"""How often an engine that failed a version is brought to it again, before it is given up. The next
version gives it another chance."""

_POLL_S = 2.0
_CHECK_S = 0.5
_TELL_S = 10.0
_FIRST_DELAY_S, _MOST_DELAY_S = 0.1, 2.0
_CLOSE_S = 5.0
_AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
"""To be tried again for as long as it takes."""
_REFUSED = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
)
"""The same call would be answered the same way. What is in neither list is tried REPAIRS times: the
engine may just have been restarted, or the bytes were damaged on the way."""

Check = Callable[[], RunRecord]
"""Reads the record; raises to stop what waits."""


class Publisher:
    """The engines of one run, as its record names them at each moment.

    Memory: one copy of the weights on the host, from `publish` to `release`; two while a slow
    engine still takes the version before.
    """

    def __init__(
        self,
        record: RunRecord,
        artifact: Path,
        info: ModelInfo,
        probe_token_ids: np.ndarray,
        first_gaps: Mapping[str, float] | None = None,
        *,
        write: Callable[..., None],
        needs_routes: bool = False,
        shared: SharedWeights | None = None,
    ) -> None:
        """
        Args:
            info: the model in training.
            probe_token_ids: int32 [T].
            first_gaps: as a checkpoint remembers them.
            write: sets fields of the run record.
            needs_routes: an engine without routes is refused.
            shared: weights go by reference to the engines that take them so.
        """
        self._run, self._write, self._shared = record.run, write, shared
        self._payload = Payload(
            artifact,
            record.spec.engine,
            info.moe_layer_numbers,
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
        self._workers: dict[str, _Worker] = {}
        self._proved = dict(record.proved)
        self._stale = dict(record.stale)
        self._token = 0
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

        Raises what `publish` raises when no engine is left that could serve the version.
        """
        with self.changed:
            self._token = record.engine_token or record.fencing_token
            for address in self._workers.keys() - set(record.engines):
                log.info("%s has left the run", address)
                self._workers.pop(address).stop()
            for address in record.engines:
                if address not in self._workers:
                    link = EngineLink(address, self._payload, self._shared)
                    self._workers[address] = _Worker(self, link)
                self._workers[address].draining = address in record.draining
            gone = (self._proved.keys() | self._stale.keys()) - set(record.engines)
            if gone:
                self._note(dict.fromkeys(gone), dict.fromkeys(gone))
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
        """It may not: what it computes is not what it was sent."""
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
        if not errors or len(errors) < len(failures) or self.version is None:
            return
        if len(errors) == 1:
            raise errors[0]
        told = "; ".join(map(str, errors))
        raise type(errors[0])(f"none of the {len(errors)} engines can go on: {told}")

    def _told(self) -> str:
        with self.changed:
            told = [f"{a} {w.told()}" for a, w in self._workers.items()]
        return ", ".join(told) or "no engine is leased"


class _Worker:
    """Brings one engine to the publisher's version, again whenever it has lost it."""

    def __init__(self, publisher: Publisher, link: EngineLink) -> None:
        self._publisher, self._link = publisher, link
        self._address = link.address
        self._stopped = False
        self.draining = False
        """It keeps what it serves."""
        self.proved: int | None = None
        """Version that it was last proved to serve, in this process."""
        self.failed: int | None = None
        self.error: KeelError | None = None
        """Why it was given up at version `failed`."""
        self.trouble = ""
        self.thread = threading.Thread(target=self._run, daemon=True, name=self._address)
        self.thread.start()

    @property
    def failure(self) -> KeelError | None:
        """Why it is given up for the version that the engines are to serve."""
        version = self._publisher.version
        return self.error if version is not None and self.failed == version.number else None

    def told(self) -> str:
        """For people: what it waits for."""
        if self.draining:
            return "drains"
        return str(self.failure or self.trouble or "is being brought to it")

    def stop(self) -> None:
        """Ends the thread as soon as its call has ended, which closing the channel brings about."""
        with self._publisher.changed:
            self._stopped = True
            self._publisher.changed.notify_all()
        self._link.close()

    def _run(self) -> None:
        try:
            while not self._stopped:
                self._attend()
        except Exception as error:
            if not self._stopped:  # else: the channel was closed under a call
                log.exception("%s", self._address)
                self._publisher.note_crash(error)

    def _attend(self) -> None:
        """Does what there is to do, or waits a moment for it."""
        with self._publisher.changed:
            self._publisher.changed.wait_for(lambda: self._stopped or self._work(), _POLL_S)
            version = self._publisher.version
            if self._stopped or self.draining or version is None:
                return
            idle = not self._work()
        if idle and not self._lost(version):
            return
        self._bring(version)

    def _work(self) -> bool:
        version = self._publisher.version
        return (
            version is not None
            and not self.draining
            and version.number not in (self.proved, self.failed)
        )

    def _wanted(self, version: Version) -> bool:
        return not self._stopped and not self.draining and self._publisher.version is version

    def _lost(self, version: Version) -> bool:
        """The engine was restarted, or has lost the version it had. Silence says nothing."""
        try:
            serving = self._link.serving()
        except grpc.RpcError:
            return False
        if self.failed == version.number:  # a wrong engine that was restarted gets another chance
            return serving.state == pb.ENGINE_STATE_EMPTY and isinstance(self.error, IntegrityError)
        if serves(serving, version):
            return False
        log.warning("%s lost version %d, bringing it again", self._address, version.number)
        return True

    def _bring(self, version: Version) -> None:
        """Returns when the engine has proved the version, is given up, or a newer one has come."""
        failures, delay_s, wrong = 0, _FIRST_DELAY_S, False
        self.proved = self.failed = None
        while self._wanted(version):
            error: KeelError
            try:
                self._prove(version, anew=wrong)
                return
            except grpc.RpcError as failed:
                code = failed.code()
                error = EngineError(f"engine {self._address}: {code.name}: {failed.details()}")
                away, refused = code in _AWAY, code in _REFUSED
            except KeelError as failed:
                error, away = failed, False
                refused = not isinstance(failed, IntegrityError)
                wrong = not refused
            if not self._wanted(version):
                return
            self.trouble = str(error)
            if not away:
                failures += 1
                if wrong or refused or failures > REPAIRS:
                    self._publisher.note_stale(self._address, str(error))
            if refused or failures > REPAIRS:
                log.error("given up for version %d: %s", version.number, error)
                self._give_up(version, error)
                return
            log.warning("%s; again in %.1f s", error, delay_s)
            self._wait(version, delay_s)
            delay_s = min(2 * delay_s, _MOST_DELAY_S)

    def _prove(self, version: Version, *, anew: bool) -> None:
        publisher = self._publisher
        kind, logprobs = self._link.bring(
            version,
            publisher.lease(),
            anew=anew,
            before_change=lambda: publisher.note_changing(self._address),
        )
        publisher.judge(self._address, kind, logprobs, version)
        with publisher.changed:
            if not self._wanted(version):
                return
            self.proved, self.trouble = version.number, ""
            publisher.note_proved(self._address, version)

    def _give_up(self, version: Version, error: KeelError) -> None:
        with self._publisher.changed:
            self.failed, self.error = version.number, error
            self._publisher.changed.notify_all()

    def _wait(self, version: Version, seconds: float) -> None:
        with self._publisher.changed:
            self._publisher.changed.wait_for(lambda: not self._wanted(version), seconds)
