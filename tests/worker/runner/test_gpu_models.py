"""Real models on the GPU device over fake streams: encoders, adapters and everything that attention reads of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from common.job import Adapter, SamplingParams
from common.settings import WorkerSettings
from tests.support import tiny_models, tiny_t5
from tests.support.adapters import slots_of, write_adapter
from tests.support.device_attention import ReferenceOnDevice
from tests.support.engine_run import Engine, Run
from tests.worker.runner.fake_streams import ALL_WAITS, FakeStreams
from tests.worker.runner.gpu_runs import Hopeful
from worker.engine.device import Device
from worker.model.moe import ListedExperts
from worker.model.weights import DenseLinear
from worker.pipe import Ready, Submit
from worker.runner.gpu_device import GpuDevice
from worker.runner.load import load_device
from worker.runner.torch_device import TorchDevice

NUM_ADAPTERS = 3
OPTIONS = dict(
    kv_tokens=160, max_num_seqs=6, max_total_tokens=120, max_batch_prefill_tokens=40, dtype="float64", threads=1,
    max_loras=2,
)  # fmt: skip
PARAMS = [dict(), dict(do_sample=True, temperature=1.3, seed=5), dict(repetition_penalty=1.3)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Callable[[str], Path]:
    """A tiny model, and adapters for all of it, for its first and for its last modules beside it."""
    torch.set_num_threads(1)

    @cache
    def save(name: str) -> Path:
        folder, kind = tmp_path_factory.mktemp(name), tiny_t5 if name in tiny_t5.CASES else tiny_models
        kind.save(name, folder / "model")
        model = kind.build(name)
        modules = [module for module, _ in model.named_modules() if module in slots_of(name).targets]
        for number, chosen in enumerate((modules, modules[:3], modules[-3:])):
            write_adapter(folder / str(number), model, chosen, rank=2 + 3 * number, seed=number)
        return folder

    return save


def load(folder: Path) -> tuple[TorchDevice, Ready]:
    return load_device(WorkerSettings(model_id=str(folder / "model"), **OPTIONS), lambda *_: None)


def gpu_device(loaded: tuple[TorchDevice, Ready], streams: FakeStreams, depth: int, graph_sizes) -> GpuDevice:
    """The same model again, on another device."""
    device, ready = loaded
    device.model.attention = ReferenceOnDevice()
    made = GpuDevice(
        device.model, torch.float64, device._adapters._slots, streams,
        num_blocks=ready.kv_tokens // ready.block_size, block_size=ready.block_size, max_num_seqs=ready.max_num_seqs,
        max_total_tokens=ready.max_total_tokens, max_lora_rank=8, max_lora_bytes=1 << 30, depth=depth,
    )  # fmt: skip
    if graph_sizes:
        made.capture(graph_sizes)
    return made


def adapter(device: Device, folder: Path, number: int) -> Adapter | None:
    """As a job would carry it; every fourth job has none."""
    if number == NUM_ADAPTERS:
        return None
    checked = device.check_adapter(f"a{number}", str(folder / str(number)))
    assert not checked.error
    return Adapter(checked.name, checked.source, checked.digest)


def messages(number: int) -> list[Submit]:
    draw = torch.Generator().manual_seed(7)
    shared = torch.randint(256, (20,), generator=draw).tolist()
    return [
        Submit(
            request_id=f"r{index}",
            epoch=1,
            prompt_ids=shared[: 8 * (index % 3)] + torch.randint(256, (1 + 7 * index % 24,), generator=draw).tolist(),
            output_ids=[],
            params=SamplingParams(max_new_tokens=12 + 8 * (index % 4), **PARAMS[index % len(PARAMS)]),
            eos_token_ids=[],
        )
        for index in range(number)
    ]


def outcomes(device: Device, ready: Ready, submits: list[Submit]) -> list[tuple[list[int], str]]:
    run = Run(Engine(device, ready), Hopeful, max_loras=OPTIONS["max_loras"])
    for message in submits:
        run.submit(message)
        if len(run.runs) > 4:
            run.run_pass()
    run.finish()
    assert run.scheduler.stats.batch_max >= 4
    assert run.scheduler.stats.preemptions >= 1
    return [run.outcome(message.request_id) for message in submits]


@pytest.mark.parametrize("graph_sizes", [(), (1, 2, 6)])
@pytest.mark.parametrize("name", ["qwen2_late_window", "bloom", "flan"])
def test_models_say_what_they_say_on_a_cpu(folders, name: str, graph_sizes) -> None:
    expected = outcomes(*load(folders(name)), messages(10))
    assert len({tuple(ids) for ids, _ in expected}) == 10
    loaded, streams = load(folders(name)), FakeStreams(3)
    assert outcomes(gpu_device(loaded, streams, 1, graph_sizes), loaded[1], messages(10)) == expected
    assert streams.waits == ALL_WAITS
    assert (sum(graph.num_replays for graph in streams.graphs) >= 20) == bool(graph_sizes)


@pytest.mark.parametrize("name", ["llama", "flan"])
def test_adapters_do_what_they_do_on_a_cpu(folders, name: str) -> None:
    folder = folders(name)
    plain, loaded, streams = load(folder), load(folder), FakeStreams(5)
    device = gpu_device(loaded, streams, 1, (1, 2, 6))
    submits = [
        replace(message, adapter=adapter(device, folder, index % (NUM_ADAPTERS + 1)))
        for index, message in enumerate(messages(12))
    ]
    expected = outcomes(*plain, submits)
    assert outcomes(device, loaded[1], submits) == expected
    without = outcomes(*load(folder), messages(12))
    assert sum(mine != others for mine, others in zip(expected, without)) >= 8, "adapters change answers"


def test_what_an_encoder_reads_lies_in_pages_of_one_size_whatever_its_length(folders, monkeypatch) -> None:
    """Kernels are compiled for each size."""
    loaded, attend, seen = load(folders("flan")), ReferenceOnDevice.attend, set()

    def watch(attention, q, k_pages, v_pages, meta, layer):
        if layer is loaded[0].model._encoder_shape:
            seen.add((len(q), (k_pages.shape[1], meta.block_tables.shape[1])))
        return attend(attention, q, k_pages, v_pages, meta, layer)

    monkeypatch.setattr(ReferenceOnDevice, "attend", watch)
    outcomes(gpu_device(loaded, FakeStreams(), 1, ()), loaded[1], messages(6))
    assert len({length for length, _ in seen}) >= 5
    assert {sizes for _, sizes in seen} == {(loaded[1].block_size, 16)}


def test_experts_of_which_each_is_a_product_run_without_graphs(folders) -> None:
    loaded, streams = load(folders("mixtral")), FakeStreams()
    device = gpu_device(loaded, streams, 1, ())
    assert device.capture([1, 2]).startswith("cuda_graphs of 2 sizes") and streams.graphs
    layers = device.model.weights.layers
    for name in ("down", "up"):
        for number, layer in enumerate(layers):
            listed = ListedExperts(tuple(DenseLinear(matrix, None) for matrix in getattr(layer.mlp, name).matrices))
            layers[number] = replace(layer, mlp=replace(layer.mlp, **{name: listed}))
        streams = FakeStreams()
        device = gpu_device(loaded, streams, 1, ())
        assert device.capture([1, 2]).startswith("cuda_graphs off: each quantised expert") and not streams.graphs
    assert outcomes(device, loaded[1], messages(6))


def test_a_step_with_adapters_runs_without_graphs_and_one_after_it_with_them(folders) -> None:
    folder = folders("llama")
    loaded, streams = load(folder), FakeStreams()
    device = gpu_device(loaded, streams, 1, (1, 2, 6))
    message = messages(1)[0]
    for number, is_replayed in ((0, False), (NUM_ADAPTERS, True)):
        run = Run(Engine(device, loaded[1]), max_loras=2)
        run.loop.scheduler._last_launched = run.loop.scheduler._last_applied = 100 * number
        run.submit(replace(message, adapter=adapter(device, folder, number)))
        run.finish()
        assert any(graph.num_replays for graph in streams.graphs) == is_replayed


def test_an_adapter_that_cannot_be_loaded_is_an_error_of_its_row_alone(folders, tmp_path) -> None:
    loaded = load(folders("llama"))
    device = gpu_device(loaded, FakeStreams(), 1, ())
    good = adapter(device, folders("llama"), 0)
    run = Run(Engine(device, loaded[1]), max_loras=2)
    for name, mine in (("good", good), ("bad", replace(good, source=str(tmp_path), digest="0" * 32))):
        run.submit(replace(messages(1)[0], request_id=name, adapter=mine))
    run.finish()
    assert "cannot be loaded any more" in run.runs["bad"][-1].error
    assert run.outcome("good")[1] == "length"


class SeesOneKey(GpuDevice):
    """Of what the encoder left."""

    def _move_in(self, plan):
        changes = super()._move_in(plan)
        self.rows.cross_lengths[:] = 1
        return changes


class ForgetsAdapters(GpuDevice):
    def _move_in(self, plan):
        changes = super()._move_in(plan)
        self._adapters._slot_of_row[:] = -1
        return changes


@pytest.mark.parametrize(("wrong", "name"), [(SeesOneKey, "flan"), (ForgetsAdapters, "llama")])
def test_a_device_that_reads_less_of_a_row_is_caught(folders, wrong: type[GpuDevice], name: str) -> None:
    folder = folders(name)
    plain, loaded = load(folder), load(folder)
    number = 0 if wrong is ForgetsAdapters else NUM_ADAPTERS
    submits = [replace(message, adapter=adapter(plain[0], folder, number)) for message in messages(6)]
    expected = outcomes(*plain, submits)
    device = gpu_device(loaded, FakeStreams(), 1, ())
    device.__class__ = wrong
    assert outcomes(device, loaded[1], submits) != expected
