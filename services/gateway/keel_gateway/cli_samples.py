"""`keel samples`: single responses, each token in the colour of the gap of engine and trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from keel.errors import InvalidField
from keel.samples import Sample
from keel_gateway.cli_group import out, show_json
from keel_gateway.cli_options import JobOrRun, Json, Url
from keel_gateway.cli_report import load
from keel_gateway.client import LATEST
from keel_gateway.sinks.base import describe_numbers, gaps_of

LIKELIER = ("dodger_blue1", "deep_sky_blue1", "sky_blue1", "light_sky_blue1")
UNLIKELIER = ("bright_red", "dark_orange", "gold1", "light_goldenrod1")
LIMITS = (1.0, 0.2, 0.05, 0.01)
"""Of |gap|, nats, for the colours above; a smaller gap has none."""
DIFFERS = "underline"


class Worst(StrEnum):
    """By what the worst samples are chosen."""

    GAP = "gap"
    EXPERTS = "experts"
    REWARD = "reward"


ORDERS: dict[Worst, Callable[[Sample], float]] = {
    Worst.GAP: lambda sample: -max((abs(g) for g in gaps_of(sample) if g is not None), default=0.0),
    Worst.EXPERTS: lambda sample: -_share_differing(sample),
    Worst.REWARD: lambda sample: sample.reward or 0.0,
}


def samples(
    job: JobOrRun = LATEST,
    step: Annotated[
        int | None, typer.Option(min=1, help="Of this step; else the newest, or all with --worst.")
    ] = None,
    worst: Annotated[
        Worst | None,
        typer.Option(
            help="First those with the largest gap, most differing experts, or least reward."
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most samples.")] = 4,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Show samples of a job: prompt, response, reward, and where engine and trainer part."""
    run = load(job, url)
    there = [Sample.model_validate(sample) for sample in run.samples]
    chosen = choose(there, step, worst)[:limit]
    if as_json:
        return show_json({"samples": [sample.model_dump(mode="json") for sample in chosen]})
    if not chosen:
        return out.print(f"{run.label} has no samples yet", markup=False)
    for sample in chosen:
        print_sample(sample, out)
    return out.print(legend())


def choose(there: Sequence[Sample], step: int | None, worst: Worst | None) -> list[Sample]:
    """Those to show, in order.

    Raises:
        InvalidField: there is none of `step`.
    """
    steps = sorted({sample.step for sample in there})
    if step is not None and step not in steps:
        valid = f"one of {', '.join(map(str, steps))}" if steps else "nothing yet: no samples"
        raise InvalidField("--step", step, valid)
    if step is None and worst is None and steps:
        step = steps[-1]
    chosen = [sample for sample in there if step is None or sample.step == step]
    return sorted(chosen, key=ORDERS[worst]) if worst else chosen


def print_sample(sample: Sample, console: Console) -> None:
    """Prints one sample."""
    head = f"step {sample.step} slot {sample.slot} sample {sample.sample}"
    console.print(Text.assemble((head, "bold"), f"  {describe_numbers(sample)}"), soft_wrap=True)
    console.print(Text(sample.prompt, style="dim"), soft_wrap=True)
    console.print(coloured(sample), soft_wrap=True)
    console.print()


def coloured(sample: Sample) -> Text:
    """The response, its tokens coloured by gap; underlined where experts differed."""
    text = Text()
    differing = sample.experts_differ or [0] * len(sample.tokens)
    for token, gap, layers in zip(sample.tokens, gaps_of(sample), differing, strict=True):
        text.append(token, f"{gap_style(gap)} {DIFFERS if layers else ''}".strip())
    rest = sample.response.removeprefix(text.plain)
    if rest != sample.response or not sample.tokens:
        text.append(rest, "dim")  # beyond the tokens that are kept
    return text


def gap_style(gap: float | None) -> str:
    """Blue: the trainer finds the token likelier than the engine did; red: less likely.

    Example:
        gap_style(0.005) == "", gap_style(-0.5) == "dark_orange"
    """
    for limit, above, below in zip(LIMITS, LIKELIER, UNLIKELIER, strict=True):
        if gap is not None and abs(gap) >= limit:
            return above if gap > 0 else below
    return ""


def legend() -> Text:
    """What colours and lines mean."""
    text = Text("gap = log pi_old - log mu_old, nats:", style="dim")
    for limit, above, below in reversed(list(zip(LIMITS, LIKELIER, UNLIKELIER, strict=True))):
        text.append(f" -{limit:g}", below).append(f" +{limit:g}", above)
    return text.append("; ").append("experts differ", DIFFERS)


def _share_differing(sample: Sample) -> float:
    differing = sample.experts_differ or []
    return sum(layers > 0 for layers in differing) / max(1, len(differing))
