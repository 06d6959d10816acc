"""A load on an engine in this process: the same counts as over HTTP, and requests at the moments that were drawn."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from common.settings import WorkerSettings
from ops.bench.lora import SHORT
from ops.bench.offline import OfflineEngine
from ops.loadgen.offline import OfflineLoad, run_offline
from ops.loadgen.workload import Ask, Workload, arrival_times
from worker.pipe import Submit, TokenRun


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> OfflineEngine:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(SHORT.config))
    settings = WorkerSettings(model_id=str(folder), load_format="dummy", kv_tokens=4096, max_total_tokens=256)
    return OfflineEngine(settings)


def asks(count: int, num_tokens: int) -> list[Ask]:
    randomness = random.Random(count)
    return [Ask(randomness.choices(range(300), k=10 + number), num_tokens + number) for number in range(count)]


def test_a_closed_loop_has_as_many_in_the_batch_as_there_are_clients(engine: OfflineEngine) -> None:
    wanted = asks(7, 5)
    result = run_offline(engine, Workload.of(wanted, clients=3, warmup=asks(2, 3)))
    assert result.most_open == 3 and result.errors == {}
    summary = result.summary()
    assert summary["input_tokens"] == sum(len(ask.prompt) for ask in wanted)
    assert summary["output_tokens"] == sum(ask.max_tokens for ask in wanted)
    assert summary["num_short"] == 0 and summary["counted_by"] == "usage"
    counts = sorted(len(answer.times) for answer in result.answers)
    assert counts == [ask.max_tokens for ask in wanted], "a token at a time"


class StoppedClock:
    """Time that passes only in turns of the engine and in sleep, both of which it counts."""

    def __init__(self) -> None:
        self.now, self.slept = 1000.0, 0.0

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds


class OneTokenEngine:
    """Answers each request by one token in the turn after it came, and each turn takes 10 ms."""

    def __init__(self, clock: StoppedClock) -> None:
        self.clock, self.waiting, self.sent = clock, list[Submit](), list[float]()

    def send(self, submit: Submit) -> None:
        self.waiting.append(submit)
        self.sent.append(self.clock.now)

    def turn(self) -> Sequence[TokenRun]:
        self.clock.now += 0.010
        due, self.waiting = self.waiting, []
        return [TokenRun(request_id=one.request_id, epoch=1, ids=[5], logprobs=[0.0], finish="length") for one in due]


def test_an_open_loop_sends_at_its_moments_or_after_the_step_that_runs_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = StoppedClock()
    for module in ("offline", "run"):
        monkeypatch.setattr(f"ops.loadgen.{module}.time", clock)
    engine = OneTokenEngine(clock)
    load = OfflineLoad(engine, Workload.of([Ask([1], 1)] * 200, rate=50.0, seed=5))  # type: ignore[arg-type]
    result = load.run()
    moments = [1000.0 + moment for moment, _ in zip(arrival_times(50.0, 5), range(200), strict=False)]
    assert [answer.started for answer in result.answers] == pytest.approx(moments)
    late = [sent - moment for sent, moment in zip(engine.sent, moments, strict=True)]
    assert -1e-9 <= min(late) and max(late) < 0.010 and clock.slept > 0
    assert max(late) > 0.001, "some came while a step ran"
    assert all(
        answer.first_token_s == pytest.approx(0.010 + lag) for answer, lag in zip(result.answers, late, strict=True)
    )


def test_time_ends_a_run_and_what_runs_then_still_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = StoppedClock()
    for module in ("offline", "run"):
        monkeypatch.setattr(f"ops.loadgen.{module}.time", clock)
    workload = Workload(ask_of=lambda number: Ask([number], 1), duration_s=0.095, clients=2)
    result = OfflineLoad(OneTokenEngine(clock), workload).run()  # type: ignore[arg-type]
    assert (len(result.answers), result.seconds) == (20, 0.095)
    assert result.summary()["output_tokens_per_s"] == pytest.approx(18 / 0.095)


def test_a_request_that_cannot_run_is_an_error_of_the_engine(engine: OfflineEngine, tmp_path: Path) -> None:
    result = run_offline(engine, Workload.of([Ask([1] * 300, 5), Ask([1] * 8, 5)], clients=2))
    assert result.errors == {"engine error": 1}
    assert result.summary()["output_tokens"] == 5
