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

// What one register holds. Many sums are kept in these: what the compiler has to split, it keeps in memory.
#ifdef __AVX512F__
constexpr int WIDTH = 16;
#else
constexpr int WIDTH = 8;
#endif

typedef float Register __attribute__((vector_size(WIDTH * sizeof(float))));
typedef uint32_t Units __attribute__((vector_size(WIDTH * sizeof(float))));

struct bf16 {
    uint16_t bits;
};

// Call a line of memory into the second-level cache. The compiler takes its own function for one without any effect, and
// leaves out calls of what does nothing else.
INLINE void call_line(const void* from) { asm volatile("prefetcht2 %0" ::"m"(*(const char*)from)); }

// Into the first-level cache.
INLINE void call_line_near(const void* from) { asm volatile("prefetcht0 %0" ::"m"(*(const char*)from)); }

// The same, where it is to be written.
INLINE void call_line_to_write(const void* to) { asm volatile("prefetchw %0" ::"m"(*(const char*)to)); }

// What is read once a step and leaves nothing in the caches that several cores share, where processors have a way to do so.
INLINE Units load_in_passing(const void* from) {
#ifdef __AVX512F__
    return (Units)_mm512_stream_load_si512((void*)from);
#else
    return (Units)_mm256_stream_load_si256((const __m256i*)from);
#endif
}

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The compiler would add the value to zero.
INLINE floats all(float value) {
#ifdef __AVX512F__
    return (floats)_mm512_set1_ps(value);
#else
    return floats{} + value;
#endif
}

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

#ifdef __AVX512F__
INLINE __mmask16 first_lanes(int64_t count) { return (1u << count) - 1; }
INLINE floats load_first(const float* from, int64_t count) { return (floats)_mm512_maskz_loadu_ps(first_lanes(count), from); }
INLINE void store_first(float* to, floats value, int64_t count) { _mm512_mask_storeu_ps(to, first_lanes(count), (__m512)value); }
#endif

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

// Units of 32 bits, to[unit][row] = rows[row][first + unit].
INLINE void transpose(const uint32_t* const* rows, int64_t first, uint32_t* to) {
#ifdef __AVX512F__
    __m512i a[LANES], b[LANES];
    for (int row = 0; row < LANES; ++row) a[row] = _mm512_loadu_si512(rows[row] + first);
    for (int row = 0; row < LANES; row += 2) {
        b[row] = _mm512_unpacklo_epi32(a[row], a[row + 1]);
        b[row + 1] = _mm512_unpackhi_epi32(a[row], a[row + 1]);
    }
    for (int row = 0; row < LANES; row += 4)
        for (int half = 0; half < 2; ++half) {
            a[row + 2 * half] = _mm512_unpacklo_epi64(b[row + half], b[row + half + 2]);
            a[row + 2 * half + 1] = _mm512_unpackhi_epi64(b[row + half], b[row + half + 2]);
        }
    for (int unit = 0; unit < 4; ++unit) {
        __m512i upper_even = _mm512_shuffle_i32x4(a[unit], a[unit + 4], 0x88);
        __m512i upper_odd = _mm512_shuffle_i32x4(a[unit], a[unit + 4], 0xdd);
        __m512i lower_even = _mm512_shuffle_i32x4(a[unit + 8], a[unit + 12], 0x88);
        __m512i lower_odd = _mm512_shuffle_i32x4(a[unit + 8], a[unit + 12], 0xdd);
        _mm512_storeu_si512(to + unit * LANES, _mm512_shuffle_i32x4(upper_even, lower_even, 0x88));
        _mm512_storeu_si512(to + (unit + 4) * LANES, _mm512_shuffle_i32x4(upper_odd, lower_odd, 0x88));
        _mm512_storeu_si512(to + (unit + 8) * LANES, _mm512_shuffle_i32x4(upper_even, lower_even, 0xdd));
        _mm512_storeu_si512(to + (unit + 12) * LANES, _mm512_shuffle_i32x4(upper_odd, lower_odd, 0xdd));
    }
#else
    for (int row = 0; row < LANES; row += 8)
        for (int unit = 0; unit < LANES; unit += 8) {
            __m256 a[8], b[8];
            for (int at = 0; at < 8; ++at) a[at] = _mm256_loadu_ps((const float*)(rows[row + at] + first + unit));
            for (int at = 0; at < 8; at += 2) {
                b[at] = _mm256_unpacklo_ps(a[at], a[at + 1]);
                b[at + 1] = _mm256_unpackhi_ps(a[at], a[at + 1]);
            }
            for (int at = 0; at < 8; at += 4)
                for (int half = 0; half < 2; ++half) {
                    a[at + 2 * half] = _mm256_shuffle_ps(b[at + half], b[at + half + 2], 0x44);
                    a[at + 2 * half + 1] = _mm256_shuffle_ps(b[at + half], b[at + half + 2], 0xee);
                }
            for (int at = 0; at < 4; ++at) {
                float* place = (float*)to + (unit + at) * LANES + row;
                _mm256_storeu_ps(place, _mm256_permute2f128_ps(a[at], a[at + 4], 0x20));
                _mm256_storeu_ps(place + 4 * LANES, _mm256_permute2f128_ps(a[at], a[at + 4], 0x31));
            }
        }
#endif
}
