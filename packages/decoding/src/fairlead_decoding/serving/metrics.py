"""What Prometheus reads at /metrics. Each service has a registry of its own, so that several can live in one process.

Every request that was accepted ends in exactly one outcome: accepted = done + cancelled + timeout + failed + those under way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST as CONTENT_TYPE
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one service."""

    content_type = CONTENT_TYPE

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("fairlead_requests", "HTTP requests answered (499: the client left)", ["route", "status"], registry=registry)
        self.seconds = Histogram("fairlead_request_seconds", "Seconds of an HTTP request", ["route"], buckets=SECONDS, registry=registry)
        self.first_text = Histogram("fairlead_first_text_seconds", "Seconds to the first text of a stream", buckets=SECONDS, registry=registry)
        self.accepted = Counter("fairlead_accepted", "Completions that entered the queue", registry=registry)
        self.outcomes = Counter("fairlead_outcomes", "How accepted completions ended", ["outcome"], registry=registry)
        for outcome in ("done", "cancelled", "timeout", "failed"):
            self.outcomes.labels(outcome)
        self.prompt_tokens = Counter("fairlead_prompt_tokens", "Prompt tokens of completions that ended", registry=registry)
        self.completion_tokens = Counter("fairlead_completion_tokens", "Tokens written, those of cancelled answers included", registry=registry)
        self.batches = Histogram("fairlead_batch_answers", "Answers written at a time", buckets=(1, 2, 4, 8, 16, 32, 64, 128), registry=registry)
        self._waiting = Gauge("fairlead_waiting", "Completions in the queue", registry=registry)
        self._running = Gauge("fairlead_running", "Completions that the model works on", registry=registry)
        if sys.platform == "linux":
            ProcessCollector(registry=registry)

    def watch(self, waiting: Callable[[], int], running: Callable[[], int]) -> None:
        """Read these when asked."""
        self._waiting.set_function(waiting)
        self._running.set_function(running)

    def batch(self, answers: int) -> None:
        self.batches.observe(answers)

    def settled(self, outcome: str, prompt_tokens: int, completion_tokens: int) -> None:
        self.outcomes.labels(outcome).inc()
        self.prompt_tokens.inc(prompt_tokens)
        self.completion_tokens.inc(completion_tokens)

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)
