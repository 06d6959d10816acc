"""A small model on the GPU device with every kernel at once, in graphs and out of them, against the CPU device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from common.job import SamplingParams
from common.settings import WorkerSettings
from tests.support import tiny_models
from tests.support.engine_run import Engine, Run
from tests.worker.runner.fake_streams import FakeStreams
from worker.attention.triton import TritonAttention
from worker.engine.device import Device
from worker.kernels.triton.operations import TritonOperations
from worker.kernels.triton.sampling import TritonSampler
from worker.model.decoder import Decoder
from worker.pipe import Ready, Submit
from worker.runner.gpu_device import GpuDevice
from worker.runner.graphs import DecodeGraphs
from worker.runner.load import load_device
from worker.runner.torch_device import TorchDevice

OPTIONS = dict(
    kv_tokens=512, max_num_seqs=2, max_total_tokens=64, max_batch_prefill_tokens=24, dtype="float32", threads=1,
    cpu_kernels="off",
)  # fmt: skip
PARAMS = [dict(do_sample=True, temperature=1.3, seed=5), dict(repetition_penalty=1.3, num_top_logprobs=2)]


def load(folder: Path, **options) -> tuple[Any, Ready]:
    return load_device(WorkerSettings(model_id=str(folder), **OPTIONS, **options), lambda *_: None)


def in_the_interpreter(loaded: TorchDevice, ready: Ready) -> GpuDevice:
    """The same weights on a device whose kernels are numpy."""
    model = loaded.model
    model = Decoder(model.spec, model.weights, TritonAttention(), None, ready.max_total_tokens, TritonOperations())
    device = GpuDevice(
        model, torch.float32, loaded._adapters._slots, FakeStreams(1), TritonSampler, block_size=ready.block_size,
        num_blocks=ready.kv_tokens // ready.block_size, max_num_seqs=ready.max_num_seqs,
        max_total_tokens=ready.max_total_tokens, max_lora_rank=8, max_lora_bytes=1 << 30,
    )  # fmt: skip
    device.capture([2])
    return device


def outcomes(device: Device, ready: Ready) -> list[tuple[list[int], str, list[float]]]:
    run, draw = Run(Engine(device, ready)), torch.Generator().manual_seed(3)
    for number, params in enumerate(PARAMS):
        ids = torch.randint(256, (3 + 8 * number,), generator=draw).tolist()
        run.submit(
            Submit(
                request_id=str(number), epoch=1, prompt_ids=ids, output_ids=[], eos_token_ids=[],
                params=SamplingParams(max_new_tokens=4 - number, **params),
            )
        )  # fmt: skip
    run.finish()
    assert run.scheduler.stats.batch_max == 2
    return [(*run.outcome(str(number)), run.logprobs(str(number))) for number in range(len(PARAMS))]


def test_with_all_kernels_together_the_tokens_are_those_of_the_cpu(tmp_path, device, monkeypatch) -> None:
    torch.set_num_threads(1)
    folder, replayed, replay = tiny_models.save("qwen3", tmp_path), [], DecodeGraphs.forward
    loaded, ready = load(folder, device="cpu")
    expected = outcomes(loaded, ready)
    if device.type == "cuda":
        tried, ready = load(folder, device="cuda", cuda_graphs=[2])
    else:
        tried = in_the_interpreter(loaded, ready)
    assert isinstance(tried, GpuDevice) and tried.pages.device.type == device.type and tried._graphs.sizes == [2]

    def watch(graphs: DecodeGraphs, size: int, words: torch.Tensor) -> torch.Tensor:
        replayed.append(size)
        return replay(graphs, size, words)

    monkeypatch.setattr(DecodeGraphs, "forward", watch)
    got = outcomes(tried, ready)
    assert len(replayed) >= 2
    for (ids, finish, logprobs), (mine, end, others) in zip(expected, got, strict=True):
        assert (ids, finish) == (mine, end)
        torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(others), atol=1e-3, rtol=0)
