"""A small HTTP server that answers `keel` as the gateway does, and what it answers with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from keel.record import RunRecord
from keel.spec import parse_spec
from keel_gateway.schemas import Job

SPEC = {
    "name": "first",
    "model": {"path": "preset:tiny-qwen3-moe"},
    "cold_start": {"steps": 10},
    "recipe": {"steps": 8, "off_policiness": 4},
}
TOML = """
name = "first"
[model]
path = "preset:tiny-qwen3-moe"
[recipe]
steps = 8
off_policiness = 4
"""
ENGINE = {
    "address": "a:1",
    "healthy": False,
    "problem": "does not answer",
    "kind": "torch",
    "state": None,
    "capabilities": None,
    "last_seen_at": None,
    "run": None,
    "run_state": "FREE",
    "proved_version": None,
    "stale": "",
}
"""One as the gateway gives it."""
RECORD = RunRecord("first-abcdef", parse_spec(SPEC), created_s=1_700_000_000.0)


def job(reason: str = "", **changes: Any) -> Job:
    return Job.from_record(replace(RECORD, **changes), reason, {})


def row(step: int, **columns: float) -> dict[str, Any]:
    return {
        "step": step,
        "lap": (step - 1) // 4,
        "reward/mean": step / 10,
        "mismatch/k3": 1e-3,
        "staleness/k3": 2e-4,
        "clip/high": 0.01,
        "clip/low": 0.002,
        "replay/rows_requested": 50,
        "replay/rows_obeyed": 50,
        "tokens/response": 100,
        "time/update_s": 0.5,
        "time/wait_s": 0.5,
    } | columns


def sample(step: int, **changes: Any) -> dict[str, Any]:
    """One as the gateway gives it."""
    return {
        "attempt": 0,
        "step": step,
        "lap": (step - 1) // 4,
        "slot": 0,
        "sample": 0,
        "policy_version": (step - 1) // 4,
        "reward": 1.0,
        "reward_parts": {"format": 0.5},
        "advantage": 0.25,
        "truncated": False,
        "valid": True,
        "invalid_reason": "",
        "prompt": "12*3=",
        "response": "36",
        "tokens": ["3", "6"],
        "rollout_logprobs": [-0.1, -0.2],
        "proximal_logprobs": [-0.15, -0.5],
        "experts_differ": [0, 2],
    } | changes


class Gateway:
    """Answers by (method, path); an answer may be a function of nothing, to change over time."""

    def __init__(self) -> None:
        self.answers: dict[tuple[str, str], Any] = {}
        self.asked: list[tuple[str, str, Any]] = []
        self.url = ""

    def jobs(self, *found: Job) -> None:
        self.answers["GET", "/v1/jobs"] = {"jobs": [j.model_dump(mode="json") for j in found]}
        for one in found:
            self.answers["GET", f"/v1/jobs/{one.id}"] = one.model_dump(mode="json")
            self.answers["GET", f"/v1/jobs/{one.id}/metrics"] = {"rows": [], "evaluation": None}
            self.answers["GET", f"/v1/jobs/{one.id}/samples"] = {"samples": []}

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        bare = path.partition("?")[0]
        self.asked.append((method, path, body))
        found = self.answers.get((method, bare), (404, {"title": "no", "detail": bare}))
        found = found() if callable(found) else found
        return found if isinstance(found, tuple) else (200, found)
