"""The GPU device over streams that delay and reorder whatever they may, against the CPU device step by step."""

from __future__ import annotations

import pytest

from tests.worker.runner.fake_streams import ALL_WAITS, FakeStreams
from tests.worker.runner.gpu_runs import agrees, gpu_device, oracle, run_traffic
from worker.runner.streams import Stream

DEPTHS = [0, 1, 2]
GRAPHS = [(), (1, 2, 4, 6)]
SEEDS = range(6)


@pytest.mark.parametrize("graph_sizes", GRAPHS)
@pytest.mark.parametrize("depth", DEPTHS)
def test_every_request_gets_what_it_gets_step_by_step(depth: int, graph_sizes) -> None:
    seen: set[str] = set()
    for seed in SEEDS:
        streams = FakeStreams(seed)
        run = run_traffic(gpu_device(streams, depth, graph_sizes), seed)
        stats = run.scheduler.stats
        assert streams.waits == ALL_WAITS
        seen |= {name for name in ("preemptions", "prefix_hits", "chunked_prompts") if getattr(stats, name)}
        seen |= {run.outcome(name)[1] for name in run.runs}
        assert agrees(run, seed)
    assert seen >= {"preemptions", "prefix_hits", "chunked_prompts", "", "length", "eos_token", "stop_sequence"}


def shows(depth: int, graph_sizes, **mistake) -> bool:
    """Whether the comparison above notices under any seed."""
    for seed in range(12):
        try:
            run = run_traffic(gpu_device(FakeStreams(seed, **mistake), depth, graph_sizes), seed)
        except Exception:
            return True
        if not agrees(run, seed):
            return True
    return False


@pytest.mark.parametrize("graph_sizes", GRAPHS)
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("wait", sorted(ALL_WAITS, key=str))
def test_without_any_single_wait_the_comparison_fails(wait: tuple, depth: int, graph_sizes) -> None:
    assert shows(depth, graph_sizes, ignored=wait)


@pytest.mark.parametrize("stream", [Stream.COPY_IN, Stream.COPY_OUT])
def test_numbers_or_results_that_are_copied_one_step_late_make_the_comparison_fail(stream: Stream) -> None:
    assert shows(1, (), late=stream)


def test_the_oracle_itself_ran_step_by_step() -> None:
    assert oracle(0).loop.device.depth == 0
