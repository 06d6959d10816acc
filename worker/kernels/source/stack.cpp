// Layers of a decoder from the first to the last without a word in between: what the caller would do from layer to layer
// takes longer than many a kernel, since weights have driven all of it out of the caches.
//
//     q, k, v = split(norm(x) @ qkv)   [norm of q, k] [rope]   k, v -> pages
//     x = x + attention(q, pages) @ out
//     x = x + activation(norm(x) @ up) @ down
//
// Ranks hold parts of heads and widths, and add up what out and down give.

#include "kernels.h"
#include "scratch.h"

#include <algorithm>

namespace {

struct NormWeights {
    const void *weight, *bias;
    int64_t weight_rows, has_wide_weight;
};

struct StackLayer {
    NormWeights attention_norm, qk_norm, mlp_norm;  // of queries and keys: null where there is none
    const Matrix *qkv, *out, *up, *down;
    const Layer* attention;
    int64_t turn;  // which of the step's; -1: none
};

// All pages of layers[num_layers] are of the type of the weights.
struct Stack {
    const StackLayer* layers;
    NormWeights final_norm;  // null where there is none
    int64_t num_layers, hidden, num_heads, num_kv_heads, head_dim, activation, is_rms;
    double eps;
    Exchange* exchange;  // null on one rank
};

struct Angles {
    const float *cos, *sin;
    int64_t rotary_dim;
};

// x [num_tokens, hidden] becomes what is behind the last layer and the final norm.
struct StackStep {
    void* x;
    int64_t num_tokens;
    const Angles* angles;
    const int64_t* slots;
    const Batch* batch;
    const void* const* pages;  // [layers][2]: of keys, of values
};

template <class T>
struct Kernels;

template <>
struct Kernels<float> {
    static constexpr auto normalise = inferfleet_normalise_f32;
    static constexpr auto multiply = inferfleet_multiply_f32;
    static constexpr auto turn = inferfleet_turn_f32;
    static constexpr auto add_up = inferfleet_add_up_f32;
};

template <>
struct Kernels<bf16> {
    static constexpr auto normalise = inferfleet_normalise_bf16;
    static constexpr auto multiply = inferfleet_multiply_bf16;
    static constexpr auto turn = inferfleet_turn_bf16;
    static constexpr auto add_up = inferfleet_add_up_bf16;
};

// Rows of `inner` parts of `size` elements, `stride` elements apart.
template <class T>
void normalise(const Stack& stack, const NormWeights& weights, const T* x, int64_t num_rows, int64_t inner, int64_t size,
               int64_t stride, const T* part, T* sums, T* out) {
    Norm norm{x, num_rows, inner, size, stride, weights.weight, weights.bias, weights.weight_rows,
              weights.has_wide_weight, stack.is_rms, stack.eps, part, sums, out};
    Kernels<T>::normalise(&norm);
}

template <class T>
struct Buffers {
    T *sums, *normed, *heads, *normed_heads, *q, *attended, *inner;

    Buffers(const Stack& stack, int64_t num_tokens) {
        int64_t queries = stack.num_heads * stack.head_dim, turned = queries + stack.num_kv_heads * stack.head_dim, widest = 0;
        for (int64_t layer = 0; layer < stack.num_layers; ++layer) widest = std::max(widest, stack.layers[layer].down->k);
        int64_t widths[] = {stack.hidden, stack.hidden, turned + turned - queries, turned, queries, queries, widest};
        T** places[] = {&sums, &normed, &heads, &normed_heads, &q, &attended, &inner};
        int64_t all = 0;
        for (int64_t& width : widths) width = ceil_div(width * num_tokens, 64) * 64, all += width;
        T* place = (T*)scratch<Buffers>(all * sizeof(T));
        for (int64_t index = 0; index < 7; ++index) *places[index] = place, place += widths[index];
    }
};

template <class T>
void attend(const Stack& stack, const StackStep& step, int64_t number, const Buffers<T>& own) {
    const StackLayer& layer = stack.layers[number];
    int64_t tokens = step.num_tokens, size = stack.head_dim, num_turned = stack.num_heads + stack.num_kv_heads;
    int64_t width = (num_turned + stack.num_kv_heads) * size;
    Kernels<T>::multiply(layer.qkv, own.normed, tokens, stack.hidden, NONE, nullptr, own.heads);
    const T* turned = own.heads;
    int64_t stride = width;
    if (layer.qk_norm.weight) {
        normalise<T>(stack, layer.qk_norm, turned, tokens, num_turned, size, width, nullptr, nullptr, own.normed_heads);
        turned = own.normed_heads, stride = num_turned * size;
    }
    const void* const* pages = step.pages + 2 * number;
    Angles angles = layer.turn < 0 ? Angles{nullptr, nullptr, 0} : step.angles[layer.turn];
    Turn turn{turned, own.heads + num_turned * size, stride, width, tokens, stack.num_heads, stack.num_kv_heads, size,
              angles.rotary_dim, angles.cos, angles.sin, step.slots, own.q, (void*)pages[0], (void*)pages[1]};
    Kernels<T>::turn(&turn);
    inferfleet_attend(step.batch, layer.attention, own.q, stack.num_heads * size, pages[0], pages[1], own.attended);
}

// False if another rank is gone.
template <class T>
bool run(const Stack& stack, const StackStep& step) {
    Buffers<T> own(stack, step.num_tokens);
    int64_t tokens = step.num_tokens, hidden = stack.hidden;
    T* x = (T*)step.x;
    for (int64_t number = 0; number < stack.num_layers; ++number) {
        const StackLayer& layer = stack.layers[number];
        normalise<T>(stack, layer.attention_norm, x, tokens, 1, hidden, hidden, nullptr, nullptr, own.normed);
        attend<T>(stack, step, number, own);
        T* part = own.normed;
        Kernels<T>::multiply(layer.out, own.attended, tokens, layer.out->k, NONE, nullptr, part);
        if (stack.exchange && !Kernels<T>::add_up(stack.exchange, part, nullptr, part, tokens * hidden)) return false;
        normalise<T>(stack, layer.mlp_norm, x, tokens, 1, hidden, hidden, part, own.sums, x);
        Kernels<T>::multiply(layer.up, x, tokens, hidden, stack.activation, nullptr, own.inner);
        if (stack.exchange) {
            Kernels<T>::multiply(layer.down, own.inner, tokens, layer.down->k, NONE, nullptr, part);
            if (!Kernels<T>::add_up(stack.exchange, part, own.sums, x, tokens * hidden)) return false;
        } else {
            Kernels<T>::multiply(layer.down, own.inner, tokens, layer.down->k, NONE, own.sums, x);
        }
    }
    if (stack.final_norm.weight) normalise<T>(stack, stack.final_norm, x, tokens, 1, hidden, hidden, nullptr, nullptr, x);
    return true;
}

}  // namespace

EXPORT bool inferfleet_run_layers_f32(const Stack* stack, const StackStep* step) { return run<float>(*stack, *step); }
EXPORT bool inferfleet_run_layers_bf16(const Stack* stack, const StackStep* step) { return run<bf16>(*stack, *step); }
