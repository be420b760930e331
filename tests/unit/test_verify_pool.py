"""Verifiers that fail in every way, in real worker processes. Run as a script, this file is one."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from keel.errors import InvalidField
from keel.spec import VerifierSpec
from keel_rollout.collector.tasks.base import Case, Verdict
from keel_rollout.collector.verifiers import Options
from keel_rollout.collector.verify import Judgement, VerifierPool
from keel_rollout.collector.verify_worker import serve

MISBEHAVING = VerifierSpec(name="regex", pattern="", label="misbehaving")
"""In these workers, regex is `Misbehaving`."""


class Misbehaving:
    """Does what the response says; the reward of a good one is the answer."""

    def __init__(self, options: Options) -> None:
        if options["label"] == "unloadable":
            raise ImportError("no such module")
        if options["label"] == "endless":
            while True:
                pass

    def verify(self, case: Case) -> Verdict:
        match case.response:
            case "raise":
                raise ValueError("no such answer")
            case "exit":
                sys.exit(0)
            case "crash":
                os._exit(3)
            case "vanish":
                os._exit(0)
            case "abort":
                os.abort()
            case "spin":
                while True:
                    pass
            case "spin in C":
                pow(7, 10**9)
            case "sleep":
                time.sleep(3600)
            case "nan":
                return Verdict(float("nan"))
            case "text":
                return Verdict("much")  # type: ignore[arg-type]
            case "print":
                print("not an answer", flush=True)
            case "close":
                os.closerange(0, 64)
                time.sleep(3600)
            case "slow":
                time.sleep(0.5)
            case "spin with a child":  # it has the worker's pipes, and outlives it
                if os.fork() == 0:
                    time.sleep(3600)
                while True:
                    pass
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
        return Verdict(float(case.answer), {"half": float(case.answer) / 2})


if __name__ == "__main__":
    serve({"regex": Misbehaving})


@pytest.fixture
async def pool() -> AsyncIterator[VerifierPool]:
    pool = VerifierPool(
        command=(sys.executable, str(Path(__file__))),
        cpu_limit_s=0.3,
        sleep_limit_s=1.0,
        stop_limit_s=0.5,
    )
    yield pool
    await pool.close()


async def judge(pool: VerifierPool, *responses: str) -> list[Judgement]:
    """Response i has answer i."""
    cases = [Case("", response, str(index)) for index, response in enumerate(responses)]
    return await pool.verify([MISBEHAVING], cases)


def good(answer: float) -> Judgement:
    return Judgement(answer, {"misbehaving": answer, "misbehaving/half": answer / 2})


@pytest.mark.parametrize(
    ("response", "fault"),
    [
        ("raise", "raised ValueError: no such answer"),
        ("exit", "raised SystemExit: 0"),
        ("crash", "ended its process with exit code 3"),
        ("vanish", "ended its process with exit code 0"),
        ("abort", "crashed with SIGABRT"),
        ("spin", "used more than 0.3 s of CPU time"),
        ("spin with a child", "used more than 0.3 s of CPU time"),
        ("spin in C", "used more than 0.3 s of CPU time"),
        ("sleep", "hung: it slept for 1 s"),
        ("nan", "raised ValueError: misbehaving is nan"),
        ("text", "raised ValueError: could not convert string to float: 'much'"),
    ],
)
async def test_a_failing_verifier_costs_one_response(
    pool: VerifierPool, response: str, fault: str
) -> None:
    judgements = await judge(pool, "a", response, "b", response, "c")
    assert [judgements[index] for index in (0, 2, 4)] == [good(0.0), good(2.0), good(4.0)]
    assert [judgements[index].fault for index in (1, 3)] == [f"verifier misbehaving {fault}"] * 2
    assert await judge(pool, "a") == [good(0.0)]


async def test_what_a_verifier_prints_is_no_answer(pool: VerifierPool) -> None:
    assert await judge(pool, "print", "a") == [good(0.0), good(1.0)]


async def test_a_verifier_that_closes_every_file_costs_one_response(pool: VerifierPool) -> None:
    judgements = await judge(pool, "a", "close", "b")
    assert [bool(judgement.fault) for judgement in judgements] == [False, True, False]


async def test_many_short_responses_take_well_under_a_tenth_of_a_second() -> None:
    pool = VerifierPool()
    case = Case("347*6=", "7642 4628 3620 =2082", "2082", raw="7642 4628 3620 =2082<end>")
    judges = [VerifierSpec(name="multiplication")]
    await pool.verify(judges, [case])
    began = time.perf_counter()
    judgements = [j for _ in range(64) for j in await pool.verify(judges, [case] * 8)]
    took_s = time.perf_counter() - began
    await pool.close()
    parts = {"multiplication": 1.0, "multiplication/formed": 1.0}
    assert judgements == [Judgement(1.0, parts)] * 512
    assert took_s < 0.1


def worker() -> psutil.Process:
    """The one worker process of this test."""
    name = Path(__file__).name
    (child,) = (c for c in psutil.Process().children() if name in " ".join(c.cmdline()))
    return child


async def while_judging(
    pool: VerifierPool, disturb: Callable[[psutil.Process], None]
) -> list[Judgement]:
    """Judges "a", "slow", "b" and disturbs the worker in the middle of "slow"."""
    await judge(pool, "warm")
    judging = asyncio.create_task(judge(pool, "a", "slow", "b"))
    await asyncio.sleep(0.2)
    disturb(worker())
    return await judging


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_a_worker_killed_from_outside_changes_nothing(
    pool: VerifierPool, number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        judgements = await while_judging(pool, lambda process: process.send_signal(number))
    assert judgements == [good(0.0), good(1.0), good(2.0)]
    assert f"was killed by {number.name}; its response is judged again" in caplog.text


async def test_a_worker_stopped_for_good_is_replaced(pool: VerifierPool) -> None:
    judgements = await while_judging(pool, lambda process: process.suspend())
    assert judgements == [good(0.0), good(1.0), good(2.0)]


async def test_a_worker_stopped_before_a_long_request_is_replaced(pool: VerifierPool) -> None:
    """A request of 8 MB, which the pipe to the worker does not hold."""
    await judge(pool, "warm")
    worker().suspend()
    async with asyncio.timeout(10):
        judgements = await judge(pool, *["x" * 2**20] * 8)
    assert judgements == [good(float(index)) for index in range(8)]


async def test_no_child_of_a_verifier_outlives_its_worker(pool: VerifierPool) -> None:
    await judge(pool, "warm")
    group = worker().pid
    await judge(pool, "spin with a child")
    await asyncio.sleep(0.1)
    alive = [p for p in psutil.process_iter(["status"]) if p.info["status"] != "zombie"]
    assert not [process for process in alive if os.getpgid(process.pid) == group]


async def test_a_pause_shorter_than_that_changes_nothing(pool: VerifierPool) -> None:
    def pause(process: psutil.Process) -> None:
        process.suspend()
        asyncio.get_running_loop().call_later(0.3, process.resume)

    assert await while_judging(pool, pause) == [good(0.0), good(1.0), good(2.0)]


async def test_a_response_that_always_kills_its_worker_is_given_up(pool: VerifierPool) -> None:
    judgements = await judge(pool, "a", "kill", "b")
    assert [judgements[0], judgements[2]] == [good(0.0), good(2.0)]
    assert judgements[1].fault == (
        "verifier misbehaving: its worker was killed by SIGKILL, 6 times"
    )


async def test_a_cancelled_call_leaves_no_answer_behind(pool: VerifierPool) -> None:
    judging = asyncio.create_task(judge(pool, "a", "slow", "b"))
    await asyncio.sleep(0.3)
    judging.cancel()
    await asyncio.wait({judging})
    assert await judge(pool, "c", "d") == [good(0.0), good(1.0)]


async def test_workers_judge_side_by_side() -> None:
    """Four responses of 0.5 s sleep on two workers: 1 s, where one would need 2."""
    pool = VerifierPool(2, command=(sys.executable, str(Path(__file__))))
    await asyncio.gather(judge(pool, "warm"), judge(pool, "warm"))
    began = time.perf_counter()
    await asyncio.gather(*(judge(pool, "slow") for _ in range(4)))
    took_s = time.perf_counter() - began
    await pool.close()
    assert 1.0 <= took_s < 1.8


def test_a_worker_is_light() -> None:
    """A new one must be there at once: no grpc, numpy or pydantic."""
    script = (
        "import sys, keel_rollout.collector.verify_worker; "
        "sys.exit(str({'grpc', 'numpy', 'pydantic', 'redis'} & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr.strip() == ""


@pytest.mark.parametrize(
    ("label", "why"),
    [
        ("unloadable", "loading it raised ImportError: no such module"),
        ("endless", "verifier endless used more than 0.5 s of CPU time"),
    ],
)
async def test_a_verifier_that_cannot_be_loaded_is_told_before_any_response(
    label: str, why: str
) -> None:
    pool = VerifierPool(command=(sys.executable, str(Path(__file__))), load_limit_s=0.5)
    broken = VerifierSpec(name="regex", pattern="", label=label)
    with pytest.raises(InvalidField) as raised:
        await pool.load("task.verifier", [broken])
    await pool.load("task.verifier", [MISBEHAVING])
    faults = [j.fault for j in await pool.verify([broken], [Case("", "a", "1")] * 2)]
    await pool.close()
    assert str(raised.value) == (
        f"task.verifier: 'regex' is not valid; valid: one that the collector can load: {why}"
    )
    assert faults == [why] * 2
