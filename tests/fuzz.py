"""Mutated messages against every method that an engine and a trainer serve, as raw bytes.

`make fuzz` sends 100,000 of them. No process may end, no call may outlast its deadline, no answer
may be INTERNAL or UNKNOWN (a bug of ours), memory must stay flat, and afterwards the engine must
give the bits that it gave before.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import psutil
from fuzz_targets import Engine, Method, Trainer, bounded, everything
from mutations import mutated

IN_FLIGHT = 8
DEADLINE_S = 20.0
GROWTH_BYTES = 96 * 2**20
"""Most that a process may grow after warm-up. One staged version of the model is 2 MiB."""
WARM_UP = 0.3
"""Share of the messages."""
UNTOUCHED = 0.05
"""Share of messages that are sent as they are: mutations must not be all that is refused."""
OURS = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
ROUND = 1_000
"""Messages between two looks at the processes."""


@dataclass
class Fuzz:
    """What was sent and what came back."""

    statuses: dict[str, Counter[str]] = field(default_factory=dict)
    """By method; a method that waits by contract, and was left waiting, counts as `waited`."""
    memory: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """(messages so far, bytes), by process."""

    @property
    def messages(self) -> int:
        """In all."""
        return sum(counter["messages"] for counter in self.statuses.values())

    def count(self, method: str, messages: int, status: str) -> None:
        """Adds one call."""
        counter = self.statuses.setdefault(method, Counter())
        counter["messages"] += messages
        counter[status] += 1

    def growth_bytes(self, process: str) -> int:
        """Largest size after warm-up against the largest during it."""
        sizes = self.memory[process]
        warm = [size for sent, size in sizes if sent <= WARM_UP * self.messages]
        return max(size for _, size in sizes) - max(warm or [sizes[0][1]])

    def __str__(self) -> str:
        rows = [f"{'method':52} {'messages':>8}  answers"]
        for method, counter in sorted(self.statuses.items()):
            said = ", ".join(
                f"{status} {count}"
                for status, count in counter.most_common()
                if status != "messages"
            )
            rows.append(f"{method:52} {counter['messages']:8}  {said}")
        rows.append(f"{'all':52} {self.messages:8}")
        for process, sizes in self.memory.items():
            rows.append(
                f"{process}: {sizes[-1][1] / 2**20:.0f} MiB at the end, "
                f"{self.growth_bytes(process) / 2**20:+.0f} MiB after warm-up"
            )
        return "\n".join(rows)


async def call(channel: grpc.aio.Channel, method: Method, messages: Sequence[bytes]) -> str:
    """One call with these bytes; what came of it.

    Raises:
        AssertionError: it outlasted its deadline, or its answer is a bug of ours.
    """
    waits = method.may_wait(messages)
    deadline_s = 0.25 if waits else DEADLINE_S
    began = time.monotonic()
    try:
        await method.send(channel, messages, deadline_s)
        return "OK"
    except grpc.aio.AioRpcError as error:
        status, details = error.code(), error.details()
    assert time.monotonic() - began < deadline_s + DEADLINE_S, f"{method.path}: it hangs"
    if status == grpc.StatusCode.DEADLINE_EXCEEDED:
        assert waits, f"{method.path}: no answer in {DEADLINE_S} s to {_shown(messages)}"
        return "waited"
    if status in OURS:
        raise AssertionError(f"{method.path}: {status.name}: {details}, to {_shown(messages)}")
    return status.name


def _shown(messages: Sequence[bytes]) -> str:
    return ", ".join(message[:300].hex() or "nothing" for message in messages[:4])


async def fuzz(
    engine: Engine, trainer: Trainer, messages: int, seed: int, say: Callable[[str], None]
) -> Fuzz:
    """Sends at least so many messages, in rounds; after each the engine serves as at the start."""
    rng, done = random.Random(seed), Fuzz()
    methods = everything(engine, trainer)
    weights = [method.weight for method in methods]
    began = time.monotonic()
    while done.messages < messages:
        size, sent = min(ROUND, messages - done.messages), 0
        # one method after the other: a Pause beside a Generate would only make it wait
        for method, share in zip(methods, weights, strict=True):
            calls = max(1, round(size * share / sum(weights) / method.messages_a_call))
            await _together(
                [_one(method, rng.randrange(2**63), done) for _ in range(calls)], IN_FLIGHT
            )
            sent += calls
            for server in (engine, trainer):
                assert server.process.poll() is None, f"{method.path}: it ended\n{server.log()}"
        await engine.restore()
        trainer.restore()
        for name, server in (("engine", engine), ("trainer", trainer)):
            size_bytes = psutil.Process(server.process.pid).memory_info().rss
            done.memory.setdefault(name, []).append((done.messages, size_bytes))
        say(
            f"{done.messages} messages, {done.messages / (time.monotonic() - began):.0f}/s, "
            + ", ".join(f"{n} {s[-1][1] / 2**20:.0f} MiB" for n, s in done.memory.items())
        )
    for process in done.memory:
        grown = done.growth_bytes(process)
        assert grown <= GROWTH_BYTES, f"{process} grew by {grown / 2**20:.0f} MiB\n{done}"
    return done


async def _one(method: Method, seed: int, done: Fuzz) -> None:
    rng = random.Random(seed)
    valid = method.make(rng)
    others = [*valid, *method.others]
    messages = list(valid)
    # of many only some, so that the others lead to where those do harm
    for place in rng.sample(range(len(valid)), min(len(valid), rng.choice((1, 1, 2, 4)))):
        if rng.random() >= UNTOUCHED:
            of = method.type_of(place, len(valid))
            messages[place] = bounded(mutated(valid[place], others, of, rng), of, rng)
    try:
        status = await call(method.channel(), method, messages)
    except AssertionError as error:
        raise AssertionError(f"call {seed}: {error}") from error
    done.count(method.path, len(messages), status)


async def _together(calls: Sequence[Awaitable[None]], at_once: int) -> None:
    room = asyncio.Semaphore(at_once)

    async def one(work: Awaitable[None]) -> None:
        async with room:
            await work

    await asyncio.gather(*map(one, calls))


async def run(messages: int, seed: int, folder: Path, say: Callable[[str], None]) -> Fuzz:
    """Starts an engine and a trainer in `folder`, and fuzzes them.

    Raises:
        AssertionError: any of what must not happen.
    """
    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(Engine.started(folder))
        trainer = await stack.enter_async_context(Trainer.started(folder))
        return await fuzz(engine, trainer, messages, seed, say)


def main() -> None:
    """All of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    def say(text: str) -> None:
        print(text, flush=True)

    with tempfile.TemporaryDirectory(prefix="keel-fuzz-") as folder:
        print(asyncio.run(run(args.messages, args.seed, Path(folder), say)))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
