// Products with matrices that were laid out for them once: out[m, n] = x[m, k] W[n, k]' + bias[n], and what is done to it
// next: an activation, or the sum with what the layer began with.
//
// A matrix lies in panels of 32 of its rows (columns of the result), one after the other, and within a panel by k: what a
// processor reads in one go is one piece of memory, and each thread reads some neighbouring panels from the first byte to
// the last. With few rows of x that is all that takes time, and what comes next is called from memory before it is wanted;
// with many rows a block of a panel stays in the first-level cache while they pass, and with still more each thread has some
// of them for itself.
//
// A panel of a gated matrix, [gate and up][n / 2][k], has 16 rows of gate and the 16 of up that belong to them.
//
//   float32    [panels][k][32]
//   bfloat16   [panels][k / 32][2][16][16][2]: two tiles of 16 columns, each 16 pairs of neighbouring k, as the tiles of AMX
//              and the pairs of vdpbf16ps want them
//
// Rows of results are sums in one order, whatever the number of rows: a row does not depend on its company.

#include "kernels.h"
#include "pool.h"
#include "scratch.h"

#include <algorithm>
#include <atomic>

namespace {

constexpr int64_t STEP = 32;  // of k, in bfloat16
constexpr int64_t STEP_ELEMENTS = PANEL * STEP;
constexpr int64_t BLOCK_BYTES = 1 << 20;  // of x, which should stay in the second-level cache
constexpr int64_t MOST_BYTES = 1 << 22;   // of x, which passes every panel: more should not have to come from memory

template <class T>
int64_t panel_elements(int64_t k) {
    return sizeof(T) == 4 ? k * PANEL : ceil_div(k, STEP) * STEP_ELEMENTS;
}

// Of an element of a panel.
int64_t place_of(const float*, int64_t column, int64_t at) { return at * PANEL + column; }

int64_t place_of(const bf16*, int64_t column, int64_t at) {
    int64_t step = at / STEP, within = at % STEP;
    return step * STEP_ELEMENTS + column / TILE * TILE * STEP + within / 2 * STEP + column % TILE * 2 + within % 2;
}

// Purposes of scratch memory.
struct RowsInTiles {};
struct Sums {};

struct Product : Matrix {
    const void* x;
    int64_t num_rows, x_stride;
    Activation activation;
    const void* residual;  // of the shape of the result; none where there is an activation
    void* out;
};

template <class T>
INLINE floats with_bias(const Product& p, floats sum, int64_t column, int64_t count) {
    return p.bias ? sum + load_some((const T*)p.bias + column, count) : sum;
}

template <class T>
INLINE void put(const Product& p, floats value, int64_t place, int64_t count) {
    if (p.residual) value = rounded((const T*)nullptr, value) + load_some((const T*)p.residual + place, count);
    store_some((T*)p.out + place, value, count);
}

// Sums of a row for the columns of a panel.
template <class T>
INLINE void finish(floats left, floats right, const Product& p, int64_t row, int64_t panel) {
    const T* like = nullptr;
    int64_t half = p.n / 2, first = panel * (p.is_gated ? TILE : PANEL), second = first + (p.is_gated ? half : TILE);
    int64_t count_left = std::min(TILE, (p.is_gated ? half : p.n) - first);
    int64_t count_right = p.is_gated ? count_left : std::max<int64_t>(std::min(TILE, p.n - second), 0);
    left = with_bias<T>(p, left, first, count_left);
    if (count_right) right = with_bias<T>(p, right, second, count_right);
    if (p.activation == NONE || !p.is_gated) {
        if (p.activation != NONE) left = activated(p.activation, rounded(like, left)), right = activated(p.activation, rounded(like, right));
        put<T>(p, left, row * p.n + first, count_left);
        if (count_right) put<T>(p, right, row * p.n + second, count_right);
        return;
    }
    floats gate = rounded(like, activated(p.activation, rounded(like, left)));
    put<T>(p, gate * rounded(like, right), row * half + first, count_left);
}

// Neighbouring panels that a thread takes at a time: it reads on where it is, and the end comes for all at once.
constexpr int64_t MOST_PANELS = 8, TURNS = 4;

// Calls `work(for_each)` on some threads, whose `for_each(multiply)` calls `multiply(first, end, next)` for pieces of whole
// units, but for the last one. Behind a piece a thread's next one, which begins at `next`, is the one after the next, most
// likely.
template <class Work>
void for_pieces(int64_t num_panels, int64_t unit, const Work& work) {
    int64_t size = std::max<int64_t>(std::min(MOST_PANELS, num_panels / (TURNS * num_threads())) / unit, 1) * unit;
    in_parallel(ceil_div(num_panels, size), [&](Pieces& pieces) {
        work([&](auto&& multiply) {
            for (int64_t piece; pieces.next(piece);)
                multiply(piece * size, std::min(piece * size + size, num_panels), (piece + num_threads()) * size);
        });
    });
}

// The same panel by panel, `multiply(panel, next)`.
template <class Work>
void for_panels(int64_t num_panels, const Work& work) {
    for_pieces(num_panels, 1, [&](auto&& for_each_piece) {
        work([&](auto&& multiply) {
            for_each_piece([&](int64_t first, int64_t end, int64_t next) {
                for (int64_t panel = first; panel < end; ++panel) multiply(panel, panel + 1 < end ? panel + 1 : next);
            });
        });
    });
}

constexpr int64_t LEAST_OWN = 160, MOST_OWN = 256;

// Rows, a multiple of `unit`, that a thread multiplies with all panels, if there are so many that each has enough of its
// own: they and their results stay in its second-level cache, which takes longer to get them from another core than all
// weights once more from memory. Else 0.
int64_t own_rows(int64_t num_rows, int64_t unit) {
    int64_t turns = ceil_div(num_rows, num_threads() * MOST_OWN), size = turns ? ceil_div(num_rows, num_threads() * turns) : 0;
    return size < LEAST_OWN ? 0 : ceil_div(size, unit) * unit;
}

// float32, and bfloat16 without tiles: some rows of x at a time against a panel or two, sums in registers. Two panels take
// fewer loads for each product, which counts where weights are in a cache.

#ifdef __AVX512F__
constexpr int PANELS_AT_ONCE = 2;
template <int PANELS>
constexpr int MOST_ROWS = PANELS == 1 ? 8 : 6;
#else
constexpr int PANELS_AT_ONCE = 1;
template <int PANELS>
constexpr int MOST_ROWS = 3;
#endif

constexpr int64_t LINE = 64, LINES_AT_ONCE = 32;
constexpr int64_t PIECE = LINE * LINES_AT_ONCE;  // bytes of a panel
constexpr int64_t TURNS_OF_PIECE = 16;           // of a loop that multiplies with it
constexpr int64_t LINES_A_TURN = LINES_AT_ONCE / TURNS_OF_PIECE;

INLINE void prefetch(const char* from, int64_t num_lines) {
    for (int64_t line = 0; line < num_lines; ++line) call_line(from + line * LINE);
}

// What is called from memory while rows pass a panel: some lines of another one for each of its pieces, a few in each turn
// of the loop. All at once they would hold up what is computed meanwhile.
struct Coming {
    const char* from;
    int64_t lines;  // 0: nothing is called

    INLINE void call_some(int64_t turn) {
        if (turn * LINES_A_TURN < lines) prefetch(from + turn * LINES_A_TURN * LINE, LINES_A_TURN);
        if (turn + 1 == TURNS_OF_PIECE) from += lines * LINE;
    }
};

// Of the two lines of a panel that a turn of the loop takes, those of the piece behind it: the first rows that pass the
// panel would wait for each, although all have been called into the second-level cache.
template <int64_t APART>
INLINE void call_next_piece(const char* line) {
    call_line_near(line + PIECE), call_line_near(line + APART + PIECE);
}

constexpr int PARTS = PANEL / WIDTH;  // of a panel

// Rows that, where there are no others, have nothing called: a panel is then read from the first byte to the last, which
// processors see and call what comes next themselves, faster than anybody who asks for it. With AMX asking came close to
// what memory gives.
#ifdef __AMX_BF16__
constexpr int MOST_STREAMED = 0;
#else
constexpr int MOST_STREAMED = 6;
#endif

template <bool ARE_CALLED, int ROWS, int PANELS>
INLINE void add_rows(const float* const* x, const float* packed, int64_t k, Coming& coming, Register (&sums)[ROWS][PARTS * PANELS]) {
    Register weights;
    for (int64_t at = 0; at < k; ++at, packed += PANEL) {
        if constexpr (ARE_CALLED) {
            coming.call_some(at % TURNS_OF_PIECE);
            for (int panel = 0; panel < PANELS; ++panel) call_next_piece<LINE>((const char*)(packed + panel * k * PANEL));
        }
        for (int part = 0; part < PARTS * PANELS; ++part) {
            memcpy(&weights, packed + part / PARTS * k * PANEL + part % PARTS * WIDTH, sizeof weights);
            for (int row = 0; row < ROWS; ++row) sums[row][part] += x[row][at] * weights;
        }
    }
}

template <int ROWS, int PANELS>
INLINE void rows_by_panels(const float* const* x, const float* packed, int64_t k, Coming coming, floats (*sums)[2 * PANELS]) {
    static_assert(TURNS_OF_PIECE * PANEL * sizeof(float) == PIECE);
    Register own[ROWS][PARTS * PANELS] = {};
    if (PANELS == 1 && ROWS <= MOST_STREAMED && !coming.lines) add_rows<false, ROWS, PANELS>(x, packed, k, coming, own);
    else add_rows<true, ROWS, PANELS>(x, packed, k, coming, own);
    memcpy(sums, own, sizeof own);
}

INLINE Register add_pairs(Register sum, uint32_t pair, Units weights) {
#ifdef __AVX512BF16__
    return (Register)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)weights);
#else
    Register first = (Register)(Units{} + (pair << 16)), second = (Register)(Units{} + (pair & 0xffff0000u));
    sum += first * (Register)(weights << 16);
    return sum + second * (Register)(weights & 0xffff0000u);
#endif
}

// Two neighbouring numbers of each row, of the last one a half, times what belongs to them.
template <int ROWS, int PANELS>
INLINE void add_pair(const bf16* const* x, int64_t at, int64_t num_bytes, const bf16* packed, int64_t size,
                     Register (&sums)[ROWS][PARTS * PANELS]) {
    uint32_t pairs[ROWS] = {};
    for (int row = 0; row < ROWS; ++row) memcpy(&pairs[row], x[row] + at, num_bytes);
    for (int part = 0; part < PARTS * PANELS; ++part) {
        int64_t column = part % PARTS * WIDTH;
        Units weights;
        memcpy(&weights, packed + part / PARTS * size + column / TILE * TILE * STEP + column % TILE * 2, sizeof weights);
        for (int row = 0; row < ROWS; ++row) sums[row][part] = add_pairs(sums[row][part], pairs[row], weights);
    }
}

std::atomic<bool> are_passing{false};  // weights, leaving shared caches to others

// 16 pairs of each row times a tile. Its sums leave memory for as long: with those of all tiles at hand the compiler would
// keep them there, and each turn of the loop wait for what the one before it stored.
template <int ROWS, bool ARE_PASSING>
INLINE void stream_tile(const bf16* const* x, int64_t at, const bf16* packed, Register (&sums)[ROWS][PARTS], int first) {
    constexpr int COLUMNS = TILE / WIDTH;
    Register own[ROWS][COLUMNS];
    asm volatile("" ::: "memory");  // each tile loads rows anew: all pairs of a step are more than registers hold
    for (int row = 0; row < ROWS; ++row) memcpy(own[row], &sums[row][first], sizeof own[row]);
    for (int pair = 0; pair < STEP / 2; ++pair)
        for (int column = 0; column < COLUMNS; ++column, packed += 2 * WIDTH) {
            Units weights;
            if (ARE_PASSING) weights = load_in_passing(packed);
            else memcpy(&weights, packed, sizeof weights);
            for (int row = 0; row < ROWS; ++row) {
                uint32_t numbers;
                memcpy(&numbers, x[row] + at + 2 * pair, sizeof numbers);
                own[row][column] = add_pairs(own[row][column], numbers, weights);
            }
        }
    for (int row = 0; row < ROWS; ++row) memcpy(&sums[row][first], own[row], sizeof own[row]);
}

// Whole steps of a panel, tile after tile: in the order in which they lie.
template <int ROWS, bool ARE_PASSING>
INLINE void stream_steps(const bf16* const* x, const bf16* packed, int64_t num_steps, Register (&sums)[ROWS][PARTS]) {
    for (int64_t at = 0; at < num_steps * STEP; at += STEP)
        for (int tile = 0; tile < PANEL / TILE; ++tile, packed += TILE * STEP)
            stream_tile<ROWS, ARE_PASSING>(x, at, packed, sums, tile * TILE / WIDTH);
}

template <int ROWS, int PANELS>
INLINE void rows_by_panels(const bf16* const* x, const bf16* packed, int64_t k, Coming coming, floats (*sums)[2 * PANELS]) {
    static_assert(STEP_ELEMENTS * sizeof(bf16) == PIECE && STEP == 2 * TURNS_OF_PIECE);
    Register own[ROWS][PARTS * PANELS] = {};
    int64_t size = panel_elements<bf16>(k), at = 0;
    if constexpr (PANELS == 1 && ROWS <= MOST_STREAMED) {
        if (!coming.lines) {
            // one row is taken as two, with which processors see better what comes next: 3 % faster
            constexpr int TAKEN = std::max(ROWS, 2);
            const bf16* taken[TAKEN];
            for (int row = 0; row < TAKEN; ++row) taken[row] = x[row % ROWS];
            Register streamed[TAKEN][PARTS] = {};
            at = k / STEP * STEP;
            if (are_passing.load(std::memory_order_relaxed)) stream_steps<TAKEN, true>(taken, packed, k / STEP, streamed);
            else stream_steps<TAKEN, false>(taken, packed, k / STEP, streamed);
            memcpy(own, streamed, sizeof own);
        }
    }
    for (; at + 1 < k; at += 2) {
        coming.call_some(at % STEP / 2);
        const bf16* weights = packed + place_of(packed, 0, at);
        for (int panel = 0; panel < PANELS; ++panel) call_next_piece<PIECE / 2>((const char*)(weights + panel * size));
        add_pair<ROWS, PANELS>(x, at, 4, weights, size, own);
    }
    memcpy(sums, own, sizeof own);
    if (k % 2 == 0) return;
    // once more from memory: what is used behind a loop as well the compiler keeps there within it
    Register last[ROWS][PARTS * PANELS];
    memcpy(last, sums, sizeof last);
    add_pair<ROWS, PANELS>(x, k - 1, 2, packed + place_of(packed, 0, k - 1), size, last);
    memcpy(sums, last, sizeof last);
}

template <class T, int PANELS, int ROWS>
void some_rows(const Product& p, int64_t first, int64_t panel, const Coming& coming) {
    const T *x[ROWS], *packed = (const T*)p.packed + panel * panel_elements<T>(p.k);
    for (int row = 0; row < ROWS; ++row) x[row] = (const T*)p.x + (first + row) * p.x_stride;
    floats sums[ROWS][2 * PANELS];
    rows_by_panels<ROWS, PANELS>(x, packed, p.k, coming, sums);
    for (int row = 0; row < ROWS; ++row)
        for (int at = 0; at < PANELS; ++at) finish<T>(sums[row][2 * at], sums[row][2 * at + 1], p, first + row, panel + at);
}

template <class T, int PANELS, int ROWS = MOST_ROWS<PANELS>>
void last_rows(const Product& p, int64_t first, int64_t count, int64_t panel, const Coming& coming) {
    if (count == ROWS) return some_rows<T, PANELS, ROWS>(p, first, panel, coming);
    if constexpr (ROWS > 1) last_rows<T, PANELS, ROWS - 1>(p, first, count, panel, coming);
}

// Rows of x that are multiplied with all panels before the next ones are.
int64_t rows_at_a_time(int64_t bytes_per_row, int64_t unit) {
    return std::max(MOST_BYTES / bytes_per_row / unit, (int64_t)1) * unit;
}

// Rows from `begin` to `end` against panels from `panel` on; then comes `next`.
template <class T, int PANELS>
void multiply_panels(const Product& p, int64_t begin, int64_t end, int64_t panel, int64_t next) {
    int64_t turns = ceil_div(end - begin, MOST_ROWS<PANELS>);
    int64_t size = panel_elements<T>(p.k), lines = ceil_div(PANELS * LINES_AT_ONCE, turns * LINES_A_TURN) * LINES_A_TURN;
    const T* wanted = (const T*)p.packed + next * size;
    bool are_alone = PANELS == 1 && turns == 1 && end - begin <= MOST_STREAMED;
    Coming coming{(const char*)wanted, are_alone ? 0 : lines};
    // turns of about as many rows: with few of them weights come no faster than they are used up
    for (int64_t row = begin, count; row < end; row += count, --turns) {
        count = ceil_div(end - row, turns);
        last_rows<T, PANELS>(p, row, count, panel, coming);
        coming.from += ceil_div(size * (int64_t)sizeof(T), PIECE) * lines * LINE;
    }
}

// The same against panels from `panel` to `last`.
template <class T, int PANELS>
void multiply_all_panels(const Product& p, int64_t begin, int64_t end, int64_t panel, int64_t last, int64_t next) {
    for (; panel + PANELS <= last; panel += PANELS)
        multiply_panels<T, PANELS>(p, begin, end, panel, panel + PANELS < last ? panel + PANELS : next);
    for (; panel < last; ++panel) multiply_panels<T, 1>(p, begin, end, panel, panel + 1);
}

template <class T, int PANELS>
void multiply_with_vectors(const Product& p) {
    if (int64_t size = own_rows(p.num_rows, MOST_ROWS<PANELS>))
        return for_each_in_parallel(ceil_div(p.num_rows, size), [&](int64_t piece) {
            int64_t begin = piece * size, num_panels = p.num_panels();
            multiply_all_panels<T, PANELS>(p, begin, std::min(begin + size, p.num_rows), 0, num_panels, num_panels);
        });
    int64_t most = rows_at_a_time(p.k * sizeof(T), MOST_ROWS<PANELS>);
    for (int64_t begin = 0; begin < p.num_rows; begin += most)
        for_pieces(p.num_panels(), PANELS, [&](auto&& for_each) {
            for_each([&](int64_t panel, int64_t last, int64_t next) {
                multiply_all_panels<T, PANELS>(p, begin, std::min(begin + most, p.num_rows), panel, last, next);
            });
        });
}

// Rows that one panel takes in one go wait for weights from memory.
template <class T>
void multiply_with_vectors(const Product& p) {
    p.num_rows > MOST_ROWS<1> ? multiply_with_vectors<T, PANELS_AT_ONCE>(p) : multiply_with_vectors<T, 1>(p);
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

constexpr int64_t AHEAD = 16;         // steps: what few rows call from memory before it is wanted
constexpr int64_t STEPS_AT_ONCE = 8;  // of many rows: a block of a panel, and of two tiles' rows, fit the first-level cache
constexpr int64_t MOST_MANY = 512;    // rows at a time
constexpr int64_t FEW_ROWS = 64;      // up to which weights take longer from memory than products

// Steps of a panel, whose sums [32][32] begin at zero or where they were left.
template <bool HAS_LOWER, class BeforeStep>
INLINE void add_steps(const bf16* upper, const bf16* lower, const bf16* packed, int64_t num_steps, bool is_first,
                      float* sums, const BeforeStep& before_step) {
    constexpr int64_t STRIDE = PANEL * sizeof(float);
    if (is_first) {
        _tile_zero(0);
        _tile_zero(1);
        if (HAS_LOWER) _tile_zero(2);
        if (HAS_LOWER) _tile_zero(3);
    } else {
        _tile_loadd(0, sums, STRIDE);
        _tile_loadd(1, sums + TILE, STRIDE);
        if (HAS_LOWER) _tile_loadd(2, sums + TILE * PANEL, STRIDE);
        if (HAS_LOWER) _tile_loadd(3, sums + TILE * PANEL + TILE, STRIDE);
    }
    for (int64_t step = 0; step < num_steps; ++step, packed += STEP_ELEMENTS) {
        before_step(step);
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
    _tile_stored(0, sums, STRIDE);
    _tile_stored(1, sums + TILE, STRIDE);
    if (HAS_LOWER) _tile_stored(2, sums + TILE * PANEL, STRIDE);
    if (HAS_LOWER) _tile_stored(3, sums + TILE * PANEL + TILE, STRIDE);
}

// Where a panel's columns of a row are written, if it is a whole one.
bf16* result_at(const Product& p, int64_t row, int64_t panel) {
    int64_t width = p.is_gated ? p.n / 2 : p.n, columns = p.is_gated ? TILE : PANEL;
    return (bf16*)p.out + row * width + panel * columns;
}

// What most products of a model come to, for whole panels.
bool finish_at_once(const Product& p, const float* sums, int64_t first, int64_t count, int64_t panel) {
    int64_t width = p.is_gated ? p.n / 2 : p.n, columns = p.is_gated ? TILE : PANEL, column = panel * columns;
    if (p.bias || column + columns > width) return false;
    const bf16 *like = nullptr, *before = p.residual ? (const bf16*)p.residual + first * width + column : nullptr;
    bf16* to = result_at(p, first, panel);
    if (p.is_gated && p.activation == SILU) {
        for (int64_t row = 0; row < count; ++row, sums += PANEL, to += width) {
            floats gate = rounded(like, activated<SILU>(rounded(like, load(sums))));
            store(to, gate * rounded(like, load(sums + LANES)));
        }
        return true;
    }
    if (p.is_gated || p.activation != NONE) return false;
    for (int64_t row = 0; row < count; ++row, sums += PANEL, to += width) {
        floats left = load(sums), right = load(sums + LANES);
        if (before) left = rounded(like, left) + load(before + row * width), right = rounded(like, right) + load(before + row * width + LANES);
        store(to, left), store(to + LANES, right);
    }
    return true;
}

void finish_rows(const Product& p, const float* sums, int64_t first, int64_t count, int64_t panel) {
    if (finish_at_once(p, sums, first, count, panel)) return;
    for (int64_t row = 0; row < count; ++row, sums += PANEL)
        finish<bf16>(load(sums), load(sums + LANES), p, first + row, panel);
}

void lay_out_rows(const Product& p, int64_t first, int64_t count, int64_t num_steps, bf16* to) {
    const bf16* x = (const bf16*)p.x + first * p.x_stride;
    for (int64_t step = 0; step < num_steps; ++step, x += STEP, to += TILE * STEP) {
        int64_t left = p.k - step * STEP;
        for (int64_t row = 0; row < count; ++row) {
            if (left >= STEP) memcpy(to + row * STEP, x + row * p.x_stride, STEP * sizeof(bf16));
            else memset(to + row * STEP, 0, STEP * sizeof(bf16)), memcpy(to + row * STEP, x + row * p.x_stride, left * sizeof(bf16));
        }
    }
}

// Few rows, which every thread lays out for itself: that takes no longer than to wait for others. Each pair of tiles goes
// through a whole panel, which is in the second-level cache by then.
void multiply_few(const Product& p) {
    int64_t num_steps = ceil_div(p.k, STEP), tile_rows = num_steps * TILE * STEP, panel_size = num_steps * STEP_ELEMENTS;
    int64_t num_tiles = ceil_div(p.num_rows, TILE), num_pairs = ceil_div(num_tiles, 2);
    int64_t lines = STEP_ELEMENTS * sizeof(bf16) / LINE / num_pairs, share = num_steps * lines * LINE / sizeof(bf16);
    const bf16* packed = (const bf16*)p.packed;
    for_panels(p.num_panels(), [&](auto&& for_each) {
        bf16* x = (bf16*)scratch<RowsInTiles>(num_tiles * tile_rows * sizeof(bf16));
        for (int64_t tile = 0; tile < num_tiles; ++tile)
            lay_out_rows(p, tile * TILE, std::min(TILE, p.num_rows - tile * TILE), num_steps, x + tile * tile_rows);
        int64_t upper = std::min(TILE, p.num_rows), lower = std::min(TILE, p.num_rows - upper);
        configure(upper, lower);
        alignas(64) float sums[2 * TILE * PANEL];
        for_each([&](int64_t panel, int64_t next) {
            const bf16 *from = packed + panel * panel_size, *coming = packed + next * panel_size;
            int64_t ahead = std::min(AHEAD, num_steps) * STEP_ELEMENTS;
            for (int64_t pair = 0; pair < num_pairs; ++pair) {
                const bf16* rows = x + 2 * pair * tile_rows;
                int64_t first = pair * 2 * TILE, count = std::min(2 * TILE, p.num_rows - first);
                // the first pair finds the beginning of its panel there, the last ones see to the rest and to the next one
                auto before_step = [&](int64_t step) {
                    int64_t at = ahead + pair * share + step * lines * (LINE / (int64_t)sizeof(bf16));
                    const bf16* wanted = at < panel_size ? from + at : coming + (at - panel_size);
                    prefetch((const char*)wanted, lines);
                };
                if (count > TILE) add_steps<true>(rows, rows + tile_rows, from, num_steps, true, sums, before_step);
                else add_steps<false>(rows, nullptr, from, num_steps, true, sums, before_step);
                finish_rows(p, sums, first, count, panel);
            }
        });
        _tile_release();
    });
}

// Rows of a block against some panels, some steps at a time: where not all of x stays in the second-level cache, what these
// steps need of it does. What comes next is called from memory bit by bit.
struct Block {
    const Product& p;
    const bf16* x;
    int64_t num_steps, begin, count;
    float* sums;  // [panels][rows, whole pairs of tiles][32]

    const bf16* weights(int64_t panel, int64_t step) const {
        return (const bf16*)p.packed + (panel * num_steps + step) * STEP_ELEMENTS;
    }

    // Each row of the result is a line of its own, which has to come before it can be written. That takes no time while
    // tiles are multiplied: at each of so many turns some rows' lines are called.
    INLINE void call_results(int64_t panel, int64_t row, int64_t num_rows, int64_t turn, int64_t num_turns) const {
        int64_t end = std::min((turn + 1) * 2 * TILE / num_turns, num_rows);
        for (int64_t at = turn * 2 * TILE / num_turns; at < end; ++at) call_line_to_write(result_at(p, row + at, panel));
    }

    void multiply(int64_t first, int64_t end, int64_t next) const {
        int64_t pairs = ceil_div(count, 2 * TILE);
        for (int64_t step = 0; step < num_steps; step += STEPS_AT_ONCE)
            for (int64_t panel = first; panel < end; ++panel) {
                int64_t then = step + STEPS_AT_ONCE;
                const bf16* wanted = panel + 1 < end      ? weights(panel + 1, step)
                                     : then < num_steps ? weights(first, then)
                                                        : weights(next, 0);
                float* own = sums + (panel - first) * pairs * 2 * TILE * PANEL;
                multiply(panel, step, std::min(STEPS_AT_ONCE, num_steps - step), pairs, (const char*)wanted, own);
            }
    }

    void multiply(int64_t panel, int64_t step, int64_t num, int64_t pairs, const char* wanted, float* own) const {
        int64_t lines = ceil_div(STEP_ELEMENTS * sizeof(bf16) / LINE, pairs), tile_rows = num_steps * TILE * STEP;
        const bf16 *here = weights(panel, step), *upper = x + step * TILE * STEP;
        bool is_last = step + num == num_steps;
        for (int64_t row = 0; row < count; row += 2 * TILE, upper += 2 * tile_rows, own += 2 * TILE * PANEL) {
            auto before_step = [&](int64_t at) {
                prefetch(wanted + at * lines * LINE, lines);
                if (is_last) call_results(panel, begin + row, std::min(2 * TILE, count - row), at, num);
            };
            if (count - row > TILE) add_steps<true>(upper, upper + tile_rows, here, num, step == 0, own, before_step);
            else add_steps<false>(upper, nullptr, here, num, step == 0, own, before_step);
            if (is_last) finish_rows(p, own, begin + row, std::min(2 * TILE, count - row), panel);
            wanted += num * lines * LINE;
        }
    }
};

// Whether rows of x stay in the second-level cache while they pass a panel after the other.
bool stays(const Product& p, int64_t num_rows) {
    return num_rows * ceil_div(p.k, STEP) * STEP * (int64_t)sizeof(bf16) <= BLOCK_BYTES;
}

void multiply_by_panels(const Product& p) {
    int64_t num_steps = ceil_div(p.k, STEP), tile_rows = num_steps * TILE * STEP;
    bf16* x = (bf16*)scratch<RowsInTiles>(ceil_div(std::min(MOST_MANY, p.num_rows), TILE) * tile_rows * sizeof(bf16));
    for (int64_t begin = 0; begin < p.num_rows; begin += MOST_MANY) {
        int64_t count = std::min(MOST_MANY, p.num_rows - begin), whole = ceil_div(count, 2 * TILE) * 2 * TILE;
        for_each_in_parallel(ceil_div(count, TILE), [&](int64_t tile) {
            lay_out_rows(p, begin + tile * TILE, std::min(TILE, count - tile * TILE), num_steps, x + tile * tile_rows);
        });
        bool is_kept = stays(p, count);
        for_pieces(p.num_panels(), 1, [&](auto&& for_each) {
            // what lies behind the last row of a tile comes to nothing but sums that nobody reads
            configure(TILE, TILE);
            float* sums = (float*)scratch<Sums>(MOST_PANELS * whole * PANEL * sizeof(float));
            Block block{p, x, num_steps, begin, count, sums};
            for_each([&](int64_t first, int64_t end, int64_t next) {
                if (!is_kept) return block.multiply(first, end, next);
                for (int64_t panel = first; panel < end; ++panel)
                    block.multiply(panel, panel + 1, panel + 1 < end ? panel + 1 : next);
            });
            _tile_release();
        });
    }
}

void multiply_by_rows(const Product& p, int64_t size) {
    int64_t num_steps = ceil_div(p.k, STEP), tile_rows = num_steps * TILE * STEP, at_once = stays(p, size) ? 1 : MOST_PANELS;
    in_parallel(ceil_div(p.num_rows, size), [&](Pieces& pieces) {
        bf16* x = (bf16*)scratch<RowsInTiles>(size / TILE * tile_rows * sizeof(bf16));
        float* sums = (float*)scratch<Sums>(at_once * size * PANEL * sizeof(float));
        configure(TILE, TILE);
        for (int64_t piece; pieces.next(piece);) {
            int64_t begin = piece * size, count = std::min(size, p.num_rows - begin);
            for (int64_t row = 0; row < count; row += TILE)
                lay_out_rows(p, begin + row, std::min(TILE, count - row), num_steps, x + row / TILE * tile_rows);
            Block block{p, x, num_steps, begin, count, sums};
            for (int64_t first = 0, end; first < p.num_panels(); first = end)
                block.multiply(first, end = std::min(first + at_once, p.num_panels()), end);
        }
        _tile_release();
    });
}

void multiply_many(const Product& p) {
    if (int64_t size = own_rows(p.num_rows, 2 * TILE)) multiply_by_rows(p, size);
    else multiply_by_panels(p);
}

void multiply_with_tiles(const Product& p) {
    if (p.num_rows > FEW_ROWS) multiply_many(p);
    else if (p.num_rows) multiply_few(p);
}

#endif

// Where there are whole rows for 16 columns they are turned in blocks of 16 x 16 units of 32 bits; what is left is the
// first element of k that is not there yet.
template <class T>
int64_t pack_blocks(const Matrix& matrix, int64_t panel, int64_t column, const T* from, int64_t stride, T* own) {
    constexpr int64_t SIZE = TILE * sizeof(float) / sizeof(T);
    const uint32_t* rows[TILE];
    for (int64_t at = 0; at < TILE; ++at) {
        int64_t row = matrix.row_at(panel, column + at);
        if (row < 0) return 0;
        rows[at] = (const uint32_t*)(from + row * stride);
    }
    int64_t num_blocks = matrix.k / SIZE;
    for (int64_t block = 0; block < num_blocks; ++block) {
        alignas(64) uint32_t turned[TILE * TILE];
        transpose(rows, block * TILE, turned);
        for (int64_t unit = 0; unit < TILE; ++unit) {
            T* to = own + place_of(own, column, block * SIZE + unit * SIZE / TILE);
            memcpy(to, turned + unit * TILE, TILE * sizeof(uint32_t));
        }
    }
    return num_blocks * SIZE;
}

template <class T>
void pack(const Matrix& matrix, const T* from, int64_t stride, T* to) {
    for_each_in_parallel(matrix.num_panels(), [&](int64_t panel) {
        T* own = to + panel * panel_elements<T>(matrix.k);
        memset(own, 0, panel_elements<T>(matrix.k) * sizeof(T));
        for (int64_t first = 0; first < PANEL; first += TILE) {
            int64_t done = pack_blocks(matrix, panel, first, from, stride, own);
            for (int64_t column = first; column < first + TILE; ++column) {
                int64_t row = matrix.row_at(panel, column);
                for (int64_t at = done; row >= 0 && at < matrix.k; ++at) own[place_of(own, column, at)] = from[row * stride + at];
            }
        }
    });
}

template <class T>
void unpack_rows(const Matrix& matrix, const int64_t* rows, int64_t count, T* out) {
    for_each_in_parallel(count, [&](int64_t index) {
        const T* panel = (const T*)matrix.packed + matrix.panel_of(rows[index]) * panel_elements<T>(matrix.k);
        int64_t column = matrix.column_of(rows[index]);
        for (int64_t at = 0; at < matrix.k; ++at) out[index * matrix.k + at] = panel[place_of(panel, column, at)];
    });
}

}  // namespace

EXPORT int64_t inferfleet_packed_elements_f32(const Matrix* matrix) { return matrix->num_panels() * panel_elements<float>(matrix->k); }
EXPORT int64_t inferfleet_packed_elements_bf16(const Matrix* matrix) { return matrix->num_panels() * panel_elements<bf16>(matrix->k); }

// From rows that are `stride` elements apart to what `packed` of a matrix points to.
EXPORT void inferfleet_pack_f32(const Matrix* matrix, const float* from, int64_t stride, float* to) { pack(*matrix, from, stride, to); }
EXPORT void inferfleet_pack_bf16(const Matrix* matrix, const bf16* from, int64_t stride, bf16* to) { pack(*matrix, from, stride, to); }

// x [num_rows, k], of which rows are x_stride elements apart; out [num_rows, n], or of a gated matrix with an activation
// [num_rows, n / 2].
EXPORT void inferfleet_multiply_f32(const Matrix* matrix, const float* x, int64_t num_rows, int64_t x_stride, int64_t activation,
                                    const float* residual, float* out) {
    multiply_with_vectors<float>({*matrix, x, num_rows, x_stride, (Activation)activation, residual, out});
}

EXPORT void inferfleet_multiply_bf16(const Matrix* matrix, const bf16* x, int64_t num_rows, int64_t x_stride, int64_t activation,
                                     const bf16* residual, bf16* out) {
    Product product{*matrix, x, num_rows, x_stride, (Activation)activation, residual, out};
#ifdef __AMX_BF16__
    multiply_with_tiles(product);
#else
    multiply_with_vectors<bf16>(product);
#endif
}

EXPORT void inferfleet_let_weights_pass(bool pass) { are_passing = pass; }

EXPORT void inferfleet_unpack_rows_f32(const Matrix* matrix, const int64_t* rows, int64_t count, float* out) {
    unpack_rows(*matrix, rows, count, out);
}

EXPORT void inferfleet_unpack_rows_bf16(const Matrix* matrix, const int64_t* rows, int64_t count, bf16* out) {
    unpack_rows(*matrix, rows, count, out);
}
