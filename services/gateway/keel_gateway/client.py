"""The gateway's REST interface as a Python client. The CLI is built on it."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx

from keel.checkpoints import CheckpointInfo
from keel.dead_letters import DeadLetter
from keel.errors import InvalidField, KeelError
from keel.metrics import Row
from keel.samples import Sample
from keel.spec import RunSpec
from keel_gateway.listen import Event, parse_events
from keel_gateway.schemas import (
    CheckpointList,
    DeadLetterList,
    Engine,
    EngineList,
    Job,
    JobList,
    Ledger,
    Metrics,
    Readiness,
    Samples,
)

DEFAULT_URL = "http://127.0.0.1:8080"
DEFAULT_DIR = Path("runs")
"""Folder of `keel up`, in the working directory."""
STATE_FILE = "stack.json"
"""In that folder: where the gateway is, while it is up."""
TIMEOUT_S = 30.0
LEDGER_TIMEOUT_S = 600.0
"""A million lines take half a minute and more."""
_DIRECT = {"all://127.0.0.1": None, "all://localhost": None, "all://[::1]": None}
"""Never through the environment's proxy."""
ROWS_PER_PAGE = 1000
SILENCE_S = 45.0
"""Of a stream of events, after which it is taken for lost: a comment comes every 15."""
RECONNECT_S = 1.0
PATIENCE_S = 60.0
"""While which a stream's gateway may be away."""
LATEST = "latest"
"""Stands for the job submitted last."""
JOBS_SEARCHED = 1000


class Unreachable(KeelError):
    """Nothing answers at the gateway's address, or it cannot work now. A retry may help."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault of a request, as the gateway names it."""

    field: str
    value: object
    valid: str


class ProblemError(KeelError):
    """The gateway refused a request (RFC 9457): the status says who can mend it."""

    def __init__(self, status_code: int, title: str, detail: str, faults: Sequence[Fault]) -> None:
        self.status_code, self.title, self.detail, self.faults = status_code, title, detail, faults
        super().__init__(f"{title}: {detail}" if detail else title)

    @property
    def callers_fault(self) -> bool:
        """The request was wrong; sent again it fails again."""
        return 400 <= self.status_code < 500

    @classmethod
    def from_answer(cls, answer: httpx.Response) -> ProblemError:
        """What a failed answer says, be it problem+json or something else in between."""
        try:
            body = answer.json()
        except ValueError:
            body = None
        if not isinstance(body, dict):
            return cls(answer.status_code, f"HTTP {answer.status_code}", answer.text[:500], ())
        faults = [
            Fault(str(item.get("field")), item.get("value"), str(item.get("valid")))
            for item in body.get("errors", [])
        ]
        title = str(body.get("title", f"HTTP {answer.status_code}"))
        return cls(answer.status_code, title, str(body.get("detail", "")), faults)


class GatewayClient:
    """Jobs, metrics, samples and engines of one gateway. Errors: Unreachable, ProblemError.

    Example:
        with GatewayClient("http://127.0.0.1:8080") as client:
            job = client.submit(load_spec(Path("job.toml")))
    """

    def __init__(self, url: str, *, timeout_s: float = TIMEOUT_S) -> None:
        self.url = url.rstrip("/")
        try:
            self._http = httpx.Client(base_url=self.url, timeout=timeout_s, mounts=_DIRECT)
        except (httpx.InvalidURL, ValueError) as error:
            raise InvalidField("--url", url, f"the gateway's URL, such as {DEFAULT_URL}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._http.close()

    def missing(self) -> str:
        """What the gateway still needs before a job could run; empty when it is ready."""
        try:
            self._call("GET", "/readyz")
        except Unreachable as error:
            return str(error)
        return ""

    def notes(self) -> list[str]:
        """What a gateway that is ready has to tell its operator."""
        return Readiness.model_validate(self._call("GET", "/readyz")).notes

    def clock(self) -> datetime:
        """What the gateway's clock says, to the second."""
        return parsedate_to_datetime(self._answer("GET", "/healthz").headers["date"])

    def submit(self, spec: RunSpec) -> Job:
        """Queues a run. What the spec leaves to defaults, it leaves to the gateway."""
        return Job.model_validate(
            self._call("POST", "/v1/jobs", json=spec.model_dump(mode="json", exclude_unset=True))
        )

    def jobs(self, limit: int = 100) -> list[Job]:
        """The jobs submitted last, newest first."""
        return JobList.model_validate(self._call("GET", "/v1/jobs", params={"limit": limit})).jobs

    def job(self, run: str) -> Job:
        """The job of this id."""
        return Job.model_validate(self._call("GET", _path(run)))

    def find(self, text: str) -> Job:
        """The job that `text` means: an id, a prefix that only one id has, or "latest"."""
        jobs = self.jobs(JOBS_SEARCHED)
        if text == LATEST and jobs:
            return jobs[0]
        found = [job for job in jobs if job.id == text] or [
            job for job in jobs if text and job.id.startswith(text)
        ]
        if len(found) == 1:
            return found[0]
        shown = [job.id for job in (found or jobs)[:5]]
        known = f"{', '.join(shown)}{', ...' if len(found or jobs) > len(shown) else ''}"
        if not found:
            self._raise_if_lost(text)
        if found:
            raise InvalidField("JOB", text, f"a prefix of only one of {known}; or {LATEST!r}")
        raise InvalidField(
            "JOB", text, f"{known}; or {LATEST!r}" if jobs else "nothing yet: no job"
        )

    def _raise_if_lost(self, run: str) -> None:
        """ProblemError if the gateway knows what has become of a job that is not there."""
        try:
            self.job(run)
        except ProblemError as error:
            if error.detail.startswith(f"run {run!r} is lost"):
                raise

    def cancel(self, run: str) -> Job:
        """Asks for the end of a job; its phase follows when the trainer has stopped."""
        return Job.model_validate(self._call("POST", f"{_path(run)}/cancel"))

    def pause(self, run: str) -> Job:
        """Has a job stop before its next lap; `paused` says when it has."""
        return Job.model_validate(self._call("POST", f"{_path(run)}/pause"))

    def resume(self, run: str) -> Job:
        """Has a paused job go on."""
        return Job.model_validate(self._call("POST", f"{_path(run)}/resume"))

    def checkpoints(self, run: str) -> list[CheckpointInfo]:
        """The checkpoints that exist, the oldest first."""
        answer = self._call("GET", f"{_path(run)}/checkpoints")
        return CheckpointList.model_validate(answer).checkpoints

    def dead_letters(self, run: str) -> list[DeadLetter]:
        """What the job's trainer gave up, in the order of slots."""
        answer = self._call("GET", f"{_path(run)}/dead-letters")
        return DeadLetterList.model_validate(answer).dead_letters

    def dead_letter_bytes(self, run: str, letter: DeadLetter) -> bytes | None:
        """The envelope of a dead letter; None: it was in the blob store."""
        try:
            path = f"{letter.stream}/{quote(letter.entry, safe='')}"
            return self._answer("GET", f"{_path(run)}/dead-letters/{path}").content
        except ProblemError as error:
            if error.status_code != httpx.codes.NOT_FOUND:
                raise
            return None

    def ledger(self, run: str) -> Ledger:
        """What the job's weights are made of, and whether that is right."""
        answer = self._call("GET", f"{_path(run)}/ledger", timeout=LEDGER_TIMEOUT_S)
        return Ledger.model_validate(answer)

    def metrics(self, run: str, *, after: int = -1) -> Metrics:
        """Every row of a step after `after`, and the newest evaluation."""
        rows: list[Row] = []
        while True:
            page = Metrics.model_validate(
                self._call(
                    *("GET", f"{_path(run)}/metrics"),
                    params={"after": after, "limit": ROWS_PER_PAGE},
                )
            )
            rows += page.rows
            if len(page.rows) < ROWS_PER_PAGE:
                return Metrics(rows=rows, evaluation=page.evaluation)
            after = int(rows[-1]["step"])

    def samples(self, run: str, *, after: int = -1) -> list[Sample]:
        """Every sample of a step after `after`, by step, slot and sample."""
        samples: list[Sample] = []
        while True:
            page = Samples.model_validate(
                self._call("GET", f"{_path(run)}/samples", params={"after": after})
            )
            if not page.samples:
                return samples
            samples += page.samples
            after = samples[-1].step

    def events(self, run: str, *, last_event_id: str = "") -> Iterator[Event]:
        """Everything that has happened to a job and happens, until `end`, each once.

        Reconnects by itself and goes on where it was. A gateway that answered once may be away for
        PATIENCE_S, then Unreachable.

        Args:
            last_event_id: `Event.id` after which to begin; empty: the whole history.
        """
        lost_s: float | None = -math.inf  # when the stream was lost; None: it is not
        while True:
            try:
                with self._stream(f"{_path(run)}/events", last_event_id) as lines:
                    lost_s = None
                    if lines is None:
                        return
                    for event in parse_events(lines):
                        last_event_id = event.id
                        yield event
                        if event.kind == "end":
                            return
            except Unreachable:
                lost_s = time.monotonic() if lost_s is None else lost_s
                if time.monotonic() - lost_s > PATIENCE_S:
                    raise
            time.sleep(RECONNECT_S)

    def engines(self) -> list[Engine]:
        """Every engine that the gateway was told of."""
        return EngineList.model_validate(self._call("GET", "/v1/engines")).engines

    def drain(self, address: str) -> Engine:
        """Has an engine emptied and kept out of jobs; `run_state` is DRAINED when it has left."""
        return self._engine(address, "drain")

    def undrain(self, address: str) -> Engine:
        """Has an engine given to jobs again."""
        return self._engine(address, "undrain")

    def _engine(self, address: str, verb: str) -> Engine:
        path = f"/v1/engines/{quote(address, safe=':')}/{verb}"
        return Engine.model_validate(self._call("POST", path))

    def _call(self, method: str, path: str, **request: Any) -> Any:
        return self._answer(method, path, **request).json()

    def _answer(self, method: str, path: str, **request: Any) -> httpx.Response:
        with self._reached():
            answer = self._http.request(method, path, **request)
        self._check(answer)
        return answer

    @contextmanager
    def _stream(self, path: str, last_event_id: str) -> Iterator[Iterable[str] | None]:
        """The lines of a stream of events; None where there is no more."""
        headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
        timeout = httpx.Timeout(TIMEOUT_S, read=SILENCE_S)
        with (
            self._reached(),
            self._http.stream("GET", path, headers=headers, timeout=timeout) as answer,
        ):
            if not answer.is_success:
                answer.read()
            self._check(answer)
            yield None if answer.status_code == httpx.codes.NO_CONTENT else answer.iter_lines()

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except httpx.RequestError as error:
            raise Unreachable(
                f"no gateway answers at {self.url} ({error}). Start one with `keel up`, or say "
                "where it is with --url or KEEL_URL"
            ) from error

    def _check(self, answer: httpx.Response) -> None:
        if answer.is_success:
            return
        problem = ProblemError.from_answer(answer)
        if answer.status_code in (502, 503, 504):
            raise Unreachable(f"the gateway at {self.url} cannot work now: {problem.detail}")
        raise problem


def find_url(given: str | None) -> str:
    """The gateway's URL: as given, else KEEL_URL, else where `keel up` runs here, else the usual.

    `keel up` leaves it in its folder; only the folder `runs` is looked into.
    """
    if url := given or os.environ.get("KEEL_URL"):
        return url
    return str(running_stack().get("url", DEFAULT_URL))


def running_stack() -> dict[str, Any]:
    """What `keel up` in this folder says of itself (`url`, `metrics`); empty if it is not up."""
    try:
        found = json.loads((DEFAULT_DIR / STATE_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _path(run: str) -> str:
    return f"/v1/jobs/{quote(run, safe='')}"
