// Activations, and results that are rounded before they are used further, as if they had been stored.

#pragma once

#include "vectors.h"

#include <cmath>
#include <initializer_list>

template <class T>
INLINE floats load_some(const T* from, int64_t count) {
    return count == LANES ? load(from) : load_first(from, count);
}

template <class T>
INLINE void store_some(T* to, floats value, int64_t count) {
    if (count == LANES) store(to, value);
    else store_first(to, value, count);
}

INLINE floats rounded(const float*, floats value) { return value; }
INLINE floats rounded(const bf16*, floats value) { return widen(narrow(value)); }

constexpr float LOG2_E = 1.44269504088896341f;

// To within 2 units in the last place (the polynomial is that of Cephes, S. Moshier, expf).
INLINE floats exponential(floats x) {
#ifdef __AVX512F__
    // what is no number stays so, as the second operand
    floats bounded = (floats)_mm512_min_ps(_mm512_set1_ps(89.0f), _mm512_max_ps(_mm512_set1_ps(-104.0f), (__m512)x));
    floats whole = (floats)_mm512_roundscale_ps((__m512)(bounded * LOG2_E), 0x08);
#else
    floats bounded = select(x > 88.72f, all(88.72f), select(x < -87.33f, all(-87.33f), x));
    floats whole = bounded * LOG2_E + 12582912.0f;
    whole -= 12582912.0f;
#endif
    floats rest = bounded - whole * 0.693359375f + whole * 2.12194440e-4f;
    floats series = all(1.9875691500e-4f);
    for (float factor : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        series = series * rest + factor;
    floats result = series * rest * rest + rest + 1.0f;
#ifdef __AVX512F__
    return (floats)_mm512_scalef_ps((__m512)result, (__m512)whole);
#else
    ints exponent = __builtin_convertvector(whole, ints);
    // in two halves: the largest results are beyond what one exponent can add
    ints half = exponent >> 1;
    result *= (floats)((half + 127) << 23);
    result *= (floats)((exponent - half + 127) << 23);
    floats is_far = select(x < -87.33f, floats{}, select(x > 88.72f, all(INFINITY), result));
    return select(x == x, is_far, x);
#endif
}

enum Activation : int64_t { NONE = -1, SILU, GELU_TANH, RELU };

template <Activation KIND>
INLINE floats activated(floats x) {
    if (KIND == RELU) return select(x < 0.0f, floats{}, x);
    floats inner = KIND == SILU ? x : (x + x * x * x * 0.044715f) * 1.5957691216057308f;
    // 0.5 (1 + tanh(y / 2)) is 1 / (1 + exp(-y))
    return x / (1.0f + exponential(-inner));
}

INLINE floats activated(Activation kind, floats x) {
    switch (kind) {
        case SILU: return activated<SILU>(x);
        case GELU_TANH: return activated<GELU_TANH>(x);
        case RELU: return activated<RELU>(x);
        default: return x;
    }
}
