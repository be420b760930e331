"""Every service tells Prometheus of a job, and the numbers are those of its rows."""

from __future__ import annotations

import time

from jobs import FINAL, Jobs, job_spec
from prometheuskit import Samples, scrape

from keel_gateway.stack import Stack


def test_the_numbers_are_those_of_the_rows(stack: Stack, jobs: Jobs) -> None:
    assert stack.metrics.keys() == {"gateway", "engine-0", "trainer", "collector"}
    before = {name: scrape(stack.metrics[name]) for name in ("engine-0", "collector")}
    run = jobs.submit(job_spec(evaluation={"every": 0}))
    seen: dict[str, list[Samples]] = {"gateway": [], "trainer": []}
    deadline = time.monotonic() + 180
    while jobs.get(run)["phase"] not in FINAL:
        assert time.monotonic() < deadline
        for name, found in seen.items():
            found.append(scrape(stack.metrics[name]))
        time.sleep(0.05)
    assert jobs.get(run)["phase"] == "SUCCEEDED"
    rows = {row["step"]: row for row in jobs.rows(run)}

    for name, prefix in (("gateway", "keel_run"), ("trainer", "keel_trainer")):
        steps = set()
        for now in seen[name]:
            columns = {
                key[1][0]: value for key, value in now.items() if key[0] == f"{prefix}_metric"
            }
            if step := int(columns.get("step", 0)):
                steps.add(step)
                # the time of publishing is written once the lap is over
                columns.pop("time/publish_s", None)
                assert columns.items() <= rows[step].items()
                assert columns["mismatch/k3"] > 0
        assert len(steps) >= 2, f"{name}: {steps}"
        assert not [key for key in scrape(stack.metrics[name]) if run in key[1]]

    after = {name: scrape(stack.metrics[name]) for name in before}
    grown = {
        key: after[name][key] - before[name].get(key, 0.0) for name in after for key in after[name]
    }
    assert grown["keel_engine_tokens_total", ()] == sum(r["tokens/response"] for r in rows.values())
    assert grown["keel_engine_groups_total", ("complete",)] == 12 * 4
    assert grown["keel_collector_slots_total", ("group",)] == 12 * 4
    assert grown["keel_collector_slots_total", ("void",)] == 0
    assert grown["keel_collector_verifier_seconds_count", ()] == 12 * 4
    assert grown["keel_engine_update_seconds_count", ()] == 4, "versions 0 to 3"
    assert 0 < grown["keel_engine_update_seconds_sum", ()] < 60
    assert after["engine-0"]["keel_engine_policy_version", ()] == 3
    assert after["engine-0"]["keel_engine_sequences_in_flight", ()] == 0
    assert after["engine-0"]["keel_engine_state", ("ready",)] == 1
    assert scrape(stack.metrics["gateway"])["keel_jobs", ("SUCCEEDED",)] >= 1
