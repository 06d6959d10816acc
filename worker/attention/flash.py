"""Attention on a GPU by libraries that may be installed, for what they can say: FlashAttention 3 and 2 (Shah et al.,
arXiv 2407.08608; Dao, arXiv 2307.08691) and torch's own, which is the latter. All else our own kernels do.

A step goes to one of them layer by layer, so that a model may have layers of both kinds.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from common.errors import ConfigurationError
from worker.attention import Attention, Batch, DeviceBatch, LayerShape

TYPES = (torch.float16, torch.bfloat16)
MAX_HEAD_DIM, HEAD_DIM_UNIT = 256, 8
HOPPER, AMPERE = (9, 0), (8, 0)

Function = Callable[..., Any]


class Meta(NamedTuple):
    """A step, and what the library has made of it, if it can take any layer of it."""

    step: DeviceBatch
    prepared: Any


class Library(Protocol):
    """`prepare` is called once per step, and says None if the step is not for this library."""

    name: str
    reads_whole_pages: bool

    def prepare(self, step: DeviceBatch) -> Any: ...

    def can_express(self, step: DeviceBatch, layer: LayerShape) -> bool: ...

    def attend(
        self, q: Tensor, k_pages: Tensor, v_pages: Tensor, step: DeviceBatch, prepared: Any, layer: LayerShape
    ) -> Tensor: ...


class FlashAttention:
    """What `library` can do it does, and `paged` the rest."""

    def __init__(self, library: Library, paged: Attention) -> None:
        self.library, self.paged = library, paged
        self.reads_whole_pages = library.reads_whole_pages or paged.reads_whole_pages

    def prepare(self, batch: Batch | DeviceBatch, block_size: int) -> Meta:
        step = self.paged.prepare(batch, block_size)
        return Meta(step, self.library.prepare(step))

    def attend(self, q: Tensor, k_pages: Tensor, v_pages: Tensor, meta: Meta, layer: LayerShape) -> Tensor:
        if meta.prepared is None or not _fits(q, k_pages) or not self.library.can_express(meta.step, layer):
            return self.paged.attend(q, k_pages, v_pages, meta.step, layer)
        return self.library.attend(q, k_pages, v_pages, meta.step, meta.prepared, layer)


def _fits(q: Tensor, pages: Tensor) -> bool:
    is_possible_head = q.shape[2] <= MAX_HEAD_DIM and q.shape[2] % HEAD_DIM_UNIT == 0
    return bool(len(q)) and is_possible_head and q.dtype in TYPES and pages.dtype is q.dtype


class Flash3:
    """Reads pages of any size, whole ones at that. `run` is flash_attn_with_kvcache of flash_attn_interface."""

    name, reads_whole_pages = "flash-attn 3", True

    def __init__(self, run: Function) -> None:
        self.run = run

    def prepare(self, step: DeviceBatch) -> tuple[Tensor, Tensor]:
        """Pages [n, b] and number of keys [n] of each row of the step."""
        num_keys = step.starts + step.query_starts.diff() if step.num_keys is None else step.num_keys
        return step.tables.index_select(0, step.rows), num_keys

    def can_express(self, step: DeviceBatch, layer: LayerShape) -> bool:
        return layer.slopes is None and layer.bias is None

    def attend(
        self,
        q: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        step: DeviceBatch,
        prepared: tuple[Tensor, Tensor],
        layer: LayerShape,
    ) -> Tensor:
        tables, num_keys = prepared
        result: Tensor = self.run(
            q,
            k_pages,
            v_pages,
            cache_seqlens=num_keys,
            page_table=tables,
            cu_seqlens_q=step.query_starts,
            max_seqlen_q=step.max_queries,
            softmax_scale=layer.scale,
            causal=step.num_keys is None,
            window_size=_window(layer),
            softcap=layer.softcap or 0.0,
        )
        return result


class Flash2:
    """Prompts without anything before them, since its pages would have to be of 256 tokens: their keys and values are
    taken out of the pages again. `run` is flash_attn_varlen_func of flash_attn."""

    name, reads_whole_pages = "flash-attn 2", False

    def __init__(self, run: Function) -> None:
        self.run = run

    def prepare(self, step: DeviceBatch) -> Tensor | None:
        return _prompt_slots(step)

    def can_express(self, step: DeviceBatch, layer: LayerShape) -> bool:
        return layer.bias is None

    def attend(
        self, q: Tensor, k_pages: Tensor, v_pages: Tensor, step: DeviceBatch, prepared: Tensor, layer: LayerShape
    ) -> Tensor:
        result: Tensor = self.run(
            q,
            *(_at(prepared, pages) for pages in (k_pages, v_pages)),
            step.query_starts,
            step.query_starts,
            step.max_queries,
            step.max_queries,
            softmax_scale=layer.scale,
            causal=True,
            window_size=_window(layer),
            softcap=layer.softcap or 0.0,
            alibi_slopes=layer.slopes,
        )
        return result


class TorchVarlen:
    """As Flash2, without slopes, softcap or window. `run` is varlen_attn of torch.nn.attention.varlen, which up to
    torch 2.11 knows of no heads that share keys: those are repeated."""

    name, reads_whole_pages = "torch's varlen_attn", False

    def __init__(self, run: Function) -> None:
        self.run, self._knows_groups = run, "enable_gqa" in inspect.signature(run).parameters

    def prepare(self, step: DeviceBatch) -> Tensor | None:
        return _prompt_slots(step)

    def can_express(self, step: DeviceBatch, layer: LayerShape) -> bool:
        return (layer.window, layer.softcap, layer.slopes, layer.bias) == (None, None, None, None)

    def attend(
        self, q: Tensor, k_pages: Tensor, v_pages: Tensor, step: DeviceBatch, prepared: Tensor, layer: LayerShape
    ) -> Tensor:
        k, v, group = _at(prepared, k_pages), _at(prepared, v_pages), q.shape[1] // k_pages.shape[2]
        options = {}
        if group > 1 and self._knows_groups:
            options = {"enable_gqa": True}
        elif group > 1:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        ends, most = step.query_starts, step.max_queries
        result: Tensor = self.run(q, k, v, ends, ends, most, most, scale=layer.scale, window_size=(-1, 0), **options)
        return result


def _prompt_slots(step: DeviceBatch) -> Tensor | None:
    """Where the keys of the step are, if it is of whole prompts and nothing else."""
    return step.slots if step.is_fresh and step.num_keys is None and step.max_queries > 1 else None


def _at(slots: Tensor, pages: Tensor) -> Tensor:
    return pages.flatten(0, 1).index_select(0, slots)


def _window(layer: LayerShape) -> tuple[int, int]:
    """Keys before and behind a query's own; without bounds -1."""
    return (-1, -1) if layer.window is None else (layer.window - 1, 0)


def choose_attention(option: str, device: torch.device, dtype: torch.dtype) -> tuple[Attention, str]:
    """By `--attention`, and what it is in words: "triton", "flash", "torch", or "auto", which is flash-attn where there
    is one. Torch's is not taken unasked before it was measured.

    Raises:
        ConfigurationError: if what was asked for is not there, does not run, or is not for this type or GPU.
    """
    from worker.attention.triton import TritonAttention

    paged = TritonAttention()
    if option == "triton" or (option == "auto" and dtype not in TYPES):
        return paged, "attention triton: kernels of our own"
    if dtype not in TYPES:
        raise ConfigurationError(
            f"--attention {option} takes float16 and bfloat16 only: choose one with --dtype, or --attention triton"
        )
    broken = ""
    for library in _libraries(option, torch.cuda.get_device_capability(device)):
        if not (problem := _problem(library, device, dtype)):
            taken = f"attention {library.name}, and kernels of our own for what it cannot do"
            return FlashAttention(library, paged), taken + broken
        broken += f"; {library.name} does not run on this GPU ({problem})"
    if option == "auto":
        return paged, "attention triton: kernels of our own" + (broken or NOT_INSTALLED)
    raise ConfigurationError(
        f"--attention {option} is not there for this GPU: flash needs the package of flash-attn 3 on an H100 or H200, "
        "or of flash-attn 2 on an A100 or later, where torch has its own; --attention triton needs nothing else"
        + broken
    )


NOT_INSTALLED = "; no flash-attn for this GPU is installed"
MAX_PROBLEM = 200


def _problem(library: Library, device: torch.device, dtype: torch.dtype) -> str:
    """What a library says to a prompt of two tokens, if it cannot do it: its build may lack this GPU's code, or be one
    that takes other arguments."""
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    ends, slots = torch.tensor([0, 2], dtype=torch.int32, device=device), torch.arange(2, device=device)
    step = DeviceBatch(
        rows=zero,
        query_starts=ends,
        starts=zero,
        tables=zero[None],
        slots=slots,
        max_queries=2,
        max_keys=2,
        is_fresh=True,
    )
    q, pages = (torch.zeros(shape, dtype=dtype, device=device) for shape in ((2, 2, 64), (1, 16, 1, 64)))
    try:
        library.attend(q, pages, pages, step, library.prepare(step), LayerShape(1.0))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except (RuntimeError, TypeError) as error:
        first, *_ = str(error).strip().splitlines() or [type(error).__name__]
        return first[:MAX_PROBLEM]
    return ""


def _libraries(option: str, capability: tuple[int, int]) -> Iterator[Library]:
    """Those that can be imported, best first."""
    if option == "torch":
        if capability >= AMPERE and (run := _function("torch.nn.attention.varlen", "varlen_attn")):
            yield TorchVarlen(run)
        return
    if capability == HOPPER and (run := _function("flash_attn_interface", "flash_attn_with_kvcache")):
        yield Flash3(run)
    if capability >= AMPERE and (run := _function("flash_attn", "flash_attn_varlen_func")):
        yield Flash2(run)


def _function(module: str, name: str) -> Function | None:
    """None if there is no such, or it was built for another torch."""
    try:
        return getattr(import_module(module), name, None)
    except (ImportError, OSError):
        return None
