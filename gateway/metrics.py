"""Prometheus metrics of one gateway: TGI's names where they make sense, `inferfleet_` ones for what TGI has not."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from common.errors import StoreError
from common.job import JobRecord, JobState
from common.store.replies import WorkerInfo

if TYPE_CHECKING:
    from gateway.dependencies import AccessEntry, Services

DURATION_BUCKETS = tuple(0.0001 * 1.5**power for power in range(1, 36))
"""TGI's buckets of every duration, in seconds."""
COUNT_BUCKETS = tuple(2**power for power in range(18))
FAILURES = {422: "validation", 429: "overloaded", 424: "generation", 499: "dropped"}
"""TGI's reasons by status; every other failure is `incomplete`."""
GENERATING = frozenset({"/", "/generate", "/generate_stream", "/v1/chat/completions", "/v1/completions", "/v1/jobs"})
MS = 1000.0


@dataclass(slots=True)
class Snapshot:
    """The fleet as Redis described it for one scrape. `queues`: counters of each lane by its model's name."""

    is_up: bool = False
    workers: list[WorkerInfo] = field(default_factory=list)
    queues: dict[str, dict[str, int]] = field(default_factory=dict)
    hub: dict[str, int] = field(default_factory=dict)
    num_followers: int = 0
    num_followed: int = 0
    num_open: int = 0


class FleetCollector(Collector):
    """Turns the newest snapshot into metric families."""

    def __init__(self) -> None:
        self.snapshot = Snapshot()

    def collect(self) -> Iterator[Metric]:
        seen = self.snapshot
        queues = seen.queues.values()
        yield _gauge("tgi_queue_size", "jobs waiting for a worker", sum(queue.get("queued", 0) for queue in queues))
        yield _gauge("tgi_batch_current_size", "jobs on workers", sum(queue.get("running", 0) for queue in queues))
        yield _gauge("inferfleet_redis_up", "1 when Redis answered this scrape", int(seen.is_up))
        yield _gauge("inferfleet_followers", "streams and waiting requests of this gateway", seen.num_followers)
        yield _gauge("inferfleet_followed_jobs", "jobs this gateway follows", seen.num_followed)
        yield _gauge("inferfleet_open_requests", "generating requests this gateway holds open", seen.num_open)
        for name, value in seen.hub.items():
            yield CounterMetricFamily(f"inferfleet_hub_{name}", f"{name.replace('_', ' ')} since start", value)
        yield from self._lanes()
        yield from self._workers()
        yield self._skipped()

    def _lanes(self) -> Iterator[Metric]:
        for name in ("queued", "queued_tokens", "running", "workers", "dead_letters"):
            family = GaugeMetricFamily(f"inferfleet_{name}", f"{name.replace('_', ' ')} by model", labels=["model"])
            for model, queue in self.snapshot.queues.items():
                family.add_metric([model], queue.get(name, 0))
            yield family

    def _skipped(self) -> Metric:
        """TGI's name for the tokens beyond one that a step brought a request."""
        of_all = [info.stats for info in self.snapshot.workers]
        num_steps, num_skipped = (sum(s.get(name, 0) for s in of_all) for name in ("decode_tokens", "accepted_tokens"))
        text = "drafts that were right, by request and step"
        return SummaryMetricFamily(
            "tgi_request_skipped_tokens", text, count_value=int(num_steps), sum_value=num_skipped
        )

    def _workers(self) -> Iterator[Metric]:
        for name in ("running", "waiting", "kv_free", "kv_total", "tokens"):
            family = GaugeMetricFamily(f"inferfleet_worker_{name}", f"{name} of a worker", labels=["worker", "model"])
            for info in self.snapshot.workers:
                family.add_metric([info.id, info.model], getattr(info, name))
            yield family
        for name in ("draft_tokens", "accepted_tokens"):
            text = f"{name.replace('_', ' ')} of a worker's engine since its start"
            family = GaugeMetricFamily(f"inferfleet_worker_{name}", text, labels=["worker", "model"])
            for info in self.snapshot.workers:
                family.add_metric([info.id, info.model], info.stats.get(name, 0))
            yield family


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value)


class Metrics:
    """The registry of one gateway. Gauges of the fleet are read from Redis when somebody asks for them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.fleet = FleetCollector()
        self.registry.register(self.fleet)
        self.requests = self._counter("tgi_request_count", "generating requests")
        self.successes = self._counter("tgi_request_success", "requests whose job was completed")
        self.failures = self._counter("tgi_request_failure", "requests that failed, by TGI's reason", ("err",))
        self.duration = self._duration("tgi_request_duration", "seconds from request to the end of its answer")
        self.queue = self._duration("tgi_request_queue_duration", "seconds a job waited for a worker")
        self.inference = self._duration("tgi_request_inference_duration", "seconds from worker to the last token")
        self.per_token = self._duration("tgi_request_mean_time_per_token_duration", "inference seconds per token")
        self.input_length = self._length("tgi_request_input_length", "prompt tokens")
        self.generated_tokens = self._length("tgi_request_generated_tokens", "output tokens")
        self.max_new_tokens = self._length("tgi_request_max_new_tokens", "output tokens that were asked for")
        self.first_token = self._duration("inferfleet_time_to_first_token", "seconds from submission to first token")
        self.responses = self._counter("inferfleet_http_responses", "responses by status", ("status",))

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _duration(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, buckets=DURATION_BUCKETS, registry=self.registry)

    def _length(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, buckets=COUNT_BUCKETS, registry=self.registry)

    def observe(self, entry: AccessEntry) -> None:
        """Count one answered request."""
        self.responses.labels(str(entry.status)).inc()
        if entry.method != "POST" or entry.path not in GENERATING:
            return
        self.requests.inc()
        record = entry.record
        if record is not None and record.state is JobState.COMPLETED:
            self.successes.inc()
            self.duration.observe(time.monotonic() - entry.started)
            self._observe_job(record, entry.first_token_ms)
        elif (reason := _failure(entry, record)) is not None:
            self.failures.labels(reason).inc()

    def _observe_job(self, record: JobRecord, first_token_ms: int) -> None:
        inference_s = max(record.finished_ms - record.started_ms, 0) / MS
        self.queue.observe(max(record.started_ms - record.created_ms, 0) / MS)
        self.inference.observe(inference_s)
        self.per_token.observe(inference_s / max(record.num_tokens, 1))
        self.input_length.observe(record.prompt_tokens)
        self.generated_tokens.observe(record.num_tokens)
        self.max_new_tokens.observe(record.view.get("max_new_tokens") or 0)
        if first_token_ms:
            self.first_token.observe(max(first_token_ms - record.created_ms, 0) / MS)

    async def render(self, services: Services) -> bytes:
        """All metrics in Prometheus' text format."""
        self.fleet.snapshot = await _look(services)
        text = generate_latest(self.registry)
        # TGI's counters carry no `_total`, which the client library insists on
        return re.sub(rb"\b(tgi_\w+)_total\b", rb"\1", text)


def _failure(entry: AccessEntry, record: JobRecord | None) -> str | None:
    """TGI's word for why a request failed; None if it did not (a job that was merely accepted)."""
    if entry.status >= 400:
        return FAILURES.get(entry.status, "incomplete")
    if record is None or entry.path == "/v1/jobs":
        return None
    if not record.state.is_terminal or record.state is JobState.CANCELLED:
        return "dropped"
    return "generation" if record.state is JobState.FAILED else "incomplete"


async def _look(services: Services) -> Snapshot:
    hub = services.hub
    snapshot = Snapshot(
        hub=asdict(hub.counters),
        num_followers=hub.num_followers,
        num_followed=hub.num_jobs,
        num_open=services.admission.num_open,
    )
    try:
        snapshot.workers = await services.fleet.workers()
        for lane, model in services.registry.models.items():
            queue = await services.fleet.queue(lane)
            known = snapshot.queues.setdefault(model.card.served_name, {})
            for name, value in queue.items():
                known[name] = known.get(name, 0) + value
        snapshot.is_up = True
    except StoreError:
        snapshot.is_up = False
    return snapshot
