"""Prometheus's text format as numbers."""

from __future__ import annotations

from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

Samples = dict[tuple[str, tuple[str, ...]], float]


def samples(text: str) -> Samples:
    """Values by (name, label values in the order of label names).

    Example:
        samples('keel_jobs{phase="QUEUED"} 1.0') == {("keel_jobs", ("QUEUED",)): 1.0}
    """
    return {
        (sample.name, tuple(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scrape(url: str) -> Samples:
    """The samples at a URL now."""
    answer: Any = httpx.get(url, trust_env=False, timeout=10).raise_for_status()
    return samples(answer.text)
