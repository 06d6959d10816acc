// Products with matrices that were laid out for them once: out[m, n] = x[m, k] W[n, k]' + bias[n].
//
// A matrix lies in panels of 32 of its rows (columns of the result), one after the other, and within a panel by k: what a
// processor reads in one go is one piece of memory, and each thread reads its panels from the first byte to the last. With
// few rows of x that is all that takes time; with many a panel stays in the second-level cache while they pass.
//
//   float32    [panels][k][32]
//   bfloat16   [panels][k / 32][2][16][16][2]: two tiles of 16 columns, each 16 pairs of neighbouring k, as the tiles of AMX
//              and the pairs of vdpbf16ps want them
//
// Rows of results are sums in one order, whatever the number of rows: a row does not depend on its company.

#include "pool.h"
#include "vectors.h"

#include <algorithm>
#include <cstdlib>
#include <sys/mman.h>

namespace {

constexpr int64_t PANEL = 32;
constexpr int64_t STEP = 32;  // of k, in bfloat16
constexpr int64_t TILE = 16;
constexpr int64_t STEP_ELEMENTS = PANEL * STEP;
constexpr int64_t BLOCK_BYTES = 1 << 20;  // of x, which should stay in the second-level cache

// Scratch memory of the calling thread, which only grows.
void* scratch(size_t bytes) {
    static thread_local void* memory = nullptr;
    static thread_local size_t size = 0;
    if (size < bytes) {
        free(memory);
        size = (bytes + 4095) / 4096 * 4096;
        memory = aligned_alloc(4096, size);
    }
    return memory;
}

struct Matrix {
    const void* packed;
    const void* bias;
    int64_t n, k;
};

struct Product : Matrix {
    const void* x;
    int64_t num_rows, x_stride;
    void* out;
};

template <class T>
INLINE void finish(floats left, floats right, const Product& p, int64_t row, int64_t panel) {
    int64_t first = panel * PANEL, count = std::min(PANEL, p.n - first);
    T* to = (T*)p.out + row * p.n + first;
    const T* bias = p.bias ? (const T*)p.bias + first : nullptr;
    if (count == PANEL) {
        if (bias) left += load(bias), right += load(bias + LANES);
        store(to, left), store(to + LANES, right);
        return;
    }
    int64_t count_right = std::max<int64_t>(count - LANES, 0), count_left = count - count_right;
    if (bias) left += load_first(bias, count_left), right += load_first(bias + count_left, count_right);
    store_first(to, left, count_left), store_first(to + count_left, right, count_right);
}

// float32, and bfloat16 without tiles: some rows of x at a time against one panel, sums in registers.

#ifdef __AVX512F__
constexpr int MOST_ROWS = 8;
#else
constexpr int MOST_ROWS = 3;
#endif

template <int ROWS>
INLINE void rows_by_panel(const float* const* x, const float* packed, int64_t k, floats (*sums)[2]) {
    floats own[ROWS][2] = {};
    for (int64_t at = 0; at < k; ++at, packed += PANEL) {
        floats left = load(packed), right = load(packed + LANES);
        for (int row = 0; row < ROWS; ++row) {
            own[row][0] += x[row][at] * left;
            own[row][1] += x[row][at] * right;
        }
    }
    memcpy(sums, own, sizeof own);
}

INLINE floats add_pairs(floats sum, uint32_t pair, const bf16* packed) {
#ifdef __AVX512BF16__
    __m512bh weights;
    memcpy(&weights, packed, sizeof weights);
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), weights);
#else
    uints weights;
    memcpy(&weights, packed, sizeof weights);
    floats first = (floats)(uints{} + (pair << 16)), second = (floats)(uints{} + (pair & 0xffff0000u));
    sum += first * (floats)(weights << 16);
    return sum + second * (floats)(weights & 0xffff0000u);
#endif
}

INLINE uint32_t pair_at(const bf16* x, int64_t at, int64_t k) {
    uint32_t pair = 0;
    memcpy(&pair, x + at, at + 1 < k ? 4 : 2);
    return pair;
}

template <int ROWS>
INLINE void rows_by_panel(const bf16* const* x, const bf16* packed, int64_t k, floats (*sums)[2]) {
    floats own[ROWS][2] = {};
    for (int64_t step = 0; step < k; step += STEP, packed += STEP_ELEMENTS)
        for (int64_t at = step; at < std::min(step + STEP, k); at += 2) {
            const bf16* pairs = packed + (at - step) * TILE;
            for (int row = 0; row < ROWS; ++row) {
                uint32_t pair = pair_at(x[row], at, k);
                own[row][0] = add_pairs(own[row][0], pair, pairs);
                own[row][1] = add_pairs(own[row][1], pair, pairs + TILE * STEP);
            }
        }
    memcpy(sums, own, sizeof own);
}

template <class T, int ROWS>
void some_rows(const Product& p, int64_t first, int64_t panel, const T* packed) {
    const T* x[ROWS];
    for (int row = 0; row < ROWS; ++row) x[row] = (const T*)p.x + (first + row) * p.x_stride;
    floats sums[ROWS][2];
    rows_by_panel<ROWS>(x, packed, p.k, sums);
    for (int row = 0; row < ROWS; ++row) finish<T>(sums[row][0], sums[row][1], p, first + row, panel);
}

template <class T, int ROWS = MOST_ROWS>
void last_rows(const Product& p, int64_t first, int64_t count, int64_t panel, const T* packed) {
    if (count == ROWS) return some_rows<T, ROWS>(p, first, panel, packed);
    if constexpr (ROWS > 1) last_rows<T, ROWS - 1>(p, first, count, panel, packed);
}

template <class T>
int64_t panel_elements(int64_t k) {
    return sizeof(T) == 4 ? k * PANEL : ceil_div(k, STEP) * STEP_ELEMENTS;
}

// Rows of x that are multiplied with all panels before the next ones are.
int64_t rows_at_a_time(int64_t bytes_per_row, int64_t unit) {
    return std::max(BLOCK_BYTES / bytes_per_row / unit, (int64_t)1) * unit;
}

template <class T>
void multiply_with_vectors(const Product& p) {
    int64_t num_panels = ceil_div(p.n, PANEL), most = rows_at_a_time(p.k * sizeof(T), MOST_ROWS);
    for (int64_t begin = 0; begin < p.num_rows; begin += most) {
        int64_t end = std::min(begin + most, p.num_rows);
        for_each_in_parallel(num_panels, [&](int64_t panel) {
            const T* packed = (const T*)p.packed + panel * panel_elements<T>(p.k);
            for (int64_t row = begin; row < end; row += MOST_ROWS)
                last_rows<T>(p, row, std::min<int64_t>(MOST_ROWS, end - row), panel, packed);
        });
    }
}

#ifdef __AMX_BF16__

// bfloat16 with tiles (Intel, Architecture Instruction Set Extensions, chapter 3): 32 rows of x against one panel, four
// tiles of sums. x is laid out in tiles too, [rows / 16][k / 32][16][32]: rows that are a power of two apart would share
// a few lines of the first-level cache.

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Tiles 0 to 3 are sums, 4 and 5 x, 6 and 7 weights; the first 16 rows, then the rest.
void configure(int64_t upper_rows, int64_t lower_rows) {
    TileConfig config;
    const int64_t rows[8] = {upper_rows, upper_rows, lower_rows, lower_rows, upper_rows, lower_rows, TILE, TILE};
    for (int tile = 0; tile < 8; ++tile) config.rows[tile] = rows[tile], config.row_bytes[tile] = rows[tile] ? 64 : 0;
    _tile_loadconfig(&config);
}

constexpr int64_t PREFETCH_STEPS = 8;

INLINE void prefetch(const bf16* from) {
    for (int64_t line = 0; line < STEP_ELEMENTS; line += 32) _mm_prefetch((const char*)(from + line), _MM_HINT_T0);
}

template <bool HAS_LOWER>
INLINE void tiles_by_panel(const bf16* upper, const bf16* lower, const bf16* packed, int64_t num_steps, float* sums) {
    _tile_zero(0);
    _tile_zero(1);
    if (HAS_LOWER) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t step = 0; step < num_steps; ++step, packed += STEP_ELEMENTS) {
        prefetch(packed + PREFETCH_STEPS * STEP_ELEMENTS);
        _tile_loadd(4, upper + step * TILE * STEP, 64);
        _tile_loadd(6, packed, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, packed + TILE * STEP, 64);
        _tile_dpbf16ps(1, 4, 7);
        if (!HAS_LOWER) continue;
        _tile_loadd(5, lower + step * TILE * STEP, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + TILE, 128);
    if (!HAS_LOWER) return;
    _tile_stored(2, sums + TILE * PANEL, 128);
    _tile_stored(3, sums + TILE * PANEL + TILE, 128);
}

void lay_out_rows(const Product& p, int64_t first, int64_t count, int64_t num_steps, bf16* to) {
    for (int64_t row = 0; row < count; ++row) {
        const bf16* x = (const bf16*)p.x + (first + row) * p.x_stride;
        for (int64_t step = 0; step < num_steps; ++step) {
            int64_t left = std::min(STEP, p.k - step * STEP);
            bf16* tile_row = to + (step * TILE + row) * STEP;
            memset(tile_row + left, 0, (STEP - left) * sizeof(bf16));
            memcpy(tile_row, x + step * STEP, left * sizeof(bf16));
        }
    }
}

// All rows of a block against one panel.
void multiply_panel(const Product& p, int64_t begin, int64_t count, const bf16* x, int64_t panel, int64_t num_steps) {
    const bf16* packed = (const bf16*)p.packed + panel * num_steps * STEP_ELEMENTS;
    int64_t tile_rows = num_steps * TILE * STEP;
    for (int64_t row = 0; row < count; row += 2 * TILE) {
        int64_t upper = std::min(TILE, count - row), lower = std::min(TILE, count - row - upper);
        if (row == 0 || upper + lower < 2 * TILE) configure(upper, lower);
        alignas(64) float sums[2 * TILE * PANEL];
        const bf16* tiles = x + row / TILE * tile_rows;
        if (lower) tiles_by_panel<true>(tiles, tiles + tile_rows, packed, num_steps, sums);
        else tiles_by_panel<false>(tiles, nullptr, packed, num_steps, sums);
        for (int64_t each = 0; each < upper + lower; ++each) {
            const float* sum = sums + each * PANEL;
            finish<bf16>(load(sum), load(sum + LANES), p, begin + row + each, panel);
        }
    }
}

void multiply_with_tiles(const Product& p) {
    int64_t num_panels = ceil_div(p.n, PANEL), num_steps = ceil_div(p.k, STEP), tile_rows = num_steps * TILE * STEP;
    int64_t most = rows_at_a_time(num_steps * STEP * sizeof(bf16), 2 * TILE);
    bf16* x = (bf16*)scratch(ceil_div(std::min(most, p.num_rows), TILE) * tile_rows * sizeof(bf16));
    for (int64_t begin = 0; begin < p.num_rows; begin += most) {
        int64_t count = std::min(most, p.num_rows - begin);
        for_each_in_parallel(ceil_div(count, TILE), [&](int64_t tile) {
            lay_out_rows(p, begin + tile * TILE, std::min(TILE, count - tile * TILE), num_steps, x + tile * tile_rows);
        });
        in_parallel(num_panels, [&](Pieces& panels) {
            for (int64_t panel; panels.next(panel);) multiply_panel(p, begin, count, x, panel, num_steps);
            _tile_release();
        });
    }
}

#endif

void pack_panel(const float* from, int64_t count, int64_t k, int64_t stride, float* to) {
    for (int64_t at = 0; at < k; ++at)
        for (int64_t column = 0; column < PANEL; ++column)
            to[at * PANEL + column] = column < count ? from[column * stride + at] : 0.0f;
}

int64_t place_of(int64_t column, int64_t at) {
    int64_t step = at / STEP, within = at % STEP;
    return step * STEP_ELEMENTS + column / TILE * TILE * STEP + within / 2 * STEP + column % TILE * 2 + within % 2;
}

void pack_panel(const bf16* from, int64_t count, int64_t k, int64_t stride, bf16* to) {
    memset(to, 0, panel_elements<bf16>(k) * sizeof(bf16));
    for (int64_t column = 0; column < count; ++column)
        for (int64_t at = 0; at < k; ++at) to[place_of(column, at)] = from[column * stride + at];
}

template <class T>
void pack(const T* from, int64_t n, int64_t k, int64_t stride, T* to) {
    for_each_in_parallel(ceil_div(n, PANEL), [&](int64_t panel) {
        pack_panel(from + panel * PANEL * stride, std::min(PANEL, n - panel * PANEL), k, stride,
                   to + panel * panel_elements<T>(k));
    });
}

int64_t place_of_element(const float*, int64_t column, int64_t at) { return at * PANEL + column; }
int64_t place_of_element(const bf16*, int64_t column, int64_t at) { return place_of(column, at); }

template <class T>
void unpack_rows(const Matrix& matrix, const int64_t* rows, int64_t count, T* out) {
    for_each_in_parallel(count, [&](int64_t index) {
        const T* panel = (const T*)matrix.packed + rows[index] / PANEL * panel_elements<T>(matrix.k);
        for (int64_t at = 0; at < matrix.k; ++at)
            out[index * matrix.k + at] = panel[place_of_element(panel, rows[index] % PANEL, at)];
    });
}

}  // namespace

EXPORT int64_t inferfleet_packed_elements_f32(int64_t n, int64_t k) { return ceil_div(n, PANEL) * panel_elements<float>(k); }
EXPORT int64_t inferfleet_packed_elements_bf16(int64_t n, int64_t k) { return ceil_div(n, PANEL) * panel_elements<bf16>(k); }

// Ask for large pages, where the system gives them to those who ask: what is read from end to end in every step should not
// be looked up every 4 KB.
EXPORT void inferfleet_prefer_large_pages(char* memory, int64_t size) {
    constexpr uintptr_t LARGE = 2 << 20;
    uintptr_t first = ((uintptr_t)memory + LARGE - 1) / LARGE * LARGE, end = ((uintptr_t)memory + size) / LARGE * LARGE;
    if (first < end) madvise((void*)first, end - first, MADV_HUGEPAGE);
}

EXPORT void inferfleet_pack_f32(const float* from, int64_t n, int64_t k, int64_t stride, float* to) { pack(from, n, k, stride, to); }
EXPORT void inferfleet_pack_bf16(const bf16* from, int64_t n, int64_t k, int64_t stride, bf16* to) { pack(from, n, k, stride, to); }

// x [num_rows, k], of which rows are x_stride elements apart; out [num_rows, n].
EXPORT void inferfleet_multiply_f32(const Matrix* matrix, const float* x, int64_t num_rows, int64_t x_stride, float* out) {
    multiply_with_vectors<float>({*matrix, x, num_rows, x_stride, out});
}

EXPORT void inferfleet_multiply_bf16(const Matrix* matrix, const bf16* x, int64_t num_rows, int64_t x_stride, bf16* out) {
    Product product{*matrix, x, num_rows, x_stride, out};
#ifdef __AMX_BF16__
    multiply_with_tiles(product);
#else
    multiply_with_vectors<bf16>(product);
#endif
}

EXPORT void inferfleet_unpack_rows_f32(const Matrix* matrix, const int64_t* rows, int64_t count, float* out) {
    unpack_rows(*matrix, rows, count, out);
}

EXPORT void inferfleet_unpack_rows_bf16(const Matrix* matrix, const int64_t* rows, int64_t count, bf16* out) {
    unpack_rows(*matrix, rows, count, out);
}
