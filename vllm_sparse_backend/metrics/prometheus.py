"""The counters as Prometheus metrics at the server's /metrics.

With one API server, a collector in it reads the workers' files when asked. With several (or
``PROMETHEUS_MULTIPROC_DIR`` set by the user) vLLM exports only ordinary metrics from the
multiprocess directory: there each worker mirrors its counters into such metrics.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from vllm_sparse_backend.config import prometheus_multiprocess
from vllm_sparse_backend.metrics.counters import (
    DENSE_ESTIMATE,
    LAYER_DECISIONS,
    LAYER_TILES,
    LAYER_TOKENS,
    SECONDS,
    TILES,
    Key,
    read_totals,
)

NAMESPACE = "vllm:sparse_prefill_"
METRICS: dict[str, tuple[tuple[str, ...], str]] = {  # name: labels, help
    LAYER_TOKENS: (
        ("path", "reason"),
        "Query tokens times layers, by the path that computed them (sparse; keep_all: by the same "
        "core, every tile kept; dense: by vLLM's own backend) and the reason if not sparse.",
    ),
    LAYER_DECISIONS: (
        ("path", "reason"),
        "Decisions where a request's query tokens of one step go, times layers, by the path that "
        "was taken and the reason if not sparse.",
    ),
    TILES: (
        ("kind",),
        "Key tiles of 16 times query heads of the core's attention: computed, and causal, which "
        "is what dense attention would have computed.",
    ),
    LAYER_TILES: (
        ("layer", "kind"),
        "Key tiles of 16 times query heads of sparse requests, by layer; computed / causal is the "
        "layer's density.",
    ),
    SECONDS: (
        ("phase",),
        "Seconds in the core's attention, summed over threads: selecting tiles, attending to them; "
        "not measured on GPUs.",
    ),
    DENSE_ESTIMATE[0]: (
        (),
        "Thread seconds that vLLM's own CPU attention would have taken for what the core computed, "
        "by the cost model's ratio of rates; not estimated on GPUs.",
    ),
}
INFO = ("info", "What is served sparsely: instruction set, profile and its digest, version; 1.")
INFO_LABELS = ("isa", "profile", "digest", "version")
EXPECTED = ("profile_density", "Density that the profile was calibrated to, by tokens of context.")
EXPECTED_LABELS = ("tokens",)


class Collector:
    """Reads the files of the session's workers at every scrape."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def collect(self) -> Iterable[Metric]:
        """One family per metric. What was never counted is exported as 0."""
        totals = read_totals(self.directory)
        for name, (labels, text) in METRICS.items():
            family = CounterMetricFamily(NAMESPACE + name, text, labels=labels)
            for values, value in totals.of(name):
                family.add_metric(values, value)
            yield family
        name, text = INFO
        info = GaugeMetricFamily(NAMESPACE + name, text, labels=INFO_LABELS)
        for labels_of in totals.infos:
            info.add_metric([labels_of[label] for label in INFO_LABELS], 1)
        yield info
        name, text = EXPECTED
        expected = GaugeMetricFamily(NAMESPACE + name, text, labels=EXPECTED_LABELS)
        for tokens, density in totals.expected.items():
            expected.add_metric([tokens], density)
        yield expected

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not collect."""
        return []


class Mirror:
    """A worker's counters as ordinary metrics, for the multiprocess directory."""

    def __init__(self, info: Mapping[str, str], expected: Mapping[str, float]) -> None:
        self._children: dict[Key, Any] = {}
        _gauge(INFO, INFO_LABELS).labels(**info).set(1)
        for tokens, density in expected.items():
            _gauge(EXPECTED, EXPECTED_LABELS).labels(tokens).set(density)

    def add(self, key: Key, amount: float) -> None:
        """Add to the metric of this key."""
        child = self._children.get(key)
        if child is None:
            name, *labels = key
            metric = _counter(name)
            child = self._children[key] = metric.labels(*labels) if labels else metric
        child.inc(amount)


# A name can be registered once in a process, which may start several engines.
@cache
def _counter(name: str) -> Counter:
    labels, text = METRICS[name]
    return Counter(NAMESPACE + name, text, labels)


@cache
def _gauge(metric: tuple[str, str], labels: tuple[str, ...]) -> Gauge:
    name, text = metric
    return Gauge(NAMESPACE + name, text, labels, multiprocess_mode="max")


_collector: Collector | None = None


def export_from_here(directory: Path) -> None:
    """Have this process's /metrics, should it serve one, export the counters in ``directory``."""
    global _collector  # noqa: PLW0603
    if prometheus_multiprocess():
        return
    if _collector is None:
        _collector = Collector(directory)
        REGISTRY.register(_collector)
    _collector.directory = directory


def mirror_if_needed(info: Mapping[str, str], expected: Mapping[str, float]) -> Mirror | None:
    """The mirror of this worker, where /metrics is put together from many processes."""
    return Mirror(info, expected) if prometheus_multiprocess() else None
