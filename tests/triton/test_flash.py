"""Libraries for attention are stood in for by functions of their signatures that write it out in float32."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from common.errors import ConfigurationError
from tests.worker.attention.cases import Case, error, exact, kind_case, moved, random_case, run
from worker.attention import LayerShape
from worker.attention.flash import Flash2, Flash3, FlashAttention, TorchVarlen, choose_attention
from worker.attention.triton import TritonAttention

BAR = 1e-2
FRESH = dict(lengths=[5, 1, 20], counts=[5, 1, 20])
MIXED = dict(lengths=[30, 9, 20], counts=[1, 9, 4])
CPU = torch.device("cpu")


def rows_of(q, k, v, q_ends, k_ends, scale, causal, window, softcap=0.0, slopes=None):
    """Row after row; the last query of a row stands at its last key."""
    group, results = q.shape[1] // k.shape[1], []
    for row in range(len(q_ends) - 1):
        queries = q[q_ends[row] : q_ends[row + 1]].float()
        keys, values = (x[k_ends[row] : k_ends[row + 1]].float().repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        places = torch.arange(len(keys), device=q.device)
        distance = places - places[len(keys) - len(queries) :, None]
        if slopes is not None:
            scores = scores - slopes[:, None, None] * distance.abs()
        if causal:
            scores = scores.masked_fill(distance > 0, -torch.inf)
        if window[0] >= 0:
            scores = scores.masked_fill(distance < -window[0], -torch.inf)
        results.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
    return torch.cat(results).to(q.dtype)


class Calls:
    """Stand-ins by the signatures that they are called with, and how often each was."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def flash_attn_varlen_func(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    ):  # fmt: skip
        self.names.append("flash_attn_varlen_func")
        ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        return rows_of(q, k, v, *ends, softmax_scale, causal, window_size, softcap, alibi_slopes)

    def flash_attn_with_kvcache(
        self, q, k_cache, v_cache, k=None, v=None, cache_seqlens=None, page_table=None, cu_seqlens_q=None,
        max_seqlen_q=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    ):  # fmt: skip
        self.names.append("flash_attn_with_kvcache")
        assert page_table.dtype is cache_seqlens.dtype is torch.int32
        keys, values = (
            torch.cat(
                [x[table].flatten(0, 1)[:length] for table, length in zip(page_table, cache_seqlens, strict=True)]
            )
            for x in (k_cache, v_cache)
        )
        ends = [0, *cache_seqlens.cumsum(0).tolist()]
        return rows_of(q, keys, values, cu_seqlens_q.tolist(), ends, softmax_scale, causal, window_size, softcap)

    def varlen_attn(self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        """Of torch 2.11."""
        self.names.append("varlen_attn")
        assert query.shape[1] == key.shape[1]
        ends = cu_seq_q.tolist(), cu_seq_k.tolist()
        return rows_of(query, key, value, *ends, scale, window_size[1] == 0, (window_size[0], 0))

    def varlen_attn_with_groups(self, *args, enable_gqa=False, **kwargs):
        """Of later ones."""
        q, k, v, *rest = args
        assert enable_gqa and q.shape[1] > k.shape[1]
        group = q.shape[1] // k.shape[1]
        return self.varlen_attn(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), *rest, **kwargs)


def with_slots(case: Case) -> Case:
    """The places of the step's tokens, which lie in the pages already."""
    if case.batch.num_keys is not None:
        return case
    slots, size = [], case.k_pages.shape[1]
    for start, count, table in zip(case.batch.starts, case.batch.num_queries, case.batch.block_tables, strict=True):
        slots += [int(table[place // size]) * size + place % size for place in range(start, start + count)]
    return case._replace(batch=replace(case.batch, slots=torch.tensor(slots)))


def attend(library, case: Case, layer: LayerShape, device: torch.device) -> torch.Tensor:
    return run(FlashAttention(library, TritonAttention()), *moved(with_slots(case), layer, device)).cpu()


@pytest.mark.parametrize("kind", ["plain", "window", "softcap and window", "slopes and window", "everything causal"])
@pytest.mark.parametrize(
    ("library", "function", "unspoken"),
    [
        (Flash2, "flash_attn_varlen_func", {"everything causal"}),
        (Flash3, "flash_attn_with_kvcache", {"everything causal", "slopes and window"}),
        (TorchVarlen, "varlen_attn", {"everything causal", "slopes and window", "window", "softcap and window"}),
        (
            TorchVarlen,
            "varlen_attn_with_groups",
            {"everything causal", "slopes and window", "window", "softcap and window"},
        ),
    ],
)
def test_a_library_does_the_layers_that_it_can_express_and_our_kernels_the_others(
    device, kind, library, function, unspoken
):
    calls = Calls()
    case, layer = kind_case(kind, **FRESH, dtype=torch.bfloat16)
    expected = exact(case, layer)
    assert error(attend(library(getattr(calls, function)), case, layer, device), expected) <= BAR
    assert len(calls.names) == (kind not in unspoken)
    if layer.window:
        assert (
            error(
                attend(library(getattr(calls, function)), case, replace(layer, window=layer.window + 1), device),
                expected,
            )
            > BAR
        )


@pytest.mark.parametrize(("library", "function"), [(Flash2, "flash_attn_varlen_func"), (TorchVarlen, "varlen_attn")])
def test_steps_with_anything_in_the_cache_are_for_our_kernels_where_a_library_reads_no_pages(device, library, function):
    calls = Calls()
    case, layer = random_case(3, **MIXED, dtype=torch.bfloat16), LayerShape(0.25)
    assert case.batch.starts.any()
    assert error(attend(library(getattr(calls, function)), case, layer, device), exact(case, layer)) <= BAR
    assert not calls.names


@pytest.mark.parametrize("kind", ["plain", "window", "cross attention with softcap"])
def test_pages_are_read_by_flash_attn_3(device, kind):
    calls = Calls()
    case, layer = kind_case(kind, **MIXED, dtype=torch.bfloat16)
    assert error(attend(Flash3(calls.flash_attn_with_kvcache), case, layer, device), exact(case, layer)) <= BAR
    assert calls.names


@pytest.mark.parametrize("spoilt", ["float32", "pages of 8 bits"])
def test_types_that_libraries_do_not_take_are_for_our_kernels(device, spoilt):
    calls = Calls()
    dtype = torch.float32 if spoilt == "float32" else torch.bfloat16
    case = random_case(3, **MIXED, dtype=dtype)
    if spoilt != "float32":
        case = case._replace(k_pages=case.k_pages.to(torch.float8_e5m2), v_pages=case.v_pages.to(torch.float8_e5m2))
    attend(Flash3(calls.flash_attn_with_kvcache), case, LayerShape(0.25), device)
    assert not calls.names


@pytest.fixture()
def installed(monkeypatch):
    """Makes a GPU of a capability, and modules with one function each."""

    def install(capability: tuple[int, int], **functions: str) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", Calls().varlen_attn)
        for name in ("flash_attn", "flash_attn_interface"):
            module = ModuleType(name)
            if name in functions:
                setattr(module, functions[name], getattr(Calls(), functions[name]))
            monkeypatch.setitem(sys.modules, name, module if name in functions else None)

    return install


FLASH_2 = {"flash_attn": "flash_attn_varlen_func"}
FLASH_3 = {"flash_attn_interface": "flash_attn_with_kvcache"}


@pytest.mark.parametrize(
    ("option", "capability", "packages", "library", "reason"),
    [
        ("auto", (9, 0), {}, None, "attention triton: kernels of our own; no flash-attn for this GPU is installed"),
        (
            "auto",
            (9, 0),
            FLASH_2 | FLASH_3,
            Flash3,
            "attention flash-attn 3, and kernels of our own for what it cannot do",
        ),
        (
            "auto",
            (8, 0),
            FLASH_2 | FLASH_3,
            Flash2,
            "attention flash-attn 2, and kernels of our own for what it cannot do",
        ),
        (
            "auto",
            (8, 0),
            FLASH_3,
            None,
            "attention triton: kernels of our own; no flash-attn for this GPU is installed",
        ),
        ("flash", (9, 0), FLASH_2, Flash2, "attention flash-attn 2, and kernels of our own for what it cannot do"),
        (
            "torch",
            (9, 0),
            FLASH_2,
            TorchVarlen,
            "attention torch's varlen_attn, and kernels of our own for what it cannot do",
        ),
        ("triton", (9, 0), FLASH_3, None, "attention triton: kernels of our own"),
    ],
)
def test_what_is_installed_and_what_is_asked_for_choose(installed, option, capability, packages, library, reason):
    installed(capability, **packages)
    attention, said = choose_attention(option, CPU, torch.bfloat16)
    assert said == reason
    assert type(attention) is TritonAttention if library is None else type(attention.library) is library


@pytest.mark.parametrize(("option", "capability"), [("flash", (9, 0)), ("torch", (7, 5))])
def test_what_is_asked_for_but_not_there_is_refused(installed, option, capability):
    installed(capability)
    with pytest.raises(ConfigurationError, match=rf"--attention {option} is not there for this GPU: .*triton"):
        choose_attention(option, CPU, torch.bfloat16)


@pytest.mark.parametrize(
    "error", [RuntimeError("no kernel image is available\nand more"), TypeError("no kernel image")]
)
def test_a_build_without_code_for_this_gpu_is_passed_over_and_named(installed, monkeypatch, error):
    def broken(*args, **kwargs):
        raise error

    installed((9, 0), **FLASH_2, **FLASH_3)
    monkeypatch.setattr(sys.modules["flash_attn_interface"], "flash_attn_with_kvcache", broken)
    attention, said = choose_attention("auto", CPU, torch.bfloat16)
    assert isinstance(attention, FlashAttention) and isinstance(attention.library, Flash2)
    assert "; flash-attn 3 does not run on this GPU (no kernel image" in said and "\n" not in said
    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_varlen_func", broken)
    attention, said = choose_attention("auto", CPU, torch.bfloat16)
    assert isinstance(attention, TritonAttention) and said.count("does not run on this GPU") == 2
    with pytest.raises(
        ConfigurationError, match=r"--attention flash is not there .*; flash-attn 2 does not run on this"
    ):
        choose_attention("flash", CPU, torch.bfloat16)


def test_float32_is_for_our_kernels_and_refused_by_the_others(installed):
    installed((9, 0), **FLASH_3)
    assert isinstance(choose_attention("auto", CPU, torch.float32)[0], TritonAttention)
    with pytest.raises(ConfigurationError, match=r"--attention flash takes float16 and bfloat16 only"):
        choose_attention("flash", CPU, torch.float32)
