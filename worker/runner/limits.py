"""How many tokens fit, in one request and in all of them together, and a line of why for each limit."""

from __future__ import annotations

from dataclasses import dataclass

from common.errors import ConfigurationError
from common.settings import WorkerSettings
from worker.engine.device import fitting_total_tokens
from worker.model.spec import AnySpec, T5Spec
from worker.runner.memory import readable

DEFAULT_KV_BYTES = 2 << 30
KV_SHARE_OF_FREE_MEMORY = 0.25
DEFAULT_PREFILL_TOKENS, DEFAULT_GPU_PREFILL_TOKENS = 2048, 8192


@dataclass(frozen=True, slots=True)
class Limits:
    kv_tokens: int
    max_input_tokens: int
    max_total_tokens: int
    max_batch_prefill_tokens: int


@dataclass(frozen=True, slots=True)
class KvMemory:
    """Bytes that are free to each of `num_ranks` ranks, and what a token's keys and values take of them there. With a
    `gpu_fraction` they are what is left of that much of a GPU, and nobody else wants them."""

    free: int
    bytes_per_token: int
    num_ranks: int = 1
    gpu_fraction: float | None = None

    @property
    def default_size(self) -> int:
        if self.gpu_fraction is not None:
            return self.free
        return min(DEFAULT_KV_BYTES, int(self.free * KV_SHARE_OF_FREE_MEMORY))

    @property
    def why_default(self) -> str:
        if self.gpu_fraction is not None:
            return f"what weights and the largest step leave of {self.gpu_fraction:.0%} of a GPU"
        is_most = self.default_size == DEFAULT_KV_BYTES
        return f"the default of {readable(self.default_size)}" if is_most else f"{_cpu_share()} of the free memory"

    @property
    def when_too_small(self) -> str:
        if self.gpu_fraction is not None:
            return (
                f" in {self.gpu_fraction:.0%} of the GPU beside weights and the largest step; choose a smaller model, "
                "--quantize, a smaller --max-batch-prefill-tokens or --max-num-seqs, or raise --cuda-memory-fraction"
            )
        return f", of which it may take {_cpu_share()}; choose a smaller model, free memory, or give --kv-tokens"

    def size(self, num_tokens: int) -> str:
        return readable(num_tokens * self.bytes_per_token) + on_each(self.num_ranks)


def _cpu_share() -> str:
    return f"{KV_SHARE_OF_FREE_MEMORY:.0%}"


def on_each(num_ranks: int) -> str:
    """Where so many bytes are meant."""
    return f" on each of {num_ranks} ranks" if num_ranks > 1 else ""


def free_text(free: int, num_ranks: int) -> str:
    """How a sentence on too little memory ends."""
    return f"only {readable(free)} of memory is free" + (" for each" if num_ranks > 1 else "")


def prefill_tokens(settings: WorkerSettings, *, is_gpu: bool) -> int:
    return settings.max_batch_prefill_tokens or (DEFAULT_GPU_PREFILL_TOKENS if is_gpu else DEFAULT_PREFILL_TOKENS)


def choose_limits(settings: WorkerSettings, spec: AnySpec, memory: KvMemory, reasons: list[str]) -> Limits:
    """Size of the KV pool, and the longest request; each gets a reason.

    Raises:
        ConfigurationError: if nothing useful fits.
    """
    has_encoder, block_size = isinstance(spec, T5Spec), settings.block_size
    num_spare = (2 if has_encoder else 1) * block_size
    asked, why_total = asked_total_tokens(settings, spec)
    kv_tokens, why_kv = _kv_tokens(settings, asked + num_spare, block_size + num_spare, memory)
    total = fitting_total_tokens(asked, kv_tokens, block_size, has_encoder=has_encoder)
    if total < asked:
        why_total = f" instead of {asked}: the KV cache holds {kv_tokens} tokens"
    prefill = prefill_tokens(settings, is_gpu=memory.gpu_fraction is not None)
    inputs, why_input = _input_tokens(settings, total, prefill if has_encoder else total)
    num_full = kv_tokens // (total + num_spare)
    reasons += [
        f"kv_tokens {kv_tokens} ({memory.size(kv_tokens)}){why_kv}",
        f"max_num_seqs {settings.max_num_seqs}{_origin(settings, 'max_num_seqs')}; "
        f"the KV cache holds {num_full} of the longest requests",
        f"max_total_tokens {total}{why_total}",
        f"max_input_tokens {inputs}{why_input}",
    ]
    return Limits(kv_tokens, inputs, total, prefill)


def _origin(settings: WorkerSettings, name: str) -> str:
    if name in settings.model_fields_set:
        return ": as asked"
    return f": the default; --{name.replace('_', '-')} changes it"


def asked_total_tokens(settings: WorkerSettings, spec: AnySpec) -> tuple[int, str]:
    """The longest request before it is known what the pool holds, and why."""
    asked, known = settings.max_total_tokens, spec.max_positions
    if asked is None:
        return known, ": as long as the model's config says; --max-total-tokens changes it"
    if asked < 2:
        raise ConfigurationError("--max-total-tokens 1 is too small: prompt and answer have a token each at least")
    if asked > known and spec.is_position_bound:
        return known, f" instead of {asked}: the model knows no more positions"
    return asked, ": as asked"


def _kv_tokens(settings: WorkerSettings, longest: int, least: int, memory: KvMemory) -> tuple[int, str]:
    """Tokens in whole blocks: as asked, or what a share of the free memory holds, up to `max_num_seqs` requests that
    take `longest` tokens each. `least` is what the shortest request takes."""
    if settings.kv_tokens is not None:
        return _asked_kv_tokens(settings, settings.kv_tokens, least, memory)
    size = memory.default_size
    useful = settings.max_num_seqs * longest
    num_tokens = min(size // memory.bytes_per_token, useful) // settings.block_size * settings.block_size
    if num_tokens < least:
        raise ConfigurationError(
            f"a KV cache of {least} tokens at least needs {memory.size(least)} but "
            f"{free_text(memory.free, memory.num_ranks)}{memory.when_too_small}"
        )
    is_all = useful * memory.bytes_per_token <= size
    why = "all that the largest batch can use" if is_all else memory.why_default
    return num_tokens, f": {why}; --kv-tokens changes it"


def _asked_kv_tokens(settings: WorkerSettings, asked: int, least: int, memory: KvMemory) -> tuple[int, str]:
    if asked * memory.bytes_per_token > memory.free:
        raise ConfigurationError(
            f"--kv-tokens {asked} needs {memory.size(asked)} but {free_text(memory.free, memory.num_ranks)}; "
            f"at most {memory.free // memory.bytes_per_token} fit"
        )
    num_tokens = asked // settings.block_size * settings.block_size
    if num_tokens < least:
        num_blocks = {2: "two", 3: "three"}[least // settings.block_size]
        raise ConfigurationError(f"--kv-tokens {asked} is too small: it must be at least {least}, {num_blocks} blocks")
    is_whole = num_tokens == asked
    return num_tokens, ": as asked" if is_whole else f" instead of {asked}: whole blocks of {settings.block_size}"


def _input_tokens(settings: WorkerSettings, total: int, encoder_limit: int) -> tuple[int, str]:
    asked, inputs = settings.max_input_tokens, total - 1
    if asked is not None and settings.max_total_tokens is not None and asked >= settings.max_total_tokens:
        raise ConfigurationError(
            f"--max-input-tokens {asked} must be smaller than --max-total-tokens {settings.max_total_tokens}"
        )
    wanted = min(asked or inputs, inputs)
    if wanted > encoder_limit:
        why = "an encoder reads its whole input in one step; --max-batch-prefill-tokens changes it"
        return encoder_limit, f" instead of {wanted}: {why}"
    if asked is None:
        return inputs, ": all but one token for the answer; --max-input-tokens changes it"
    if asked > inputs:
        return inputs, f" instead of {asked}: one token of {total} is for the answer"
    return asked, ": as asked"
