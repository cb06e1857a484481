"""Numbers for Prometheus: the engine's, read when they are asked for, and what requests went through."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from elf_rt.model import Timings
from elf_rt.sampling.program import Stats

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
RATIOS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


class Metrics(Collector):
    """stats: of the model."""

    def __init__(self, stats: Callable[[], Stats]) -> None:
        self._stats, self.registry = stats, CollectorRegistry()
        self.registry.register(self)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"elf_rt_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"elf_rt_{name}", text, buckets=buckets, registry=self.registry)

        self.requests = counter("http_requests", "Answers by status code.", "status")
        self.finished = counter("texts_finished", "Written texts by finish_reason.", "reason")
        self.rejected = counter("texts_rejected", "Texts refused at the door, by code.", "code")
        self.left = counter("texts_abandoned", "Texts cancelled because their client left.")
        self.late = counter("texts_late", "Texts dropped because their deadline passed.")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self.completion_tokens = counter("completion_tokens", "Tokens of written texts.")
        self.queue = histogram("queue_seconds", "From acceptance to the first network call.", SECONDS)
        self.total = histogram("text_seconds", "From acceptance to the written text.", SECONDS)
        self.error = histogram("prediction_error_ratio", "|predicted - actual| / actual seconds of a text.", RATIOS)

    def written(self, reason: str, timings: Timings, tokens: int, predicted_ms: float | None) -> None:
        self.finished.labels(reason).inc()
        self.completion_tokens.inc(tokens)
        self.queue.observe(timings.waited_ms / 1e3)
        self.total.observe(timings.total_ms / 1e3)
        if predicted_ms is not None:
            self.error.observe(abs(predicted_ms - timings.total_ms) / timings.total_ms)

    def collect(self) -> Iterator[Metric]:
        """``Model.stats`` as metrics."""
        stats = self._stats()
        gauges = {
            "texts_running": ("Texts in flight.", stats.slots),
            "texts_waiting": ("Accepted texts that are not in flight yet.", stats.waiting),
            "call_rows": ("Rows of the last network call.", stats.rows),
            "call_rows_max": ("Rows that a network call should hold.", stats.max_rows),
            "engine_bytes": ("Bytes of slots and bound graphs.", stats.bytes),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"elf_rt_{name}", text, value)
        call = GaugeMetricFamily("elf_rt_call_milliseconds", "Usual time of a network call by rows.", labels=["rows"])
        for rows, ms in stats.call_ms.items():
            call.add_metric([str(rows)], ms)
        yield call
        counters = {
            "calls": ("Network calls.", stats.calls),
            "steps": ("Steps of all texts.", stats.steps),
            "graph_captures": ("CUDA graphs captured.", stats.captures),
            "texts_cancelled": ("Texts cancelled before their end.", stats.cancelled),
            "texts_failed": ("Texts that the engine could not write.", stats.failed),
        }
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"elf_rt_{name}", text, value)
