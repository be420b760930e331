"""What a sink is, and how a followed run comes into it: every settled row once, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from keel.errors import KeelError
from keel.metrics import Row
from keel.samples import Sample
from keel_gateway.client import GatewayClient
from keel_gateway.follow import View
from keel_gateway.schemas import Job

SAMPLES_A_STEP = 8
"""Samples of one step that are shown."""


class SinkError(KeelError):
    """A sink cannot be written to; the message says what to do."""


class Sink(Protocol):
    """Takes rows of one run, ascending by step."""

    last_step: int
    """Last step that it has, also from earlier writers; -1: none."""

    def write(self, row: Row, samples: Sequence[Sample]) -> None:
        """Takes the row of a step after `last_step`, and samples of that step."""
        ...

    def close(self) -> None:
        """Returns once all is written."""
        ...

    @property
    def place(self) -> str:
        """Where it went: a folder or an address, and how to look at it."""
        ...


Open = Callable[[Job], Sink]


def require(module: str, extra: str) -> Any:
    """The module, or SinkError naming the extra that brings it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise SinkError(
            f"{extra} is not installed ({error}): pip install 'keel-gateway[{extra}]'"
        ) from error


@contextmanager
def opened(opens: Iterable[Open], job: Job) -> Iterator[list[Sink]]:
    """Sinks of a job, closed at the end whatever happens."""
    with ExitStack() as stack:
        sinks = []
        for open_sink in opens:
            sinks.append(open_sink(job))
            stack.callback(sinks[-1].close)
        yield sinks


def logged(client: GatewayClient, views: Iterable[View], sinks: Sequence[Sink]) -> Iterator[View]:
    """The views as they come; each sink gets every row that it lacks once that can change no more.

    A row grows after its step: publishing is timed at the end of the lap, an evaluation comes
    before the next lap does. So a row is written when the lap after it is over, or the run is.
    """
    for view in views:
        settled = settled_step(view.job)
        for sink in sinks:
            missing = [r for r in view.rows if sink.last_step < r["step"] <= settled]
            samples = _samples(client, view.job.id, sink.last_step) if missing else {}
            for row in missing:
                sink.write(row, samples.get(row["step"], []))
        yield view


def settled_step(job: Job) -> int:
    """The last step whose row grows no more; below 0: none yet."""
    if job.phase.final:
        return job.step
    lap_steps = job.spec.recipe.off_policiness
    return (job.step // lap_steps - 1) * lap_steps


def numbers(row: Row) -> dict[str, float]:
    """The columns that have a value, but the step itself."""
    return {name: float(v) for name, v in row.items() if v is not None and name != "step"}


def describe(sample: Sample) -> str:
    """A sample as plain text: its numbers, prompt and response."""
    return "\n".join(
        [describe_numbers(sample), "prompt:", sample.prompt, "response:", sample.response]
    )


def describe_numbers(sample: Sample) -> str:
    """Reward and its parts, advantage, and where engine and trainer part, on one line.

    Example:
        "reward 1, advantage +0.250, gap mean 0.0021 max 0.0140 nats, 3 of 23 tokens with ..."
    """
    rewards = {"reward": sample.reward, **sample.reward_parts}
    parts = [f"{n} {'?' if value is None else f'{value:g}'}" for n, value in rewards.items()]
    parts.append(f"advantage {sample.advantage:+.3f}")
    if gaps := [abs(gap) for gap in gaps_of(sample) if gap is not None]:
        parts.append(f"gap mean {sum(gaps) / len(gaps):.4f} max {max(gaps):.4f} nats")
    if sample.experts_differ is not None:
        differ = sum(layers > 0 for layers in sample.experts_differ)
        parts.append(f"{differ} of {len(sample.tokens)} tokens with differing experts")
    if sample.truncated:
        parts.append("truncated at max_tokens")
    if not sample.valid:
        parts.append(f"not trained on: {sample.invalid_reason}")
    return ", ".join(parts)


def gaps_of(sample: Sample) -> list[float | None]:
    """log pi_old - log mu_old of each response token, nats; None where one of them is unknown."""
    proximal = sample.proximal_logprobs or [None] * len(sample.tokens)
    return [
        None if p is None or r is None else p - r
        for p, r in zip(proximal, sample.rollout_logprobs, strict=True)
    ]


def _samples(client: GatewayClient, run: str, after: int) -> dict[int, list[Sample]]:
    found: dict[int, list[Sample]] = {}
    for sample in client.samples(run, after=after):
        of_step = found.setdefault(sample.step, [])
        if len(of_step) < SAMPLES_A_STEP:
            of_step.append(sample)
    return found


def checked_folder(folder: Path) -> Path:
    """The folder, made if need be; OSError names it if it cannot be."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder
