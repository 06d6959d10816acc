// Sixteen float32 at a time, whatever the processor has: the compiler splits them into what there is.
//
// Everything is written with the compiler's own vector types, so that one source serves AVX2 and AVX-512. Orders of
// summation depend on nothing but the numbers of elements, so that a row's result does not depend on its company.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include <immintrin.h>

#define INLINE inline __attribute__((always_inline))
#define EXPORT extern "C" __attribute__((visibility("default")))

constexpr int LANES = 16;

typedef float floats __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint32_t uints __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));
typedef int8_t bytes __attribute__((vector_size(16)));

struct bf16 {
    uint16_t bits;
};

// Call a line of memory into the second-level cache. The compiler takes its own function for one without any effect, and
// leaves out calls of what does nothing else.
INLINE void call_line(const void* from) { asm volatile("prefetcht1 %0" ::"m"(*(const char*)from)); }

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

INLINE floats all(float value) { return floats{} + value; }

INLINE floats load(const float* from) {
    floats found;
    memcpy(&found, from, sizeof found);
    return found;
}

// The compiler would do this in two parts, and put them together again.
INLINE uints wide(halves bits) {
#ifdef __AVX512F__
    return (uints)_mm512_cvtepu16_epi32((__m256i)bits);
#else
    return __builtin_convertvector(bits, uints);
#endif
}

INLINE floats widen(halves bits) { return (floats)(wide(bits) << 16); }

INLINE floats load(const bf16* from) {
    halves found;
    memcpy(&found, from, sizeof found);
    return widen(found);
}

// To the nearest, ties to even; what is not a number stays so.
INLINE halves narrow(floats value) {
#ifdef __AVX512BF16__
    return (halves)_mm512_cvtneps_pbh((__m512)value);
#else
    uints bits = (uints)value;
    uints rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    uints is_number = (uints)(value == value);
    return __builtin_convertvector((rounded & is_number) | (0x7fc0 & ~is_number), halves);
#endif
}

INLINE void store(float* to, floats value) { memcpy(to, &value, sizeof value); }

INLINE void store(bf16* to, floats value) {
    halves bits = narrow(value);
    memcpy(to, &bits, sizeof bits);
}

// The first `count` elements, zeros behind them.
template <class T>
INLINE floats load_first(const T* from, int64_t count) {
    T few[LANES] = {};
    memcpy(few, from, count * sizeof(T));
    return load(few);
}

template <class T>
INLINE void store_first(T* to, floats value, int64_t count) {
    T few[LANES];
    store(few, value);
    memcpy(to, few, count * sizeof(T));
}

INLINE float widen(float value) { return value; }

INLINE float widen(bf16 value) {
    uint32_t bits = (uint32_t)value.bits << 16;
    float found;
    memcpy(&found, &bits, sizeof found);
    return found;
}

INLINE floats select(ints condition, floats yes, floats no) { return (floats)((condition & (ints)yes) | (~condition & (ints)no)); }

INLINE floats larger(floats a, floats b) { return select(a > b, a, b); }

INLINE float sum(floats value) {
    float lanes[LANES];
    memcpy(lanes, &value, sizeof lanes);
    for (int width = LANES / 2; width; width /= 2)
        for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
    return lanes[0];
}

INLINE float largest(floats value) {
    float lanes[LANES];
    memcpy(lanes, &value, sizeof lanes);
    for (int width = LANES / 2; width; width /= 2)
        for (int lane = 0; lane < width; ++lane)
            if (lanes[lane + width] > lanes[lane]) lanes[lane] = lanes[lane + width];
    return lanes[0];
}
