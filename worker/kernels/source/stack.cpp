// A step of a decoder from its tokens to its logits without a word in between: what the caller would do from layer to
// layer takes longer than many a kernel, since weights have driven all of it out of the caches.
//
//     x = table[tokens]
//     each layer:
//         q, k, v = split(norm(x) @ qkv)   [norm of q, k] [rope]   k, v -> pages
//         x = x + attention(q, pages) @ out
//         x = x + activation(norm(x) @ up) @ down
//     logits = norm(x) @ head
//
// Behind the keys and values of the last layer only tokens go on whose logits are wanted.
// Ranks hold parts of heads and widths, and add up what out and down give.

#include "kernels.h"
#include "pool.h"
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
    int64_t turning;  // which of the stack's; -1: none
};

// All pages are of the type of the weights.
struct Stack {
    const StackLayer* layers;
    NormWeights final_norm;  // null where there is none
    int64_t num_layers, hidden, num_heads, num_kv_heads, head_dim, activation, is_rms;
    double eps;
    Exchange* exchange;  // null on one rank
    const Turning* turnings;
    int64_t num_turnings;
    const void* table;  // [vocabulary][hidden]; null where its rows are those of `tied`, or where each step brings its x
    const Matrix* tied;
    const Matrix* head;  // null where the caller goes on from what is behind the final norm
};

struct StackStep {
    const int64_t *tokens, *positions;
    int64_t num_tokens;
    void* x;  // [num_tokens][hidden], which is lost; null where there is a table
    const int64_t* slots;
    const Batch* batch;
    char* pages;         // [layers][2] of keys and of values
    int64_t page_bytes;  // from one of them to the next
    const int64_t* wanted;  // ascending
    int64_t num_wanted;
    void* out;  // [num_wanted] logits, or what is behind the final norm
    float* most;  // of logits their summary, [num_wanted] each
    int64_t* places;
    float* normalisers;
};

template <class T>
struct Kernels;

template <>
struct Kernels<float> {
    static constexpr auto normalise = inferfleet_normalise_f32;
    static constexpr auto multiply = inferfleet_multiply_f32;
    static constexpr auto unpack_rows = inferfleet_unpack_rows_f32;
    static constexpr auto turn = inferfleet_turn_f32;
    static constexpr auto summarise = inferfleet_summarise_f32;
    static constexpr auto add_up = inferfleet_add_up_f32;
};

template <>
struct Kernels<bf16> {
    static constexpr auto normalise = inferfleet_normalise_bf16;
    static constexpr auto multiply = inferfleet_multiply_bf16;
    static constexpr auto unpack_rows = inferfleet_unpack_rows_bf16;
    static constexpr auto turn = inferfleet_turn_bf16;
    static constexpr auto summarise = inferfleet_summarise_bf16;
    static constexpr auto add_up = inferfleet_add_up_bf16;
};

// What is dead when another begins leaves it its place: `attended` has that of `heads`, `inner` all behind `normed`.
template <class T>
struct Buffers {
    T *x, *sums, *normed, *heads, *q, *normed_heads, *attended, *inner;

    Buffers(const Stack& stack, int64_t num_tokens) {
        int64_t queries = stack.num_heads * stack.head_dim, turned = queries + stack.num_kv_heads * stack.head_dim;
        int64_t widest = 0, num_normed = 0;
        for (int64_t number = 0; number < stack.num_layers; ++number) {
            widest = std::max(widest, stack.layers[number].down->k);
            if (stack.layers[number].qk_norm.weight) num_normed = turned;
        }
        int64_t hidden = stack.hidden, widths[] = {hidden, hidden, hidden, 2 * turned - queries, queries, num_normed};
        T** places[] = {&x, &sums, &normed, &heads, &q, &normed_heads};
        int64_t ends[7] = {0};
        for (int64_t index = 0; index < 6; ++index) ends[index + 1] = ends[index] + in_lines(widths[index] * num_tokens);
        T* memory = (T*)scratch<Buffers>(std::max(ends[6], ends[3] + in_lines(widest * num_tokens)) * sizeof(T));
        for (int64_t index = 0; index < 6; ++index) *places[index] = memory + ends[index];
        attended = inner = heads;
    }

  private:
    static int64_t in_lines(int64_t num_elements) { return ceil_div(num_elements, 64) * 64; }
};

// Rows `wanted` of x, in the place of the first ones.
template <class T>
void keep_rows(T* x, int64_t size, const int64_t* wanted, int64_t num_wanted) {
    for (int64_t row = 0; row < num_wanted; ++row)
        if (wanted[row] != row) memcpy(x + row * size, x + wanted[row] * size, size * sizeof(T));
}

template <class T>
class Run {
  public:
    Run(const Stack& stack, const StackStep& step) : stack_(stack), step_(step), own_(stack, step.num_tokens) {
        num_tokens_ = step.num_tokens, batch_ = *step.batch, x_ = step.x ? (T*)step.x : own_.x;
    }

    // False if another rank is gone.
    bool run() {
        embed();
        find_angles();
        for (int64_t number = 0; number < stack_.num_layers; ++number) {
            write_keys(number);
            if (number + 1 == stack_.num_layers) keep_wanted();
            if (num_tokens_ && !(attend(number) && feed_forward(number))) return false;
        }
        finish();
        return true;
    }

  private:
    void embed() {
        if (stack_.tied) return Kernels<T>::unpack_rows(stack_.tied, step_.tokens, num_tokens_, x_);
        if (!stack_.table) return;
        int64_t hidden = stack_.hidden;
        for (int64_t token = 0; token < num_tokens_; ++token)
            memcpy(x_ + token * hidden, (const T*)stack_.table + step_.tokens[token] * hidden, hidden * sizeof(T));
    }

    void find_angles() {
        int64_t elements = 0;
        for (int64_t index = 0; index < stack_.num_turnings; ++index)
            elements += 2 * num_tokens_ * stack_.turnings[index].rotary_dim;
        angles_ = (float*)scratch<Turning>(elements * sizeof(float));
        for (int64_t index = 0; index < stack_.num_turnings; ++index) {
            Angles angles = angles_of(index);
            inferfleet_find_angles(stack_.turnings + index, step_.positions, num_tokens_, angles.cos, angles.sin);
        }
    }

    struct Angles {
        float *cos, *sin;
        int64_t rotary_dim;
    };

    Angles angles_of(int64_t turning) const {
        if (turning < 0) return {nullptr, nullptr, 0};
        float* place = angles_;
        for (int64_t index = 0; index < turning; ++index) place += 2 * step_.num_tokens * stack_.turnings[index].rotary_dim;
        int64_t size = stack_.turnings[turning].rotary_dim;
        return {place, place + step_.num_tokens * size, size};
    }

    char* pages_of(int64_t number, bool are_values) const { return step_.pages + (2 * number + are_values) * step_.page_bytes; }

    void write_keys(int64_t number) {
        const StackLayer& layer = stack_.layers[number];
        int64_t size = stack_.head_dim, num_turned = stack_.num_heads + stack_.num_kv_heads;
        int64_t width = (num_turned + stack_.num_kv_heads) * size, stride = width;
        normalise(layer.attention_norm, x_, nullptr, nullptr, own_.normed);
        Kernels<T>::multiply(layer.qkv, own_.normed, num_tokens_, stack_.hidden, NONE, nullptr, own_.heads);
        const T* turned = own_.heads;
        if (layer.qk_norm.weight) {
            normalise(layer.qk_norm, turned, num_turned, size, width, nullptr, nullptr, own_.normed_heads);
            turned = own_.normed_heads, stride = num_turned * size;
        }
        Angles angles = angles_of(layer.turning);
        Turn turn{turned, own_.heads + num_turned * size, stride, width, num_tokens_, stack_.num_heads, stack_.num_kv_heads, size,
                  angles.rotary_dim, angles.cos, angles.sin, step_.slots, own_.q, pages_of(number, false), pages_of(number, true)};
        Kernels<T>::turn(&turn);
    }

    bool attend(int64_t number) {
        const StackLayer& layer = stack_.layers[number];
        int64_t stride = stack_.num_heads * stack_.head_dim;
        inferfleet_attend(&batch_, layer.attention, own_.q, stride, pages_of(number, false), pages_of(number, true), own_.attended);
        T* part = own_.normed;
        Kernels<T>::multiply(layer.out, own_.attended, num_tokens_, layer.out->k, NONE, nullptr, part);
        if (stack_.exchange && !Kernels<T>::add_up(stack_.exchange, part, nullptr, part, num_tokens_ * stack_.hidden)) return false;
        normalise(layer.mlp_norm, x_, part, own_.sums, x_);
        return true;
    }

    bool feed_forward(int64_t number) {
        const StackLayer& layer = stack_.layers[number];
        int64_t width = layer.down->k;
        Kernels<T>::multiply(layer.up, x_, num_tokens_, stack_.hidden, stack_.activation, nullptr, own_.inner);
        const T* added = stack_.exchange ? nullptr : own_.sums;
        T* to = stack_.exchange ? own_.normed : x_;
        Kernels<T>::multiply(layer.down, own_.inner, num_tokens_, width, NONE, added, to);
        return !stack_.exchange || Kernels<T>::add_up(stack_.exchange, to, own_.sums, x_, num_tokens_ * stack_.hidden);
    }

    // Keys of the last layer are written; of its queries only those are left whose logits are wanted, where these are the
    // last ones of their rows, which attention can be told.
    void keep_wanted() {
        if (step_.num_wanted == num_tokens_ || !are_last_of_rows()) return;
        keep_rows(x_, stack_.hidden, step_.wanted, step_.num_wanted);
        keep_rows(own_.q, stack_.num_heads * stack_.head_dim, step_.wanted, step_.num_wanted);
        num_tokens_ = step_.num_wanted;
    }

    // If so, `batch_` has no others any more.
    bool are_last_of_rows() {
        if (batch_.num_keys) return false;
        int64_t *counts = (int64_t*)scratch<Batch>(2 * batch_.num_rows * sizeof(int64_t)), *starts = counts + batch_.num_rows;
        int64_t end = 0, place = 0;
        for (int64_t row = 0; row < batch_.num_rows; ++row) {
            int64_t all = batch_.num_queries[row], first = place;
            for (end += all; place < step_.num_wanted && step_.wanted[place] < end;) ++place;
            counts[row] = place - first, starts[row] = batch_.starts[row] + all - counts[row];
            if (place > first && step_.wanted[first] != end - counts[row]) return false;
        }
        batch_.num_queries = counts, batch_.starts = starts;
        return true;
    }

    void finish() {
        if (step_.num_wanted < num_tokens_) keep_rows(x_, stack_.hidden, step_.wanted, step_.num_wanted);
        num_tokens_ = step_.num_wanted;
        T* last = stack_.head ? x_ : (T*)step_.out;
        if (stack_.final_norm.weight) normalise(stack_.final_norm, x_, nullptr, nullptr, last);
        else if (last != x_) memcpy(last, x_, num_tokens_ * stack_.hidden * sizeof(T));
        if (!stack_.head) return;
        T* logits = (T*)step_.out;
        Kernels<T>::multiply(stack_.head, x_, num_tokens_, stack_.hidden, NONE, nullptr, logits);
        Kernels<T>::summarise(logits, num_tokens_, stack_.head->n, step_.most, step_.places, step_.normalisers);
    }

    // Rows of x[num_tokens][hidden].
    void normalise(const NormWeights& weights, const T* x, const T* part, T* sums, T* out) {
        normalise(weights, x, 1, stack_.hidden, stack_.hidden, part, sums, out);
    }

    // Of tokens `stride` elements apart `inner` parts of `size` elements.
    void normalise(const NormWeights& weights, const T* x, int64_t inner, int64_t size, int64_t stride, const T* part, T* sums,
                   T* out) {
        Norm norm{x, num_tokens_, inner, size, stride, weights.weight, weights.bias, weights.weight_rows,
                  weights.has_wide_weight, stack_.is_rms, stack_.eps, part, sums, out};
        Kernels<T>::normalise(&norm);
    }

    const Stack& stack_;
    const StackStep& step_;
    Buffers<T> own_;
    int64_t num_tokens_;  // under way
    Batch batch_;
    T* x_;
    float* angles_;
};

template <class T>
bool run(const Stack& stack, const StackStep& step) {
    Run<T> run(stack, step);
    bool has_run = false;
    auto lead = [&] { has_run = run.run(); };
    run_after_rest([](void* context) { (*(decltype(lead)*)context)(); }, &lead);
    return has_run;
}

}  // namespace

EXPORT bool inferfleet_run_stack_f32(const Stack* stack, const StackStep* step) { return run<float>(*stack, *step); }
EXPORT bool inferfleet_run_stack_bf16(const Stack* stack, const StackStep* step) { return run<bf16>(*stack, *step); }
