"""Writes docs/metrics.md from keel.metrics. `--check` fails if the committed page differs."""

from __future__ import annotations

import sys
from pathlib import Path

from keel.metrics import COLUMNS, FAMILIES

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"

HEAD = """# Metrics

A row for each optimizer step: `GET /v1/jobs/ID/metrics?after=STEP`, `runs/demo/metrics.jsonl`.
mu_old is the engine that sampled, pi_old the trainer at the lap's first weights, pi_theta the
trainer now. Means are over the response tokens of valid sequences unless said otherwise. A value
that is not finite is null.

*Generated from `keel.metrics` by `scripts/metrics_page.py`; do not edit.*

| column | meaning |
| --- | --- |
"""


def page() -> str:
    """The whole page."""
    columns = COLUMNS | {f"{family}...": meaning for family, meaning in FAMILIES.items()}
    rows = (
        f"| `{name}` | {meaning.replace('|', chr(92) + '|')} |" for name, meaning in columns.items()
    )
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        if PAGE.read_text(encoding="utf-8") != page():
            sys.exit("docs/metrics.md is not what keel.metrics says: run make docs")
    else:
        PAGE.write_text(page(), encoding="utf-8")
