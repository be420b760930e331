"""One engine's thread: brings it to the publisher's version, again whenever it has lost it.

idle --a newer version--> bring, probe --proved--> idle, looking every 2 s whether it is kept
          ^     |  failed: stale, loaded anew and brought again, REPAIRS times, then given up
          '-----'  away: for as long as it takes
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

import grpc

from keel import rpc
from keel.errors import IntegrityError, KeelError
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel_trainer.delivery import EngineError, EngineLink, serves
from keel_trainer.version import Version

if TYPE_CHECKING:
    from keel_trainer.publish import Publisher

log = logging.getLogger(__name__)

REPAIRS = 3
"""How often an engine that failed a version is brought to it again, before it is given up. The next
version gives it another chance."""

_POLL_S = 2.0
_FIRST_DELAY_S, _MOST_DELAY_S = 0.1, 2.0
_AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
"""To be tried again for as long as it takes. What is neither here nor in `rpc.FINAL` is tried
REPAIRS times: the engine may just have been restarted, or the bytes were damaged on the way."""


class EngineWorker:
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
        if serves(serving, version) or not self._publisher.leases(self._address):
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
                away, refused = code in _AWAY, code in rpc.FINAL
            except KeelError as failed:
                # kept for long: its frames would keep the version's bytes
                error, away = failed.with_traceback(None), False
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
                log.error("given up for version %d: %s", version.number, self.trouble)
                self._give_up(version, error)
                return
            log.warning("%s; again in %.1f s", self.trouble, delay_s)
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
            publisher.note_proved(self._address, version)
            self.proved, self.error, self.trouble = version.number, None, ""

    def _give_up(self, version: Version, error: KeelError) -> None:
        with self._publisher.changed:
            self.failed, self.error = version.number, error
            self._publisher.changed.notify_all()

    def _wait(self, version: Version, seconds: float) -> None:
        with self._publisher.changed:
            self._publisher.changed.wait_for(lambda: not self._wanted(version), seconds)
