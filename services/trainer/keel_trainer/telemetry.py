"""What the trainer tells Prometheus: read from Redis when asked, of the runs in training.

Runs are trained in processes of their own, which write all that is worth knowing into the run
record and the metric rows: the service needs no second way to them. A run that is over is gone
here too, so that the number of series stays that of the runs in training.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping

import redis
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from keel.errors import KeelError
from keel.metrics import row_field
from keel.queue import metrics_key, run_key
from keel.record import RunRecord

log = logging.getLogger(__name__)


class TrainingCollector(Collector):
    """The runs in training, as gauges. While Redis is away only `keel_trainer_runs` is told.

    Args:
        client: of its own, since it is asked from the thread that serves metrics.
        running: ids of the runs that have a process now.
    """

    def __init__(self, client: redis.Redis, running: Callable[[], Iterable[str]]) -> None:
        self._redis, self._running = client, running

    def describe(self) -> Iterator[Metric]:
        """Nothing: registering would ask Redis otherwise."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """See `Collector`."""
        runs = sorted(self._running())
        yield GaugeMetricFamily("keel_trainer_runs", "Runs in training here", value=len(runs))
        step = _by_run("keel_trainer_step", "Optimizer steps done")
        cold = _by_run("keel_trainer_cold_start_step", "Supervised steps done")
        version = _by_run("keel_trainer_policy_version", "Newest version published; -1: none")
        metric = GaugeMetricFamily(
            "keel_trainer_metric",
            "The newest metric row: a column of docs/metrics.md",
            labels=["run", "metric"],
        )
        try:
            for run in runs:
                raw: Mapping[bytes, bytes] = self._redis.hgetall(run_key(run))  # type: ignore[assignment]
                if not raw:
                    continue
                record = RunRecord.from_hash(run, raw)
                if record.phase.final:  # its process is about to end
                    continue
                newest = -1 if record.policy_version is None else record.policy_version
                step.add_metric([run], record.step)
                cold.add_metric([run], record.cold_start_step)
                version.add_metric([run], newest)
                row = self._redis.hget(metrics_key(run), row_field(record.attempt, record.step))
                for name, value in json.loads(row or "{}").items():
                    if value is not None:
                        metric.add_metric([run, name], value)
        except (redis.RedisError, KeelError) as error:
            log.warning("metrics of the runs cannot be read: %s", error)
            return
        yield from (step, cold, version, metric)


def _by_run(name: str, says: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, says, labels=["run"])
