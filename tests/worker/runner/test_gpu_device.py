"""The GPU device over streams that delay and reorder whatever they may, against the CPU device step by step."""

from __future__ import annotations

import random
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.lockstep import run_ranks
from tests.worker.runner.fake_streams import ALL_WAITS, DefaultStream, FakeStreams, Loss
from tests.worker.runner.gpu_runs import (
    SIZES,
    agrees,
    gpu_device,
    messages,
    oracle,
    plan_of_decodes,
    plan_of_prompts,
    run_traffic,
)
from worker.engine import scheduler as scheduler_module
from worker.engine.device import StepTooLarge
from worker.parallel.group import Alone, Group
from worker.parallel.shard import Shard
from worker.runner import gpu_device as gpu_device_module
from worker.runner.device_rows import DeviceRows
from worker.runner.gpu_device import Buffers, GpuDevice
from worker.runner.graphs import DecodeGraphs, default_sizes
from worker.runner.streams import Stream

DEPTHS = [0, 1, 2]
GRAPHS = [(), (1, 2, 4, 6)]
MISTAKE_SEEDS = range(6)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("graph_sizes", GRAPHS)
@pytest.mark.parametrize("depth", DEPTHS)
def test_every_request_gets_what_it_gets_step_by_step(depth: int, graph_sizes) -> None:
    seen, num_late, num_replays = set(), 0, 0
    for seed in range(2):
        streams = FakeStreams(seed)
        run = run_traffic(gpu_device(streams, depth, graph_sizes), seed)
        stats = run.scheduler.stats
        assert streams.waits == ALL_WAITS
        seen |= {name for name in ("preemptions", "prefix_hits", "chunked_prompts") if getattr(stats, name)}
        seen |= {run.outcome(name)[1] for name in run.runs}
        num_late += run.scheduler.num_late
        num_replays += sum(graph.num_replays for graph in streams.graphs)
        assert agrees(run, seed)
        assert run.scheduler.pool.num_free == SIZES["num_blocks"]
    assert seen >= {"preemptions", "prefix_hits", "chunked_prompts", "", "length", "eos_token", "stop_sequence"}
    assert num_late >= 3 * min(depth, 1)
    assert num_replays >= 40 * bool(graph_sizes)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 9),
    delays=st.integers(0, 10**6),
    depth=st.sampled_from(DEPTHS),
    graph_sizes=st.sampled_from([(), (3,), (1, 6)]),
    share=st.sampled_from([0.0, 0.05, 0.3]),
)
def test_any_delays_and_losses_change_no_answer(seed: int, delays: int, depth: int, graph_sizes, share: float) -> None:
    streams = FakeStreams(delays)
    device = gpu_device(streams, depth, graph_sizes)
    streams.loss = Loss(random.Random(delays), share)
    assert agrees(run_traffic(device, seed, 8), seed, 8)


def shows(depth: int, graph_sizes, device_class=GpuDevice, **mistake) -> bool:
    """Whether the comparison above notices under any seed."""
    for seed in MISTAKE_SEEDS:
        try:
            run = run_traffic(gpu_device(FakeStreams(seed, **mistake), depth, graph_sizes, device_class), seed)
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


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("stream", [Stream.COPY_IN, Stream.COPY_OUT])
def test_numbers_or_results_that_are_copied_one_step_late_make_the_comparison_fail(stream: Stream, depth: int) -> None:
    assert shows(depth, (), late=stream)


def test_without_a_mistake_it_does_not_fail() -> None:
    assert not shows(1, GRAPHS[1])


class SharesBuffers(GpuDevice):
    """All steps in flight have the same memory for numbers and results."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self._free = [self._free[0]] * len(self._free)


class PadsWithRowZero(GpuDevice):
    """What is left of a graph is filled with a row that may be a request's."""

    def _spare_row(self):
        return 0, 0, 1, 0


class ReadsOnlyTheHost(GpuDevice):
    """A token that is not known yet is taken for none."""

    def _known(self, tokens, owners):
        return super()._known(tokens, owners).clip(min=0)


@pytest.mark.parametrize("wrong", [SharesBuffers, PadsWithRowZero, ReadsOnlyTheHost])
def test_a_device_with_a_known_mistake_is_caught(wrong: type[GpuDevice]) -> None:
    assert shows(1, (6,), wrong)


# Graphs.


def state_of(device: GpuDevice) -> dict[str, torch.Tensor]:
    """All that padding could spoil, without page 0 and the spare row."""
    rows = device.rows
    kept = {name: getattr(rows, name)[:-1] for name in ("parameters", "stops", "last_ids", "tables")}
    pages = {f"page {page}": device.pages[:, :, page] for page in range(1, device.pages.shape[2])}
    return {name: each.clone() for name, each in (kept | pages | {"counts": rows.counts}).items()}


def test_padding_touches_no_row_and_no_page_but_its_own() -> None:
    streams = FakeStreams()
    device = gpu_device(streams, 0, (6,))
    device.forward(plan := plan_of_prompts([[1, 2, 3], [4, 5]]))
    device.collect(device.sample(plan))
    before = state_of(device)
    device.forward(plan := plan_of_decodes({1: 2}))
    result = device.collect(device.sample(plan))
    assert [graph.num_replays for graph in streams.graphs] == [1, 1, 0], "forward pass, greedy sampling"
    after = state_of(device)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"last_ids", "page 2"}
    assert (before["last_ids"] != after["last_ids"]).nonzero().tolist() in ([[1]], [])
    assert result.ids.tolist() == [int(after["last_ids"][1])]


def test_steps_that_are_no_plain_decoding_run_without_graphs() -> None:
    streams = FakeStreams()
    device = gpu_device(streams, 0, (1, 2))
    device.forward(plan := plan_of_prompts([[1, 2, 3], [4, 5], [6]]))
    device.collect(device.sample(plan))
    device.forward(plan := plan_of_decodes({0: 3, 1: 2, 2: 1}))
    device.collect(device.sample(plan))
    assert not any(graph.num_replays for graph in streams.graphs), "a prompt, then more rows than any graph has"
    device.forward(plan := plan_of_decodes({0: 4, 1: 3}))
    device.collect(device.sample(plan))
    assert sum(graph.num_replays for graph in streams.graphs) == 2


def test_graphs_are_captured_largest_first_until_the_time_is_over() -> None:
    captured, times = [], iter([0.0, 1.0, 30.0, 61.0])
    run_forward = DecodeGraphs._run_forward

    class Watched(FakeStreams):
        def capture(self, work, beside):
            if work.func.__name__ == run_forward.__name__:
                captured.append(work.args[0])
            return super().capture(work, beside)

    device = gpu_device(Watched(), 1)
    said = device.capture([1, 2, 4, 6], 60.0, lambda: next(times))
    assert captured == [6, 4]
    assert said == "cuda_graphs from 4 to 6 rows: to capture all 4 sizes takes longer than 60 s"
    assert [device._graphs.size_for(number) for number in (1, 4, 5, 6, 7)] == [4, 4, 6, 6, None]
    assert agrees(run_traffic(device, 1), 1)


def test_ranks_capture_what_the_slowest_has_time_for() -> None:
    def captured(group: Group) -> list[int]:
        device, times = gpu_device(FakeStreams(), 1), count(0.0, 25.0 * group.shard.rank)
        device.model.group = group
        device.capture([1, 2, 4, 6], 60.0, lambda: next(times))
        return device._graphs.sizes

    alone, slow = Alone(), SimpleNamespace(shard=Shard(1, 2), all_gather=Alone().all_gather)
    assert [captured(each) for each in (alone, slow)] == [[1, 2, 4, 6], [4, 6]]
    assert run_ranks(2, captured) == [[4, 6]] * 2


def test_the_default_sizes_reach_to_all_rows() -> None:
    assert default_sizes(1) == [1]
    assert default_sizes(6) == [1, 2, 4, 6]
    assert default_sizes(36) == [1, 2, 4, 8, 16, 24, 32, 36]
    assert default_sizes(1000)[-4:] == [928, 960, 992, 1000]
    assert max(len(default_sizes(number)) for number in range(1, 5000)) < 70


# Steps for which there is no memory.


@pytest.mark.parametrize("graph_sizes", GRAPHS)
@pytest.mark.parametrize("depth", DEPTHS)
def test_steps_without_memory_cost_no_request_and_no_page(depth: int, graph_sizes, monkeypatch) -> None:
    monkeypatch.setattr(scheduler_module, "STEPS_UNTIL_REGROWTH", 3)
    streams = FakeStreams(depth)
    device = gpu_device(streams, depth, graph_sizes)
    streams.loss = Loss(random.Random(depth), 0.15)
    run = run_traffic(device, seed=depth)
    assert agrees(run, depth)
    assert run.scheduler.stats.steps_too_large == streams.loss.num_lost == streams.num_tidied >= 3
    assert run.scheduler.pool.num_free == SIZES["num_blocks"]
    assert len(device._free) == depth + 1


class ForgetsBuffers(GpuDevice):
    """Memory of a step that was lost is never used again."""

    def _try(self, flight, launch) -> None:
        try:
            super()._try(flight, launch)
        except StepTooLarge:
            self._free.remove(flight.buffers)
            raise


def test_a_device_that_loses_its_buffers_with_a_step_is_caught() -> None:
    streams = FakeStreams(0)
    device = gpu_device(streams, 1, device_class=ForgetsBuffers)
    streams.loss = Loss(random.Random(0), 0.1)
    with pytest.raises(IndexError):
        run_traffic(device, 0)


@pytest.mark.parametrize("where", ["forward", "sample"])
def test_of_several_ranks_none_goes_on_without_memory(where: str) -> None:
    streams = FakeStreams()
    device = gpu_device(streams, 1)
    device._model = SimpleNamespace(
        group=SimpleNamespace(shard=SimpleNamespace(size=2)), attention=device._model.attention
    )
    plan = plan_of_prompts([[1]])
    if where == "sample":
        device.forward(plan)
    streams.loss = Loss(random.Random(0), 1.0, most_in_a_row=9)
    with pytest.raises(torch.OutOfMemoryError):
        getattr(device, where)(plan)


def test_other_errors_of_a_step_are_no_lack_of_memory(monkeypatch) -> None:
    device = gpu_device(FakeStreams(), 1)

    def fail(*_) -> None:
        raise RuntimeError("an illegal address")

    monkeypatch.setattr(Buffers, "hold", fail)
    with pytest.raises(RuntimeError, match="illegal"):
        device.forward(plan_of_prompts([[1]]))


# What concerns one row, and what is larger than expected.


def test_an_unknown_token_is_an_error_of_its_row_alone() -> None:
    device = gpu_device(FakeStreams(), 1)
    device.forward(plan := plan_of_prompts([[1, 2], [3, 40], [4]]))
    result = device.collect(device.sample(plan))
    assert result.errors == {1: "a token of the prompt is outside the model's vocabulary"}
    assert len(result.ids) == 3


def test_numbers_of_a_step_may_be_more_than_any_before() -> None:
    device = gpu_device(FakeStreams(), 1)
    for buffers in device._free:
        buffers._make(4)
    assert agrees(run_traffic(device, 2), 2)
    assert len(device._free[0].numbers) > 4


@pytest.mark.parametrize("graph_sizes", GRAPHS)
def test_nothing_happens_on_a_device_outside_of_its_streams(graph_sizes, monkeypatch) -> None:
    # whose tensors are the host's
    monkeypatch.setattr(gpu_device_module, "agree_on_minimum", lambda group, value: value)
    streams = FakeStreams(1)
    with DefaultStream(streams):
        torch.zeros(1)
        assert streams.astray, "it would be noticed"
        device = gpu_device(streams, 1, graph_sizes)
        assert not streams.astray
        for buffers in device._free:
            buffers._make(4)
        run = run_traffic(device, 1, 8)
        assert len(device._free[0].numbers) > 4
    assert agrees(run, 1, 8)


def test_drafts_are_refused_where_nobody_compares_them() -> None:
    plan = plan_of_prompts([[1, 2]])
    plan.num_drafts[0] = 1
    with pytest.raises(AssertionError, match="drafts"):
        gpu_device(FakeStreams(), 1).forward(plan)


def test_the_oracle_itself_ran_step_by_step() -> None:
    run = oracle(0)
    assert run.loop.device.depth == 0
    assert len({tuple(run.outcome(message.request_id)[0]) for message in messages(0, 16)}) > 8
    assert not isinstance(run.loop.device.rows, DeviceRows)
