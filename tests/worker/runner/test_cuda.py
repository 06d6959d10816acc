"""The choice of a GPU and of what is made of its memory, with stand-ins for all that torch would say of one."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import ConfigurationError
from common.job import SamplingParams
from common.settings import WorkerSettings
from tests.support import tiny_t5
from tests.support.engine_run import Engine, Run
from tests.worker.runner.fake_streams import FakeStreams
from worker.attention import Batch, DeviceBatch
from worker.attention.reference import ReferenceAttention
from worker.engine.device import StepTooLarge
from worker.model.decoder import Decoder
from worker.model.lora import AdaptedLinear, LoraSlots
from worker.model.operations import Operations
from worker.model.weights import DenseLinear
from worker.parallel.group import Alone
from worker.parallel.shard import Shard
from worker.pipe import Submit
from worker.runner import cuda, hardware
from worker.runner.cuda import largest_step, small_steps
from worker.runner.gpu_device import GpuDevice
from worker.runner.gpu_sampler import TorchSampler
from worker.runner.limits import KvMemory
from worker.runner.load import choose_hardware, load_device
from worker.runner.streams import CudaStreams
from worker.runner.torch_device import TorchDevice

TOTAL = 1000 << 20
BYTES_PER_TOKEN = 2 * 3 * 2 * 8 * 4
"""Of the tiny Llama in float32."""


class HostAttention(ReferenceAttention):
    """The reference for batches of a device, which it waits for."""

    def prepare(self, batch, block_size):
        if isinstance(batch, DeviceBatch):
            starts, lengths = batch.starts.numpy().astype(np.int64), batch.query_starts.diff().numpy().astype(np.int64)
            num_keys = None if batch.num_keys is None else batch.num_keys.numpy().astype(np.int64)
            tables = batch.tables[batch.rows.long()].numpy().astype(np.int64)
            batch = Batch(lengths, starts, tables, batch.slots, num_keys)
        return super().prepare(batch, block_size)


@dataclass
class FakeMemory:
    """Of a GPU on which everything that is tried takes `taken` until it is tidied up; pages take theirs besides."""

    taken: int = 0
    free: int = 900 << 20
    num_tidied: int = 0
    in_use: list[int] = field(default_factory=list)

    def free_and_total(self) -> tuple[int, int]:
        return self.free - sum(self.in_use), TOTAL

    def tidy(self) -> None:
        self.num_tidied += 1
        self.in_use.clear()


@dataclass
class Gpus:
    """What the stand-ins say and what they heard."""

    memory: FakeMemory
    chosen: list[torch.device] = field(default_factory=list)
    devices: list[GpuDevice] = field(default_factory=list)


@pytest.fixture()
def gpus(monkeypatch) -> Gpus:
    """Two GPUs of a current kind, whose memory is the CPU's."""
    found = Gpus(FakeMemory(taken=40 << 20))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Stand-in")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "set_device", found.chosen.append)
    monkeypatch.setattr(cuda, "find_spec", lambda name: name)
    monkeypatch.setattr(cuda, "which", lambda name: name)
    monkeypatch.setattr(cuda, "CudaMemory", lambda device: found.memory)
    monkeypatch.setattr(cuda, "CudaStreams", lambda device: FakeStreams())
    monkeypatch.setattr(cuda, "gpu_number", lambda place: torch.device("cpu", place) if place else torch.device("cpu"))

    def kernels(attention, device, dtype, reasons):
        reasons.append(f"attention {attention}: a stand-in")
        return hardware.Kernels(HostAttention(), Operations(), lambda layer: layer), TorchSampler

    class Noted(GpuDevice):
        def __init__(self, *arguments, **options) -> None:
            super().__init__(*arguments, **options)
            found.devices.append(self)
            found.memory.in_use += [found.memory.taken, self.pages.nbytes]

    monkeypatch.setattr(cuda, "triton_kernels", kernels)
    monkeypatch.setattr("worker.runner.gpu_device.GpuDevice", Noted)
    return found


@pytest.fixture()
def load(gpus, tiny_folder, tmp_path_factory):
    """Load a tiny model; whatever was loaded before is gone. Options as in WorkerSettings."""
    torch.set_num_threads(1)
    folders = dict[str, Path]()

    def make(name: str = "llama", **options):
        gpus.memory.in_use.clear()
        if name == "t5" and name not in folders:
            folders[name] = tiny_t5.save(name, tmp_path_factory.mktemp(name))
        settings = dict(model_id=str(folders.get(name) or tiny_folder(name)), threads=1, kv_tokens=2048) | options
        return load_device(WorkerSettings(**settings), lambda phase, done, total: None)

    return make


def refusal(act, *arguments, **options) -> str:
    with pytest.raises(ConfigurationError) as caught:
        act(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def hardware_of(shard: Shard = Alone.shard, **options):
    return choose_hardware(WorkerSettings(**options), shard, [])


def test_a_gpu_is_taken_where_there_is_one_unless_the_option_says_otherwise(gpus, monkeypatch) -> None:
    assert [hardware_of(device=device).name for device in ("auto", "cuda", "cpu")] == ["GPU", "GPU", "CPU"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert hardware_of().name == "CPU"
    assert refusal(hardware_of, device="cuda").startswith("--device cuda: torch sees no GPU")


def test_each_rank_has_the_gpu_of_its_place_on_its_machine(gpus, monkeypatch) -> None:
    monkeypatch.setattr(cuda, "gpu_number", lambda place: torch.device("cuda", place))
    hardware_of(Shard(1, 2), num_shard=2)
    second = dict(num_shard=4, num_nodes=2, node_rank=1, rendezvous="a:1")
    hardware_of(Shard(2, 4), **second)
    hardware_of(Shard(3, 4), **second)
    assert [device.index for device in gpus.chosen] == [1, 0, 1]
    text = "4 ranks on one machine need a GPU each, and this process sees 2; "
    assert refusal(hardware_of, num_shard=4).startswith(text)


def test_what_a_gpu_cannot_do_is_one_sentence(monkeypatch, load) -> None:
    assert refusal(load, dtype="float64").startswith("float64 is for a CPU")
    assert "--attention cpu is not for a GPU, which has auto, triton, flash, torch" in refusal(load, attention="cpu")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(cuda, "which", lambda name: name if name == "clang" else None)
    assert hardware_of().name == "GPU"
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "made by a C compiler, and there is none: install gcc or clang, or name one by CC" in refusal(load)
    monkeypatch.setattr(cuda, "find_spec", lambda name: None)
    assert "Triton, which is not installed" in refusal(load)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 7.5 and kernels need 8.0" in refusal(load)


def test_what_a_cpu_cannot_do_is_one_sentence_and_what_says_nothing_there_is_told(load) -> None:
    text = refusal(load, device="cpu", attention="triton")
    assert text == "--attention triton is not for a CPU, which has auto, cpu, reference"
    _, ready = load(device="cpu", cuda_graphs=[1, 2], cuda_memory_fraction=0.5, overlap=False)
    why = "changes nothing: the model runs on a CPU"
    assert ready.reasons[:3] == [f"{name} {why}" for name in ("cuda_graphs", "cuda_memory_fraction", "overlap")]
    assert not any("changes nothing" in reason for reason in load(device="cpu")[1].reasons)


def test_types_are_as_stored_also_the_one_that_is_slow_on_a_cpu(gpus) -> None:
    reasons: list[str] = []
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert hardware_of().choose_dtype("auto", dtype, reasons) is dtype
    assert hardware_of().choose_dtype("float16", torch.float32, reasons) is torch.float16
    assert reasons == []
    assert hardware_of(device="cpu").choose_dtype("auto", torch.float16, reasons) is torch.bfloat16


def test_pages_get_what_weights_the_largest_step_and_the_fraction_leave(gpus, load) -> None:
    device, ready = load(kv_tokens=None, cuda_memory_fraction=0.8, max_num_seqs=200)
    tried, kept = gpus.devices
    assert kept is device and gpus.memory.num_tidied == 2, "before it was tried, and behind it"
    assert tried.pages.nbytes < device.pages.nbytes
    left = (900 << 20) - (200 << 20) - (40 << 20)
    assert ready.kv_tokens == min(left // BYTES_PER_TOKEN, 200 * (512 + 16)) // 16 * 16
    assert ready.max_batch_prefill_tokens == 8192
    gpus.memory.free = 250 << 20
    _, ready = load(kv_tokens=None, cuda_memory_fraction=0.8, max_num_seqs=200)
    assert ready.kv_tokens == (10 << 20) // BYTES_PER_TOKEN // 16 * 16
    assert any("what weights and the largest step leave of 80% of a GPU" in reason for reason in ready.reasons)
    assert load(kv_tokens=512)[1].kv_tokens == 512


def test_too_little_memory_of_a_gpu_is_one_sentence(gpus, load) -> None:
    gpus.memory.free = 50 << 20
    assert "only 0 B of memory is free; choose a smaller model" in refusal(load, kv_tokens=None)
    gpus.memory.free = 90 << 20
    text = refusal(load, kv_tokens=None)
    assert "needs 12.0 KiB but only 0 B of memory is free in 95% of the GPU" in text
    assert "--cuda-memory-fraction" in text


NO_MEMORY = [
    torch.OutOfMemoryError("no memory. More."),
    StepTooLarge("no memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
]


@pytest.mark.parametrize("error", NO_MEMORY)
def test_a_largest_step_for_which_there_is_no_memory_is_one_sentence(gpus, load, monkeypatch, error) -> None:
    def fail(self, plan) -> None:
        raise error

    monkeypatch.setattr(GpuDevice, "forward", fail)
    text = refusal(load, max_batch_prefill_tokens=100, max_num_seqs=8)
    said = str(error).partition(". ")[0]
    assert f"no memory for a step of 107 tokens ({said}); lower --max-batch-prefill-tokens" in text


def test_a_capture_that_fails_is_ended_and_says_why(monkeypatch) -> None:
    """A graph is left open otherwise, to which everything belongs that is launched from then on."""
    done, works = [], iter([0, 1])

    class Graph:
        def capture_begin(self, pool) -> None:
            done.append("begun")

        def capture_end(self) -> None:
            done.append("ended")
            raise RuntimeError("the capture has failed")

    for name, stand_in in dict(Stream=str, stream=nullcontext, synchronize=str, CUDAGraph=Graph).items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    with pytest.raises(ZeroDivisionError):
        CudaStreams(torch.device("cpu")).capture(lambda: 1 // (1 - next(works)), None)
    assert done == ["begun", "ended"]


def test_room_for_adapters_is_kept_when_there_are_some(gpus, load) -> None:
    gpus.memory.free = 110 << 20
    without, fewer, more = (
        load(kv_tokens=None, **options)[1].kv_tokens
        for options in ({}, *(dict(lora_adapters=["a=b"], max_loras=count) for count in (2, 4)))
    )
    assert without > fewer > more
    assert without - more == pytest.approx(2 * (without - fewer), abs=16)


def test_options_of_a_gpu_say_what_became_of_them(gpus, load) -> None:
    device, ready = load(speculate=4, overlap=False, cuda_graphs=[4, 1, 900], max_num_seqs=8, cpu_kernels="off")
    assert ready.reasons[:4] == [
        "device cpu (Stand-in): torch sees a GPU; --device cpu takes none",
        "cpu_kernels changes nothing: the model runs on a GPU",
        "speculate off: a GPU begins the next step before guesses could be compared",
        "attention auto: a stand-in",
    ]
    assert ready.reasons[-2:] == [
        "cuda_graphs of 3 sizes up to 8 rows",
        "overlap off: as asked; the GPU waits while tokens are read",
    ]
    assert (ready.can_speculate, device.depth) == (False, 0)
    device, ready = load(cuda_graphs=[0], quantize="bitsandbytes-nf4", kv_cache_dtype="fp8_e5m2")
    assert device.depth == 1 and ready.reasons[-1] == "cuda_graphs off: as asked"
    assert not any("CPU" in reason for reason in ready.reasons)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_answers_of_a_loaded_gpu_are_those_of_the_cpu(gpus, load, name) -> None:
    """All that is on the way but kernels and streams of a real one."""
    answers = []
    for device in ("cuda", "cpu"):
        run = Run(Engine(*load(name, device=device, kv_tokens=512, max_num_seqs=4, cuda_graphs=[1, 2])))
        for number in range(3):
            message = Submit(
                request_id=str(number), epoch=1, prompt_ids=[5, 6 + number, 7], output_ids=[], eos_token_ids=[],
                params=SamplingParams(max_new_tokens=5),
            )  # fmt: skip
            run.submit(message)
        run.finish()
        answers.append([run.outcome(str(number)) for number in range(3)])
    assert isinstance(run.loop.device, TorchDevice)
    assert answers[0] == answers[1] and all(end == "length" for _, end in answers[0])


@pytest.mark.parametrize(
    ("name", "options", "lengths"),
    [
        ("llama", dict(max_batch_prefill_tokens=300, max_num_seqs=7), [300, *[1] * 6]),
        ("llama", dict(max_batch_prefill_tokens=3, max_num_seqs=2), [3, 1]),
        ("llama", dict(max_batch_prefill_tokens=120, max_num_seqs=5, max_total_tokens=100), [99, 7, 6, 6, 6]),
        ("llama", dict(max_batch_prefill_tokens=300, max_num_seqs=2, max_total_tokens=100), [99, 99]),
        ("llama", dict(max_batch_prefill_tokens=300, max_num_seqs=1), [300]),
        ("t5", dict(max_batch_prefill_tokens=40, max_num_seqs=3), [1, 1, 1]),
    ],
)
def test_no_step_is_larger_than_the_one_that_is_tried(load, name, options, lengths) -> None:
    device, _ = load(name, device="cpu", kv_tokens=4096, **options)
    plan = largest_step(WorkerSettings(**options), device.model.spec)
    assert plan.num_tokens.tolist() == lengths and plan.starts[1:].any() == (len(lengths) > 1 and name != "t5")
    assert sum(len(init.encoder_ids) for init in plan.new_rows) == (40 if name == "t5" else 0)
    device.forward(plan)
    result = device.collect(device.sample(plan))
    assert len(result.ids) == len(lengths) and not result.errors


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_rows_of_few_tokens_are_tried_with_few_and_with_many_keys(load, name) -> None:
    options = dict(max_batch_prefill_tokens=20, max_num_seqs=2, max_total_tokens=100)
    device, _ = load(name, device="cpu", kv_tokens=4096, **options)
    plans = list(small_steps(WorkerSettings(**options), device.model.spec))
    tried = [(max(len(plan.new_rows[0].encoder_ids), *plan.num_tokens), plan.starts[0]) for plan in plans]
    assert tried == [(count, start) for count in (2, 4, 8, 16) for start in (0, 99 - count)]
    for plan in plans:
        device.forward(plan)
        assert not device.collect(device.sample(plan)).errors


@dataclass(frozen=True, slots=True)
class Layer:
    codes: torch.Tensor
    parts: tuple
    size: int


def test_nothing_of_a_layer_stays_behind_on_the_host() -> None:
    there, slots = torch.empty(2, device="meta"), LoraSlots(None, torch.float32)
    adapted = AdaptedLinear(DenseLinear(torch.zeros(2, 2), None), 2, slots)
    layer = Layer(torch.zeros(2), ([DenseLinear(torch.zeros(1), there)], adapted, None), 3)
    moved = cuda.finished(layer, torch.device("meta"), lambda node: node)
    (dense,), _, nothing = moved.parts
    assert dense.bias is there and nothing is None and moved.size == 3
    assert all(each.is_meta for each in (moved.codes, dense.weight, adapted.base.weight))
    assert cuda.finished(dense, torch.device("meta"), lambda node: node) is dense
    assert cuda.finished(moved, torch.device("meta"), lambda node: node) is moved


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_what_follows_from_the_config_is_where_the_weights_are(load, name) -> None:
    device, _ = load(name, device="cpu", kv_tokens=512)
    with torch.device("meta"):
        elsewhere = Decoder(device.model.spec, device.model.weights, ReferenceAttention())
    for model, kind in ((device.model, "cpu"), (elsewhere, "meta")):
        slopes = [shape.slopes for shape in model._shapes if shape.slopes is not None]
        made = [model._embedding_scale, *model._frequencies.values(), *slopes]
        assert len(made) > 1 and {tensor.device.type for tensor in made} == {kind}


def test_of_a_cpu_the_pool_takes_a_share_and_of_a_gpu_all() -> None:
    assert KvMemory(1000, 1).default_size == 250
    assert KvMemory(1000, 1, gpu_fraction=0.9).default_size == 1000
