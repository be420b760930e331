"""Which pictures a report has, in which order. What a run did not measure has none."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keel.metrics import Row
from keel_gateway.charts import Card, Chart, Line
from keel_gateway.heat_map import HeatMap
from keel_gateway.summary import TRAINER_TIMES

ACCURACY = "accuracy/eval"
"""A run's one number of held-out prompts; runs of several sets have a score for each too."""
Runs = Sequence[tuple[str, Sequence[Row]]]
"""(name, rows) of several runs."""


@dataclass(frozen=True, slots=True)
class Section:
    """Pictures under one heading."""

    title: str
    says: str
    pictures: Sequence[Chart | HeatMap]


@dataclass(frozen=True, slots=True)
class Shown:
    """A section as a page shows it."""

    id: str
    title: str
    says: str
    cards: Sequence[Card]
    heads: Sequence[str] = ()
    """Of a table below the pictures; empty: it has none."""
    lines: Sequence[Mapping[str, Any]] = ()
    """Its lines: name, meaning, cells."""


def of_run(rows: Sequence[Row]) -> list[Shown]:
    """What a run's rows can show; the paper's panels come first, if there are any of them."""
    names = columns(rows)
    if any(map(_is_score, names)):  # accuracy/eval is the first set's score then
        names = [name for name in names if name != ACCURACY]
    return _shown(names, lambda picture: picture.cards(rows))


def of_runs(runs: Runs) -> list[Shown]:
    """The same of several runs: a colour a run, a picture a column."""
    names = columns([row for _, rows in runs for row in rows])
    return _shown(names, lambda picture: picture.overlays(runs))


def columns(rows: Sequence[Row]) -> list[str]:
    """Every column that some row has, by name."""
    return sorted({name for row in rows for name in row})


def _shown(names: Collection[str], cards: Callable[[Chart | HeatMap], list[Card]]) -> list[Shown]:
    every = {
        "paper": _paper(names),
        "gaps": _GAPS,
        "routing": _ROUTING,
        "weights": _WEIGHTS,
        "responses": _responses(names),
        "time": _TIME,
    }
    shown = [
        Shown(id_, part.title, part.says, [card for one in part.pictures for card in cards(one)])
        for id_, part in every.items()
    ]
    return [part for part in shown if part.cards]


def _paper(names: Collection[str]) -> Section:
    """The four panels that each figure of the paper has."""
    scores = [name for name in names if name == ACCURACY or _is_score(name)]
    return Section(
        "The paper's four panels",
        "As the figures of arXiv 2512.01374 show a run.",
        (
            Chart(
                "Benchmark score",
                "On prompts never trained on: accuracy, or the mean over a set's samples (avg@k).",
                _points(scores),
                share=True,
            ),
            Chart(
                "Training reward",
                "Mean of each mini-batch's responses.",
                (Line("reward/mean", 0),),
                smoothed=True,
            ),
            Chart(
                "Entropy",
                "Of the policy over the full vocabulary, on sampled tokens.",
                (Line("entropy", 0),),
                unit="nats",
                smoothed=True,
            ),
            Chart(
                "KL[mu_old || pi_old]",
                "Engine against trainer (k1). A sample mean: it may be negative.",
                (Line("mismatch/k1", 0),),
                unit="nats",
                smoothed=True,
            ),
        ),
    )


def _responses(names: Collection[str]) -> Section:
    parts = [name for name in names if name.startswith("reward/part/")]
    sets = [name for name in names if name.startswith("eval/")]
    return Section(
        "Rewards, held-out sets, responses",
        "",
        (
            Chart(
                "Parts of the reward",
                "Means over valid responses, before weighting.",
                [Line(name, number) for number, name in enumerate(parts)],
                smoothed=True,
            ),
            Chart(
                "Held-out sets",
                "avg@k: mean of k samples a prompt; pass@k: share of prompts with a right one.",
                _points(sets),
                share=True,
            ),
            Chart(
                "Response length",
                "All responses.",
                (Line("response/length_mean", 0),),
                unit="tokens",
                smoothed=True,
            ),
            Chart(
                "Responses and groups without signal",
                "Truncated responses, and groups whose advantages are all zero.",
                (Line("response/truncated", 0), Line("groups/zero_advantage", 1)),
                share=True,
                smoothed=True,
            ),
        ),
    )


def _is_score(name: str) -> bool:
    return name.startswith("eval/") and "/avg@" in name


def _points(names: Sequence[str]) -> list[Line]:
    return [Line(name, number, points=True) for number, name in enumerate(names)]


def _staleness(kind: str) -> tuple[Line, Line]:
    return (
        Line(f"staleness/{kind}", 1, faint=True),
        Line(f"staleness/{kind}", 1, made_of="lap maximum"),
    )


_GAPS = Section(
    "The two gaps",
    "Train-inference discrepancy (mismatch: engine against trainer) and staleness (the trainer's "
    "old policy against the present one): the two factors of the importance ratio.",
    (
        Chart(
            "Both factors, k3",
            "Never negative. Lower is nearer to the first-order approximation that the objective "
            "rests on.",
            (Line("mismatch/k3", 0), *_staleness("k3")),
            log=True,
            unit="nats",
        ),
        Chart(
            "Both factors, k1",
            "Signed means; over the same tokens they add up to the whole ratio's.",
            (Line("mismatch/k1", 0), *_staleness("k1")),
            unit="nats",
        ),
        Chart(
            "Log-prob gap between engine and trainer",
            "Absolute differences on sampled tokens.",
            (Line("mismatch/logprob_abs_mean", 0), Line("mismatch/logprob_abs_max", 1)),
            log=True,
            smoothed=True,
            unit="nats",
        ),
    ),
)
_ROUTING = Section(
    "Routing",
    "Where the trainer's router, left alone, chooses other experts than the engine did.",
    (
        Chart(
            "Routing disagreement",
            "Under R3 later layers see the replayed layers below them.",
            (
                Line("routing/pair_disagree", 0),
                Line("routing/token_disagree", 1),
                Line("routing/overlap", 2, made_of="complement", dotted=True),
            ),
            share=True,
            smoothed=True,
        ),
        HeatMap(
            "Routing disagreement by layer",
            "Share of tokens with other experts, each MoE layer by its number in the model.",
            "routing/layer/",
        ),
    ),
)
_WEIGHTS = Section(
    "Clipping and importance weights",
    "",
    (
        Chart(
            "Clip fraction",
            "Tokens that the mask takes out of the gradient, by the sign of their advantage.",
            (Line("clip/high", 0), Line("clip/low", 1)),
            share=True,
            smoothed=True,
        ),
        Chart(
            "Effective sample size",
            "How much of the batch still counts under its weights, and the tails.",
            (Line("is/ess", 0), Line("is/truncated", 1), Line("mismatch/f2", 2)),
            share=True,
            smoothed=True,
        ),
        Chart(
            "Largest weights and ratios",
            "The tails: the weight before truncation, and the trainer's own ratio.",
            (Line("is/max", 0), Line("staleness/ratio_max", 1), Line("is/mean", 2, dotted=True)),
            log=True,
        ),
        Chart("Gradient norm", "Before clipping.", (Line("grad_norm", 0),), smoothed=True),
    ),
)
_TIME = Section(
    "Time",
    "",
    (
        Chart(
            "Where a step's time went",
            "The trainer's time, stacked. Generation goes on beside it and shows as waiting.",
            (
                *(Line(name, colour, stacked=True) for colour, name in enumerate(TRAINER_TIMES)),
                Line("time/generate_s", 4, dotted=True),
            ),
            unit="seconds",
        ),
    ),
)
