"""The trial for people: a table for each stage, as soon as it is over, and a last line."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from keel_rollout.conformance.runner import counts, passed
from keel_rollout.conformance.verdicts import Outcome, Stage, Status

COLOURS = {
    Status.PASS: "green",
    Status.FAIL: "bold red",
    Status.NOT_CLAIMED: "dim",
    Status.NOT_RUN: "yellow",
}


def stage_table(stage: Stage, outcomes: list[Outcome]) -> Table:
    """One stage's rows; a row that has failed says what was seen and what would be valid."""
    table = Table(box=None, show_header=False, title=stage.title, title_justify="left")
    table.title_style = "bold"
    table.add_column(no_wrap=True, min_width=11)
    table.add_column(ratio=1)
    table.add_column(justify="right", no_wrap=True)
    for outcome in outcomes:
        table.add_row(
            f"[{COLOURS[outcome.status]}]{outcome.status}[/]",
            "\n".join(lines(outcome)),
            f"[dim]{outcome.seconds:.1f} s[/]",
        )
    return table


def lines(outcome: Outcome) -> list[str]:
    """The middle column, with markup."""
    found = [f"[bold]{escape(outcome.name)}[/]: {escape(outcome.proves)}"]
    measured = [*map(str, outcome.numbers), *([outcome.note] if outcome.note else [])]
    if measured:
        found.append(f"[dim]{escape('; '.join(measured))}[/]")
    if outcome.status is Status.FAIL:
        found.append(f"[red]seen:     {escape(outcome.seen)}[/]")
        found.append(f"valid:    {escape(outcome.valid)}")
        found.append(f"contract: {escape(outcome.contract)}")
    return found


def last_lines(console: Console, engine: str, outcomes: list[Outcome]) -> None:
    """Counts, and the verdict."""
    told = ", ".join(f"{number} {status}" for status, number in counts(outcomes).items() if number)
    good = passed(outcomes)
    console.print()
    console.print(f"{engine}: {told}", style="bold", markup=False)
    failed = [outcome.name for outcome in outcomes if outcome.status is Status.FAIL]
    if failed:
        console.print(f"It does not keep the contract: {', '.join(failed)}", style="bold red")
    elif good:
        console.print("It keeps the contract in every row that was tried.", style="green")
    else:
        console.print("Nothing was proved.", style="yellow")
