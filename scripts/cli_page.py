"""Writes docs/cli.md from the commands. `--check` fails if the committed page differs."""

from __future__ import annotations

import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import typer
from typer.cli import get_docs_for_click
from typer.main import get_command

from keel_gateway import cli_group
from keel_gateway.cli import app
from keel_gateway.cli_group import EXIT_STATUSES, GROUP

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "cli.md"

HEAD = """# The command `keel`

*Generated from the commands themselves by `scripts/cli_page.py`; do not edit.*

## In scripts

`--json` makes a command write JSON to stdout and nothing else there: the bodies of the REST
interface where it reads one (`keel jobs --json | jq -r '.jobs[].id'`), a line for each change
where it watches. An error is then one JSON object, the last line on stderr: a problem (RFC 9457)
with `exit_status`, and `errors` for each faulty field. Colours end where stdout is no terminal,
and with `NO_COLOR`.

| exit status | meaning |
| --- | --- |
{statuses}

```bash
job=$(keel submit job.toml --json | jq -r .id)
keel watch "$job" --json > events.jsonl || echo "ended with $?"
```

## Completion

`keel --install-completion` makes the shell complete commands, flags and, by asking the gateway
for at most half a second, the ids of jobs. `keel --show-completion` prints what it would install.

"""


def declared() -> list[EntryPoint]:
    """Commands that the distributions of this checkout add, installed anew or not."""
    found = []
    for path in sorted(ROOT.glob("services/*/pyproject.toml")):
        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        for name, value in project.get("entry-points", {}).get(GROUP, {}).items():
            found.append(EntryPoint(name, value, GROUP))
    return found


def page() -> str:
    """The whole page."""
    cli_group.added = declared
    command = get_command(app)
    body = get_docs_for_click(obj=command, ctx=typer.Context(command), name="keel", indent=1)
    rows = (f"| {status} | {meaning} |" for status, meaning in EXIT_STATUSES.items())
    lines = [line.rstrip() for line in body.strip().splitlines()]
    return HEAD.format(statuses="\n".join(rows)) + "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        if PAGE.read_text(encoding="utf-8") != page():
            sys.exit("docs/cli.md is not what the commands say: run make docs")
    else:
        PAGE.write_text(page(), encoding="utf-8")
