"""Paged attention on the CPU by a kernel of our own, which reads pages where they are (worker/kernels/source)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from worker.attention import Batch, LayerShape

QUERY_TYPES = (torch.float32, torch.bfloat16)
PAGE_KINDS = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.int8: 2,
    torch.float8_e4m3fn: 3,
    torch.float8_e5m2: 4,
}
"""As the kernel numbers them."""
NO_WINDOW = 1 << 62
"""A window that no request outgrows."""


class _Batch(ctypes.Structure):
    _fields_ = (
        ("num_rows", ctypes.c_int64),
        ("num_queries", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("num_keys", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("table_stride", ctypes.c_int64),
        ("page_size", ctypes.c_int64),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("query_kind", ctypes.c_int64),
        ("page_kind", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
        ("slopes", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("reach", ctypes.c_int64),
    )


class NativeMeta:
    """A step as the kernel wants it, and the arrays that it points to."""

    def __init__(self, batch: Batch, block_size: int) -> None:
        arrays = (batch.num_queries, batch.starts, batch.num_keys, batch.block_tables)
        self.arrays = [None if each is None else torch.from_numpy(each).contiguous() for each in arrays]
        pointers = [None if each is None else each.data_ptr() for each in self.arrays]
        self.step = _Batch(len(batch.starts), *pointers, batch.block_tables.shape[1], block_size)
        self.address = ctypes.addressof(self.step)


class NativeAttention:
    """Agrees with ReferenceAttention within the rounding of the type; scores and sums are float32, and beside bfloat16
    queries the weights of values are bfloat16.

    A query's result depends on its own row's keys and its position only, to the last bit.
    """

    reads_whole_pages = False

    def __init__(self, library: ctypes.CDLL) -> None:
        self._run = library.inferfleet_attend
        pointer = ctypes.c_void_p
        self._run.argtypes = [pointer, pointer, pointer, ctypes.c_int64, pointer, pointer, pointer]
        self._run.restype = None
        self._layers: dict[tuple[object, ...], tuple[int, object]] = {}

    def prepare(self, batch: Batch, block_size: int) -> NativeMeta:
        return NativeMeta(batch, block_size)

    def attend(self, q: Tensor, k_pages: Tensor, v_pages: Tensor, meta: NativeMeta, layer: LayerShape) -> Tensor:
        if q.stride()[1:] != (q.shape[2], 1):
            q = q.contiguous()
        assert k_pages.is_contiguous() and v_pages.is_contiguous()
        out = torch.empty(q.shape, dtype=q.dtype)
        shape = q.shape[1], k_pages.shape[2], q.shape[2]
        address = self.address_of(layer, *shape, q.dtype, k_pages.dtype)
        self._run(
            meta.address, address, q.data_ptr(), q.stride(0), k_pages.data_ptr(), v_pages.data_ptr(), out.data_ptr()
        )
        return out

    def address_of(
        self,
        layer: LayerShape,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        kv_type: torch.dtype,
    ) -> int:
        """That of a layer as the kernel wants it, made when it is first asked for."""
        key = (layer, num_heads, num_kv_heads, head_dim, dtype, kv_type)
        if key not in self._layers:
            self._layers[key] = _layer_of(*key)
        return self._layers[key][0]


def _layer_of(
    layer: LayerShape, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, kv_type: torch.dtype
) -> tuple[int, object]:
    """Address of the structure, and what must live as long."""
    slopes, bias = (None if each is None else each.float().contiguous() for each in (layer.slopes, layer.bias))
    made = _Layer(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        query_kind=PAGE_KINDS[dtype],
        page_kind=PAGE_KINDS[kv_type],
        window=layer.window or NO_WINDOW,
        scale=layer.scale,
        softcap=layer.softcap or 0.0,
        slopes=None if slopes is None else slopes.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        reach=0 if bias is None else bias.shape[1] // 2,
    )
    return ctypes.addressof(made), (made, slopes, bias, layer)
