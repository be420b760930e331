"""Writes the table of rows into docs/conformance.md. `--check` fails if it is another."""

from __future__ import annotations

import sys
from pathlib import Path

from keel_rollout.conformance.catalogue import STAGES, SUITE
from keel_rollout.conformance.verdicts import always

PAGE = Path(__file__).parents[1] / "docs" / "conformance.md"
BEGIN, END = "<!-- rows: begin -->", "<!-- rows: end -->"


def table() -> str:
    """Rows by stage; the suite that comes again is told once."""
    lines = ["| row | what it proves | where the contract says so | who claims it |"]
    lines += ["| --- | --- | --- | --- |"]
    again = "`*/`"
    for stage in STAGES:
        rows = [row for row in stage.rows if row not in SUITE or stage.name == "first"]
        for row in rows:
            name = f"`{'*' if row in SUITE else stage.name}/{row.name}`"
            claim = "every engine" if row.claim is always else (row.claim.__doc__ or "").rstrip(".")
            lines.append(f"| {name} | {row.proves} | {row.contract} | {claim} |")
    stages = ", ".join(f"`{s.name}`" for s in STAGES if set(SUITE) <= set(s.rows))
    return "\n".join([*lines, "", f"{again} rows are tried in each of the stages {stages}."])


def page() -> str:
    """The whole page."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        if PAGE.read_text(encoding="utf-8") != page():
            sys.exit("docs/conformance.md is not what the rows say: run make docs")
    else:
        PAGE.write_text(page(), encoding="utf-8")
