"""Numbers as floats of eight bits, for the kernels that write some."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def in_8_bits(x, MANTISSA: tl.constexpr, LOWEST: tl.constexpr, LARGEST: tl.constexpr):
    """The bytes of float32 `x` as a float with that many bits of mantissa, 2**LOWEST its smallest normal number: the
    nearest, even where two are, at most LARGEST; no number where `x` is none or infinite.

    By hand, since sm_80 has no instruction for it.
    """
    bits = x.to(tl.int32, bitcast=True)
    size = tl.minimum(tl.abs(x), LARGEST)
    size_bits = size.to(tl.int32, bitcast=True)
    dropped: tl.constexpr = 23 - MANTISSA
    normal = (size_bits + ((1 << (dropped - 1)) - 1) + ((size_bits >> dropped) & 1)) >> dropped
    normal -= (LOWEST + 126) << MANTISSA
    # the last bit of this float32 weighs what the smallest number of the format does, so that adding it rounds
    unit: tl.constexpr = 2.0 ** (LOWEST + dropped)
    small = (size + unit).to(tl.int32, bitcast=True) - ((LOWEST + dropped + 127) << 23)
    code = tl.where(size < 2.0**LOWEST, small, normal)
    code = tl.where((bits & 0x7FFFFFFF) < 0x7F800000, code, 0x7F)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)
