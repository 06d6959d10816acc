// How keys and values lie in pages; worker/attention/pages.py has the definitions.

#pragma once

#include "vectors.h"

enum Kind : int64_t { FLOAT32, BFLOAT16, INT8, E4M3, E5M2 };

struct int8 {
    int8_t code;
};

struct e4m3 {
    uint8_t bits;
};

struct e5m2 {
    uint8_t bits;
};

typedef uint8_t ubytes __attribute__((vector_size(16)));

template <class T>
INLINE ubytes load_bytes(const T* from) {
    ubytes found;
    memcpy(&found, from, sizeof found);
    return found;
}

// Float16 of these bits.
INLINE floats widen_fp16(halves bits) {
#ifdef __AVX512F__
    return (floats)_mm512_cvtph_ps((__m256i)bits);
#else
    __m128i narrow_parts[2];
    memcpy(narrow_parts, &bits, sizeof bits);
    __m256 wide_parts[2] = {_mm256_cvtph_ps(narrow_parts[0]), _mm256_cvtph_ps(narrow_parts[1])};
    floats wide;
    memcpy(&wide, wide_parts, sizeof wide);
    return wide;
#endif
}

INLINE floats load(const int8* from) {
    bytes found;
    memcpy(&found, from, sizeof found);
    return __builtin_convertvector(__builtin_convertvector(found, ints), floats);
}

// The bits are those of a float16 whose exponent is 8 less; only what is no number has none there.
INLINE floats load(const e4m3* from) {
    halves bits = __builtin_convertvector(load_bytes(from), halves);
    floats wide = widen_fp16(((bits & 0x7f) << 7) | ((bits & 0x80) << 8)) * 256.0f;
    uints sizes = __builtin_convertvector(bits & 0x7f, uints);
    return select((ints)(sizes == 0x7f), all(__builtin_nanf("")), wide);
}

INLINE floats load(const e5m2* from) { return widen_fp16(__builtin_convertvector(load_bytes(from), halves) << 8); }

// What the elements of one head of one token are multiplied with.
template <class T>
INLINE float scale_of(const T*, int64_t) {
    return 1.0f;
}

INLINE float scale_of(const int8* head, int64_t head_dim) {
    bf16 scale;
    memcpy(&scale, head + head_dim, sizeof scale);
    return widen(scale);
}

// Bytes that a head of a token takes.
INLINE int64_t head_bytes(Kind kind, int64_t head_dim) {
    switch (kind) {
        case FLOAT32: return head_dim * 4;
        case BFLOAT16: return head_dim * 2;
        case INT8: return head_dim + 2;
        default: return head_dim;
    }
}
