"""A GPU for each rank: what of its memory and kernels a model gets.

What a step takes besides weights is not computed but tried: the largest graph is captured, and a step runs that is as
large as any can get. What is less free then than before is what steps need. Small steps follow, for kernels that are
compiled when they are first launched.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from shutil import which
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from common.errors import ConfigurationError
from common.job import SamplingParams
from common.settings import WorkerSettings
from worker.engine.device import NO_IDS, Device, Ints, RowInit, StepPlan, StepTooLarge
from worker.model.loading import Finish, WeightsType
from worker.model.spec import AnySpec, T5Spec
from worker.model.tree import mapped
from worker.parallel.group import Group, agree_on_minimum
from worker.parallel.shard import Shard
from worker.runner.device_rows import DeviceRows
from worker.runner.gpu_sampler import Sampler
from worker.runner.hardware import (
    GPU_ATTENTIONS,
    Kernels,
    Loaded,
    check_attention,
    device_options,
    say_what_is_idle,
)
from worker.runner.limits import KvMemory, Limits, asked_total_tokens, prefill_tokens
from worker.runner.places import ascending
from worker.runner.streams import CudaStreams, is_out_of_memory
from worker.runner.vocabulary import Vocabulary

if TYPE_CHECKING:
    from worker.runner.gpu_device import GpuDevice

MakeSampler = Callable[[DeviceRows, Vocabulary], Sampler]

LEAST_CAPABILITY = (8, 0)
"""Of GPUs that compute in bfloat16; kernels are compiled for these."""
FOR_CPUS = ("cpu_kernels",)
NO_TRITON = "kernels for a GPU are written in Triton, which is not installed: pip install 'inferfleet[triton]'"
NO_COMPILER = "Triton has launchers made by a C compiler, and there is none: install gcc or clang, or name one by CC"


class Memory(Protocol):
    """Of one GPU."""

    def free_and_total(self) -> tuple[int, int]:
        """Bytes, whoever uses the rest."""

    def tidy(self) -> None:
        """Give back what nobody uses any more."""


class CudaMemory:
    def __init__(self, device: torch.device) -> None:
        self._device = device

    def free_and_total(self) -> tuple[int, int]:
        return torch.cuda.mem_get_info(self._device)

    def tidy(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


class Cuda:
    """The GPU whose number among those that this process sees is the rank's among those of this machine."""

    name, can_speculate = "GPU", False

    def __init__(self, settings: WorkerSettings, shard: Shard, reasons: list[str]) -> None:
        self._settings, place = settings, shard.rank - settings.local_ranks.start
        _check_gpus(settings, place)
        self.torch_device = gpu_number(place)
        torch.cuda.set_device(self.torch_device)
        self._memory: Memory = CudaMemory(self.torch_device)
        self._streams = CudaStreams(self.torch_device)
        how = "as asked" if settings.device == "cuda" else "torch sees a GPU; --device cpu takes none"
        reasons.append(f"device {self.torch_device} ({torch.cuda.get_device_name(self.torch_device)}): {how}")
        say_what_is_idle(settings, FOR_CPUS, "the model runs on a GPU", reasons)
        if settings.speculate:
            reasons.append("speculate off: a GPU begins the next step before guesses could be compared")

    def choose_dtype(self, option: str, stored: torch.dtype, reasons: list[str]) -> torch.dtype:
        """As stored."""
        dtype: torch.dtype = stored if option == "auto" else getattr(torch, option)
        if dtype is torch.float64:
            raise ConfigurationError("float64 is for a CPU; give --dtype bfloat16, float16 or float32, or --device cpu")
        return dtype

    def free_bytes(self, group: Group) -> int:
        return agree_on_minimum(group, self._free_bytes())

    def _free_bytes(self) -> int:
        """What is left of the fraction that may be taken."""
        free, total = self._memory.free_and_total()
        return max(free - self._spare_bytes(total), 0)

    def _spare_bytes(self, total: int) -> int:
        return int((1.0 - self._settings.cuda_memory_fraction) * total)

    def kernels(self, dtype: torch.dtype, reasons: list[str]) -> Kernels:
        kernels, self._make_sampler = triton_kernels(self._settings.attention, self.torch_device, dtype, reasons)
        return kernels

    def kv_memory(self, loaded: Loaded) -> KvMemory:
        self._memory.tidy()
        free = self._free_bytes() - self._lora_bytes(loaded)
        left = agree_on_minimum(loaded.group, max(free - self._taken_by_steps(loaded), 0))
        num_ranks = loaded.group.shard.size
        return KvMemory(left, loaded.kv_bytes_per_token, num_ranks, self._settings.cuda_memory_fraction)

    def _lora_bytes(self, loaded: Loaded) -> int:
        """For as many adapters as there may be in a batch, each as large as it may be."""
        if not self._settings.lora_adapters:
            return 0
        slots, targets = loaded.adapters, list(dict.fromkeys(loaded.adapters.targets.values()))
        return slots.growth(self._settings.max_loras - 1, self._settings.max_lora_rank, targets)

    def _taken_by_steps(self, loaded: Loaded) -> int:
        """What is less free once the largest graph and the largest step ran, the null page aside."""
        plan = largest_step(self._settings, loaded.model.spec)
        before, _ = self._memory.free_and_total()
        with _no_memory_is_said(
            f"beside its weights the GPU has no memory for a step of {len(plan.tokens)} tokens",
            "lower --max-batch-prefill-tokens or --max-num-seqs, choose a smaller model, or --quantize",
        ):
            self._try_steps(loaded, [plan, *small_steps(self._settings, loaded.model.spec)])
        after, _ = self._memory.free_and_total()
        self._memory.tidy()
        return before - after - self._settings.block_size * loaded.kv_bytes_per_token

    def _try_steps(self, loaded: Loaded, plans: list[StepPlan]) -> None:
        asked, _ = asked_total_tokens(self._settings, loaded.model.spec)
        device = self._make(loaded, 0, asked, 0)
        if sizes := self._graph_sizes():
            device.capture(sizes[-1:])
        for plan in plans:
            device.forward(plan)
            device.collect(device.sample(plan))

    def device(self, loaded: Loaded, limits: Limits, memory: KvMemory, reasons: list[str]) -> Device:
        _, total = self._memory.free_and_total()
        # adapters that nobody spoke of at the start must do with what pages left alone
        max_lora_bytes = max(self._lora_bytes(loaded), self._spare_bytes(total))
        num_blocks = limits.kv_tokens // self._settings.block_size
        with _no_memory_is_said(
            f"the GPU has no memory for a KV cache of {limits.kv_tokens} tokens",
            "lower --kv-tokens or --cuda-memory-fraction",
        ):
            device = self._make(loaded, num_blocks, limits.max_total_tokens, max_lora_bytes)
            sizes = self._graph_sizes()
            reasons.append(device.capture(sizes) if sizes else "cuda_graphs off: as asked")
        if not self._settings.overlap:
            reasons.append("overlap off: as asked; the GPU waits while tokens are read")
        return device

    def _graph_sizes(self) -> list[int]:
        """Ascending; none if there are to be no graphs."""
        from worker.runner.graphs import default_sizes

        most, asked = self._settings.max_num_seqs, self._settings.cuda_graphs
        if asked == [0]:
            return []
        return sorted({min(size, most) for size in asked}) or default_sizes(most)

    def _make(self, loaded: Loaded, num_blocks: int, max_total_tokens: int, max_lora_bytes: int) -> GpuDevice:
        from worker.runner.gpu_device import GpuDevice

        options = device_options(self._settings, num_blocks, max_total_tokens)
        return GpuDevice(
            loaded.model,
            loaded.kv_type,
            loaded.adapters,
            self._streams,
            self._make_sampler,
            max_lora_bytes=max_lora_bytes,
            depth=int(self._settings.overlap),
            **options,
        )


@contextmanager
def _no_memory_is_said(what: str, fix: str) -> Iterator[None]:
    """Whoever of torch, CUDA and Triton had none inside: a ConfigurationError."""
    try:
        yield
    except (RuntimeError, StepTooLarge) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        said = str(error).partition(". ")[0].partition("\n")[0]
        raise ConfigurationError(f"{what} ({said}); {fix}") from None


def gpu_number(place: int) -> torch.device:
    """Of those that CUDA_VISIBLE_DEVICES lets this process see."""
    return torch.device("cuda", place)


def triton_kernels(
    attention: str, device: torch.device, dtype: torch.dtype, reasons: list[str]
) -> tuple[Kernels, MakeSampler]:
    """Imported here: Triton takes a second, and a CPU has no use for it."""
    from worker.attention.flash import choose_attention
    from worker.kernels.triton.operations import TritonOperations
    from worker.kernels.triton.quantised import for_gpu, pack_for_gpu
    from worker.kernels.triton.sampling import TritonSampler

    chosen, why = choose_attention(attention, device, dtype)
    reasons.append(why)
    finish = partial(finished, device=device, pack=pack_for_gpu)
    return Kernels(chosen, TritonOperations(), finish, for_gpu), TritonSampler


def finished(layer: WeightsType, /, device: torch.device, pack: Finish) -> WeightsType:
    """The layer with products for a GPU, and with all there that was made on the host of its config: orders of columns,
    tables of codes."""
    moved: WeightsType = mapped(pack(layer), lambda node: node.to(device) if isinstance(node, Tensor) else node)
    return moved


def _check_gpus(settings: WorkerSettings, place: int) -> None:
    """Raises ConfigurationError if this machine has no GPU of that number, one that is too old, or no way to make
    kernels for it."""
    check_attention(settings.attention, GPU_ATTENTIONS, "a GPU")
    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else ", since this build of it is for CPUs"
        raise ConfigurationError(f"--device cuda: torch sees no GPU{built}")
    count = torch.cuda.device_count()
    if settings.ranks_per_node > count:
        raise ConfigurationError(
            f"{settings.ranks_per_node} ranks on one machine need a GPU each, and this process sees {count}; lower "
            "--num-shard, look at CUDA_VISIBLE_DEVICES, or give --device cpu"
        )
    capability = torch.cuda.get_device_capability(place)
    if capability < LEAST_CAPABILITY:
        found, least = (".".join(map(str, each)) for each in (capability, LEAST_CAPABILITY))
        raise ConfigurationError(
            f"the GPU has compute capability {found} and kernels need {least}; give --device cpu, or hide it by "
            "CUDA_VISIBLE_DEVICES"
        )
    if find_spec("triton") is None:
        raise ConfigurationError(NO_TRITON)
    if not any(map(which, [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"])):
        raise ConfigurationError(NO_COMPILER)


def largest_step(settings: WorkerSettings, spec: AnySpec) -> StepPlan:
    """All tokens of prompts that a step may have, as many as possible in one row, beside rows that go on; an encoder
    gets the longest input. Everything is sampled with all that takes memory."""
    longest, budget = _most_of_a_prompt(settings, spec)
    lengths = np.ones(settings.max_num_seqs, np.int32)
    if isinstance(spec, T5Spec):
        return _step(lengths, 0 * lengths, min(longest, budget), settings.block_size)
    lengths[0] = min(longest, budget)
    share, rest = divmod(budget - int(lengths[0]), max(len(lengths) - 1, 1))
    lengths[1:] += share
    lengths[1 : 1 + rest] += 1
    starts = np.ones_like(lengths)
    starts[0] = 0
    return _step(np.minimum(lengths, longest), starts, 0, settings.block_size)


FEW_QUERIES = (2, 4, 8, 16, 32, 64)
"""Most tokens of a row for which kernels have tiles of their own; how many heads share keys decides which of them do
the same."""


def small_steps(settings: WorkerSettings, spec: AnySpec) -> Iterator[StepPlan]:
    """So many tokens of a prompt beside a row that goes on, with few keys before them and with many, which are cut into
    parts: kernels for them are compiled now, which in service would keep everybody waiting."""
    longest, budget = _most_of_a_prompt(settings, spec)
    has_encoder = isinstance(spec, T5Spec)
    for count in FEW_QUERIES:
        for start in (0, longest - count):
            if count <= min(longest, budget):
                lengths = np.array([1 if has_encoder else count, 1][: settings.max_num_seqs], np.int32)
                starts = np.array([start, 1][: settings.max_num_seqs], np.int32)
                yield _step(lengths, starts, count if has_encoder else 0, settings.block_size)


def _most_of_a_prompt(settings: WorkerSettings, spec: AnySpec) -> tuple[int, int]:
    """Tokens in all, and in one step."""
    return asked_total_tokens(settings, spec)[0] - 1, prefill_tokens(settings, is_gpu=True)


def _step(lengths: Ints, starts: Ints, num_encoder_ids: int, block_size: int) -> StepPlan:
    """Of rows with so many tokens, and so many before them; the first one brings the encoder's input. All pages are
    page 0, which everybody may write."""
    num_rows, counts = len(lengths), -(-(starts + lengths) // block_size)
    return StepPlan(
        step=1,
        rows=np.arange(num_rows, dtype=np.int32),
        num_tokens=lengths,
        num_drafts=np.zeros(num_rows, np.int32),
        starts=starts,
        tokens=np.zeros(int(lengths.sum()), np.int32),
        samples=np.ones(num_rows, np.bool_),
        block_rows=np.repeat(np.arange(num_rows, dtype=np.int32), counts),
        block_offsets=ascending(np.zeros(num_rows, np.int64), counts.astype(np.int64)).astype(np.int32),
        block_ids=np.zeros(int(counts.sum()), np.int32),
        new_rows=[
            _row(row, int(end), block_size, num_encoder_ids if row == 0 else 0) for row, end in enumerate(lengths)
        ],
        freed_rows=NO_IDS,
    )


def _row(row: int, num_tokens: int, block_size: int, num_encoder_ids: int) -> RowInit:
    params = SamplingParams(max_new_tokens=1, do_sample=True, top_p=0.9, repetition_penalty=1.1, num_top_logprobs=1)
    return RowInit(
        row=row,
        request_id=str(row),
        params=params,
        prompt_ids=np.zeros(num_tokens, np.int32),
        output_ids=NO_IDS,
        stop_ids=NO_IDS,
        encoder_ids=np.zeros(num_encoder_ids, np.int32),
        cross_blocks=np.zeros(-(-num_encoder_ids // block_size), np.int32),
    )
