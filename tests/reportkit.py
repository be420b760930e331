"""A job, synthetic rows, and pages taken apart, for the tests of reports and comparisons."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any

from keel.metrics import COLUMNS
from keel.spec import parse_spec
from keel_gateway.report import build_report
from keel_gateway.run_folder import RunData

SPEC = parse_spec(
    {
        "name": "first",
        "model": {"path": "preset:tiny-qwen3-moe"},
        "recipe": {"steps": 40, "off_policiness": 4, "is_cap": None},
    }
)
JOB: dict[str, Any] = {
    "id": "first-abcdef",
    "name": "first",
    "phase": "SUCCEEDED",
    "spec": SPEC.model_dump(mode="json"),
    "created_at": "2026-11-20T11:00:00Z",
    "started_at": "2026-11-20T11:00:05Z",
    "finished_at": "2026-11-20T11:03:25Z",
    "step": 40,
    "steps": 40,
    "error": "",
}


def synthetic_rows(steps: int = 40) -> list[dict[str, Any]]:
    """Every column in every row, an evaluation every ten steps, reward from 0 to 1, two layers."""
    rows: list[dict[str, Any]] = [{"step": 0, "accuracy/eval": 0.25}]
    for step in range(1, steps + 1):
        row: dict[str, Any] = dict.fromkeys(COLUMNS, 0.01 + step / 1000)
        row |= {"step": step, "lap": (step - 1) // 4, "policy_version": (step - 1) // 4}
        row |= {"reward/mean": (step - 1) / (steps - 1)}
        row |= {"replay/rows_requested": 100, "replay/rows_obeyed": 100}
        row |= {"routing/layer/1": 0.1, "routing/layer/10": 0.2, "reward/part/format": 0.5}
        row |= {"eval/gsm8k/avg@4": 0.4, "eval/gsm8k/pass@4": 0.6} if step % 10 == 0 else {}
        del row["accuracy/eval"]
        if step % 10 == 0:
            row["accuracy/eval"] = 0.25 + step / 100
        rows.append(row)
    return rows


class Page(HTMLParser):
    """What a browser would see: visible text, attributes that load something, scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.loads, self.scripts = "", [], []
        self.ids: list[str] = []
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action", "poster", "data"):
                self.loads += [] if str(value).startswith("#") else [value]
            if name == "id" and value:
                self.ids.append(value)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data


def report(job: dict[str, Any], rows: list[dict[str, Any]], **more: Any) -> str:
    return build_report(RunData(job, rows), **more)


def figures(html: str) -> list[dict[str, Any]]:
    """Data of the pictures, in order."""
    found = [json.loads(script) for script in Page(html).scripts if script.startswith("{")]
    return [figure for figure in found if "kind" in figure]


def traces(html: str) -> dict[str, dict[str, Any]]:
    """Drawn lines by name."""
    return {t["name"]: t for f in figures(html) if f["kind"] == "lines" for t in f["traces"]}
