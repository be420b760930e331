"""What the collector tells Prometheus: counted where it happens. All runs together."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Summary

RUNS = Gauge("keel_collector_runs", "Runs that are followed now")
SLOTS = Counter(
    "keel_collector_slots", "Slots added to the groups' streams: a group, or VOID", ["kind"]
)
EVALUATIONS = Counter("keel_collector_evaluations", "Evaluations of a version, done")
VERIFIER_SECONDS = Summary(
    "keel_collector_verifier_seconds", "From a group's responses to its verdicts, waiting included"
)
VERIFIER_FAULTS = Counter(
    "keel_collector_verifier_faults", "Responses that the verifier crashed on or took too long for"
)
INVALID_RESPONSES = Counter(
    "keel_collector_invalid_responses", "Responses with bad log-probs or routes of the engine"
)
ENGINE_RETRIES = Counter(
    "keel_collector_engine_retries", "Cohorts sent again because the engine failed"
)

BYTES_IN_FLIGHT = Gauge(
    "keel_collector_bytes_in_flight", "Bytes of envelopes added and not yet acknowledged"
)
HELD_SECONDS = Counter(
    "keel_collector_held_seconds",
    "Seconds that a run was held back: by its bytes in flight, by Redis' memory, by the blob store",
    ["cause"],
)

for _kind in ("group", "void"):
    SLOTS.labels(_kind)  # there from the start, so that a rate is 0 and not absent
for _cause in ("queue", "redis", "blobs"):
    HELD_SECONDS.labels(_cause)
