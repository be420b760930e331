"""What the metric rows of a run come to: pure functions, for the watch, the report and `keel run`.

Rows may lack columns, hold nulls, or not exist at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from keel.metrics import Row

TRAINER_TIMES = (
    *("time/wait_s", "time/score_s", "time/update_s", "time/publish_s", "time/checkpoint_s"),
)
"""Columns that add up to a step's time. Generation goes on beside them, and shows as waiting."""


@dataclass(frozen=True, slots=True)
class Summary:
    """A run in some numbers. None: no row has what it takes."""

    steps: int
    """Rows of optimizer steps."""
    reward_first: float | None
    """Mean of reward/mean over the first tenth of the steps."""
    reward_last: float | None
    accuracy_first: float | None
    """First evaluation."""
    accuracy_last: float | None
    rows_requested: int
    """(token, layer) pairs whose experts were prescribed, all steps together."""
    rows_obeyed: int
    disobeyed_steps: tuple[int, ...]
    """Steps where the two differ."""
    tokens_per_s: float | None
    """Response tokens a second of training, generation included."""

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Summary:
        """The summary of rows in ascending order of steps."""
        trained = trained_rows(rows)
        accuracies = column(rows, "accuracy/eval")
        return cls(
            steps=len(trained),
            reward_first=mean(column(first_tenth(trained), "reward/mean")),
            reward_last=mean(column(last_tenth(trained), "reward/mean")),
            accuracy_first=accuracies[0] if accuracies else None,
            accuracy_last=accuracies[-1] if accuracies else None,
            rows_requested=int(sum(column(trained, "replay/rows_requested"))),
            rows_obeyed=int(sum(column(trained, "replay/rows_obeyed"))),
            disobeyed_steps=tuple(
                int(row["step"])
                for row in trained
                if row.get("replay/rows_requested") != row.get("replay/rows_obeyed")
            ),
            tokens_per_s=tokens_per_s(trained),
        )

    @property
    def replay(self) -> str:
        """One sentence on whether the prescribed experts were the ones that computed."""
        if not self.steps:
            return "No step yet."
        if not self.rows_requested and not self.disobeyed_steps:
            return "No replay was asked for."
        pairs = f"{self.rows_obeyed:,} of {self.rows_requested:,} (token, layer) pairs"
        if not self.disobeyed_steps:
            return (
                f"Replay was obeyed in every step: {pairs} ran on exactly the prescribed experts."
            )
        first = self.disobeyed_steps[0]
        return (
            f"Replay was NOT obeyed in {len(self.disobeyed_steps)} of {self.steps} steps, first in "
            f"step {first}: {pairs} ran on the prescribed experts."
        )

    @property
    def obeyed(self) -> bool:
        """No step went another way than prescribed."""
        return not self.disobeyed_steps


def trained_rows(rows: Iterable[Row]) -> list[Row]:
    """Rows of optimizer steps: not those that hold an evaluation alone."""
    return [row for row in rows if "lap" in row]


def column(rows: Iterable[Row], name: str) -> list[float]:
    """The values of a column, where there are any."""
    return [row[name] for row in rows if row.get(name) is not None]


def mean(values: Sequence[float]) -> float | None:
    """Their mean; None if there are none."""
    return sum(values) / len(values) if values else None


def first_tenth(rows: Sequence[Row]) -> Sequence[Row]:
    """The first tenth, at least one."""
    return rows[: max(1, len(rows) // 10)]


def last_tenth(rows: Sequence[Row]) -> Sequence[Row]:
    """The last tenth, at least one."""
    return rows[-max(1, len(rows) // 10) :]


def step_s(row: Row) -> float:
    """Seconds that the trainer spent on a step, waiting included."""
    return sum(row.get(name) or 0.0 for name in TRAINER_TIMES)


def tokens_per_s(rows: Sequence[Row]) -> float | None:
    """Response tokens a second over these steps."""
    seconds = sum(map(step_s, rows))
    return sum(column(rows, "tokens/response")) / seconds if seconds else None


def lap_maximum(rows: Sequence[Row], name: str) -> list[float | None]:
    """For each row the largest value of its lap: in-step staleness, if the column is staleness's.

    Example:
        laps 0 0 1 1, values 0 .1 0 .3 -> .1 .1 .3 .3
    """
    largest: dict[object, float] = {}
    for row in rows:
        value, lap = row.get(name), row.get("lap")
        if value is not None:
            largest[lap] = max(value, largest.get(lap, value))
    return [largest.get(row.get("lap")) for row in rows]


def duration(seconds: float) -> str:
    """A time for people: 45 s, 3 min 20 s, 2 h 05 min."""
    whole = max(0, round(seconds))  # clocks of two machines differ
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


@dataclass(frozen=True, slots=True)
class KeyNumber:
    """One of the numbers by which runs are compared."""

    name: str
    value: float | None
    form: str
    """How it is written, as of `format`."""


def key_numbers(rows: Sequence[Row], held_out: Iterable[str] = ()) -> list[KeyNumber]:
    """The same numbers for every run, in the same order; of rows in ascending order of steps.

    `held_out`: columns `eval/...` to give the last value of.
    """
    trained = trained_rows(rows)
    found = Summary.of(rows)
    accuracies = column(rows, "accuracy/eval")
    seconds = [taken for row in trained if (taken := step_s(row))]
    masked = [c for name in ("clip/high", "clip/low") if (c := mean(column(trained, name)))]

    def over_all(name: str) -> float | None:
        return mean(column(trained, name))

    def at_end(name: str) -> float | None:
        return mean(column(last_tenth(trained), name))

    def last(name: str) -> float | None:
        return next(reversed(column(rows, name)), None)

    in_step = [value for value in lap_maximum(trained, "staleness/k3") if value is not None]
    return [
        KeyNumber("reward, first tenth", found.reward_first, ".3f"),
        KeyNumber("reward, last tenth", found.reward_last, ".3f"),
        KeyNumber("reward, all steps", over_all("reward/mean"), ".3f"),
        KeyNumber("held-out accuracy, first", found.accuracy_first, ".3f"),
        KeyNumber("held-out accuracy, last", found.accuracy_last, ".3f"),
        KeyNumber("held-out accuracy, best", max(accuracies, default=None), ".3f"),
        *(KeyNumber(f"{name}, last", last(name), ".3f") for name in held_out),
        KeyNumber("entropy, last tenth", at_end("entropy"), ".3f"),
        KeyNumber("mismatch/k1, mean", over_all("mismatch/k1"), ".2e"),
        KeyNumber("mismatch/k3, mean", over_all("mismatch/k3"), ".2e"),
        KeyNumber("staleness/k3, mean of lap maxima", mean(in_step), ".2e"),
        KeyNumber(
            "clipped tokens, mean", sum(masked) if column(trained, "clip/high") else None, ".2%"
        ),
        KeyNumber("effective sample size, mean", over_all("is/ess"), ".1%"),
        KeyNumber("routes that differ, mean", over_all("routing/pair_disagree"), ".2%"),
        KeyNumber("gradient norm, largest", max(column(trained, "grad_norm"), default=None), ".3g"),
        KeyNumber("response length, last tenth", at_end("response/length_mean"), ".1f"),
        KeyNumber("response tokens a second", found.tokens_per_s, ",.0f"),
        KeyNumber("seconds a step", mean(seconds), ".3g"),
    ]
