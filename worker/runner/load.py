"""From options to a device that is ready: weights, type, memory for keys and values, and the limits that follow."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from common.errors import ConfigurationError
from common.settings import WorkerSettings
from worker.attention.pages import choose_kv_type, page_width
from worker.engine.device import Device
from worker.model.checkpoint import Checkpoint, weights_digest
from worker.model.config import read_config, stretch_rope
from worker.model.decoder import Decoder
from worker.model.families import read_spec
from worker.model.families.base import Family
from worker.model.loading import load_weights, weight_bytes
from worker.model.lora import LoraSlots
from worker.model.quant.choice import choose_quantisation
from worker.model.quant.linear import has_slow_products
from worker.model.quant.scheme import Quantisation
from worker.model.spec import AnySpec, QkNorm, Spec, T5Spec
from worker.model.t5 import T5, load_t5_weights, t5_weight_bytes
from worker.model.weights import CPU, DummySource, TensorSource
from worker.parallel.group import Alone, Group
from worker.parallel.shard import Shard, check_heads
from worker.pipe import Ready
from worker.runner.hardware import Cpu, Hardware, Kernels, Loaded, wants_cuda
from worker.runner.limits import Limits, choose_limits, free_text, on_each
from worker.runner.memory import readable
from worker.runner.torch_device import Model, TorchDevice

OnProgress = Callable[[str, int, int], None]


def load_device(settings: WorkerSettings, on_progress: OnProgress, group: Group | None = None) -> tuple[Device, Ready]:
    """Load one rank's part of the model of `settings.model_id`, a local folder.

    `on_progress(phase, bytes done, bytes in all)` counts the rank's bytes.

    Raises:
        ConfigurationError: if the model, an option or the memory does not allow it; one sentence with the fix.
    """
    group = group or Alone()
    reasons: list[str] = []
    torch.set_num_threads(settings.threads or _num_cores())
    folder = Path(settings.model_id)
    config = _config(settings, folder)
    spec, family = read_spec(config)
    check_shards(spec, group.shard.size)
    hardware = choose_hardware(settings, group.shard, reasons)
    quantisation = choose_quantisation(settings.quantize, config)
    source, digest, stored = _open(settings, folder, config, spec, family, hardware.torch_device)
    dtype = hardware.choose_dtype(settings.dtype, stored, reasons)
    kernels = hardware.kernels(dtype, reasons)
    quantisation = kernels.adapt(quantisation)
    num_bytes, num_ranks = _weight_bytes(spec, family, source, dtype, group.shard, quantisation), group.shard.size
    _check_memory(num_bytes, hardware.free_bytes(group), num_ranks)
    adapters = LoraSlots(family, dtype, hardware.torch_device)
    model = _load(settings, spec, family, source, dtype, group, quantisation, adapters, kernels, on_progress)
    reasons += _quantisation_reasons(quantisation, model, num_bytes, hardware)
    kv_type = choose_kv_type(settings.kv_cache_dtype, dtype)
    kv_bytes, unsaved = (_kv_bytes_per_token(spec, group.shard, each) for each in (kv_type, dtype))
    if kv_type is not dtype:
        saving = f"a token takes {readable(kv_bytes)} instead of {readable(unsaved)}{on_each(num_ranks)}"
        price = "; a CPU reads it more slowly" if hardware.name == "CPU" else ""
        reasons.append(f"kv_cache_dtype {settings.kv_cache_dtype}: {saving}{price}")
    loaded = Loaded(model=model, adapters=adapters, kv_type=kv_type, kv_bytes_per_token=kv_bytes, group=group)
    memory = hardware.kv_memory(loaded)
    limits = choose_limits(settings, spec, memory, reasons)
    if settings.prefix_caching and isinstance(spec, T5Spec):
        reasons.append("prefix caching off: an encoder reads each prompt whole, so that equal beginnings are of no use")
    device = hardware.device(loaded, limits, memory, reasons)
    return device, _ready(settings, spec, dtype, quantisation, digest, limits, hardware, reasons)


def load_on_cpu(settings: WorkerSettings) -> tuple[TorchDevice, Ready]:
    """The same for who wants to look into the device, whatever `--device` says."""
    device, ready = load_device(settings.model_copy(update={"device": "cpu"}), lambda phase, done, total: None)
    assert isinstance(device, TorchDevice)
    return device, ready


def choose_hardware(settings: WorkerSettings, shard: Shard, reasons: list[str]) -> Hardware:
    """A GPU of this rank's own, or the CPU.

    Raises:
        ConfigurationError: what was asked for is not there.
    """
    if not wants_cuda(settings.device):
        return Cpu(settings, reasons)
    # a CPU needs nothing of this
    from worker.runner.cuda import Cuda

    return Cuda(settings, shard, reasons)


def _config(settings: WorkerSettings, folder: Path) -> dict[str, Any]:
    """What config.json says, except for what the options say of rope."""
    config, kind = read_config(folder), settings.rope_scaling or "linear"
    if settings.rope_scaling is None and settings.rope_factor is None:
        return config
    stretched = stretch_rope(config, kind, settings.rope_factor or 1.0)
    spec, _ = read_spec(stretched)
    if not any(rope and rope.kind == kind for rope in getattr(spec, "ropes", ())):
        raise ConfigurationError(f"{spec.model_type} has no rope that --rope-scaling and --rope-factor could stretch")
    return stretched


def check_shards(spec: AnySpec, num_shards: int) -> None:
    """Raises ConfigurationError if the model cannot be split over so many ranks."""
    check_heads(spec.num_heads, spec.num_kv_heads, num_shards)
    if num_shards > 1 and isinstance(spec, Spec) and spec.qk_norm is QkNorm.FULL:
        raise ConfigurationError(
            f"{spec.model_type} normalises all heads of a token together and runs on one rank only: "
            "leave out --num-shard"
        )


def _kv_bytes_per_token(spec: AnySpec, shard: Shard, kv_type: torch.dtype) -> int:
    """Bytes that keys and values of one token take on this rank over all layers."""
    num_heads = 2 * spec.num_layers * len(shard.kv_heads(spec.num_kv_heads))
    return num_heads * page_width(spec.head_dim, kv_type) * kv_type.itemsize


def _num_cores() -> int:
    """Cores this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _open(
    settings: WorkerSettings,
    folder: Path,
    config: dict[str, Any],
    spec: AnySpec,
    family: Family,
    device: torch.device,
) -> tuple[TensorSource, str, torch.dtype]:
    """Where weights come from, their fingerprint and the type they are stored in."""
    if settings.load_format == "dummy":
        source = DummySource(is_tied=spec.is_tied, head_name=family.candidates("head", 0, 0)[0], device=device)
        return source, f"{source.name}-{weights_digest(config, [])}", source.dtype
    checkpoint = Checkpoint(folder, device)
    return checkpoint, weights_digest(config, checkpoint.files), checkpoint.dtype


def _weight_bytes(
    spec: AnySpec, family: Family, source: TensorSource, dtype: torch.dtype, shard: Shard, quantisation: Quantisation
) -> int:
    if isinstance(spec, T5Spec):
        return t5_weight_bytes(spec, family, source, dtype, shard, quantisation)
    return weight_bytes(spec, family, source, dtype, shard, quantisation)


def _quantisation_reasons(quantisation: Quantisation, model: Model, num_bytes: int, hardware: Hardware) -> list[str]:
    if quantisation.name == "none":
        return []
    reasons = [f"quantize {quantisation.name}: weights take {readable(num_bytes)}", *quantisation.notes]
    if has_slow_products(model.weights):
        reasons.append(
            f"quantize {quantisation.name} saves memory, not time: a {hardware.name} has no fast product for some of "
            "these weights, which are dequantised for each"
        )
    return reasons


def _check_memory(needed: int, free: int, num_ranks: int) -> None:
    if needed > free:
        raise ConfigurationError(
            f"the model needs {readable(needed)}{on_each(num_ranks)} for its weights but {free_text(free, num_ranks)}; "
            "choose a smaller model, --quantize int8 or int4, or --dtype bfloat16, or free memory"
        )


def _load(
    settings: WorkerSettings,
    spec: AnySpec,
    family: Family,
    source: TensorSource,
    dtype: torch.dtype,
    group: Group,
    quantisation: Quantisation,
    adapters: LoraSlots,
    kernels: Kernels,
    on_progress: OnProgress,
) -> Model:
    def report(done: int, total: int) -> None:
        on_progress("weights", done, total)

    options = (family, source, dtype, group.shard, report, quantisation, adapters, kernels.finish)
    attention, operations = kernels.attention, kernels.operations
    if isinstance(spec, T5Spec):
        return T5(spec, kernels.finish(load_t5_weights(spec, *options)), attention, group, operations)
    weights = kernels.finish(load_weights(spec, *options))
    longest = min(settings.max_total_tokens or spec.max_positions, spec.max_positions)
    # what follows from the config, such as frequencies, is to be where the weights are
    with nullcontext() if source.device == CPU else source.device:
        return Decoder(spec, weights, attention, group, longest, operations)


def _ready(
    settings: WorkerSettings,
    spec: AnySpec,
    dtype: torch.dtype,
    quantisation: Quantisation,
    digest: str,
    limits: Limits,
    hardware: Hardware,
    reasons: list[str],
) -> Ready:
    return Ready(
        vocab_size=spec.vocab_size,
        dtype=str(dtype).removeprefix("torch."),
        quantize=quantisation.name,
        weights_digest=digest,
        kv_tokens=limits.kv_tokens,
        block_size=settings.block_size,
        max_num_seqs=settings.max_num_seqs,
        max_input_tokens=limits.max_input_tokens,
        max_total_tokens=limits.max_total_tokens,
        max_batch_prefill_tokens=limits.max_batch_prefill_tokens,
        step_limit_s=settings.step_limit,
        reasons=reasons,
        decoder_start_id=spec.decoder_start_id if isinstance(spec, T5Spec) else None,
        can_speculate=hardware.can_speculate,
    )
