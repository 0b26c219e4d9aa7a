"""What a monitoring system reads at /metrics, in the format of Prometheus."""

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Of one server, all its bundles. Each server has a registry of its own, so that several fit in one process."""

    def __init__(self):
        self.registry = CollectorRegistry()

        def of(kind: type, name: str, text: str, *labels: str, **more):
            return kind(f"smalti_{name}", text, labels, registry=self.registry, **more)

        self.requests = of(Counter, "requests", "Answers, by route and status.", "route", "status")
        self.tokens = of(Counter, "tokens", "Tokens drawn; their rate is tokens per second.", "model")
        self.steps = of(Counter, "steps", "Steps of the engine.", "model")
        self.pictures = of(Counter, "pictures", "Pictures drawn.", "model")
        self.cancellations = of(Counter, "cancellations", "Jobs given up: by the client, or their deadline.", "model")
        self.refusals = of(Counter, "refusals", "Jobs refused because the queue was full.", "model")
        self.failures = of(Counter, "failures", "Jobs that failed by a fault of the server.", "model")
        self.seconds = of(Histogram, "job_seconds", "From taking a job to its answer.", "model", buckets=SECONDS)
        self.first_partial = of(
            Histogram, "first_partial_seconds", "To the first partial picture.", "model", buckets=SECONDS
        )
        self.gauges = {
            "queue": of(Gauge, "queue", "Sequences that wait for a row.", "model"),
            "pending": of(Gauge, "pending", "Sequences and other work taken in and not answered.", "model"),
            "rows": of(Gauge, "rows_in_use", "Rows of the engine in use; a guided picture has two.", "model"),
            "capacity": of(Gauge, "capacity", "Sequences that run at once.", "model"),
        }

    def watch(self, model: str, gauge: str, read: Callable[[], float]) -> None:
        """A gauge that is read when it is asked for."""
        self.gauges[gauge].labels(model).set_function(read)

    def start(self, models: Sequence[str]) -> None:
        """Every bundle's counters from 0 on, so that a rate is there before the first event."""
        for model in models:
            for counter in (self.tokens, self.steps, self.pictures, self.cancellations, self.refusals, self.failures):
                counter.labels(model)
