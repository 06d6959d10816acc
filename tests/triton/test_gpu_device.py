"""A small model on the GPU device with every kernel at once, in graphs and out of them, against the CPU device."""

from __future__ import annotations

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
from worker.runner.load import load_device
from worker.runner.torch_device import TorchDevice

OPTIONS = dict(
    kv_tokens=512, max_num_seqs=2, max_total_tokens=64, max_batch_prefill_tokens=24, dtype="float32", threads=1,
    cpu_kernels="off",
)  # fmt: skip
PARAMS = [dict(do_sample=True, temperature=1.3, seed=5), dict(repetition_penalty=1.3, num_top_logprobs=2)]


def gpu_device(loaded: TorchDevice, ready: Ready, streams: FakeStreams) -> GpuDevice:
    """The same weights on another device."""
    model = loaded.model
    model = Decoder(model.spec, model.weights, TritonAttention(), None, ready.max_total_tokens, TritonOperations())
    device = GpuDevice(
        model, torch.float32, loaded._adapters._slots, streams, TritonSampler, block_size=ready.block_size,
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


def test_with_all_kernels_together_the_tokens_are_those_of_the_cpu(tmp_path) -> None:
    torch.set_num_threads(1)
    folder, streams = tiny_models.save("qwen3", tmp_path), FakeStreams(1)
    loaded, ready = load_device(WorkerSettings(model_id=str(folder), **OPTIONS), lambda *_: None)
    expected = outcomes(loaded, ready)
    got = outcomes(gpu_device(loaded, ready, streams), ready)
    assert sum(graph.num_replays for graph in streams.graphs) >= 3
    for (ids, finish, logprobs), (mine, end, others) in zip(expected, got, strict=True):
        assert (ids, finish) == (mine, end)
        torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(others), atol=1e-3, rtol=0)
