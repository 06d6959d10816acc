"""Prometheus metrics of one worker, on a port of its own when one is given."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from common.job import FinishReason, JobState

CALL_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
ENGINE_GAUGES = ("running", "waiting", "blocks_free", "blocks_total", "step_ms", "batch_max")
ENGINE_TOTALS = (
    "steps",
    "preemptions",
    "prefix_hits",
    "prefix_hit_tokens",
    "chunked_prompts",
    "prefill_tokens",
    "decode_tokens",
    "encoder_passes",
    "encoder_tokens",
    "draft_tokens",
    "accepted_tokens",
    "steps_too_large",
)


class WorkerMetrics:
    """Counters start at zero with the agent; those of the engine with the engine, as `engine_stats` has them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._jobs = Counter(
            "inferfleet_worker_jobs_ended", "Jobs ended here", ["state", "reason"], registry=self.registry
        )
        self._tokens = Counter("inferfleet_worker_tokens", "Output tokens of ended jobs", registry=self.registry)
        self.taken = Counter("inferfleet_worker_jobs_taken", "Jobs taken from the queue", registry=self.registry)
        self.fenced = Counter("inferfleet_worker_fenced", "Times this worker was sealed", registry=self.registry)
        self.reasserted = Counter(
            "inferfleet_worker_reasserted", "Times Redis had lost its newest writes", registry=self.registry
        )
        self.engine_deaths = Counter("inferfleet_worker_engine_deaths", "Engines that died", registry=self.registry)
        self.held = Gauge("inferfleet_worker_jobs_held", "Jobs held now", registry=self.registry)
        self.call_seconds = Histogram(
            "inferfleet_worker_step_call_seconds",
            "Time of one step call to Redis",
            buckets=CALL_BUCKETS,
            registry=self.registry,
        )
        self.engine_stats: Mapping[str, float] = {}
        for name in (*ENGINE_GAUGES, *ENGINE_TOTALS):
            gauge = Gauge(f"inferfleet_engine_{name}", f"Engine: {name}", registry=self.registry)
            gauge.set_function(partial(self._engine_stat, name))

    def serve(self, port: int) -> None:
        """Answer on 127.0.0.1:`port`.

        Raises:
            OSError: the port is taken.
        """
        start_http_server(port, addr="127.0.0.1", registry=self.registry)

    def ended(self, state: JobState, reason: FinishReason | None, num_tokens: int) -> None:
        self._jobs.labels(state.value, reason.value if reason else "").inc()
        self._tokens.inc(num_tokens)

    def _engine_stat(self, name: str) -> float:
        return self.engine_stats.get(name, 0.0)
