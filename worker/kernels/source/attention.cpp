// Paged attention, which reads pages where they are: decoding rows and prompt chunks alike.
//
// A query's result depends on its own row's keys and its position only, to the last bit: never on the batch, the chunk it
// came in, how many queries run together or the number of threads. Every query goes through blocks of 64 keys that begin
// at multiples of 64, with an online softmax (Milakov & Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135), and
// every 512 keys begin a segment with sums of its own, which are merged in order. What a query does not see has a weight
// of zero, which changes no sum; so a block may be left out where no query of a tile sees it, segments may be computed
// by different threads, and queries in any company.
//
// Products are of units of 32 bits: one float32, or two neighbouring bfloat16, of a head (queries and keys) or of
// neighbouring tokens (weights and values). Blocks of units that products want are 16 x 16, as the tiles of AMX:
//
//   queries   [tiles of 16 rows][head / 16 units][16 rows][16 units]       a row is a head of a query
//   keys      [head / 16 units][4][16 units][16 keys]                      transposed; where there is one tile of rows
//                                                                          they are read where they are, and the queries
//                                                                          are transposed instead
//   weights   [64 keys / 16 units][16 rows][16 units]
//   values    [64 keys / 16 units][head / 16 elements][16 units][16 elements]
//
// Many rows go the other way round where there are tiles, `turned`: keys times queries, values times weights. A vector then
// has 16 rows, so that what is largest and what is summed up need not be looked for within vectors.

#include "kernels.h"
#include "pool.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <utility>
#include <vector>

namespace {

constexpr int64_t BLOCK = 64;
constexpr int64_t SEGMENT = 512;
constexpr int64_t GROUPS = BLOCK / LANES;
constexpr int64_t LINE = 64;  // bytes
constexpr int64_t UNITS = TILE * TILE;
constexpr int64_t MOST_ROWS = 256;        // of an item: what is laid out of keys and values serves so many
constexpr int64_t MOST_SPLIT_ROWS = 64;   // of an item whose segments may go to different threads
constexpr int64_t MOST_HEADS = 8;         // of an item that has one tile of rows for each
constexpr int64_t SERIAL_WORK = 1 << 16;  // elements of keys that are not worth waking other threads
constexpr float SLACK = 8.0f;             // powers of two by which scores may be above what they are measured by
constexpr float INFINITE = __builtin_inff();

struct Call {
    const Batch& batch;
    const Layer& layer;
    const char* queries = nullptr;
    int64_t query_stride = 0;  // bytes between tokens
    const char *keys = nullptr, *values = nullptr;
    char* out = nullptr;

    int64_t group = 0, columns = 0, token_bytes = 0, head_bytes = 0;
};

// Sums of rows: of weighted values [rows][columns] and of weights [rows][LANES]; and the scores, times log2(e), that they
// are measured by [rows]: the largest ones, or what is at most SLACK below them, so that sums need not be measured anew
// whenever a score is the largest so far.
struct State {
    float *sums, *weights, *largest;

    static int64_t size(int64_t rows, int64_t columns) { return rows * (columns + LANES + 1); }

    State() = default;
    State(float* memory, int64_t rows, int64_t columns)
        : sums(memory), weights(memory + rows * columns), largest(memory + rows * (columns + LANES)) {}

    State from_row(int64_t row, int64_t columns) const {
        State state;
        state.sums = sums + row * columns, state.weights = weights + row * LANES, state.largest = largest + row;
        return state;
    }

    void reset(int64_t rows, int64_t columns) {
        memset(sums, 0, rows * columns * sizeof(float));
        memset(weights, 0, rows * LANES * sizeof(float));
        std::fill_n(largest, rows, -INFINITE);
    }
};

// Where sums of one segment are left: those of the first head of keys at `place`, of the next ones `stride` further each.
struct Partial {
    float* place = nullptr;
    int64_t stride = 0;

    Partial of(int64_t segment, int64_t size) const { return {place + segment * size, stride}; }
};

// One of the decoding rows that share a segment.
struct Member {
    int64_t row, token;
    Partial partial;
};

// Queries first .. first + count of a row, for the heads that share those of keys from `head` on; of their keys the
// segments from `segment` on. With a `partial` place one segment alone, whose sums are left there. With `members` the
// queries are those of `count` rows, and `row` is one of them.
//
// Some heads are one item because their keys are neighbours in memory: what is read together can be called together.
struct Item {
    int64_t row, head, num_heads, first, count, token, segment, num_segments;
    Partial partial = {};
    const Member* members = nullptr;

    int64_t row_of(int64_t query) const { return members ? members[query].row : row; }
    int64_t token_of(int64_t query) const { return members ? members[query].token : token + query; }
};

// What a row of queries sees.
struct Row {
    int32_t low, high, position;
    float slope;
    const float* bias;  // for distance 0
};

// Numbers.

// 2 ** x for x <= 0; 1 of 0, 0 of minus infinity; relative error 3e-6 in degree 4, 9e-8 in degree 6.
template <int DEGREE>
INLINE floats exp2(floats x) {
    constexpr float few[] = {1.0f, 0.6930321455f, 0.2413797677f, 0.0520323701f, 0.0135557465f};
    constexpr float many[] = {1.0f,          0.6931470037f, 0.2402295172f, 0.0554841533f,
                              0.0096780639f, 0.0012440877f, 0.0002171503f};
    const float* factors = DEGREE == 4 ? few : many;
#ifdef __AVX512F__
    floats rest = (floats)_mm512_reduce_ps((__m512)x, 0x09);
#else
    floats bounded = select(x < -150.0f, all(-150.0f), x);
    ints whole = __builtin_convertvector(bounded, ints);
    floats below = __builtin_convertvector(whole, floats);
    ints is_above = (ints)(below > bounded);
    whole += is_above;
    floats rest = bounded - (below - select(is_above, all(1.0f), all(0.0f)));
#endif
    floats result = all(factors[DEGREE]);
    for (int power = DEGREE - 1; power >= 0; --power) result = result * rest + factors[power];
#ifdef __AVX512F__
    return (floats)_mm512_scalef_ps((__m512)result, (__m512)x);
#else
    ints exponent = whole + 127;
    exponent &= (ints)(exponent > 0);
    return result * (floats)(exponent << 23);
#endif
}

INLINE floats tanh(floats x) {
    floats size = (floats)((uints)x & 0x7fffffffu);
    floats power = exp2<6>(size * (-2.0f * LOG2_E));
    floats result = (1.0f - power) / (1.0f + power);
    return (floats)((uints)result | ((uints)x & 0x80000000u));
}

// What sums are measured by next, where the largest new score is `high`.
INLINE floats measure(floats high, floats before) { return select(high > before + SLACK, high, before); }

// Minus infinity would be subtracted from itself.
INLINE floats finite_or_zero(floats x) { return select((ints)(x == -INFINITE), all(0.0f), x); }

INLINE float highest(floats value) {
#ifdef __AVX512F__
    return _mm512_reduce_max_ps((__m512)value);
#else
    return largest(value);
#endif
}

// Denormal numbers are zero, which they are to the tiles of AMX anyhow.
struct FlushDenormals {
    unsigned before = _mm_getcsr();
    FlushDenormals() { _mm_setcsr(before | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(before); }
};

// Units.

struct Singles {
    using Element = float;
    static constexpr Kind KIND = FLOAT32;
    static constexpr int64_t PER_UNIT = 1;
    static constexpr int DEGREE = 6;

    static INLINE Register add(Register sum, uint32_t unit, Units with) {
        float factor;
        memcpy(&factor, &unit, sizeof factor);
        return sum + factor * (Register)with;
    }
};

#ifdef __AVX512BF16__
struct Pairs {
    using Element = bf16;
    static constexpr Kind KIND = BFLOAT16;
    static constexpr int64_t PER_UNIT = 2;
    static constexpr int DEGREE = 4;

    static INLINE Register add(Register sum, uint32_t unit, Units with) {
        return (Register)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(unit), (__m512bh)with);
    }
};
#endif

INLINE void store_units(uint32_t* to, uints units) { memcpy(to, &units, sizeof units); }

// Values of neighbouring tokens, `rows`, from element `first` on.
INLINE uints unit_of(const float* const* rows, int64_t first) { return (uints)load(rows[0] + first); }

INLINE uints unit_of(const bf16* const* rows, int64_t first) {
    halves even, odd;
    memcpy(&even, rows[0] + first, sizeof even);
    memcpy(&odd, rows[1] + first, sizeof odd);
    return wide(even) | (wide(odd) << 16);
}

// Those of all elements, `num_columns` times 16, into blocks that follow each other.
template <class Element>
INLINE void store_token_units(const Element* const* rows, int64_t num_columns, uint32_t* to) {
    for (int64_t column = 0; column < num_columns; ++column, to += UNITS) store_units(to, unit_of(rows, column * LANES));
}

#ifdef __AVX512BF16__
// Orders in which the lower or the upper halves of two rows' 32 elements take turns.
INLINE __m512i lower_halves() {
    return (__m512i)(uints{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} * 0x10001u + 0x200000u);
}

INLINE __m512i upper_halves() { return _mm512_add_epi16(lower_halves(), _mm512_set1_epi16(16)); }

INLINE void store_token_units(const bf16* const* rows, int64_t num_columns, uint32_t* to) {
    const __m512i lower = lower_halves(), upper = upper_halves();
    const bf16 *even = rows[0], *odd = rows[1];
    int64_t column = 0;
    for (; column + 2 <= num_columns; column += 2, even += 2 * LANES, odd += 2 * LANES, to += 2 * UNITS) {
        __m512i first = _mm512_loadu_si512(even), second = _mm512_loadu_si512(odd);
        _mm512_storeu_si512(to, _mm512_permutex2var_epi16(first, lower, second));
        _mm512_storeu_si512(to + UNITS, _mm512_permutex2var_epi16(first, upper, second));
    }
    if (column < num_columns) store_units(to, unit_of(rows, column * LANES));
}
#endif

// The same of a register's elements from `first` on. Where both halves of 32 elements are wanted, they take one load each.
template <bool HAS_BOTH>
INLINE Units units_of(const float* const* rows, int64_t first) {
    Units found;
    memcpy(&found, rows[0] + first, sizeof found);
    return found;
}

#ifdef __AVX512BF16__
template <bool HAS_BOTH>
INLINE Units units_of(const bf16* const* rows, int64_t first) {
    if (!HAS_BOTH) return unit_of(rows, first);
    int64_t begin = first / (2 * LANES) * (2 * LANES);
    __m512i order = begin == first ? lower_halves() : upper_halves();
    return (Units)_mm512_permutex2var_epi16(_mm512_loadu_si512(rows[0] + begin), order, _mm512_loadu_si512(rows[1] + begin));
}
#endif

// Products without tiles: some rows at a time, sums in registers.

#ifdef __AVX512F__
constexpr int ROWS_AT_ONCE = 6, VECTORS_AT_ONCE = 4;
#else
constexpr int ROWS_AT_ONCE = 3, VECTORS_AT_ONCE = 2;
#endif

// Both ends of loops over registers, which hold a copy of all sums in between: of sums that are loaded or stored one by one
// the compiler keeps the registers in memory.
template <int ROWS, int VECTORS>
INLINE void load_sums(floats (&sums)[ROWS][VECTORS], const float* factors, const float* from, int64_t columns) {
    for (int row = 0; row < ROWS; ++row)
        for (int vector = 0; vector < VECTORS; ++vector)
            sums[row][vector] = load(from + row * columns + vector * LANES) * factors[row];
}

template <int ROWS, int VECTORS>
INLINE void store_sums(const floats (&sums)[ROWS][VECTORS], float* to, int64_t columns) {
    for (int row = 0; row < ROWS; ++row)
        for (int vector = 0; vector < VECTORS; ++vector) store(to + row * columns + vector * LANES, sums[row][vector]);
}

// Sums of left [rows][16] and right [16][16] over `num_units`, which lie in blocks; right ones `right_stride` units apart.
template <class E, int ROWS, int VECTORS>
INLINE void add_products(floats (&sums)[ROWS][VECTORS], const uint32_t* left, const uint32_t* right, int64_t right_stride,
                         int64_t num_units) {
    Register own[ROWS][VECTORS * LANES / WIDTH];
    memcpy(own, sums, sizeof own);
    for (int64_t block = 0; block < num_units; block += TILE, left += UNITS, right += right_stride)
        for (int64_t unit = 0; unit < std::min(TILE, num_units - block); ++unit)
            for (int column = 0; column < VECTORS * LANES; column += WIDTH) {
                Units with;
                memcpy(&with, right + column / LANES * UNITS + unit * TILE + column % LANES, sizeof with);
                for (int row = 0; row < ROWS; ++row)
                    own[row][column / WIDTH] = E::add(own[row][column / WIDTH], left[row * TILE + unit], with);
            }
    memcpy(sums, own, sizeof own);
}

template <class E, int ROWS, int VECTORS>
INLINE void some_scores(const uint32_t* queries, const uint32_t* keys, int64_t num_units, float* scores) {
    floats sums[ROWS][VECTORS] = {};
    add_products<E>(sums, queries, keys, GROUPS * UNITS, num_units);
    store_sums(sums, scores, BLOCK);
}

template <class E, int ROWS, int VECTORS>
INLINE void some_sums(const uint32_t* weights, const uint32_t* values, int64_t num_units, const float* factors,
                      float* results, int64_t columns) {
    floats sums[ROWS][VECTORS];
    load_sums(sums, factors, results, columns);
    add_products<E>(sums, weights, values, columns / LANES * UNITS, num_units);
    store_sums(sums, results, columns);
}

// The same with values that lie in `tokens`, from element `first` on; `between` is called for each unit.
template <class E, int ROWS, int VECTORS, class Between>
INLINE void some_sums_in_place(const uint32_t* weights, const typename E::Element* const* tokens, int64_t first,
                               int64_t num_units, const float* factors, float* results, int64_t columns,
                               const Between& between) {
    floats sums[ROWS][VECTORS];
    load_sums(sums, factors, results, columns);
    Register own[ROWS][VECTORS * LANES / WIDTH];
    memcpy(own, sums, sizeof own);
    for (int64_t unit = 0; unit < num_units; ++unit, tokens += E::PER_UNIT) {
        between();
        const uint32_t* left = weights + unit / TILE * UNITS + unit % TILE;
        for (int column = 0; column < VECTORS * LANES; column += WIDTH) {
            Units with = units_of<VECTORS % 2 == 0>(tokens, first + column);
            for (int row = 0; row < ROWS; ++row)
                own[row][column / WIDTH] = E::add(own[row][column / WIDTH], left[row * TILE], with);
        }
    }
    memcpy(sums, own, sizeof own);
    store_sums(sums, results, columns);
}

// Calls run<ROWS, VECTORS>(first row, first vector) for all of them.
template <int ROWS, int VECTORS, class Run>
INLINE void in_pieces(int64_t num_rows, int64_t num_vectors, const Run& run) {
    int64_t row = 0;
    for (; row + ROWS <= num_rows; row += ROWS) {
        int64_t vector = 0;
        for (; vector + VECTORS <= num_vectors; vector += VECTORS)
            run(std::integral_constant<int, ROWS>(), std::integral_constant<int, VECTORS>(), row, vector);
        for (; vector < num_vectors; ++vector)
            run(std::integral_constant<int, ROWS>(), std::integral_constant<int, 1>(), row, vector);
    }
    if constexpr (ROWS > 1)
        if (row < num_rows)
            in_pieces<ROWS - 1, VECTORS>(num_rows - row, num_vectors, [&](auto rows, auto vectors, int64_t at, int64_t vector) {
                run(rows, vectors, row + at, vector);
            });
}

template <class E>
struct WithVectors : E {
    // scores [rows][BLOCK] of the first `num_groups` times 16 keys
    static void score(const uint32_t* queries, const uint32_t* keys, int64_t num_units, int64_t num_rows, int64_t num_groups,
                      float* scores) {
        in_pieces<ROWS_AT_ONCE, VECTORS_AT_ONCE>(num_rows, num_groups, [&](auto rows, auto vectors, int64_t row, int64_t at) {
            some_scores<E, rows.value, vectors.value>(queries + row * TILE, keys + at * UNITS, num_units,
                                                      scores + row * BLOCK + at * LANES);
        });
    }

    // sums [rows][columns] = sums * factors + weights * values of the first `num_keys`
    template <class Between>
    static void weigh(const uint32_t* weights, const uint32_t* values, int64_t num_keys, int64_t num_rows,
                      const float* factors, float* sums, int64_t columns, const Between&) {
        int64_t num_units = ceil_div(num_keys, E::PER_UNIT);
        in_pieces<ROWS_AT_ONCE, VECTORS_AT_ONCE>(num_rows, columns / LANES, [&](auto rows, auto vectors, int64_t row, int64_t at) {
            some_sums<E, rows.value, vectors.value>(weights + row * TILE, values + at * UNITS, num_units, factors + row,
                                                    sums + row * columns + at * LANES, columns);
        });
    }

    // the same with values of `tokens`, each in its place
    template <class Between>
    static void weigh_in_place(const uint32_t* weights, const typename E::Element* const* tokens, int64_t num_keys,
                               int64_t num_rows, const float* factors, float* sums, int64_t columns, const Between& between) {
        int64_t num_units = ceil_div(num_keys, E::PER_UNIT);
        in_pieces<ROWS_AT_ONCE, VECTORS_AT_ONCE>(num_rows, columns / LANES, [&](auto rows, auto vectors, int64_t row, int64_t at) {
            bool is_first = row == 0 && at == 0;
            some_sums_in_place<E, rows.value, vectors.value>(weights + row * TILE, tokens, at * LANES, num_units,
                                                             factors + row, sums + row * columns + at * LANES, columns,
                                                             [&] { if (is_first) between(); });
        });
    }

    static constexpr bool TURNS = false;
    template <class Between>
    static void score_in_place(const uint32_t*, const char* const*, int64_t, int64_t, int64_t, int64_t, float*, const Between&) {}

    static void begin() {}
    static void end() {}
};

#ifdef __AMX_BF16__

// Products with tiles (Intel, Architecture Instruction Set Extensions, chapter 3). The compiler's own functions do not say
// that they read memory.

#define LOAD_TILE(tile, from, stride) \
    asm volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(from), "r"((int64_t)(stride)) : "memory")
#define STORE_TILE(tile, to, stride) \
    asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"((int64_t)(stride)) : "memory")

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tiles 0 to 3 hold sums, 4 is left and 5 to 7 are right.
template <int TILES, class Between>
INLINE void add_tiles(const uint32_t* left, const uint32_t* right, int64_t right_stride, int64_t num_blocks,
                      const Between& between) {
    for (int64_t block = 0; block < num_blocks; ++block, left += UNITS, right += right_stride) {
        LOAD_TILE(4, left, 64);
        LOAD_TILE(5, right, 64);
        _tile_dpbf16ps(0, 4, 5);
        between();
        if constexpr (TILES > 1) {
            LOAD_TILE(6, right + UNITS, 64);
            _tile_dpbf16ps(1, 4, 6);
            between();
        }
        if constexpr (TILES > 2) {
            LOAD_TILE(7, right + 2 * UNITS, 64);
            _tile_dpbf16ps(2, 4, 7);
            between();
        }
        if constexpr (TILES > 3) {
            LOAD_TILE(5, right + 3 * UNITS, 64);
            _tile_dpbf16ps(3, 4, 5);
            between();
        }
    }
}

template <int TILES>
INLINE void clear_tiles() {
    _tile_zero(0);
    if constexpr (TILES > 1) _tile_zero(1);
    if constexpr (TILES > 2) _tile_zero(2);
    if constexpr (TILES > 3) _tile_zero(3);
}

template <int TILES>
INLINE void load_tiles(const float* from, int64_t stride) {
    LOAD_TILE(0, from, stride);
    if constexpr (TILES > 1) LOAD_TILE(1, from + LANES, stride);
    if constexpr (TILES > 2) LOAD_TILE(2, from + 2 * LANES, stride);
    if constexpr (TILES > 3) LOAD_TILE(3, from + 3 * LANES, stride);
}

template <int TILES>
INLINE void store_tiles(float* to, int64_t stride) {
    STORE_TILE(0, to, stride);
    if constexpr (TILES > 1) STORE_TILE(1, to + LANES, stride);
    if constexpr (TILES > 2) STORE_TILE(2, to + 2 * LANES, stride);
    if constexpr (TILES > 3) STORE_TILE(3, to + 3 * LANES, stride);
}

template <class Run>
INLINE void in_tiles(int64_t count, const Run& run) {
    int64_t at = 0;
    for (; at + 4 <= count; at += 4) run(std::integral_constant<int, 4>(), at);
    if (count - at == 3) run(std::integral_constant<int, 3>(), at);
    if (count - at == 2) run(std::integral_constant<int, 2>(), at);
    if (count - at == 1) run(std::integral_constant<int, 1>(), at);
}

// to[column][16 keys] of from[16 keys][16] for the first columns.
INLINE void turn_scores(const float* from, int64_t num_columns, float* to) {
    if (num_columns > 4) {
        const uint32_t* rows[TILE];
        for (int row = 0; row < TILE; ++row) rows[row] = (const uint32_t*)from + row * TILE;
        return transpose(rows, 0, (uint32_t*)to);
    }
    __m512 some[4];
    for (int at = 0; at < 4; ++at) {
        __m512 found = _mm512_castps128_ps512(_mm_loadu_ps(from + at * TILE));
        found = _mm512_insertf32x4(found, _mm_loadu_ps(from + (at + 4) * TILE), 1);
        found = _mm512_insertf32x4(found, _mm_loadu_ps(from + (at + 8) * TILE), 2);
        some[at] = _mm512_insertf32x4(found, _mm_loadu_ps(from + (at + 12) * TILE), 3);
    }
    __m512 a = _mm512_unpacklo_ps(some[0], some[1]), b = _mm512_unpackhi_ps(some[0], some[1]);
    __m512 c = _mm512_unpacklo_ps(some[2], some[3]), d = _mm512_unpackhi_ps(some[2], some[3]);
    auto pairs = [](__m512 left, __m512 right, bool is_high) {
        __m512d l = _mm512_castps_pd(left), r = _mm512_castps_pd(right);
        return (floats)_mm512_castpd_ps(is_high ? _mm512_unpackhi_pd(l, r) : _mm512_unpacklo_pd(l, r));
    };
    store(to, pairs(a, c, false)), store(to + TILE, pairs(a, c, true));
    store(to + 2 * TILE, pairs(b, d, false)), store(to + 3 * TILE, pairs(b, d, true));
}

struct WithTiles : Pairs {
    static constexpr bool TURNS = true;

    // scores [groups][16 keys][16 rows] of keys that are `stride` bytes apart in every group; queries [head / 16 units]
    // [16 units][16 rows]
    template <class Between>
    static void score_turned(const uint32_t* queries, const char* const* keys, int64_t stride, int64_t num_units,
                             int64_t num_groups, float* scores, const Between& between) {
        in_tiles(num_groups, [&](auto tiles, int64_t at) {
            clear_tiles<tiles.value>();
            for (int64_t unit = 0; unit < num_units; unit += TILE) {
                LOAD_TILE(4, queries + unit * TILE, 64);
                LOAD_TILE(5, keys[at] + unit * 4, stride);
                _tile_dpbf16ps(0, 5, 4);
                between();
                if constexpr (tiles.value > 1) {
                    LOAD_TILE(6, keys[at + 1] + unit * 4, stride);
                    _tile_dpbf16ps(1, 6, 4);
                    between();
                }
                if constexpr (tiles.value > 2) {
                    LOAD_TILE(7, keys[at + 2] + unit * 4, stride);
                    _tile_dpbf16ps(2, 7, 4);
                    between();
                }
                if constexpr (tiles.value > 3) {
                    LOAD_TILE(5, keys[at + 3] + unit * 4, stride);
                    _tile_dpbf16ps(3, 5, 4);
                    between();
                }
            }
            STORE_TILE(0, scores + at * UNITS, 64);
            if constexpr (tiles.value > 1) STORE_TILE(1, scores + (at + 1) * UNITS, 64);
            if constexpr (tiles.value > 2) STORE_TILE(2, scores + (at + 2) * UNITS, 64);
            if constexpr (tiles.value > 3) STORE_TILE(3, scores + (at + 3) * UNITS, 64);
        });
    }

    // the same as [groups][16 rows][16 keys], the first rows of each
    template <class Between>
    static void score_in_place(const uint32_t* queries, const char* const* keys, int64_t stride, int64_t num_units,
                               int64_t num_rows, int64_t num_groups, float* scores, const Between& between) {
        alignas(64) float turned[TILE * BLOCK];
        score_turned(queries, keys, stride, num_units, num_groups, turned, between);
        for (int64_t group = 0; group < num_groups; ++group)
            turn_scores(turned + group * UNITS, num_rows, scores + group * UNITS);
    }

    static void score(const uint32_t* queries, const uint32_t* keys, int64_t num_units, int64_t, int64_t num_groups,
                      float* scores) {
        in_tiles(num_groups, [&](auto tiles, int64_t at) {
            clear_tiles<tiles.value>();
            add_tiles<tiles.value>(queries, keys + at * UNITS, GROUPS * UNITS, num_units / TILE, [] {});
            store_tiles<tiles.value>(scores + at * LANES, BLOCK * sizeof(float));
        });
    }

    template <class Between>
    static void weigh(const uint32_t* weights, const uint32_t* values, int64_t num_keys, int64_t num_rows,
                      const float* factors, float* sums, int64_t columns, const Between& between) {
        for (int64_t row = 0; row < num_rows; ++row)
            for (int64_t column = 0; column < columns; column += LANES) {
                float* place = sums + row * columns + column;
                store(place, load(place) * factors[row]);
            }
        in_tiles(columns / LANES, [&](auto tiles, int64_t at) {
            load_tiles<tiles.value>(sums + at * LANES, columns * sizeof(float));
            add_tiles<tiles.value>(weights, values + at * UNITS, columns / LANES * UNITS, ceil_div(num_keys, 2 * TILE),
                                   between);
            store_tiles<tiles.value>(sums + at * LANES, columns * sizeof(float));
        });
    }

    // sums [columns][16 rows] += values * weights of the first `num_keys`; values [64 keys / 16 units][head / 16 elements]
    // [16 elements][16 units], weights [64 keys / 16 units][16 units][16 rows]
    static void weigh_turned(const uint32_t* weights, const uint32_t* values, int64_t num_keys, float* sums, int64_t columns) {
        in_tiles(columns / LANES, [&](auto tiles, int64_t at) {
            float* own = sums + at * UNITS;
            LOAD_TILE(0, own, 64);
            if constexpr (tiles.value > 1) LOAD_TILE(1, own + UNITS, 64);
            if constexpr (tiles.value > 2) LOAD_TILE(2, own + 2 * UNITS, 64);
            if constexpr (tiles.value > 3) LOAD_TILE(3, own + 3 * UNITS, 64);
            for (int64_t block = 0; block < ceil_div(num_keys, 2 * TILE); ++block) {
                const uint32_t* from = values + (block * columns / LANES + at) * UNITS;
                LOAD_TILE(4, weights + block * UNITS, 64);
                LOAD_TILE(5, from, 64);
                _tile_dpbf16ps(0, 5, 4);
                if constexpr (tiles.value > 1) {
                    LOAD_TILE(6, from + UNITS, 64);
                    _tile_dpbf16ps(1, 6, 4);
                }
                if constexpr (tiles.value > 2) {
                    LOAD_TILE(7, from + 2 * UNITS, 64);
                    _tile_dpbf16ps(2, 7, 4);
                }
                if constexpr (tiles.value > 3) {
                    LOAD_TILE(5, from + 3 * UNITS, 64);
                    _tile_dpbf16ps(3, 5, 4);
                }
            }
            STORE_TILE(0, own, 64);
            if constexpr (tiles.value > 1) STORE_TILE(1, own + UNITS, 64);
            if constexpr (tiles.value > 2) STORE_TILE(2, own + 2 * UNITS, 64);
            if constexpr (tiles.value > 3) STORE_TILE(3, own + 3 * UNITS, 64);
        });
    }

    static void begin() {
        TileConfig config;
        asm volatile("ldtilecfg %0" ::"m"(config));
    }

    static void end() { _tile_release(); }
};

using Narrow = WithTiles;
#elif defined(__AVX512BF16__)
using Narrow = WithVectors<Pairs>;
#else
using Narrow = WithVectors<Singles>;
#endif
using Wide = WithVectors<Singles>;

// Keys and values out of pages.

INLINE void narrow_to(float* to, floats value) { store(to, value); }
INLINE void narrow_to(bf16* to, floats value) { store(to, value); }

// One head of one token as elements of products, zeros behind it up to `size`.
template <class T, class Element>
void stage(const char* from, int64_t head_dim, int64_t size, Element* to) {
    const T* head = (const T*)from;
    floats scale = all(scale_of(head, head_dim));
    int64_t at = 0;
    for (; at + LANES <= head_dim; at += LANES) store(to + at, load(head + at) * scale);
    if (at < head_dim) store(to + at, load_first(head + at, head_dim - at) * scale), at += LANES;
    for (; at < size; at += LANES) store(to + at, all(0.0f));
}

template <class Element>
using Stage = void (*)(const char*, int64_t, int64_t, Element*);

template <class Element>
Stage<Element> stage_of(Kind kind) {
    switch (kind) {
        case FLOAT32: return stage<float, Element>;
        case BFLOAT16: return stage<bf16, Element>;
        case INT8: return stage<int8, Element>;
        case E4M3: return stage<e4m3, Element>;
        default: return stage<e5m2, Element>;
    }
}

// Where the keys `first` .. `first + count` of a row are, in bytes from the beginning of all pages.
void locate(const Call& call, int64_t row, int64_t head, int64_t first, int64_t count, int64_t* places) {
    int64_t size = call.batch.page_size, page = first / size, within = first % size;
    const int64_t* table = call.batch.tables + row * call.batch.table_stride;
    for (int64_t key = 0; key < count; ++page, within = 0) {
        int64_t place = (table[page] * size + within) * call.token_bytes + head * call.head_bytes;
        int64_t end = std::min(key + size - within, count);
        for (; key < end; ++key, place += call.token_bytes) places[key] = place;
    }
}

struct Places {
    int64_t at[BLOCK], count = 0;
};

// What one thread has besides.
template <class E>
struct Scratch {
    using Element = typename E::Element;

    int64_t num_units, columns;
    uint32_t *queries, *keys, *values, *weights;
    Element *staged, *zeros;
    float* scores;
    State state, total;
    std::vector<Row> rows;
    const Element* tokens[BLOCK];  // values where they are

    Scratch(int64_t head_dim, int64_t most_rows) {
        num_units = ceil_div(ceil_div(head_dim, E::PER_UNIT), TILE) * TILE;
        columns = ceil_div(head_dim, LANES) * LANES;
        int64_t elements = std::max(num_units * E::PER_UNIT, columns);
        int64_t sizes[] = {most_rows * num_units,
                           BLOCK * num_units,
                           BLOCK / E::PER_UNIT * columns,
                           TILE * BLOCK / E::PER_UNIT,
                           TILE * BLOCK,
                           State::size(most_rows, columns),
                           State::size(most_rows, columns),
                           BLOCK * elements / E::PER_UNIT,
                           elements / E::PER_UNIT};
        int64_t all_of_it = 0;
        for (int64_t& size : sizes) size = ceil_div(size, UNITS) * UNITS, all_of_it += size;
        uint32_t* place = memory(all_of_it);
        auto next = [&, index = 0]() mutable { return std::exchange(place, place + sizes[index++]); };
        queries = next(), keys = next(), values = next(), weights = next(), scores = (float*)next();
        state = State((float*)next(), most_rows, columns), total = State((float*)next(), most_rows, columns);
        staged = (Element*)next(), zeros = (Element*)next();
        memset(weights, 0, TILE * BLOCK / E::PER_UNIT * sizeof(uint32_t));
        memset(zeros, 0, elements * sizeof(Element));
        rows.resize(most_rows);
    }

    static uint32_t* memory(int64_t units) {
        static thread_local std::vector<uint32_t> kept;
        if ((int64_t)kept.size() < units + TILE) kept.resize(units + TILE);
        return (uint32_t*)(((uintptr_t)kept.data() + 63) / 64 * 64);
    }
};

// What is called from memory while one head is at work, a little at every turn: a core waits for few lines at a time, and
// those called in one go wait for each other. Of a block's tokens it is the `part`-th of so many shares, for heads that take
// `size` bytes together.
//
// Turns are to take equally long: where tiles and softmax take longer than two tokens' values that are laid out, they are
// several. Lines that come in while nothing else waits for memory cost nothing; all others are added to what a block takes.
constexpr int64_t TURNS_OF_KEYS = 2, TURNS_OF_BLOCK = 8, TURNS_OF_ROW = 12, TURNS_OF_VALUES = 8;

class Coming {
    const char *keys, *values;
    const Places& places;
    int64_t token, end, size, line = 0, due = 0, num_lines, num_turns;

  public:
    Coming(const Call& call, const Places& places, int64_t part, int64_t num_parts, int64_t size, int64_t num_turns)
        : keys(call.keys), values(call.values), places(places), token(part * BLOCK / num_parts),
          end((part + 1) * BLOCK / num_parts), size(size),
          num_lines((end - token) * ceil_div(size, LINE)), num_turns(num_turns) {
        end = std::min(end, places.count);
    }

    // As much as belongs to `turns` of all.
    INLINE void call_some(int64_t turns = 1) {
        // in registers while it loops
        int64_t still = due + turns * num_lines, at = line, of = token;
        for (; still > 0 && of < end; still -= num_turns) {
            call_line(keys + places.at[of] + at), call_line(values + places.at[of] + at);
            if ((at += LINE) >= size) at = 0, ++of;
        }
        due = still, line = at, token = of;
    }

    void call_rest() {
        call_some(num_turns);
    }
};

// Pointers to the elements of a block's tokens, of which the first head is at `pages`; to zeros behind the last one.
template <class E>
void gather(const Call& call, const char* pages, const Places& places, int64_t end, Scratch<E>& own,
            const typename E::Element** rows) {
    bool is_direct = call.layer.page_kind == E::KIND && call.layer.head_dim % (LANES * E::PER_UNIT) == 0;
    int64_t elements = std::max(own.num_units * E::PER_UNIT, own.columns);
    auto* stage = stage_of<typename E::Element>(call.layer.page_kind);
    for (int64_t key = 0; key < places.count; ++key)
        rows[key] = is_direct ? (const typename E::Element*)(pages + places.at[key]) : own.staged + key * elements;
    for (int64_t key = 0; !is_direct && key < places.count; ++key)
        stage(pages + places.at[key], call.layer.head_dim, elements, own.staged + key * elements);
    for (int64_t key = places.count; key < end; ++key) rows[key] = own.zeros;
}

// Which way tiles of rows go; ALONE is straight on where there is one tile, which what comes next must not hold up.
enum Way { STRAIGHT, ALONE, IN_PLACE, TURNED };

bool calls_between(Way way) { return way == ALONE || way == IN_PLACE; }

INLINE void turn(uint32_t* block) {
    alignas(64) uint32_t turned[UNITS];
    const uint32_t* rows[TILE];
    for (int row = 0; row < TILE; ++row) rows[row] = block + row * TILE;
    transpose(rows, 0, turned);
    memcpy(block, turned, sizeof turned);
}

// Keys [groups of 16][head / 16 units][16 units][16 keys]; turned they are as they were, one after the other.
template <class E>
void lay_out_keys(const typename E::Element* const* rows, int64_t num_groups, Coming& coming, Way way, Scratch<E>& own) {
    if (way == TURNED) {
        for (int64_t key = 0; key < num_groups * LANES; ++key)
            memcpy(own.keys + key * own.num_units, rows[key], own.num_units * sizeof(uint32_t));
        return;
    }
    for (int64_t group = 0; group < num_groups; ++group)
        for (int64_t block = 0; block < own.num_units / TILE; ++block) {
            if (way == ALONE) coming.call_some(TURNS_OF_BLOCK);
            // pointers kept for the next block would be moved through other registers, which takes longer
            asm volatile("" : "+r"(rows));
            transpose((const uint32_t* const*)rows + group * LANES, block * TILE, own.keys + (block * GROUPS + group) * UNITS);
        }
}

// Lay out a block's keys and values of one head, `offset` bytes behind the first one's.
template <class E>
void lay_out(const Call& call, const Places& places, int64_t offset, Coming& coming, Way way, Scratch<E>& own) {
    const typename E::Element* rows[BLOCK];
    int64_t num_groups = ceil_div(places.count, LANES), end = ceil_div(places.count, LANES * E::PER_UNIT) * LANES * E::PER_UNIT;
    if (way != IN_PLACE) {
        gather(call, call.keys + offset, places, end, own, rows);
        lay_out_keys(rows, num_groups, coming, way, own);
    }
    gather(call, call.values + offset, places, end, own, own.tokens);
    // without tiles these are weighed where they are
    if (way == ALONE && !E::TURNS) return;
    int64_t num_columns = own.columns / LANES;
    constexpr int64_t MOST_UNITS = BLOCK / E::PER_UNIT;
    for (int64_t unit = 0; unit < MOST_UNITS; ++unit) {
        if (calls_between(way)) coming.call_some();
        if (unit >= end / E::PER_UNIT) continue;
        uint32_t* to = own.values + unit / TILE * num_columns * UNITS + unit % TILE * TILE;
        store_token_units(own.tokens + unit * E::PER_UNIT, num_columns, to);
    }
    for (int64_t block = 0; way == TURNED && block < ceil_div(end, TILE * E::PER_UNIT) * num_columns; ++block)
        turn(own.values + block * UNITS);
}

// Softmax.

// Scores that are more than products, times log2(e); `key` is the first of 16.
INLINE floats irregular(const Layer& layer, const Row& row, floats score, int64_t key) {
    constexpr floats numbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    score *= (float)layer.scale;
    if (layer.softcap != 0.0) score = tanh(score / (float)layer.softcap) * (float)layer.softcap;
    int64_t first = key - row.position;
    if (layer.slopes) score += row.slope * (numbers + (float)first);
    if (layer.bias) {
        int64_t reach = layer.reach;
        if (first >= -reach && first + LANES - 1 <= reach) {
            score += load(row.bias + first);
        } else {
            float found[LANES];
            for (int64_t at = 0; at < LANES; ++at)
                found[at] = row.bias[std::max(std::min(first + at, reach), -reach)];
            score += load(found);
        }
    }
    return score * LOG2_E;
}

INLINE floats hide(const Row& row, floats score, int64_t key) {
    constexpr ints numbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    ints keys = numbers + (int32_t)key;
    return select((keys >= row.low) & (keys < row.high), score, all(-INFINITE));
}

#ifdef __AVX512BF16__
// Two vectors as one of pairs.
INLINE void store_pairs(uint32_t* to, floats first, floats second) {
    const __m512i order = (__m512i)(uints{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} * 0x10001u + 0x100000u);
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    _mm512_store_si512(to, _mm512_permutexvar_epi16(order, both));
}
#endif

INLINE void store_weights(uint32_t* to, float, int64_t group, floats value) { store((float*)to + group * UNITS, value); }
INLINE void store_weights(uint32_t* to, bf16, int64_t group, floats value) {
    store((bf16*)(to + group / 2 * UNITS) + group % 2 * LANES, value);
}

// Whether scores are nothing but products.
bool is_plain(const Layer& layer) { return layer.softcap == 0.0 && !layer.slopes && !layer.bias && layer.scale > 0.0; }

// From scores of a tile's rows to weights of a block's keys, and the factors on what was summed up before. Scores of a
// row are `row_stride` apart, of groups of 16 keys `group_stride`.
template <class E, class BeforeRow>
__attribute__((noinline)) void soften(const Layer& layer, const Row* rows, int64_t num_rows, int64_t first_key,
                                      int64_t num_groups, float* scores, int64_t row_stride, int64_t group_stride,
                                      uint32_t* weights, const State& state, float* factors, const BeforeRow& before_row) {
    bool is_regular = is_plain(layer);
    float scale = is_regular ? (float)(layer.scale * LOG2_E) : 1.0f;
    float most[TILE];
    std::fill_n(most, TILE, -INFINITE);
    for (int64_t at = 0; at < num_rows; ++at) {
        before_row();
        const Row& row = rows[at];
        float* own = scores + at * row_stride;
        bool hides = row.low > first_key || row.high < first_key + num_groups * LANES;
        floats high = all(-INFINITE);
        for (int64_t group = 0; group < num_groups; ++group) {
            floats score = load(own + group * group_stride);
            int64_t key = first_key + group * LANES;
            if (!is_regular) score = irregular(layer, row, score, key);
            if (hides) score = hide(row, score, key);
            if (!is_regular || hides) store(own + group * group_stride, score);
            high = larger(score, high);
        }
        most[at] = highest(high);
    }
    floats before = load_first(state.largest, num_rows);
    floats after = measure(load(most) * scale, before);
    store_first(state.largest, after, num_rows);
    floats shift = finite_or_zero(after);
    float shifts[TILE];
    store(shifts, shift);
    store(factors, exp2<6>(before - shift));
    for (int64_t at = 0; at < num_rows; ++at) {
        before_row();
        floats sum = all(0.0f);
        for (int64_t group = 0; group < num_groups; ++group) {
            floats weight = exp2<E::DEGREE>(load(scores + at * row_stride + group * group_stride) * scale - shifts[at]);
            store_weights(weights + at * TILE, typename E::Element(), group, weight);
            sum += weight;
        }
        if (num_groups % E::PER_UNIT) store_weights(weights + at * TILE, typename E::Element(), num_groups, all(0.0f));
        float* place = state.weights + at * LANES;
        store(place, load(place) * factors[at] + sum);
    }
}

#ifdef __AMX_BF16__

INLINE void hide_turned(const Row* rows, int64_t num_rows, int64_t first_key, int64_t num_keys, float* scores) {
    alignas(64) int32_t low[TILE] = {}, high[TILE] = {};
    for (int64_t row = 0; row < num_rows; ++row) low[row] = rows[row].low, high[row] = rows[row].high;
    for (int64_t at = 0; at < num_keys; ++at, scores += TILE) {
        ints key = ints{} + (int32_t)(first_key + at);
        store(scores, select((key >= *(const ints*)low) & (key < *(const ints*)high), load(scores), all(-INFINITE)));
    }
}

// The same for scores [keys][16 rows] and weights [units][16 rows], where scores are nothing but products; bit for bit.
// `before_part` is called before each of TILE / 2 parts.
template <class E, class BeforePart>
void soften_turned(const Layer& layer, const Row* rows, int64_t num_rows, int64_t first_key, int64_t num_groups,
                   float* scores, uint32_t* weights, const State& state, int64_t columns, const BeforePart& before_part) {
    const floats scale = all((float)(layer.scale * LOG2_E));
    int64_t num_keys = num_groups * LANES;
    // positions ascend with rows
    if (rows[num_rows - 1].low > first_key || rows[0].high < first_key + num_keys)
        hide_turned(rows, num_rows, first_key, num_keys, scores);
    floats high[] = {load(scores), load(scores + TILE), load(scores + 2 * TILE), load(scores + 3 * TILE)};
    for (int64_t key = 4; key < num_keys; key += 4)
        for (int at = 0; at < 4; ++at) high[at] = larger(load(scores + (key + at) * TILE), high[at]);
    floats before = load(state.largest);
    floats after = measure(larger(larger(high[0], high[1]), larger(high[2], high[3])) * scale, before);
    store(state.largest, after);
    floats shift = finite_or_zero(after), factors = exp2<6>(before - shift);
    for (int64_t unit = 0; unit < TILE / 2; ++unit) {
        before_part();
        floats even = all(0.0f), odd = all(0.0f);
        for (int64_t group = 0; group < num_groups; ++group) {
            const float* from = scores + (group * LANES + 2 * unit) * TILE;
            floats first = exp2<E::DEGREE>(load(from) * scale - shift), second = exp2<E::DEGREE>(load(from + TILE) * scale - shift);
            store_pairs(weights + (group * TILE / 2 + unit) * TILE, first, second);
            even += first, odd += second;
        }
        float* place = state.weights + 2 * unit * TILE;
        store(place, load(place) * factors + even);
        store(place + TILE, load(place + TILE) * factors + odd);
    }
    if (num_groups % 2) memset(weights + num_groups * UNITS / 2, 0, UNITS / 2 * sizeof(uint32_t));
    if (_mm512_cmp_ps_mask((__m512)factors, _mm512_set1_ps(1.0f), _CMP_NEQ_UQ) == 0) return;
    for (int64_t column = 0; column < columns; ++column)
        store(state.sums + column * TILE, load(state.sums + column * TILE) * factors);
}

#endif

// Add a segment's sums to those of the segments before it.
void merge(const State& total, const State& part, int64_t num_rows, int64_t columns) {
    for (int64_t row = 0; row < num_rows; ++row) {
        floats before = all(total.largest[row]), here = all(part.largest[row]);
        floats after = larger(here, before), shift = finite_or_zero(after);
        floats old = exp2<6>(before - shift), added = exp2<6>(here - shift);
        total.largest[row] = after[0];
        float *to = total.weights + row * LANES, *from = part.weights + row * LANES;
        store(to, load(to) * old + load(from) * added);
        to = total.sums + row * columns, from = part.sums + row * columns;
        for (int64_t column = 0; column < columns; column += LANES)
            store(to + column, load(to + column) * old + load(from + column) * added);
    }
}

// The same for a tile whose sums are turned, [columns][16 rows] and [LANES][16 rows].
void merge_turned(const State& total, const State& part, int64_t columns) {
    floats before = load(total.largest), here = load(part.largest), after = larger(here, before);
    floats shift = finite_or_zero(after), old = exp2<6>(before - shift), added = exp2<6>(here - shift);
    store(total.largest, after);
    auto add = [&](float* to, const float* from, int64_t count) {
        for (int64_t at = 0; at < count; ++at, to += TILE, from += TILE) store(to, load(to) * old + load(from) * added);
    };
    add(total.weights, part.weights, LANES), add(total.sums, part.sums, columns);
}

// Of a tile's sums [columns][16 rows] and [LANES][16 rows] to [16 rows][columns] and [16 rows][LANES].
void turn_back(const State& tile, int64_t columns, float* sums) {
    turn((uint32_t*)tile.weights);
    for (int64_t column = 0; column < columns; column += LANES) {
        turn((uint32_t*)tile.sums + column * TILE);
        for (int64_t row = 0; row < TILE; ++row) store(sums + row * columns + column, load(tile.sums + (column + row) * TILE));
    }
    memcpy(tile.sums, sums, TILE * columns * sizeof(float));
}

// Items.

template <class Q, class Element>
INLINE void copy_head(const Q* from, int64_t head_dim, int64_t size, Element* to, int64_t stride) {
    for (int64_t at = 0; at < size; at += LANES, to += stride) {
        int64_t count = std::min(std::max(head_dim - at, (int64_t)0), (int64_t)LANES);
        store(to, count == LANES ? load(from + at) : load_first(from + at, count));
    }
}

// Those of one head of keys, from the row `base` of what is laid out on.
template <class Q, class E>
void load_queries(const Call& call, const Item& item, int64_t kv_head, int64_t base, int64_t num_tiles, Scratch<E>& own) {
    using Element = typename E::Element;
    const Layer& layer = call.layer;
    int64_t tile_units = TILE * own.num_units;
    uint32_t* queries = own.queries + base * own.num_units;
    // tiles are loaded whole; without them nobody reads rows that are none
    if (E::TURNS) memset(queries + (num_tiles - 1) * tile_units, 0, tile_units * sizeof(uint32_t));
    for (int64_t row = 0; row < item.count * call.group; ++row) {
        int64_t query = row / call.group, head = kv_head * call.group + row % call.group, of = item.row_of(query);
        const Q* from = (const Q*)(call.queries + item.token_of(query) * call.query_stride) + head * layer.head_dim;
        uint32_t* to = queries + row / TILE * tile_units + row % TILE * TILE;
        for (int64_t unit = 0; unit < own.num_units; unit += TILE, to += UNITS) {
            int64_t first = unit * E::PER_UNIT, left = layer.head_dim - first;
            copy_head(from + first, left, TILE * E::PER_UNIT, (Element*)to, LANES);
        }
        int64_t position = call.batch.starts[of] + (item.members ? 0 : item.first + query);
        Row& seen = own.rows[base + row];
        seen.high = call.batch.num_keys ? call.batch.num_keys[of] : position + 1;
        seen.low = std::max(position + 1 - layer.window, (int64_t)0);
        if (call.batch.num_keys) seen.low = 0;
        seen.position = position;
        seen.slope = layer.slopes ? layer.slopes[head] : 0.0f;
        seen.bias = layer.bias ? layer.bias + head * (2 * layer.reach + 1) + layer.reach : nullptr;
    }
}

// Of tiles of rows, [units / 16][16 rows][16 units] to [units / 16][16 units][16 rows].
void turn_queries(uint32_t* queries, int64_t num_units) {
    for (int64_t unit = 0; unit < num_units; unit += TILE, queries += UNITS) turn(queries);
}

template <class Q>
void finish(const Call& call, const Item& item, int64_t kv_head, const State& state) {
    const Layer& layer = call.layer;
    for (int64_t row = 0; row < item.count * call.group; ++row) {
        int64_t head = kv_head * call.group + row % call.group;
        Q* out = (Q*)call.out + ((item.token + row / call.group) * layer.num_heads + head) * layer.head_dim;
        floats total = all(sum(load(state.weights + row * LANES)));
        for (int64_t column = 0; column < layer.head_dim; column += LANES) {
            floats value = load(state.sums + row * call.columns + column) / total;
            int64_t count = layer.head_dim - column;
            if (count >= LANES) store(out + column, value);
            else store_first(out + column, value, count);
        }
    }
}

int64_t first_key(const Call& call, const Item& item) {
    if (item.members) return item.segment * SEGMENT;
    if (call.batch.num_keys) return 0;
    return std::max(call.batch.starts[item.row] + item.first + 1 - call.layer.window, (int64_t)0);
}

int64_t end_key(const Call& call, const Item& item) {
    if (item.members) return (item.segment + 1) * SEGMENT;
    if (call.batch.num_keys) return call.batch.num_keys[item.row];
    return call.batch.starts[item.row] + item.first + item.count;
}

int64_t first_block(const Call& call, const Item& item) {
    return std::max(first_key(call, item) / BLOCK, item.segment * SEGMENT / BLOCK);
}

void find_block(const Call& call, const Item& item, int64_t block, Places& places) {
    places.count = std::min(BLOCK, end_key(call, item) - block * BLOCK);
    locate(call, item.row, item.head, block * BLOCK, places.count, places.at);
}

// What is called from memory during a block: the next one. Where that is an item's last and is short, so many tokens of the
// next item follow that together they are a block: during a short one there would be no time for all of them.
Places coming_places(const Call& call, const Item& item, const Item* next_item, int64_t block, int64_t last_block) {
    Places coming, others;
    if (block < last_block) find_block(call, item, block + 1, coming);
    if (block + 1 < last_block || !next_item) return coming;
    find_block(call, *next_item, first_block(call, *next_item), others);
    bool is_called_already = block == last_block && block > first_block(call, item);
    int64_t first = is_called_already ? BLOCK - std::min(BLOCK, end_key(call, item) - block * BLOCK) : 0;
    for (int64_t token = first; token < others.count && coming.count < BLOCK; ++token) coming.at[coming.count++] = others.at[token];
    return coming;
}

// Keys as they lie in memory, the first of each group of 16, `stride` bytes apart.
struct KeysInPlace {
    const char* groups[GROUPS] = {};
    int64_t stride;
};

template <class E>
KeysInPlace find_keys(const Call& call, const Places& places, int64_t offset, Way way, const Scratch<E>& own) {
    KeysInPlace found;
    found.stride = way == TURNED ? own.num_units * (int64_t)sizeof(uint32_t) : call.token_bytes;
    // pages hold whole groups
    for (int64_t key = 0; (way == IN_PLACE || way == TURNED) && key < places.count; key += LANES)
        found.groups[key / LANES] = way == TURNED ? (const char*)own.keys + key * found.stride : call.keys + places.at[key] + offset;
    return found;
}

template <class E>
void run_tile(const Call& call, Way way, const Row* rows, int64_t num_rows, int64_t first_key, int64_t num_keys,
              const uint32_t* queries, const KeysInPlace& keys, Coming& coming, const State& state, Scratch<E>& own) {
    int64_t num_groups = ceil_div(num_keys, LANES);
#ifdef __AMX_BF16__
    if constexpr (E::TURNS)
        if (way == TURNED) {
            E::score_turned(queries, keys.groups, keys.stride, own.num_units, num_groups, own.scores, [] {});
            soften_turned<E>(call.layer, rows, num_rows, first_key, num_groups, own.scores, own.weights, state, own.columns,
                             [&] { coming.call_some(); });
            return E::weigh_turned(own.weights, own.values, num_keys, state.sums, own.columns);
        }
#endif
    auto between = [&](int64_t turns) {
        if (calls_between(way)) coming.call_some(turns);
    };
    float factors[TILE];
    int64_t row_stride = way == IN_PLACE ? LANES : BLOCK, group_stride = way == IN_PLACE ? UNITS : LANES;
    if (way == IN_PLACE)
        E::score_in_place(queries, keys.groups, keys.stride, own.num_units, num_rows, num_groups, own.scores,
                          [&] { between(TURNS_OF_KEYS); });
    else E::score(queries, own.keys, own.num_units, num_rows, num_groups, own.scores);
    soften<E>(call.layer, rows, num_rows, first_key, num_groups, own.scores, row_stride, group_stride, own.weights, state,
              factors, [&] { between(TURNS_OF_ROW); });
    if constexpr (!E::TURNS)
        if (way == ALONE)
            return E::weigh_in_place(own.weights, own.tokens, num_keys, num_rows, factors, state.sums, own.columns,
                                     [&] { between(1); });
    E::weigh(own.weights, own.values, num_keys, num_rows, factors, state.sums, own.columns,
             [&] { between(TURNS_OF_VALUES); });
}

template <class E>
void run_block(const Call& call, Way way, int64_t first_key, int64_t base, int64_t num_rows, int64_t num_seen,
               const KeysInPlace& keys, Coming& coming, Scratch<E>& own) {
    for (int64_t first = base; first < base + num_rows; first += TILE) {
        int64_t count = std::min(TILE, base + num_rows - first);
        const Row* rows = own.rows.data() + first;
        // positions ascend with rows
        int64_t end = std::min<int64_t>(rows[count - 1].high - first_key, num_seen);
        bool is_seen = end > 0 && rows[0].low < first_key + BLOCK;
        if (way == STRAIGHT) coming.call_some();
        if (!is_seen) continue;
        const uint32_t* queries = own.queries + first * own.num_units;
        run_tile(call, way, rows, count, first_key, end, queries, keys, coming, own.state.from_row(first, own.columns), own);
    }
    coming.call_rest();
}

// How often something is called from memory while one head is at work.
template <class E>
int64_t turns_of(Way way, int64_t num_rows, int64_t num_tiles, const Scratch<E>& own) {
    if (way == TURNED) return num_tiles * TILE / 2;
    if (way == STRAIGHT) return num_tiles;
    int64_t units = BLOCK / E::PER_UNIT, blocks = own.num_units / TILE * GROUPS;
    int64_t both = units + blocks * (way == ALONE ? TURNS_OF_BLOCK : TURNS_OF_KEYS) + 2 * num_rows * TURNS_OF_ROW;
    return E::TURNS ? both + own.columns / LANES * units / TILE * TURNS_OF_VALUES : both;
}

template <class E>
Way way_of(const Call& call, int64_t num_tiles) {
    const Layer& layer = call.layer;
    if (E::TURNS && num_tiles > 1 && is_plain(layer)) return TURNED;
    bool lies_well = layer.page_kind == E::KIND && layer.head_dim % (TILE * E::PER_UNIT) == 0 && call.batch.page_size % TILE == 0;
    return num_tiles > 1 ? STRAIGHT : E::TURNS && lies_well ? IN_PLACE : ALONE;
}

void keep(const State& sums, int64_t num_rows, int64_t columns, const Partial& to, int64_t kv_head) {
    State kept(to.place + kv_head * to.stride, num_rows, columns);
    memcpy(kept.sums, sums.sums, num_rows * columns * sizeof(float));
    memcpy(kept.weights, sums.weights, num_rows * LANES * sizeof(float));
    memcpy(kept.largest, sums.largest, num_rows * sizeof(float));
}

void keep_each(const Call& call, const Item& item, int64_t kv_head, const State& sums) {
    for (int64_t query = 0; query < item.count; ++query)
        keep(sums.from_row(query * call.group, call.columns), call.group, call.columns, item.members[query].partial, kv_head);
}

template <class Q, class E>
void run_item(const Call& call, const Item& item, const Item* next_item, Places& places, Scratch<E>& own) {
    int64_t num_rows = item.count * call.group, num_tiles = ceil_div(num_rows, TILE), end = end_key(call, item);
    int64_t head_rows = num_tiles * TILE;
    Way way = way_of<E>(call, num_tiles);
    int64_t num_turns = turns_of(way, num_rows, num_tiles, own), size = item.num_heads * call.head_bytes;
    for (int64_t head = 0; head < item.num_heads; ++head) {
        load_queries<Q, E>(call, item, item.head + head, head * head_rows, num_tiles, own);
        if (way == IN_PLACE || way == TURNED) turn_queries(own.queries + head * head_rows * own.num_units, num_tiles * own.num_units);
    }
    int64_t last_segment = item.segment + item.num_segments - 1, block = first_block(call, item);
    int64_t last_block = ceil_div(std::min((last_segment + 1) * SEGMENT, end), BLOCK) - 1;
    for (int64_t segment = item.segment; segment <= last_segment; ++segment) {
        for (int64_t row = 0; row < item.num_heads * head_rows; row += head_rows)
            own.state.from_row(row, own.columns).reset(E::TURNS ? head_rows : num_rows, own.columns);
        int64_t end_block = ceil_div(std::min((segment + 1) * SEGMENT, end), BLOCK);
        for (; block < end_block; ++block) {
            Places next = coming_places(call, item, next_item, block, last_block);
            for (int64_t head = 0; head < item.num_heads; ++head) {
                Coming coming(call, next, head, item.num_heads, size, num_turns);
                int64_t offset = head * call.head_bytes;
                lay_out(call, places, offset, coming, way, own);
                KeysInPlace keys = find_keys(call, places, offset, way, own);
                run_block(call, way, block * BLOCK, head * head_rows, num_rows, places.count, keys, coming, own);
            }
            places = next, places.count = std::min(BLOCK, end - (block + 1) * BLOCK);
        }
        if (segment == item.segment) {
            std::swap(own.state, own.total);
            continue;
        }
        for (int64_t row = 0; way == TURNED && row < head_rows; row += TILE)
            merge_turned(own.total.from_row(row, own.columns), own.state.from_row(row, own.columns), own.columns);
        for (int64_t row = 0; way != TURNED && row < item.num_heads * head_rows; row += head_rows)
            merge(own.total.from_row(row, own.columns), own.state.from_row(row, own.columns), num_rows, own.columns);
    }
    for (int64_t row = 0; way == TURNED && row < head_rows; row += TILE)
        turn_back(own.total.from_row(row, own.columns), own.columns, own.state.sums);
    for (int64_t head = 0; head < item.num_heads; ++head) {
        State sums = own.total.from_row(head * head_rows, own.columns);
        if (!item.members && !item.partial.place) finish<Q>(call, item, item.head + head, sums);
        else if (!item.members) keep(sums, num_rows, own.columns, item.partial, item.head + head);
        else keep_each(call, item, item.head + head, sums);
    }
}

// Rows whose keys of a whole segment are the same ones, as behind a prompt that many requests begin with: what is laid out
// of them serves all. `members` are counted first.
struct Group {
    int64_t segment, row, num_members = 0, first_member = 0;
};

// That of an item's segment.
struct Share {
    int64_t item, segment, group;
};

constexpr int64_t MOST_RECENT = 8;  // groups of a segment that a row is compared with

struct Recent {
    int64_t groups[MOST_RECENT], count = 0;
};

// What of an item is one thread's task, longest first.
struct Plan {
    std::vector<Item> items, split, blocks;
    std::vector<float> partial;
    std::vector<Group> groups;
    std::vector<Share> shares;
    std::vector<Member> members;
    std::vector<Recent> recent;
    int64_t most_rows = 0;

    void clear() { items.clear(), split.clear(), blocks.clear(), groups.clear(), shares.clear(), members.clear(), recent.clear(); }
};

int64_t work_of(const Call& call, const Item& item) {
    return item.count * (end_key(call, item) - first_key(call, item));
}

void add_blocks(const Call& call, int64_t queries_at_once, std::vector<Item>& blocks) {
    int64_t token = 0, num_heads = call.layer.num_kv_heads;
    for (int64_t row = 0; row < call.batch.num_rows; ++row) {
        // of about one size: a short rest would lay out as many keys as the others
        int64_t all = call.batch.num_queries[row], size = all ? ceil_div(all, ceil_div(all, queries_at_once)) : 1;
        for (int64_t first = 0; first < all; first += size) {
            int64_t count = std::min(size, all - first);
            Item block{row, 0, num_heads, first, count, token, 0, 1};
            block.segment = first_key(call, block) / SEGMENT;
            block.num_segments = ceil_div(end_key(call, block), SEGMENT) - block.segment;
            blocks.push_back(block);
            token += count;
        }
    }
    std::stable_sort(blocks.begin(), blocks.end(),
                     [&](const Item& a, const Item& b) { return work_of(call, a) > work_of(call, b); });
}

const int64_t* pages_of(const Call& call, int64_t row, int64_t segment) {
    return call.batch.tables + row * call.batch.table_stride + segment * SEGMENT / call.batch.page_size;
}

int64_t find_group(const Call& call, int64_t row, int64_t segment, Plan& made) {
    if ((int64_t)made.recent.size() <= segment) made.recent.resize(segment + 1);
    Recent& recent = made.recent[segment];
    const int64_t *own = pages_of(call, row, segment), num = SEGMENT / call.batch.page_size;
    for (int64_t at = 0; at < std::min(recent.count, MOST_RECENT); ++at) {
        const int64_t* other = pages_of(call, made.groups[recent.groups[at]].row, segment);
        if (*own == *other && !memcmp(own, other, num * sizeof *own)) return recent.groups[at];
    }
    made.groups.push_back({segment, row});
    return recent.groups[recent.count++ % MOST_RECENT] = made.groups.size() - 1;
}

void find_shares(const Call& call, Plan& made) {
    if (call.batch.num_keys || SEGMENT % call.batch.page_size) return;
    for (int64_t index = 0; index < (int64_t)made.blocks.size(); ++index) {
        const Item& block = made.blocks[index];
        if (call.batch.num_queries[block.row] > 1) continue;
        int64_t segment = ceil_div(first_key(call, block), SEGMENT), end = end_key(call, block) / SEGMENT;
        for (; segment < end; ++segment) {
            int64_t group = find_group(call, block.row, segment, made);
            made.shares.push_back({index, segment, group});
            ++made.groups[group].num_members;
        }
    }
    auto is_alone = [&](const Share& share) { return made.groups[share.group].num_members < 2; };
    made.shares.erase(std::remove_if(made.shares.begin(), made.shares.end(), is_alone), made.shares.end());
}

// Items of a block's heads, `most_heads` at a time.
void add_heads(const Call& call, Item item, int64_t most_heads, std::vector<Item>& items, Plan& made) {
    made.most_rows = std::max(made.most_rows, ceil_div(item.count * call.group, TILE) * TILE * most_heads);
    for (item.head = 0; item.head < call.layer.num_kv_heads; item.head += most_heads) {
        item.num_heads = std::min(most_heads, call.layer.num_kv_heads - item.head);
        items.push_back(item);
    }
}

void add_shared(const Call& call, int64_t members_at_once, Plan& made) {
    int64_t place = 0, size = State::size(call.group, call.columns);
    for (Group& group : made.groups)
        if (group.num_members > 1) group.first_member = std::exchange(place, place + group.num_members), group.num_members = 0;
    made.members.resize(place);
    for (const Share& share : made.shares) {
        Group& group = made.groups[share.group];
        const Item& block = made.blocks[share.item];
        Partial partial = block.partial.of(share.segment - block.segment, size);
        made.members[group.first_member + group.num_members++] = {block.row, block.token, partial};
    }
    for (const Group& group : made.groups)
        for (int64_t first = 0; group.num_members > 1 && first < group.num_members; first += members_at_once) {
            int64_t count = std::min(members_at_once, group.num_members - first);
            Item item{group.row, 0, 1, 0, count, 0, group.segment, 1, {}, made.members.data() + group.first_member + first};
            add_heads(call, item, 1, made.items, made);
        }
}

// What is left of a block whose segments go apart, without those that `share` and the next ones tell of.
void add_segments(const Call& call, const Item& block, int64_t most_heads, const Share*& share, const Share* end, Plan& made) {
    int64_t index = &block - made.blocks.data();
    for (int64_t segment = 0; segment < block.num_segments; ++segment) {
        if (share < end && share->item == index && share->segment == block.segment + segment) {
            ++share;
            continue;
        }
        Item part = block;
        part.segment += segment, part.num_segments = 1;
        part.partial = block.partial.of(segment, State::size(block.count * call.group, call.columns));
        add_heads(call, part, most_heads, made.items, made);
    }
    add_heads(call, block, 1, made.split, made);
}

// Deal out places for the sums of blocks whose segments go apart.
void place_partials(const Call& call, int64_t num_threads, int64_t work, Plan& made) {
    std::vector<int64_t> sizes(made.blocks.size());
    for (const Share& share : made.shares) sizes[share.item] = 1;
    int64_t all = 0;
    for (size_t index = 0; index < sizes.size(); ++index) {
        const Item& block = made.blocks[index];
        int64_t num_rows = block.count * call.group;
        bool is_long = num_threads > 1 && block.num_segments > 1 && num_rows <= MOST_SPLIT_ROWS &&
                       work_of(call, block) * call.layer.num_kv_heads * 2 * num_threads > work;
        if (sizes[index] || is_long) sizes[index] = block.num_segments * State::size(num_rows, call.columns);
        all += sizes[index] * call.layer.num_kv_heads;
    }
    if ((int64_t)made.partial.size() < all) made.partial.resize(all);
    float* place = made.partial.data();
    for (size_t index = 0; index < sizes.size(); place += sizes[index++] * call.layer.num_kv_heads)
        if (sizes[index]) made.blocks[index].partial = {place, sizes[index]};
}

void plan(const Call& call, int64_t num_threads, Plan& made) {
    made.clear();
    int64_t num_tokens = 0, work = 0, num_heads = call.layer.num_kv_heads;
    for (int64_t row = 0; row < call.batch.num_rows; ++row) num_tokens += call.batch.num_queries[row];
    int64_t rows = num_tokens * call.layer.num_heads / (2 * num_threads);
    rows = std::min(std::max(rows, TILE), MOST_ROWS);
    int64_t queries_at_once = std::max(rows / call.group, (int64_t)1);
    add_blocks(call, queries_at_once, made.blocks);
    for (const Item& block : made.blocks) work += work_of(call, block) * num_heads;
    int64_t heads_at_once = (int64_t)made.blocks.size() * num_heads / (4 * num_threads);
    heads_at_once = std::max(std::min(heads_at_once, MOST_HEADS), (int64_t)1);
    made.most_rows = 0;
    find_shares(call, made);
    place_partials(call, num_threads, work, made);
    add_shared(call, queries_at_once, made);
    const Share *share = made.shares.data(), *end = share + made.shares.size();
    for (bool goes_apart : {true, false})
        for (const Item& block : made.blocks) {
            if ((block.partial.place != nullptr) != goes_apart) continue;
            bool is_shared = share < end && share->item == &block - made.blocks.data();
            int64_t most_heads = block.count * call.group > TILE ? 1 : heads_at_once;
            if (!goes_apart) add_heads(call, block, most_heads, made.items, made);
            else add_segments(call, block, is_shared ? most_heads : 1, share, end, made);
        }
}

template <class Q>
void finish_split(const Call& call, const Item& item) {
    int64_t num_rows = item.count * call.group, size = State::size(num_rows, call.columns);
    float* first = item.partial.place + item.head * item.partial.stride;
    State total(first, num_rows, call.columns);
    for (int64_t segment = 1; segment < item.num_segments; ++segment)
        merge(total, State(first + segment * size, num_rows, call.columns), num_rows, call.columns);
    finish<Q>(call, item, item.head, total);
}

template <class Q, class E>
void run_items(const Call& call, const Plan& plan, int64_t threads, Pieces& items) {
    FlushDenormals flush;
    Scratch<E> own(call.layer.head_dim, plan.most_rows);
    E::begin();
    for (int64_t index; items.next(index);) {
        const Item& item = plan.items[index];
        // most likely this thread's next one
        const Item* next = index + threads < (int64_t)plan.items.size() ? &plan.items[index + threads] : nullptr;
        Places places;
        find_block(call, item, first_block(call, item), places);
        run_item<Q, E>(call, item, next, places, own);
    }
    E::end();
}

template <class Q, class E>
void attend(const Call& call) {
    static thread_local Plan made;
    int64_t threads = num_threads(), keys = 0;
    for (int64_t row = 0; row < call.batch.num_rows; ++row)
        keys += call.batch.num_queries[row] *
                (call.batch.num_keys ? call.batch.num_keys[row] : call.batch.starts[row] + call.batch.num_queries[row]);
    if (keys * call.layer.num_heads * call.layer.head_dim < SERIAL_WORK) threads = 1;
    plan(call, threads, made);
    const Plan& shared = made;
    if (threads == 1) in_this_thread(shared.items.size(), [&](Pieces& items) { run_items<Q, E>(call, shared, 1, items); });
    else in_parallel(shared.items.size(), [&](Pieces& items) { run_items<Q, E>(call, shared, threads, items); });
    for_each_in_parallel(shared.split.size(), [&](int64_t item) { finish_split<Q>(call, shared.split[item]); });
}

Call call_of(const Batch& batch, const Layer& layer) {
    Call call{batch, layer};
    call.group = layer.num_heads / layer.num_kv_heads;
    call.columns = ceil_div(layer.head_dim, LANES) * LANES;
    call.head_bytes = head_bytes(layer.page_kind, layer.head_dim);
    call.token_bytes = call.head_bytes * layer.num_kv_heads;
    return call;
}

}  // namespace

// How many segments of rows are read together with those of other rows.
EXPORT int64_t inferfleet_num_shared_segments(const Batch* batch, const Layer* layer) {
    Plan made;
    plan(call_of(*batch, *layer), num_threads(), made);
    return made.members.size();
}

// `queries` are `query_stride` elements apart; keys and values lie alike, tokens of all pages one after the other.
EXPORT void inferfleet_attend(const Batch* batch, const Layer* layer, const void* queries, int64_t query_stride,
                              const void* keys, const void* values, void* out) {
    Call call = call_of(*batch, *layer);
    call.queries = (const char*)queries, call.keys = (const char*)keys, call.values = (const char*)values, call.out = (char*)out;
    call.query_stride = query_stride * (layer->query_kind == FLOAT32 ? 4 : 2);
    if (layer->query_kind == FLOAT32) attend<float, Wide>(call);
    else attend<bf16, Narrow>(call);
}
