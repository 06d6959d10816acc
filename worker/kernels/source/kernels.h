// What kernels are told, as worker/kernels and worker/attention lay it out, and the kernels that others are made of.

#pragma once

#include "activations.h"
#include "pages.h"

constexpr int64_t TILE = 16;
constexpr int64_t PANEL = 32;

struct Matrix {
    const void* packed;
    const void* bias;
    int64_t n, k, is_gated;

    int64_t num_panels() const { return is_gated ? ceil_div(n / 2, TILE) : ceil_div(n, PANEL); }

    // Of the 32 rows of a panel the one that is at `column`; -1: none.
    int64_t row_at(int64_t panel, int64_t column) const {
        int64_t row = is_gated ? panel * TILE + column % TILE : panel * PANEL + column;
        if (row >= (is_gated ? n / 2 : n)) return -1;
        return is_gated ? row + column / TILE * (n / 2) : row;
    }

    int64_t panel_of(int64_t row) const { return is_gated ? row % (n / 2) / TILE : row / PANEL; }
    int64_t column_of(int64_t row) const {
        return is_gated ? row % (n / 2) % TILE + row / (n / 2) * TILE : row % PANEL;
    }
};

// x[outer][inner][size] has rows of `size` elements; weights and biases are [weight_rows][size], of which inner ones take
// turns.
struct Norm {
    const void* x;
    int64_t num_outer, num_inner, size, outer_stride;
    const void* weight;
    const void* bias;
    int64_t weight_rows, has_wide_weight, is_rms;
    double eps;
    const void* part;  // added to x first, [outer][size], where there is one; the sums go to `sums`
    void* sums;
    void* out;
};

// Of each position `amplitude` times cosine and sine of what it turns every pair by, [positions][rotary_dim]; the first half
// of `frequencies` is the second one the other way round.
struct Turning {
    const float* frequencies;
    int64_t rotary_dim;
    double amplitude;
};

// turned[tokens][heads + kv heads][head_dim] and v[tokens][kv heads][head_dim], tokens `..._stride` elements apart; cos and
// sin [tokens][rotary_dim], none where nothing turns. Queries go to q[tokens][heads][head_dim], keys and values to the
// places `slots` of pages [places][kv heads][head_dim].
struct Turn {
    const void* turned;
    const void* v;
    int64_t turned_stride, v_stride, num_tokens, num_heads, num_kv_heads, head_dim, rotary_dim;
    const float* cos;
    const float* sin;
    const int64_t* slots;
    void* q;
    void* k_pages;
    void* v_pages;
};

struct Batch {
    int64_t num_rows;
    const int64_t *num_queries, *starts;
    const int64_t* num_keys;  // null: causal
    const int64_t* tables;
    int64_t table_stride, page_size;
};

struct Layer {
    int64_t num_heads, num_kv_heads, head_dim;
    Kind query_kind, page_kind;
    int64_t window;  // keys that a query sees
    double scale;
    double softcap;  // 0: none
    const float* slopes;
    const float* bias;
    int64_t reach;
};

// A rank's side of what the ranks of one machine say to each other.
struct Exchange;

extern "C" {
void inferfleet_normalise_f32(const Norm*);
void inferfleet_normalise_bf16(const Norm*);
void inferfleet_multiply_f32(const Matrix*, const float*, int64_t, int64_t, int64_t, const float*, float*);
void inferfleet_multiply_bf16(const Matrix*, const bf16*, int64_t, int64_t, int64_t, const bf16*, bf16*);
void inferfleet_unpack_rows_f32(const Matrix*, const int64_t*, int64_t, float*);
void inferfleet_unpack_rows_bf16(const Matrix*, const int64_t*, int64_t, bf16*);
void inferfleet_summarise_f32(const float*, int64_t, int64_t, float*, int64_t*, float*);
void inferfleet_summarise_bf16(const bf16*, int64_t, int64_t, float*, int64_t*, float*);
void inferfleet_find_angles(const Turning*, const int64_t*, int64_t, float*, float*);
void inferfleet_turn_f32(const Turn*);
void inferfleet_turn_bf16(const Turn*);
void inferfleet_attend(const Batch*, const Layer*, const void*, int64_t, const void*, const void*, void*);
bool inferfleet_add_up_f32(Exchange*, const float*, const float*, float*, int64_t);
bool inferfleet_add_up_bf16(Exchange*, const bf16*, const bf16*, bf16*, int64_t);
}
