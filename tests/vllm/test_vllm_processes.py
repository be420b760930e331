"""What becomes of the vLLM engine's processes: asked to end, killed, or left without a parent."""

from __future__ import annotations

import asyncio
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from enginekit import CONFIG, EngineClient, checkpoint, engine_client, engine_process

from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.types.v1 import sequence_pb2

LONG = {"num_samples": 32, "max_tokens": 500}


def family(pid: int) -> list[psutil.Process]:
    """vLLM's processes under a keel-engine."""
    return psutil.Process(pid).children(recursive=True)


def segments(processes: list[psutil.Process]) -> set[Path]:
    """Their shared memory."""
    paths = {Path(m.path) for p in processes for m in p.memory_maps() if "/psm_" in m.path}
    assert paths
    return paths


async def gone(processes: list[psutil.Process], memory: set[Path]) -> None:
    """Within ten seconds nothing runs and nothing lies in /dev/shm."""
    _, alive = await asyncio.to_thread(psutil.wait_procs, processes, timeout=10)
    left = [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert not left
    assert not [path for path in memory if path.exists()]


def scratch() -> set[Path]:
    """Folders of keel-engines on this machine."""
    return set(Path(tempfile.gettempdir()).glob("keel-vllm-*"))


async def generating(client: EngineClient, model: Any) -> asyncio.Task:
    """Loads, publishes, and has a group in flight."""
    await client.load()
    await client.publish(0, checkpoint(model))
    running = asyncio.ensure_future(client.generate([5, 9, 2], **LONG))
    while await client.pause(pb.PAUSE_MODE_KEEP) == 0:
        await client.resume()
        await asyncio.sleep(0.01)
    await client.resume()
    return running


async def test_sigterm_ends_sequences_aborted_and_leaves_nothing(
    vllm_python: str, model_a: Any
) -> None:
    """Before that: an unknown architecture leaves it EMPTY; it answers while vLLM starts."""
    before = scratch()
    with engine_process("--kind", "vllm", python=vllm_python) as (address, process):
        async with engine_client(address, "r", 1) as client:
            with pytest.raises(grpc.aio.AioRpcError, match="MambaForCausalLM"):
                await client.load(CONFIG | {"architectures": ["MambaForCausalLM"]})
            assert await client.state() == pb.ENGINE_STATE_EMPTY
            loading = asyncio.ensure_future(client.load())
            slowest_s = 0.0
            while not loading.done():
                asked_s = time.perf_counter()
                await client.state()
                slowest_s = max(slowest_s, time.perf_counter() - asked_s)
                await asyncio.sleep(0.1)
            assert slowest_s < 5
            running = await generating(client, model_a)
            processes = family(process.pid)
            memory = segments(processes)
            process.send_signal(signal.SIGTERM)
            reasons = {s.complete.finish_reason for s in await running if s.complete}
            assert reasons == {sequence_pb2.FINISH_REASON_ABORTED}
        assert await asyncio.to_thread(process.wait, 15) == 0
        await gone(processes, memory)
    assert scratch() <= before


@pytest.mark.parametrize("victim", ["EngineCore", "keel-engine"])
async def test_a_killed_process_takes_the_others_with_it(
    vllm_python: str, model_a: Any, victim: str
) -> None:
    """UNAVAILABLE for what was in flight; the process ends with 1, so that it is started again."""
    before = scratch()
    with engine_process("--kind", "vllm", python=vllm_python) as (address, process):
        async with engine_client(address, "r", 1) as client:
            running = await generating(client, model_a)
            processes = family(process.pid)
            memory = segments(processes)
            if victim == "keel-engine":
                process.kill()
            else:
                next(p for p in processes if victim in " ".join(p.cmdline())).kill()
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await running
            assert failure.value.code() == grpc.StatusCode.UNAVAILABLE
        status = await asyncio.to_thread(process.wait, 15)
        assert status == (-signal.SIGKILL if victim == "keel-engine" else 1)
        await gone(processes, memory)
    assert scratch() <= before


async def test_an_update_under_which_vllm_dies_ends_the_process(
    vllm_python: str, model_a: Any, model_b: Any
) -> None:
    """vLLM's own call never returns then: a deaf engine must not look healthy."""
    with engine_process("--kind", "vllm", python=vllm_python) as (address, process):
        async with engine_client(address, "r", 1) as client:
            await client.load()
            await client.publish(0, checkpoint(model_a))
            core = next(p for p in family(process.pid) if "EngineCore" in " ".join(p.cmdline()))
            core.suspend()
            update = asyncio.ensure_future(client.publish(1, checkpoint(model_b)))
            await asyncio.sleep(1)
            assert not update.done()
            core.kill()
            with pytest.raises(grpc.aio.AioRpcError):
                await asyncio.wait_for(update, 20)
        assert await asyncio.to_thread(process.wait, 20) == 1
