"""Verdicts from worker processes: a failing verifier costs one response, a disturbed worker none.

What becomes of a response whose worker does not answer:

    it raised, crashed, or ended the process ............. invalid
    it used more CPU time than the limit ................. invalid; ITIMER_PROF ends the worker
    it slept longer than the limit, as seen from here .... invalid
    the worker was killed or stopped from outside ........ judged again in a new worker

CPU time and sleep are counted, never the clock: a machine that pauses changes no reward.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil

from keel.errors import InvalidField
from keel.spec import VerifierSpec
from keel_rollout.collector.tasks.base import Case

log = logging.getLogger(__name__)

WORKER = (sys.executable, "-m", "keel_rollout.collector.verify_worker")
"""Command of a worker process."""

_TICK_S = 0.25
_LINE_BYTES = 2**20
_EXIT_S = 2.0
_KILLS = 5
"""A response is judged again this often after its worker was killed from outside; then the response
is taken to be the cause (out of memory, say)."""
_FROM_OUTSIDE = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict, or the reason why there is none."""

    reward: float = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)
    fault: str = ""
    """Not empty: the verifier failed on this response, and the reward means nothing."""


class _Disturbed(Exception):
    """The worker was killed or stopped from outside."""


class _Failed(Exception):
    """The verifier ended the worker; the message says how."""


_LOAD = Case("", "")
"""Stands for no response: the verifiers are loaded, and judge nothing."""


@dataclass(frozen=True, slots=True)
class _Limits:
    """Seconds; see `VerifierPool`."""

    cpu_s: float
    load_s: float
    sleep_s: float
    stop_s: float


class VerifierPool:
    """Judges responses in `workers` processes, each started when it is first needed.

    Example:
        pool = VerifierPool()
        await pool.verify([VerifierSpec(name="exact")], [Case("2*3=", "6", answer="6")])
        -> [Judgement(reward=1.0, parts={"exact": 1.0}, fault="")]
    """

    def __init__(
        self,
        workers: int = 1,
        *,
        allowed: Collection[str] = (),
        command: Sequence[str] = WORKER,
        cpu_limit_s: float = 2.0,
        load_limit_s: float = 60.0,
        sleep_limit_s: float = 30.0,
        stop_limit_s: float = 5.0,
    ) -> None:
        """
        Args:
            allowed: names module:function that jobs may ask for; the code is the operator's.
            command: starts a worker that speaks `verify_worker`'s lines.
            cpu_limit_s: CPU seconds of one response.
            load_limit_s: CPU seconds of importing verifiers.
            sleep_limit_s: seconds that a verifier may sleep on one response without using any CPU.
            stop_limit_s: seconds after which a stopped worker is replaced.
        """
        self._allowed = frozenset(allowed)
        limits = _Limits(cpu_limit_s, load_limit_s, sleep_limit_s, stop_limit_s)
        self._workers = [_Worker(command, limits) for _ in range(workers)]
        self._idle: asyncio.Queue[_Worker] = asyncio.Queue()
        for worker in self._workers:
            self._idle.put_nowait(worker)

    async def load(self, field: str, verifiers: Sequence[VerifierSpec]) -> None:
        """Imports what a job asks for, before anything is trained.

        Raises:
            InvalidField: naming `field`: the operator has not allowed one, or it cannot be loaded.
        """
        for verifier in verifiers:
            if verifier.custom and verifier.name not in self._allowed:
                allowed = ", ".join(sorted(self._allowed)) or "none now"
                raise InvalidField(
                    field,
                    verifier.name,
                    f"a built-in verifier, or one that the operator allowed ({allowed}) with the "
                    "collector's --verifiers or KEEL_VERIFIERS",
                )
            (judgement,) = await self.verify([verifier], [_LOAD])
            if judgement.fault:
                raise InvalidField(
                    field, verifier.name, f"one that the collector can load: {judgement.fault}"
                )

    async def verify(
        self, verifiers: Sequence[VerifierSpec], cases: Sequence[Case]
    ) -> list[Judgement]:
        """One judgement for each case, in order: the weighted sum of the verifiers."""
        worker = await self._idle.get()
        try:
            return await worker.judge(verifiers, cases)
        except BaseException:
            worker.kill()  # it may be in the middle of an answer
            raise
        finally:
            self._idle.put_nowait(worker)

    async def close(self) -> None:
        """Ends the workers."""
        for worker in self._workers:
            await worker.close()


class _Worker:
    def __init__(self, command: Sequence[str], limits: _Limits) -> None:
        self._command, self._limits = command, limits
        self._process: asyncio.subprocess.Process | None = None

    async def judge(
        self, verifiers: Sequence[VerifierSpec], cases: Sequence[Case]
    ) -> list[Judgement]:
        judgements: list[Judgement] = []
        named = "+".join(verifier.part for verifier in verifiers)
        kills = 0
        while len(judgements) < len(cases):
            before = len(judgements)
            try:
                await self._judge(verifiers, cases, judgements)
            except _Failed as failure:
                log.warning("verifier %s failed: %s", named, failure)
                judgements.append(Judgement(fault=f"verifier {named} {failure}"))
            except _Disturbed as disturbance:
                kills = 1 if len(judgements) > before else kills + 1
                log.warning("verifier worker %s; its response is judged again", disturbance)
                if kills > _KILLS:
                    fault = f"verifier {named}: its worker {disturbance}, {kills} times"
                    judgements.append(Judgement(fault=fault))
        return judgements

    async def _judge(
        self,
        verifiers: Sequence[VerifierSpec],
        cases: Sequence[Case],
        judgements: list[Judgement],
    ) -> None:
        """Appends to `judgements` from where they end."""
        process = await self._start()
        assert process.stdin is not None
        left = cases[len(judgements) :]
        rest = [case for case in left if case is not _LOAD]
        request = {
            "verifiers": [{**each.model_dump(), "part": each.part} for each in verifiers],
            "cpu_limit_s": self._limits.cpu_s,
            "load_limit_s": self._limits.load_s,
            "cases": [asdict(case) for case in rest],
        }
        # no drain: a worker that was stopped would hold it for ever; reading notices one
        process.stdin.write(json.dumps(request).encode() + b"\n")
        loaded = await self._answer(process, self._limits.load_s)
        if "error" in loaded:
            fault = Judgement(fault=f"loading it raised {loaded['error']}")
            judgements += [fault] * len(left)
            return
        if len(rest) < len(left):
            judgements.append(Judgement())
        for _ in rest:
            answer = await self._answer(process, self._limits.cpu_s)
            judgements.append(_judgement(answer))

    async def _start(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=_LINE_BYTES,
                start_new_session=True,  # Ctrl-C is for us, not for it
                env={**os.environ, "PYTHONHASHSEED": "0"},  # sympy's ways follow the order of sets
            )
        return self._process

    async def _answer(
        self, process: asyncio.subprocess.Process, cpu_limit_s: float
    ) -> dict[str, Any]:
        assert process.stdout is not None
        slept_s = stopped_s = 0.0
        while True:
            try:
                async with asyncio.timeout(_TICK_S):
                    line = await process.stdout.readline()
                break
            except TimeoutError:
                if process.returncode is not None:  # dead, and a child of it has its pipe open
                    raise await self._death(process, cpu_limit_s) from None
                state = _state(process.pid)
            except ValueError as error:
                await self._end(process)
                raise _Failed(f"answered with more than {_LINE_BYTES} bytes") from error
            slept_s += _TICK_S if state == psutil.STATUS_SLEEPING else 0
            stopped_s += _TICK_S if state in _STOPPED else 0
            if slept_s >= self._limits.sleep_s:
                await self._end(process)
                raise _Failed(f"hung: it slept for {self._limits.sleep_s:g} s")
            if stopped_s >= self._limits.stop_s:
                await self._end(process)
                raise _Disturbed("was stopped")
        if not line.endswith(b"\n"):
            raise await self._death(process, cpu_limit_s)
        answer = json.loads(line)
        assert isinstance(answer, dict), "our own worker's line"
        return answer

    async def _death(
        self, process: asyncio.subprocess.Process, cpu_limit_s: float
    ) -> _Failed | _Disturbed:
        """What the end of a worker means."""
        try:
            async with asyncio.timeout(_EXIT_S):
                code = await process.wait()
        except TimeoutError:
            await self._end(process)
            return _Failed("closed the worker's output")
        self._process = None
        _kill_group(process.pid)
        if code >= 0:
            return _Failed(f"ended its process with exit code {code}")
        by = signal.Signals(-code)
        if by == signal.SIGPROF:
            return _Failed(f"used more than {cpu_limit_s:g} s of CPU time")
        if by in _FROM_OUTSIDE:
            return _Disturbed(f"was killed by {by.name}")
        return _Failed(f"crashed with {by.name}")

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        self.kill()
        await process.wait()

    def kill(self) -> None:
        """Ends the process, if there is one; the next call starts another."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            _kill_group(process.pid)

    async def close(self) -> None:
        process = self._process
        if process is not None:
            await self._end(process)


_STOPPED = {psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP}


def _kill_group(pid: int) -> None:
    """Kills a worker and what its verifiers have started; the worker leads a group of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _state(pid: int) -> str:
    try:
        return psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return psutil.STATUS_DEAD


def _judgement(answer: Mapping[str, Any]) -> Judgement:
    if "error" in answer:
        return Judgement(fault=f"verifier {answer['error']}")
    return Judgement(answer["reward"], answer["parts"])
