"""Jobs over REST for tests of the whole stack."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx

FINAL = {"SUCCEEDED", "FAILED", "CANCELLED"}


class Jobs:
    """Jobs over REST, as anybody would use them."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=30, trust_env=False)

    def submit(self, spec: dict[str, Any]) -> str:
        reply = self.http.post("/v1/jobs", json=spec)
        assert reply.status_code == 201, reply.text
        return reply.json()["id"]

    def named(self, name: str) -> list[str]:
        """Ids of the jobs of this name."""
        jobs = self.http.get("/v1/jobs").raise_for_status().json()["jobs"]
        return [job["id"] for job in jobs if job["name"] == name]

    def get(self, job: str) -> dict[str, Any]:
        return self.http.get(f"/v1/jobs/{job}").raise_for_status().json()

    def rows(self, job: str) -> list[dict[str, Any]]:
        return self.http.get(f"/v1/jobs/{job}/metrics").raise_for_status().json()["rows"]

    def wait_up(self, timeout_s: float = 60) -> None:
        """Returns once the gateway, which somebody has killed, answers again."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                self.http.get("/healthz").raise_for_status()
                return
            except httpx.HTTPError:
                assert time.monotonic() < deadline, "the gateway does not come back"
                time.sleep(0.1)

    def wait(self, job: str, *, step: int | None = None, timeout_s: float = 180) -> dict[str, Any]:
        """The job once it is over, or has done `step` optimizer steps."""
        deadline = time.monotonic() + timeout_s
        while True:
            state = self.get(job)
            if state["phase"] in FINAL or (step is not None and state["step"] >= step):
                return state
            assert time.monotonic() < deadline, f"{job} is still {state['phase']}: {state}"
            time.sleep(0.1)

    def run(self, spec: dict[str, Any], *, timeout_s: float = 600) -> dict[str, Any]:
        """Submits and waits for success."""
        state = self.wait(self.submit(spec), timeout_s=timeout_s)
        assert state["phase"] == "SUCCEEDED", state["error"]
        return state


def job_spec(**sections: Any) -> dict[str, Any]:
    """A job of some seconds: 12 supervised steps, 3 laps of N = 4, R3, fp8 engine."""
    spec: dict[str, Any] = {
        "name": "small",
        "seed": 3,
        "model": {"path": "preset:tiny-qwen3-moe"},
        "task": {"difficulty": 2},
        "cold_start": {"steps": 12, "batch_size": 16, "learning_rate": 1e-4},
        "engine": {"quantize": "fp8"},
        "rollout": {"group_size": 8, "max_tokens": 16},
        "recipe": {
            "replay": "R3",
            "off_policiness": 4,
            "groups_per_minibatch": 4,
            "steps": 12,
            "learning_rate": 5e-4,
        },
        "evaluation": {"every": 4, "samples": 16},
        "checkpoint": {"every": 4},
    }
    for name, section in sections.items():
        spec[name] = spec[name] | section if isinstance(spec.get(name), dict) else section
    return spec


def model_bytes(state: dict[str, Any]) -> bytes:
    """The final weights of a job, as they lie on disk."""
    return (Path(state["model"]) / "model.safetensors").read_bytes()


def taught_model(jobs: Jobs, engine: dict[str, Any] | None = None) -> dict[str, Any]:
    """[model] of a model that gets some problems right: without rewards nothing is updated."""
    state = jobs.run(
        job_spec(
            cold_start={"steps": 400, "batch_size": 32, "learning_rate": 3e-3},
            recipe={"steps": 4},
            evaluation={"every": 0},
            engine=engine or {},
        )
    )
    return {"path": state["model"]}
