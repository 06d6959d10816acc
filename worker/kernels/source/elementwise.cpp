// What a step does between its products: norms, activations, and the turn of queries and keys on their way into pages.
//
// Roundings are those of worker/model/layers.py and worker/model/rope.py, which models were trained with: where these
// round to bfloat16 on the way, so do the kernels.

#include "kernels.h"
#include "pool.h"

#include <algorithm>
#include <cmath>

namespace {

constexpr int64_t PIECE_ELEMENTS = 1 << 14;  // less is not worth another thread

int64_t rows_of_piece(int64_t row_elements) { return std::max<int64_t>(PIECE_ELEMENTS / std::max<int64_t>(row_elements, 1), 1); }

template <class Work>
void for_rows(int64_t num_rows, int64_t row_elements, const Work& work) {
    int64_t size = rows_of_piece(row_elements);
    for_each_in_parallel(ceil_div(num_rows, size), [&](int64_t piece) {
        for (int64_t row = piece * size; row < std::min(num_rows, (piece + 1) * size); ++row) work(row);
    });
}

// `work(at, count)` for runs of LANES elements and a shorter one at the end.
template <class Work>
INLINE void for_lanes(int64_t size, const Work& work) {
    int64_t at = 0;
    for (; at + LANES <= size; at += LANES) work(at, (int64_t)LANES);
    if (at < size) work(at, size - at);
}

// Norms.

template <class T, class W>
INLINE floats weighed(floats normed, const T* like, const W* weight, const T* bias, bool is_rounded, int64_t count) {
    if (is_rounded) normed = rounded(like, normed);
    normed *= load_some(weight, count);
    if (!bias) return normed;
    if (is_rounded) normed = rounded(like, normed);
    return normed + load_some(bias, count);
}

template <class T>
INLINE const T* with_part(const Norm& norm, const T* x, int64_t outer) {
    if (!norm.part) return x;
    const T* part = (const T*)norm.part + outer * norm.size;
    T* sums = (T*)norm.sums + outer * norm.size;
    for_lanes(norm.size, [&](int64_t at, int64_t count) {
        store_some(sums + at, load_some(x + at, count) + load_some(part + at, count), count);
    });
    return sums;
}

template <class T>
INLINE float sum_of(const T* x, int64_t size) {
    floats total = {};
    for_lanes(size, [&](int64_t at, int64_t count) { total += load_some(x + at, count); });
    return sum(total);
}

template <class T>
INLINE float sum_of_squares(const T* x, int64_t size, float mean) {
    floats total = {};
    for_lanes(size, [&](int64_t at, int64_t count) {
        floats value = load_some(x + at, count) - mean;
        if (count < LANES) {
            float first[LANES];
            store(first, value);
            value = load_first(first, count);
        }
        total += value * value;
    });
    return sum(total);
}

template <class T, class W>
void normalise_row(const Norm& norm, int64_t row) {
    int64_t outer = row / norm.num_inner, inner = row % norm.num_inner, size = norm.size;
    const T* x = (const T*)norm.x + outer * norm.outer_stride + inner * size;
    x = with_part(norm, x, outer);
    float mean = norm.is_rms ? 0.0f : sum_of(x, size) / size;
    float scale = 1.0f / std::sqrt(sum_of_squares(x, size, mean) / size + (float)norm.eps);
    const W* weight = (const W*)norm.weight + inner % norm.weight_rows * size;
    const T* bias = norm.bias ? (const T*)norm.bias + inner % norm.weight_rows * size : nullptr;
    T* out = (T*)norm.out + row * size;
    bool is_rounded = norm.is_rms ? !norm.has_wide_weight : norm.weight_rows > 1;
    for_lanes(size, [&](int64_t at, int64_t count) {
        floats normed = (load_some(x + at, count) - mean) * scale;
        store_some(out + at, weighed(normed, x, weight + at, bias ? bias + at : nullptr, is_rounded, count), count);
    });
}

template <class T>
void normalise(const Norm& norm) {
    for_rows(norm.num_outer * norm.num_inner, norm.size, [&](int64_t row) {
        if (norm.has_wide_weight) normalise_row<T, float>(norm, row);
        else normalise_row<T, T>(norm, row);
    });
}

// Activations.

// x[rows][width], or [rows][2 * width] of which the second half is multiplied with what becomes of the first one.
template <class T, Activation KIND>
void activate(const T* x, int64_t num_rows, int64_t width, bool is_gated, T* out) {
    for_rows(num_rows, width, [&](int64_t row) {
        const T* gate = x + row * width * (is_gated ? 2 : 1);
        T* to = out + row * width;
        for_lanes(width, [&](int64_t at, int64_t count) {
            floats value = activated<KIND>(load_some(gate + at, count));
            if (is_gated) value = rounded(x, value) * load_some(gate + width + at, count);
            store_some(to + at, value, count);
        });
    });
}

template <class T>
void activate_as(int64_t kind, const T* x, int64_t num_rows, int64_t width, int64_t is_gated, T* out) {
    if (kind == SILU) activate<T, SILU>(x, num_rows, width, is_gated, out);
    if (kind == GELU_TANH) activate<T, GELU_TANH>(x, num_rows, width, is_gated, out);
    if (kind == RELU) activate<T, RELU>(x, num_rows, width, is_gated, out);
}

// Logits.

INLINE void smallest_place(floats values, ints places, float value, int64_t& place) {
    float lanes[LANES];
    int32_t indices[LANES];
    memcpy(lanes, &values, sizeof lanes), memcpy(indices, &places, sizeof indices);
    place = INT32_MAX;
    for (int lane = 0; lane < LANES; ++lane)
        if (lanes[lane] == value) place = std::min<int64_t>(place, indices[lane]);
}

// The largest number of a row, the first place where it stands, and the logarithm of the sum of all exponentials, which is
// no number where the row has one that is none, or no finite one.
template <class T>
void summarise_row(const T* row, int64_t size, float* most, int64_t* place, float* normaliser) {
    constexpr ints numbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    floats high = all(-INFINITY);
    ints places = {};
    for_lanes(size, [&](int64_t at, int64_t count) {
        floats value = load_some(row + at, count);
        if (count < LANES) value = select(numbers < (int32_t)count, value, all(-INFINITY));
        ints is_larger = (ints)(value > high);
        high = select(is_larger, value, high);
        places = (is_larger & (numbers + (int32_t)at)) | (~is_larger & places);
    });
    *most = largest(high);
    smallest_place(high, places, *most, *place);
    floats total = {};
    for_lanes(size, [&](int64_t at, int64_t count) {
        floats value = exponential(load_some(row + at, count) - *most);
        total += count < LANES ? select(numbers < (int32_t)count, value, floats{}) : value;
    });
    *normaliser = *most + std::log(sum(total));
    if (*place == INT32_MAX) *place = 0;
}

template <class T>
void summarise(const T* logits, int64_t num_rows, int64_t size, float* most, int64_t* places, float* normalisers) {
    for_each_in_parallel(num_rows, [&](int64_t row) {
        summarise_row(logits + row * size, size, most + row, places + row, normalisers + row);
    });
}

// Queries, keys and values.

constexpr int64_t WORK_OF_ANGLE = 16;  // elements that take as long

void find_angles(const Turning& turning, const int64_t* positions, int64_t num_positions, float* cos, float* sin) {
    int64_t size = turning.rotary_dim, half = size / 2;
    float amplitude = turning.amplitude;
    for_rows(num_positions, half * WORK_OF_ANGLE, [&](int64_t row) {
        float *own_cos = cos + row * size, *own_sin = sin + row * size;
        for (int64_t pair = 0; pair < half; ++pair) {
            float angle = (float)positions[row] * turning.frequencies[half + pair];
            own_cos[pair] = own_cos[half + pair] = std::cos(angle) * amplitude;
            own_sin[half + pair] = std::sin(angle) * amplitude;
            own_sin[pair] = -own_sin[half + pair];
        }
    });
}

template <class T>
INLINE void turn_head(const T* from, const float* cos, const float* sin, int64_t rotary_dim, int64_t head_dim, T* to) {
    int64_t half = rotary_dim / 2;
    for_lanes(half, [&](int64_t at, int64_t count) {
        floats first = load_some(from + at, count), second = load_some(from + half + at, count);
        floats turned_first = first * load_some(cos + at, count), turned_second = second * load_some(cos + half + at, count);
        turned_first += second * load_some(sin + at, count);
        turned_second += first * load_some(sin + half + at, count);
        store_some(to + at, turned_first, count), store_some(to + half + at, turned_second, count);
    });
    memcpy(to + rotary_dim, from + rotary_dim, (head_dim - rotary_dim) * sizeof(T));
}

template <class T>
void turn_token(const Turn& turn, int64_t token) {
    int64_t size = turn.head_dim, kv_elements = turn.num_kv_heads * size, place = turn.slots[token] * kv_elements;
    const T* from = (const T*)turn.turned + token * turn.turned_stride;
    const float *cos = turn.cos + token * turn.rotary_dim, *sin = turn.sin + token * turn.rotary_dim;
    T *q = (T*)turn.q + token * turn.num_heads * size, *k = (T*)turn.k_pages + place;
    for (int64_t head = 0; head < turn.num_heads + turn.num_kv_heads; ++head) {
        T* to = head < turn.num_heads ? q + head * size : k + (head - turn.num_heads) * size;
        turn_head(from + head * size, cos, sin, turn.rotary_dim, size, to);
    }
    memcpy((T*)turn.v_pages + place, (const T*)turn.v + token * turn.v_stride, kv_elements * sizeof(T));
}

template <class T>
void turn_all(const Turn& turn) {
    int64_t elements = (turn.num_heads + 2 * turn.num_kv_heads) * turn.head_dim;
    for_rows(turn.num_tokens, elements, [&](int64_t token) { turn_token<T>(turn, token); });
}

}  // namespace

EXPORT void inferfleet_normalise_f32(const Norm* norm) { normalise<float>(*norm); }
EXPORT void inferfleet_normalise_bf16(const Norm* norm) { normalise<bf16>(*norm); }

EXPORT void inferfleet_activate_f32(const float* x, int64_t kind, int64_t num_rows, int64_t width, int64_t is_gated, float* out) {
    activate_as(kind, x, num_rows, width, is_gated, out);
}

EXPORT void inferfleet_activate_bf16(const bf16* x, int64_t kind, int64_t num_rows, int64_t width, int64_t is_gated, bf16* out) {
    activate_as(kind, x, num_rows, width, is_gated, out);
}

EXPORT void inferfleet_find_angles(const Turning* turning, const int64_t* positions, int64_t num_positions, float* cos, float* sin) {
    find_angles(*turning, positions, num_positions, cos, sin);
}

EXPORT void inferfleet_turn_f32(const Turn* turn) { turn_all<float>(*turn); }
EXPORT void inferfleet_turn_bf16(const Turn* turn) { turn_all<bf16>(*turn); }

EXPORT void inferfleet_summarise_f32(const float* logits, int64_t num_rows, int64_t size, float* most, int64_t* places, float* sums) {
    summarise(logits, num_rows, size, most, places, sums);
}

EXPORT void inferfleet_summarise_bf16(const bf16* logits, int64_t num_rows, int64_t size, float* most, int64_t* places, float* sums) {
    summarise(logits, num_rows, size, most, places, sums);
}
