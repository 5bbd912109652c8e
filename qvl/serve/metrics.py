"""What Prometheus may ask: requests, queue, waiting times, caches."""

import time
from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
WAITS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
STEPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class Metrics:
    """One registry for each server, so that two in one process do not mix."""

    def __init__(self, names: Iterable[str]) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        self.requests = self._counter("qvl_requests", "Requests by route and status.", "route", "status")
        self.prompt_tokens = self._counter("qvl_prompt_tokens", "Tokens of prompts.")
        self.answer_tokens = self._counter("qvl_answer_tokens", "Tokens of answers.")
        self.first_token = self._histogram("qvl_time_to_first_token_seconds", "From arrival to the first token.", WAITS)
        self.between_tokens = self._histogram("qvl_inter_token_seconds", "Between two tokens of one answer.", STEPS)
        self.whole = self._histogram("qvl_request_seconds", "From arrival to the end of the reply.", WAITS)
        self.queue = self._histogram(
            "qvl_prepare_seconds", "From arrival to the engine's queue, media included.", WAITS
        )
        self.media = self._histogram("qvl_media_seconds", "Fetching and decoding the media of one request.", WAITS)
        self._gauges: dict[str, Gauge] = {}
        self._latest: dict[str, Any] = {name: None for name in names}

    def _counter(self, name: str, words: str, *labels: str) -> Counter:
        return Counter(name, words, labels, registry=self.registry)

    def _histogram(self, name: str, words: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, words, registry=self.registry, buckets=buckets)

    def on_stats(self, name: str, stats: Any) -> None:
        """The engine's own counts, as of its last step. Called from the engine's thread."""
        self._latest[name] = stats

    def page(self) -> bytes:
        for name, stats in self._latest.items():
            for field, value in ({} if stats is None else vars(stats)).items():
                if field not in self._gauges:
                    words = f"The engine's {field.replace('_', ' ')}."
                    self._gauges[field] = Gauge(f"qvl_engine_{field}", words, ["model"], registry=self.registry)
                self._gauges[field].labels(name).set(value)
        return generate_latest(self.registry)


class Watch:
    """The clock of one request."""

    def __init__(self, metrics: Metrics, start: float) -> None:
        self.metrics, self.start = metrics, start
        self.prompt_tokens = self.answer_tokens = 0
        self.first: float | None = None
        """Seconds to the first token."""
        self._last: dict[int, float] = {}

    def token(self, index: int) -> None:
        now = time.monotonic()
        if index in self._last:
            self.metrics.between_tokens.observe(now - self._last[index])
        elif not self._last:
            self.first = now - self.start
            self.metrics.first_token.observe(self.first)
        self._last[index] = now
        self.answer_tokens += 1
        self.metrics.answer_tokens.inc()

    def queued(self, media_seconds: float, prompt_tokens: int, has_media: bool) -> None:
        self.metrics.queue.observe(time.monotonic() - self.start)
        self.prompt_tokens = prompt_tokens
        self.metrics.prompt_tokens.inc(prompt_tokens)
        if has_media:
            self.metrics.media.observe(media_seconds)

    def __str__(self) -> str:
        """For the log: how much came in and went out, and nothing of what it said."""
        first = "" if self.first is None else f", the first after {self.first:.2f} s"
        return f"{self.prompt_tokens:,} tokens in, {self.answer_tokens:,} out{first}"

    def end(self) -> None:
        self.metrics.whole.observe(time.monotonic() - self.start)
