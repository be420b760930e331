"""A run on the terminal: a live panel, or plain lines where nobody can see one (a CI log)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from itertools import pairwise

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from keel.metrics import Row
from keel.record import Phase
from keel_gateway.cli_group import show_json
from keel_gateway.follow import View
from keel_gateway.schemas import Job
from keel_gateway.summary import column, duration, mean, tokens_per_s, trained_rows

POLL_S = 1.0
PLAIN_EVERY_S = 5.0
"""Between two plain lines, unless the phase changes."""
_STYLES = {Phase.SUCCEEDED: "green", Phase.FAILED: "red", Phase.CANCELLED: "yellow"}
_BARS = " ▁▂▃▄▅▆▇█"
_CURVE_CHARACTERS = 40


def watch(views: Iterable[View], console: Console) -> Job:
    """Shows views until the last, and returns its job."""
    return _live(views, console) if console.is_terminal else _plain(views, console)


def write_events(views: Iterable[View]) -> Job:
    """Writes every change as a line of JSON to stdout until the last view; returns its job."""
    state: tuple[object, ...] | None = None
    told: dict[int, Row] = {}
    lost = ""
    for view in views:
        job = view.job
        if view.lost and view.lost != lost:
            show_json({"event": "lost", "detail": view.lost})
        lost = view.lost
        for row in view.rows:
            if told.get(row["step"]) != row:
                told[row["step"]] = dict(row)  # a view's rows grow in place
                show_json({"event": "row", "row": row})
        now = (job.phase, job.desired, job.paused, job.reason, job.error, job.dead_letters)
        if now != state:
            state = now
            show_json({"event": "job", "job": job.model_dump(mode="json")})
    return job


def _live(views: Iterable[View], console: Console) -> Job:
    with Live(console=console, refresh_per_second=4) as live:
        for view in views:
            live.update(panel(view))
    return view.job


def _plain(views: Iterable[View], console: Console) -> Job:
    told: tuple[object, ...] | None = None
    told_s = 0.0
    for view in views:
        state = (
            view.job.phase,
            view.job.desired,
            view.job.reason,
            view.lost,
            view.job.dead_letters,
        )
        if state != told or time.monotonic() - told_s >= PLAIN_EVERY_S:
            console.print(line(view), soft_wrap=True, markup=False, highlight=False)
            told, told_s = state, time.monotonic()
    return view.job


def line(view: View) -> str:
    """The view in one line.

    Example:
        "11:58:02 TRAINING 120/320  1 min 40 s left  reward 0.312  accuracy 0.35  mismatch k3 ..."
    """
    parts = [f"{time.strftime('%H:%M:%S')} {view.job.phase}{_steps(view)}", *_notes(view)]
    if view.left_s is not None:
        parts.append(f"{duration(view.left_s)} left")
    if not view.lost and view.job.phase not in (Phase.QUEUED, Phase.PREPARING):
        parts += [f"{name} {value}" for name, value in numbers(view.rows, view.recent)]
    return "  ".join(parts)


def panel(view: View) -> RenderableType:
    """The view as a panel: where it stands, how far it is, its numbers."""
    job, (done, steps) = view.job, view.progress
    style = _STYLES.get(job.phase, "cyan")
    head = Text.assemble((str(job.phase), f"bold {style}"), f"{_steps(view)}")
    if view.left_s is not None:
        head.append(f"  {duration(view.left_s)} left")
    parts: list[RenderableType] = [head, ProgressBar(total=max(1, steps), completed=done)]
    parts += [Text(note, style="yellow") for note in _notes(view)]
    if found := numbers(view.rows, view.recent):
        parts += ["", _grid(found)]
    rewards = column(trained_rows(view.rows), "reward/mean")
    if len(rewards) > 1:
        parts += ["", Text.assemble(("reward  ", "dim"), (curve(rewards), "cyan"))]
    return Panel(Group(*parts), title=escape(job.id), title_align="left", border_style=style)


def numbers(rows: Sequence[Row], recent: Sequence[Row]) -> list[tuple[str, str]]:
    """Name and value of what a watcher wants to know; what no row has is left out.

    Values are means over `recent`, the last steps; accuracy is the newest evaluation.
    """
    found: list[tuple[str, str]] = []

    def add(name: str, text: str, *values: float | None) -> None:
        if None not in values:
            found.append((name, text.format(*values)))

    def of(name: str) -> float | None:
        return mean(column(recent, name))

    accuracies = column(rows, "accuracy/eval")
    add("reward", "{:.3f}", of("reward/mean"))
    add("accuracy", "{:.3f}", accuracies[-1] if accuracies else None)
    for factor in ("mismatch", "staleness"):
        add(f"{factor} k3", "{:.2e}", of(f"{factor}/k3"))
    add("clip high/low", "{:.2%}/{:.2%}", of("clip/high"), of("clip/low"))
    add("routes differ", "{:.1%}", of("routing/pair_disagree"))
    requested = sum(column(recent, "replay/rows_requested"))
    if requested:
        obeyed = sum(column(recent, "replay/rows_obeyed"))
        text = "{:.0%}" if obeyed == requested else "ONLY {:.4%}"
        add("replay obeyed", text, obeyed / requested)
    add("entropy", "{:.3f}", of("entropy"))
    add("tokens/s", "{:,.0f}", tokens_per_s(recent))
    return found


def curve(values: Sequence[float]) -> str:
    """Values as a row of bars, means of equal parts, scaled to their range."""
    parts = min(_CURVE_CHARACTERS, len(values))
    cuts = [round(i * len(values) / parts) for i in range(parts + 1)]
    means = [sum(values[begin:end]) / (end - begin) for begin, end in pairwise(cuts)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 2) / (high - low) if high > low else 0.0
    bars = "".join(_BARS[1 + round((value - low) * scale)] for value in means)
    return f"{bars}  {low:.2f} to {high:.2f}"


def _steps(view: View) -> str:
    done, steps = view.progress
    if view.job.phase in (Phase.QUEUED, Phase.PREPARING):
        return ""
    unit = "supervised step" if view.job.phase is Phase.COLD_START else "step"
    return f" {unit} {done}/{steps}"


def _notes(view: View) -> list[str]:
    job = view.job
    cancelling = job.desired == "CANCELLED" and not job.phase.final
    notes = ["it was cancelled and is stopping" if cancelling else "", job.reason, view.lost]
    return [note for note in [*notes, job.error, dead_letters_note(job)] if note]


def dead_letters_note(job: Job) -> str:
    """What to tell of a job whose trainer gave up groups; empty if it did not."""
    if not job.dead_letters:
        return ""
    letters = "1 dead letter" if job.dead_letters == 1 else f"{job.dead_letters} dead letters"
    return f"{letters}: keel dead-letters {job.id}"


def _grid(found: Sequence[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 3, 0, 0))
    for begin in range(0, len(found), 3):
        grid.add_row(
            *(
                Text.assemble((f"{name} ", "dim"), (value, "bold"))
                for name, value in found[begin : begin + 3]
            )
        )
    return grid
