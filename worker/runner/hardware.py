"""What a rank computes on. Loading asks it for types, memory, kernels and the device of the engine core."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from common.errors import ConfigurationError
from common.settings import WorkerSettings
from worker.attention import Attention
from worker.attention.cpu import CpuAttention
from worker.attention.native import QUERY_TYPES, NativeAttention
from worker.attention.reference import ReferenceAttention
from worker.engine.device import Device
from worker.kernels.build import load_library
from worker.kernels.elementwise import CpuOperations
from worker.kernels.products import pack
from worker.kernels.room import Room
from worker.model.loading import Finish
from worker.model.lora import LoraSlots
from worker.model.operations import Operations
from worker.model.quant.scheme import Quantisation
from worker.model.weights import CPU
from worker.parallel.group import Group, agree_on_minimum
from worker.runner.limits import KvMemory, Limits
from worker.runner.memory import available_bytes, return_freed_memory
from worker.runner.torch_device import Model, TorchDevice

CPU_ATTENTIONS, GPU_ATTENTIONS = ("auto", "cpu", "reference"), ("auto", "triton", "flash", "torch")
FOR_GPUS = ("cuda_graphs", "cuda_memory_fraction", "overlap")


def as_it_is(quantisation: Quantisation) -> Quantisation:
    return quantisation


@dataclass(frozen=True, slots=True)
class Kernels:
    """What a model is made with. `finish` gets each layer when it has been read; `adapt` says of a quantisation how its
    products are made here."""

    attention: Attention
    operations: Operations
    finish: Finish
    adapt: Callable[[Quantisation], Quantisation] = as_it_is


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model in memory, and what its pages, requests and adapters are to be like."""

    model: Model
    adapters: LoraSlots
    kv_type: torch.dtype
    kv_bytes_per_token: int
    group: Group


class Hardware(Protocol):
    """Methods that add to `reasons` say there what they chose."""

    @property
    def name(self) -> str:
        """CPU or GPU."""

    @property
    def torch_device(self) -> torch.device: ...

    @property
    def can_speculate(self) -> bool: ...

    def choose_dtype(self, option: str, stored: torch.dtype, reasons: list[str]) -> torch.dtype:
        """The type to compute in.

        Raises:
            ConfigurationError: it has no kernels for the one that was asked for.
        """

    def free_bytes(self, group: Group) -> int:
        """What every rank may take: all go by the one that has least."""

    def kernels(self, dtype: torch.dtype, reasons: list[str]) -> Kernels:
        """
        Raises:
            ConfigurationError: an option asks for some that are not to be had.
        """

    def kv_memory(self, loaded: Loaded) -> KvMemory:
        """What there is for keys and values now that the model is loaded."""

    def device(self, loaded: Loaded, limits: Limits, memory: KvMemory, reasons: list[str]) -> Device:
        """
        Raises:
            ConfigurationError: there is no memory for the pages.
        """


def device_options(settings: WorkerSettings, num_blocks: int, max_total_tokens: int) -> dict[str, Any]:
    """What devices of all kinds are made with, besides `max_lora_bytes`."""
    return {
        "num_blocks": num_blocks,
        "block_size": settings.block_size,
        "max_num_seqs": settings.max_num_seqs,
        "max_total_tokens": max_total_tokens,
        "max_lora_rank": settings.max_lora_rank,
    }


def say_what_is_idle(settings: WorkerSettings, names: tuple[str, ...], why: str, reasons: list[str]) -> None:
    """Options that were given and have no meaning on this hardware."""
    reasons += [f"{name} changes nothing: {why}" for name in names if name in settings.model_fields_set]


def check_attention(option: str, allowed: tuple[str, ...], where: str) -> None:
    """Raises ConfigurationError if `where` has no such attention."""
    if option not in allowed:
        raise ConfigurationError(f"--attention {option} is not for {where}, which has {', '.join(allowed)}")


def wants_cuda(option: str) -> bool:
    """Whether by `--device` the model is to run on a GPU."""
    return option == "cuda" or (option == "auto" and torch.cuda.is_available())


class Cpu:
    """All cores of a rank, with the C++ kernels where there are some."""

    name, torch_device, can_speculate = "CPU", CPU, True

    def __init__(self, settings: WorkerSettings, reasons: list[str]) -> None:
        check_attention(settings.attention, CPU_ATTENTIONS, "a CPU")
        say_what_is_idle(settings, FOR_GPUS, "the model runs on a CPU", reasons)
        self._settings = settings

    def choose_dtype(self, option: str, stored: torch.dtype, reasons: list[str]) -> torch.dtype:
        return cpu_dtype(option, stored, reasons)

    def free_bytes(self, group: Group) -> int:
        """Ranks of one machine share it."""
        return agree_on_minimum(group, available_bytes() // self._settings.ranks_per_node)

    def kernels(self, dtype: torch.dtype, reasons: list[str]) -> Kernels:
        library = load_library(self._settings.cpu_kernels)
        if library is not None:
            library.inferfleet_set_threads(torch.get_num_threads())
        operations = Operations() if library is None else CpuOperations(library)
        finish = partial(pack, library=library, room=Room())
        return Kernels(_attention(self._settings.attention, library, dtype), operations, finish)

    def kv_memory(self, loaded: Loaded) -> KvMemory:
        return_freed_memory()
        return KvMemory(self.free_bytes(loaded.group), loaded.kv_bytes_per_token, loaded.group.shard.size)

    def device(self, loaded: Loaded, limits: Limits, memory: KvMemory, reasons: list[str]) -> TorchDevice:
        num_blocks = limits.kv_tokens // self._settings.block_size
        options = device_options(self._settings, num_blocks, limits.max_total_tokens)
        max_lora_bytes = memory.free - limits.kv_tokens * memory.bytes_per_token
        try:
            return TorchDevice(loaded.model, loaded.kv_type, loaded.adapters, max_lora_bytes=max_lora_bytes, **options)
        except MemoryError as error:
            raise ConfigurationError(
                f"there is no memory for a KV cache of {limits.kv_tokens} tokens; lower --kv-tokens"
            ) from error


def cpu_dtype(option: str, stored: torch.dtype, reasons: list[str]) -> torch.dtype:
    """As stored, except that a CPU has no fast float16."""
    if option != "auto":
        return getattr(torch, option)  # type: ignore[no-any-return]
    if stored is torch.float16:
        reasons.append("dtype bfloat16: the checkpoint is float16, which a CPU computes slowly")
        return torch.bfloat16
    return stored


def _attention(option: str, kernels: ctypes.CDLL | None, dtype: torch.dtype) -> Attention:
    if option == "reference":
        return ReferenceAttention()
    if kernels is not None and option != "cpu" and dtype in QUERY_TYPES:
        return NativeAttention(kernels)
    return CpuAttention()
