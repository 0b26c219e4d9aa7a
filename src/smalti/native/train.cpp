// Loss of a decoder-only transformer and its gradients: what autograd does for `models.slot_nll` in some hundred
// operators, in three passes over the sequences. Products are of float32, or, with SMALTI_BFLOAT16 defined, of bfloat16
// with float32 sums: operands_float32.h and operands_bfloat16.h are the two ways to make them.
//
//   forward    groups of sequences, each through all layers, head and loss; what the backward pass needs is kept
//   backward   the same groups, from the loss down to the embeddings
//   gradients  every piece of every weight, summed over all groups
//
// A task is one group, or 32 rows of one weight, and no sum crosses tasks in an order that depends on the threads: the
// results are the same, bit for bit, for any number of threads. Within a group activations stay in the cache of a core.
//
// The residual stream, sums, norms, softmax and losses are float32; what enters a product is rounded to its kind of number.
//
// Letters: B sequences, T tokens, D model width, F feed-forward width, Dh head width, n the ids of a slot.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef SMALTI_BFLOAT16
#include "operands_bfloat16.h"
#else
#include "operands_float32.h"
#endif
#include "threads.h"
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

using namespace smalti;

constexpr long round_up(long n) { return (n + EDGE - 1) / EDGE * EDGE; }

// ---- feed-forward activations, numbered as in transformer.FEED_FORWARDS ----

enum Activation { GELU, GELU_TANH, RELU, TANH, SWIGLU };

struct Activated {
    Vector value, slope;
};

// x · Φ(x), whose slope is Φ(x) + x φ(x).
INLINE Activated gelu(Vector x) {
    Vector phi = of(0.5f) + of(0.5f) * erf(x * of(0.70710678f)), density = exp(of(-0.5f) * x * x) * of(0.39894228f);
    return {x * phi, fma(x, density, phi)};
}

INLINE Activated gelu_tanh(Vector x) {
    const Vector k = of(0.79788456f), cubic = of(0.044715f);
    Vector square = x * x, t = tanh(k * x * fma(cubic, square, of(1))), half = of(0.5f) * (of(1) + t);
    return {x * half, fma(of(0.5f) * x * (of(1) - t * t) * k, fma(of(3) * cubic, square, of(1)), half)};
}

INLINE Activated silu(Vector x) {
    Vector s = of(1) / (of(1) + exp(-x));
    return {x * s, s * fma(x, of(1) - s, of(1))};
}

template <int KIND>
INLINE Activated activation(Vector x) {
    if constexpr (KIND == GELU) return gelu(x);
    if constexpr (KIND == GELU_TANH) return gelu_tanh(x);
    if constexpr (KIND == SWIGLU) return silu(x);
    if constexpr (KIND == TANH) {
        Vector t = tanh(x);
        return {t, of(1) - t * t};
    }
    Mask positive = x > of(0);
    return {select(positive, x, of(0)), select(positive, of(1), of(0))};
}

// ---- products ----

// Left rows times a packed right operand of this depth; take(row, column, 32 numbers) gets the result.
template <class Take>
void product(const Element* a, long stride, long rows, const Element* b, long columns, long depth, const Take& take) {
    alignas(64) float c[EDGE * EDGE];
    for (long row = 0; row < rows; row += EDGE)
        for (long column = 0; column < columns; column += EDGE) {
            block(plain_rows(a + row * stride, stride), b + column * depth, depth, c, EDGE, std::min(EDGE, rows - row));
            for (long i = 0; i < EDGE && row + i < rows; ++i) take(row + i, column, c + i * EDGE);
        }
}

// ---- the task, as Python describes it ----

enum Positions { NONE, LEARNED, FIXED, ROTARY };

struct Slot {
    long num_targets;
    const int64_t *rows, *local;  // B · T hidden states count the rows; the true ids count from the slot's first
    long num_ranges;
    const int64_t* ranges;  // of the head: start and end, one pair after the other
};

struct Task {
    long num_layers, width, num_heads, kv_heads, wide, activation, rms_norm, positions;
    long num_sequences, length, token_stride, num_slots, num_threads, with_gradients;
    double norm_eps, dropout;
    uint64_t seed;
    const int64_t* token_ids;
    const float* table;  // fixed positions (T × D), or cosines and sines (T × Dh / 2 × 2)
    const Slot* slots;
    const float* const* parameters;
    char* workspace;

    long rows_of(long range_slot) const {
        long n = 0;
        for (long i = 0; i < slots[range_slot].num_ranges; ++i)
            n += slots[range_slot].ranges[2 * i + 1] - slots[range_slot].ranges[2 * i];
        return n;
    }
};

// Parameters and gradients come in this order; missing ones are null.
enum { EMBEDDING, HEAD, POSITIONS, FINAL_NORM, FINAL_BIAS, FIRST_LAYER };
enum { NORM_1, NORM_1_BIAS, QKV, QKV_BIAS, OUT, OUT_BIAS, NORM_2, NORM_2_BIAS, UP, UP_BIAS, DOWN, DOWN_BIAS, PER_LAYER };

// Hands out memory piece by piece; from a null start it only counts.
struct Memory {
    char* start;
    size_t used = 0;

    template <class Number>
    Number* take(long count) {
        size_t at = used;
        used += (count * sizeof(Number) + 63) / 64 * 64;
        return reinterpret_cast<Number*>(start + at);
    }
};

// A weight as right operand of both directions, and what its gradient is the product of.
struct Weight {
    long out, in;
    Element *forward, *backward;
    Element *output_gradient, *input;  // packed, all groups one after the other

    Weight(Memory& memory, long out, long in, long depth) : out(out), in(in) {
        forward = memory.take<Element>(out * in);
        backward = memory.take<Element>(out * in);
        output_gradient = memory.take<Element>(out * depth);
        input = memory.take<Element>(in * depth);
    }
};

struct Layer {
    Weight qkv, out, up, down;
    float *before, *between;  // the residual stream before attention and before the feed-forward
    Element *heads, *wide;       // queries, keys and values; what enters the activation
    float *norm_1, *norm_2;   // per group: gradients of weight and bias
};

// A part of the depth over which a weight's gradient is summed in one go.
struct Part {
    long start, depth;
};

// The targets of a slot, those of one group together and padded, and what the loss leaves for the way back.
struct Head {
    long n, padded_n, depth;
    std::vector<long> starts;   // of each group among the padded targets
    std::vector<long> targets;  // index of each padded target, -1 for padding
    std::vector<Part> parts;
    Element *forward, *backward, *hidden, *packed_hidden, *logit_gradient;
    float* hidden_gradient;
};

struct Scratch {
    Element *normed, *mixed, *activated, *wide, *output, *heads;
    float *stream, *sums, *logits;
    Element *q, *k, *v, *o, *p, *s, *kt, *vt, *kp, *vp, *qp, *op, *pt, *st, *logit_rows;
    float *scores, *dq, *dk, *dv;
};

struct Plan {
    const Task& task;
    long D, F, wide, heads_width, Dh, padded_Dh, T, padded_T, group_size, num_groups, rows, depth, kv_width;
    std::vector<Layer> layers;
    std::vector<Head> heads;
    std::vector<Scratch> scratch;
    std::vector<Part> parts;
    float *last, *final_norm, *embedded;  // the stream behind the last layer; gradients by group; of the embeddings
    Memory memory;

    explicit Plan(const Task& task) : task(task), memory{task.workspace} {
        D = task.width, F = task.wide, wide = F * (task.activation == SWIGLU ? 2 : 1);
        Dh = D / task.num_heads, padded_Dh = round_up(Dh), kv_width = Dh * task.kv_heads;
        heads_width = D + 2 * kv_width;
        T = task.length, padded_T = round_up(T);
        group_size = std::max(1L, ROWS_OF_A_GROUP / T);
        num_groups = (task.num_sequences + group_size - 1) / group_size;
        rows = round_up(group_size * T), depth = rows * num_groups;
        for (long group = 0; group < num_groups; ++group) parts.push_back({group * rows, num_rows(group)});
        if (!DEPTH_IN_PARTS) parts = {{0, depth}};
        for (long i = 0; i < task.num_layers; ++i) add_layer();
        for (long i = 0; i < task.num_slots; ++i) add_head(i);
        last = memory.take<float>(depth * D);
        embedded = memory.take<float>(depth * D);
        final_norm = memory.take<float>(num_groups * 2 * D);
        for (long i = 0; i < task.num_threads; ++i) add_scratch();
    }

    static constexpr long ROWS_OF_A_GROUP = 256;

    void add_layer() {
        layers.push_back({
            Weight(memory, heads_width, D, depth), Weight(memory, D, D, depth),
            Weight(memory, wide, D, depth), Weight(memory, D, F, depth),
            memory.take<float>(depth * D), memory.take<float>(depth * D),
            memory.take<Element>(depth * heads_width), memory.take<Element>(depth * wide),
            memory.take<float>(num_groups * 2 * D), memory.take<float>(num_groups * 2 * D),
        });
    }

    void add_head(long index) {
        const Slot& slot = task.slots[index];
        Head head;
        head.n = task.rows_of(index), head.padded_n = round_up(head.n);
        std::vector<std::vector<long>> by_group(num_groups);
        for (long i = 0; i < slot.num_targets; ++i) by_group[slot.rows[i] / T / group_size].push_back(i);
        for (const auto& found : by_group) {
            head.starts.push_back(head.targets.size());
            if (!found.empty()) head.parts.push_back({head.starts.back(), long(found.size())});
            head.targets.insert(head.targets.end(), found.begin(), found.end());
            head.targets.resize(round_up(head.targets.size()), -1);
        }
        head.depth = head.targets.size();
        if (!DEPTH_IN_PARTS) head.parts = {{0, head.depth}};
        head.starts.push_back(head.depth);
        head.forward = memory.take<Element>(head.padded_n * D);
        head.backward = memory.take<Element>(head.padded_n * D);
        head.hidden = memory.take<Element>(head.depth * D);
        head.packed_hidden = memory.take<Element>(head.depth * D);
        head.logit_gradient = memory.take<Element>(head.depth * head.padded_n);
        head.hidden_gradient = memory.take<float>(head.depth * D);
        heads.push_back(std::move(head));
    }

    void add_scratch() {
        Scratch s;
        long most_logits = EDGE;
        for (const Head& head : heads) most_logits = std::max(most_logits, head.padded_n);
        for (Element** of_width : {&s.normed, &s.mixed, &s.output}) *of_width = memory.take<Element>(rows * D);
        s.activated = memory.take<Element>(rows * F);
        s.wide = memory.take<Element>(rows * wide);
        s.heads = memory.take<Element>(rows * heads_width);
        s.stream = memory.take<float>(rows * D);
        s.sums = memory.take<float>(rows * D);
        s.logits = memory.take<float>(EDGE * most_logits);
        s.logit_rows = memory.take<Element>(EDGE * most_logits);
        for (Element** one : {&s.q, &s.k, &s.v, &s.o, &s.kt, &s.vt, &s.kp, &s.vp, &s.qp, &s.op})
            *one = memory.take<Element>(padded_T * padded_Dh);
        for (Element** one : {&s.p, &s.s, &s.pt, &s.st}) *one = memory.take<Element>(padded_T * padded_T);
        s.scores = memory.take<float>(EDGE * padded_T);
        for (float** one : {&s.dq, &s.dk, &s.dv}) *one = memory.take<float>(padded_T * padded_Dh);
        scratch.push_back(s);
    }

    long num_sequences(long group) const { return std::min(group_size, task.num_sequences - group * group_size); }
    long num_rows(long group) const { return num_sequences(group) * T; }
    long packed_rows_of(long group) const { return DEPTH_IN_PARTS ? num_rows(group) : rows; }
    const float* parameter(long index) const { return task.parameters[index]; }
    const float* parameter(long layer, long index) const {
        return task.parameters[FIRST_LAYER + layer * PER_LAYER + index];
    }
};

// Asks for pages of 2 MiB, where the system gives them on request: panels lie so far apart that small ones cost a
// twentieth of the time.
void use_large_pages([[maybe_unused]] const Plan& plan) {
#ifdef MADV_HUGEPAGE
    constexpr uintptr_t page = 1 << 21;
    const auto start = reinterpret_cast<uintptr_t>(plan.task.workspace);
    const uintptr_t first = (start + page - 1) / page * page, end = (start + plan.memory.used) / page * page;
    if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

// Tasks 0 .. count − 1, each taken by the next thread that is free.
template <class Work>
void for_each(const Plan& plan, long count, const Work& work) {
    std::atomic<long> next{0};
    smalti::parallel(plan.task.num_threads, [&](int rank, int) {
        tiles_on();
        for (long i; (i = next++) < count;) work(i, plan.scratch[rank]);
        tiles_off();
    });
}

// ---- pieces of a layer ----

// Layer norm, or RMS norm: of one row the mean that is taken off and the factor.
struct Statistics {
    float mean = 0, factor;

    Statistics(const Plan& plan, const float* x) {
        long D = plan.D;
        Vector total = of(0), squares = of(0);
        if (!plan.task.rms_norm) {
            for (long i = 0; i < D; i += 16) total += load(x + i);
            mean = sum(total) / D;
        }
        for (long i = 0; i < D; i += 16) {
            Vector centred = load(x + i) - of(mean);
            squares = fma(centred, centred, squares);
        }
        factor = 1 / std::sqrt(sum(squares) / D + float(plan.task.norm_eps));
    }
};

void normed_row(const Plan& plan, const float* x, Statistics row, const float* weight, const float* bias, Element* to) {
    for (long i = 0; i < plan.D; i += 16) {
        Vector y = (load(x + i) - of(row.mean)) * of(row.factor) * load(weight + i);
        store(to + i, bias ? y + load(bias + i) : y);
    }
}

void norm(const Plan& plan, const float* x, long rows, const float* weight, const float* bias, Element* to) {
    for (long r = 0; r < rows; ++r)
        normed_row(plan, x + r * plan.D, Statistics(plan, x + r * plan.D), weight, bias, to + r * plan.D);
}

// Adds the gradient of the norm's input to `dx`; writes those of weight and bias behind one another to `parameters`, and
// the norm's output, once more, to `output`.
void norm_backward(const Plan& plan, const float* dy, const float* x, long rows, const float* weight, const float* bias,
                   float* dx, float* parameters, Element* output) {
    const long D = plan.D;
    float *dweight = parameters, *dbias = parameters + D;
    std::memset(parameters, 0, 2 * D * sizeof(float));
    for (long r = 0; r < rows; ++r, x += D, dy += D, dx += D) {
        Statistics row(plan, x);
        normed_row(plan, x, row, weight, bias, output + r * D);
        Vector along = of(0), total = of(0);
        for (long i = 0; i < D; i += 16) {
            Vector d = load(dy + i), y = (load(x + i) - of(row.mean)) * of(row.factor), g = d * load(weight + i);
            store(dweight + i, fma(d, y, load(dweight + i)));
            store(dbias + i, d + load(dbias + i));
            along = fma(g, y, along);
            total += g;
        }
        float mean = plan.task.rms_norm ? 0 : sum(total) / D, share = sum(along) / D;
        for (long i = 0; i < D; i += 16) {
            Vector y = (load(x + i) - of(row.mean)) * of(row.factor), g = load(dy + i) * load(weight + i);
            store(dx + i, fma(of(row.factor), g - of(mean) - y * of(share), load(dx + i)));
        }
    }
}

// Which of the stream's numbers a dropout keeps, by a hash of seed, place and number ("lowbias32", twice, because
// neighbours in seed and place must not resemble each other); kept ones grow so that the mean stays.
struct Dropout {
    uint32_t key = 0, threshold = 0;
    float scale = 1;

    Dropout(const Task& task, long place) {
        if (task.dropout == 0) return;
        key = hash(uint32_t(task.seed) + hash(uint32_t(task.seed >> 32) + hash(uint32_t(place))));
        threshold = uint32_t(std::min(task.dropout * 4294967296.0, 4294967295.0));
        scale = float(1 / (1 - task.dropout));
    }
    static uint32_t hash(uint32_t x) {
        x = (x ^ x >> 16) * 0x7feb352du;
        x = (x ^ x >> 15) * 0x846ca68bu;
        return x ^ x >> 16;
    }
    // 0 or `scale` for the 16 numbers from `index` on.
    Vector factors(uint64_t index) const {
        if (threshold == 0) return of(1);
        Unsigned x = counted_from(uint32_t(index)) ^ of_unsigned(key);
        for (int i = 0; i < 2; ++i) {
            x = (x ^ shifted_right(x, 16)) * of_unsigned(0x7feb352du);
            x = (x ^ shifted_right(x, 15)) * of_unsigned(0x846ca68bu);
            x = x ^ shifted_right(x, 16);
        }
        return select(x < of_unsigned(threshold), of(0), of(scale));
    }
};

// The places of dropout, counted through the model: behind the embeddings, and behind both halves of every layer.
enum { BEHIND_ATTENTION = 1, BEHIND_FEED_FORWARD = 2 };
long place_of(long layer, long half) { return 2 * layer + half; }

Vector bias_at(const float* bias, long column) { return bias ? load(bias + column) : of(0); }

// out[row] = stream[row] + dropped(input · weightᵀ + bias)
void add_product(const Plan& plan, const Element* input, const Weight& weight, const float* bias, Dropout dropout,
                 long group, const float* stream, float* out) {
    const long D = plan.D, first = group * plan.rows;
    product(input, weight.in, plan.num_rows(group), weight.forward, D, weight.in, [&](long r, long column, float* c) {
        for (long i = column; i < column + EDGE; i += 16, c += 16) {
            Vector y = (load(c) + bias_at(bias, i)) * dropout.factors((first + r) * D + i);
            store(out + r * D + i, load(stream + r * D + i) + y);
        }
    });
}

// The gradient behind a dropout, as rows and, for the weight's gradient, packed.
void drop_gradient(const Plan& plan, const float* gradient, Dropout dropout, long group, const Weight& weight,
                   Element* rows) {
    const long D = plan.D, num_rows = plan.num_rows(group);
    for (long i = 0; i < num_rows * D; i += 16)
        store(rows + i, load(gradient + i) * dropout.factors(group * plan.rows * D + i));
    pack<true, true>(rows, D, num_rows, plan.packed_rows_of(group), D, weight.output_gradient, plan.depth / EDGE,
                     group * plan.rows / EDGE);
}

// Packs the rows of a group as what a weight's gradient is summed over.
void keep_input(const Plan& plan, const Element* rows, long group, const Weight& weight) {
    pack<false, true>(rows, weight.in, plan.num_rows(group), plan.packed_rows_of(group), weight.in, weight.input,
                      plan.depth / EDGE, group * plan.rows / EDGE);
}

void keep_output_gradient(const Plan& plan, const Element* rows, long group, const Weight& weight) {
    pack<true, true>(rows, weight.out, plan.num_rows(group), plan.packed_rows_of(group), weight.out,
                     weight.output_gradient, plan.depth / EDGE, group * plan.rows / EDGE);
}

// What enters the activation is kept in blocks of 32 × 32, in the order in which a product makes them.
long in_blocks(const Plan& plan, long row, long column) {
    return row / EDGE * EDGE * plan.wide + column / EDGE * EDGE * EDGE + row % EDGE * EDGE + column % EDGE;
}

// The feed-forward's first product and the activation; `wide` gets what enters it.
template <int KIND>
void activate(const Plan& plan, const Element* input, const Weight& up, const float* bias, long rows, Element* wide, Element* to) {
    const long F = plan.F;
    product(input, plan.D, rows, up.forward, plan.wide, plan.D, [&](long r, long column, float* c) {
        Element* kept = wide + in_blocks(plan, r, column);
        for (long i = 0; i < EDGE; i += 16) {
            store(kept + i, load(c + i) + bias_at(bias, column + i));
            if (KIND != SWIGLU)
                store(to + r * F + column + i, activation<KIND>(load(kept + i)).value);
            else if (column >= F)  // its gate has come before
                store(to + r * F + column - F + i, load(kept + i) * silu(load(kept - F * EDGE + i)).value);
        }
    });
}

// From the gradient of the activation's output to that of its input; and the output, once more.
template <int KIND>
void activate_backward(const Plan& plan, const Element* gradient, const Weight& down, const Element* wide, long rows,
                       Element* to, Element* output) {
    const long F = plan.F;
    product(gradient, plan.D, rows, down.backward, F, plan.D, [&](long r, long column, float* c) {
        const Element* kept = wide + in_blocks(plan, r, column);
        Element *gradients = to + r * plan.wide + column, *outputs = output + r * F + column;
        for (long i = 0; i < EDGE; i += 16) {
            Activated found = activation<KIND>(load(kept + i));
            Vector d = load(c + i);
            if (KIND == SWIGLU) {
                Vector up = load(kept + F * EDGE + i);
                store(gradients + F + i, d * found.value);
                found.value *= up;
                d *= up;
            }
            store(gradients + i, d * found.slope);
            store(outputs + i, found.value);
        }
    });
}

// Calls run(kind) with the activation as a constant.
template <class Run>
void with_activation(long kind, const Run& run) {
    switch (kind) {
        case GELU: return run(std::integral_constant<int, GELU>());
        case GELU_TANH: return run(std::integral_constant<int, GELU_TANH>());
        case RELU: return run(std::integral_constant<int, RELU>());
        case TANH: return run(std::integral_constant<int, TANH>());
        default: return run(std::integral_constant<int, SWIGLU>());
    }
}

// ---- attention: one sequence and head at a time, all of it in cache ----

// Neighbouring channels (a, b) → (a cos − b sin, b cos + a sin), or back (transformer.rotate).
template <class From>
void rotate_row(const From* from, const float* turns, float direction, long Dh, float* to) {
    for (long i = 0; i < Dh; i += 2) {
        const float a = to_float(from[i]), b = to_float(from[i + 1]), cos = turns[i], sin = direction * turns[i + 1];
        to[i] = a * cos - b * sin;
        to[i + 1] = b * cos + a * sin;
    }
}

// One head of a sequence, padded with zeros to whole blocks, and rotated if `turns` is not null.
void load_head(const Plan& plan, const Element* from, long stride, const float* turns, Element* to) {
    const long Dh = plan.Dh, width = plan.padded_Dh;
    float turned[512];
    for (long t = 0; t < plan.T; ++t, from += stride, to += width) {
        if (turns) {
            rotate_row(from, turns + t * Dh, 1, Dh, turned);
            for (long i = 0; i < Dh; ++i) to[i] = to_element(turned[i]);
        } else {
            std::memcpy(to, from, Dh * sizeof(Element));
        }
        std::memset(to + Dh, 0, (width - Dh) * sizeof(Element));
    }
    std::memset(to, 0, (plan.padded_T - plan.T) * width * sizeof(Element));
}

void store_head(const Plan& plan, const float* from, const float* turns, float direction, Element* to, long stride) {
    const long Dh = plan.Dh;
    float turned[512];
    for (long t = 0; t < plan.T; ++t, from += plan.padded_Dh, to += stride) {
        const float* row = from;
        if (turns) {
            rotate_row(from, turns + t * Dh, direction, Dh, turned);
            row = turned;
        }
        for (long i = 0; i < Dh; ++i) to[i] = to_element(row[i]);
    }
}

// Causal attention probabilities (T × T) of s.q and the packed s.kt, as rows of s.p: zero right of the diagonal, in each
// row as far as products go.
void probabilities(const Plan& plan, const Scratch& s) {
    const long P = plan.padded_T;
    const Vector scale = of(1 / std::sqrt(float(plan.Dh))), lowest = of(-INFINITY);
    for (long first = 0; first < P; first += EDGE) {
        for (long key = 0; key <= first; key += EDGE)
            block(plain_rows(s.q + first * plan.padded_Dh, plan.padded_Dh), s.kt + key * plan.padded_Dh, plan.padded_Dh,
                  s.scores + key, P, std::min(EDGE, plan.T - first));
        for (long t = first; t < first + EDGE; ++t) {
            float* scores = s.scores + (t - first) * P;
            Element* row = s.p + t * P;
            if (t >= plan.T) {
                std::memset(row, 0, (first + EDGE) * sizeof(Element));
                continue;
            }
            Vector highest = lowest, total = of(0);
            for (long i = 0; i <= t; i += 16) {
                Vector x = select(first_lanes(t + 1 - i), load(scores + i) * scale, lowest);
                store(scores + i, x);
                highest = larger(highest, x);
            }
            Vector shift = of(largest(highest));
            for (long i = 0; i <= t; i += 16) {
                Vector e = select(first_lanes(t + 1 - i), exp(load(scores + i) - shift), of(0));
                store(scores + i, e);
                total += e;
            }
            Vector share = of(1 / sum(total));
            for (long i = 0; i < first + EDGE; i += 16) store(row + i, i <= t ? load(scores + i) * share : of(0));
        }
    }
}

// The transposes of rows that are zero right of the diagonal, as a left operand.
void pack_lower(const Plan& plan, const Element* from, Element* to) {
    const long P = plan.padded_T;
    for (long first = 0; first < P; first += EDGE)
        pack<true>(from + first * P, P, EDGE, EDGE, first + EDGE, to, P / EDGE, first / EDGE);
}

const float* turns_of(const Plan& plan) { return plan.task.positions == ROTARY ? plan.task.table : nullptr; }

// `heads` holds queries, keys and values of a sequence's tokens, `out` gets what its heads gather.
void attend(const Plan& plan, const Element* heads, const Scratch& s, Element* out) {
    const long P = plan.padded_T, W = plan.padded_Dh, Dh = plan.Dh, shared = plan.task.num_heads / plan.task.kv_heads;
    alignas(64) float c[EDGE * EDGE];
    for (long m = 0; m < plan.task.kv_heads; ++m) {
        load_head(plan, heads + plan.D + m * Dh, plan.heads_width, turns_of(plan), s.k);
        load_head(plan, heads + plan.D + plan.kv_width + m * Dh, plan.heads_width, nullptr, s.v);
        pack_transposed(s.k, W, P, P, W, s.kt);
        pack<false>(s.v, W, P, P, W, s.vp, P / EDGE);
        for (long head = m * shared; head < (m + 1) * shared; ++head) {
            load_head(plan, heads + head * Dh, plan.heads_width, turns_of(plan), s.q);
            probabilities(plan, s);
            for (long t = 0; t < P; t += EDGE)
                for (long column = 0; column < W; column += EDGE) {
                    block(plain_rows(s.p + t * P, P), s.vp + column * P, std::min(plan.T, t + EDGE), c, EDGE, std::min(EDGE, plan.T - t));
                    const long columns = std::min(EDGE, Dh - column);
                    for (long i = 0; i < EDGE && t + i < plan.T; ++i)
                        for (long j = 0; j < columns; ++j)
                            out[(t + i) * plan.D + head * Dh + column + j] = to_element(c[i * EDGE + j]);
                }
        }
    }
}

// Adds a 32 × 32 block to `to`, whose rows are `stride` apart.
void add_block(Rows a, const Element* b, long depth, float* to, long stride) {
    alignas(64) float c[EDGE * EDGE];
    block(a, b, depth, c, EDGE);
    for (long i = 0; i < EDGE; ++i)
        for (long j = 0; j < EDGE; j += 16) store(to + i * stride + j, load(to + i * stride + j) + load(c + i * EDGE + j));
}

// Gradients of the scores, as rows of s.s, from those of the output, s.o, with s.p and the packed s.vt.
void score_gradients(const Plan& plan, const Scratch& s) {
    const long P = plan.padded_T, W = plan.padded_Dh;
    const Vector scale = of(1 / std::sqrt(float(plan.Dh)));
    for (long first = 0; first < P; first += EDGE) {
        for (long key = 0; key <= first; key += EDGE)
            block(plain_rows(s.o + first * W, W), s.vt + key * W, W, s.scores + key, P, std::min(EDGE, plan.T - first));
        for (long t = first; t < first + EDGE; ++t) {
            const float* gradient = s.scores + (t - first) * P;
            const Element* row = s.p + t * P;
            Vector along = of(0);
            for (long i = 0; i < first + EDGE; i += 16) along = fma(load(row + i), load(gradient + i), along);
            Vector mean = of(sum(along));
            for (long i = 0; i < first + EDGE; i += 16)
                store(s.s + t * P + i, load(row + i) * (load(gradient + i) - mean) * scale);
        }
    }
}

// From the gradient of what a sequence's heads gathered to that of their queries, keys and values.
void attend_backward(const Plan& plan, const Element* heads, const Element* gradient, const Scratch& s, Element* to) {
    const long P = plan.padded_T, W = plan.padded_Dh, Dh = plan.Dh, shared = plan.task.num_heads / plan.task.kv_heads;
    const long stride = plan.heads_width, steps = P / EDGE, size = P * W;
    const float* turns = turns_of(plan);
    for (long m = 0; m < plan.task.kv_heads; ++m) {
        const long keys = plan.D + m * Dh, values = keys + plan.kv_width;
        load_head(plan, heads + keys, stride, turns, s.k);
        load_head(plan, heads + values, stride, nullptr, s.v);
        pack_transposed(s.k, W, P, P, W, s.kt);
        pack_transposed(s.v, W, P, P, W, s.vt);
        pack<false>(s.k, W, P, P, W, s.kp, steps);
        std::memset(s.dk, 0, size * sizeof(float));
        std::memset(s.dv, 0, size * sizeof(float));
        for (long head = m * shared; head < (m + 1) * shared; ++head) {
            load_head(plan, heads + head * Dh, stride, turns, s.q);
            load_head(plan, gradient + head * Dh, plan.D, nullptr, s.o);
            pack<false>(s.q, W, P, P, W, s.qp, steps);
            pack<false>(s.o, W, P, P, W, s.op, steps);
            probabilities(plan, s);
            score_gradients(plan, s);
            pack_lower(plan, s.p, s.pt);
            pack_lower(plan, s.s, s.st);
            for (long t = 0; t < P; t += EDGE)
                for (long column = 0; column < W; column += EDGE) {
                    const long step = t / EDGE, from = (column / EDGE * steps + step) * BLOCK, at = t * W + column;
                    const long diagonal = (step * steps + step) * BLOCK;
                    block(plain_rows(s.s + t * P, P), s.kp + column * P, std::min(plan.T, t + EDGE), s.dq + at, W,
                          std::min(EDGE, plan.T - t));
                    add_block(packed_rows(s.st + diagonal), s.qp + from, plan.T - t, s.dk + at, W);
                    add_block(packed_rows(s.pt + diagonal), s.op + from, plan.T - t, s.dv + at, W);
                }
            store_head(plan, s.dq, turns, -1, to + head * Dh, stride);
        }
        store_head(plan, s.dk, turns, -1, to + keys, stride);
        store_head(plan, s.dv, nullptr, -1, to + values, stride);
    }
}

// ---- the loss ----

// Cross-entropies of a group's targets, and, per unit of them, the gradients of logits and hidden states.
void losses(const Plan& plan, const Head& head, const Slot& slot, long group, const Element* hidden, const Scratch& s,
            float* nll) {
    const long D = plan.D, n = head.padded_n;
    for (long start = head.starts[group]; start < head.starts[group + 1]; start += EDGE) {
        long count = 0;
        for (; count < EDGE && head.targets[start + count] >= 0; ++count)
            std::memcpy(head.hidden + (start + count) * D,
                        hidden + (slot.rows[head.targets[start + count]] - group * plan.group_size * plan.T) * D,
                        D * sizeof(Element));
        product(head.hidden + start * D, D, count, head.forward, n, D, [&](long r, long column, float* c) {
            std::memcpy(s.logits + r * n + column, c, EDGE * sizeof(float));
        });
        for (long r = 0; r < count; ++r) {
            float* logits = s.logits + r * n;
            const long target = head.targets[start + r], truth = slot.local[target];
            Vector highest = of(-INFINITY), total = of(0);
            for (long i = head.n; i < n; ++i) logits[i] = -INFINITY;
            for (long i = 0; i < n; i += 16) highest = larger(highest, load(logits + i));
            const float most = largest(highest), shifted = logits[truth] - most;
            const Vector shift = of(most);
            for (long i = 0; i < n; i += 16) {
                Vector e = exp(load(logits + i) - shift);
                store(logits + i, e);
                total += e;
            }
            float all = sum(total);
            nll[target] = std::log(all) - shifted;
            if (!plan.task.with_gradients) continue;
            logits[truth] -= all;
            for (long i = 0; i < n; i += 16) store(s.logit_rows + r * n + i, load(logits + i) * of(1 / all));
            for (long i = head.n; i < n; ++i) s.logit_rows[r * n + i] = 0;
        }
        if (!plan.task.with_gradients) continue;
        pack<true>(s.logit_rows, n, count, EDGE, n, head.logit_gradient, head.depth / EDGE, start / EDGE);
        product(s.logit_rows, n, count, head.backward, D, n, [&](long r, long column, float* c) {
            std::memcpy(head.hidden_gradient + (start + r) * D + column, c, EDGE * sizeof(float));
        });
    }
}

// The gradient of a group's hidden states, in `to`, and the packed hidden states, by the gradients of the losses.
void losses_backward(const Plan& plan, const Head& head, const Slot& slot, long group, const float* gradients,
                     float* to) {
    const long D = plan.D, start = head.starts[group], end = head.starts[group + 1];
    long count = 0;
    for (; start + count < end && head.targets[start + count] >= 0; ++count) {
        const long target = head.targets[start + count];
        float* row = to + (slot.rows[target] - group * plan.group_size * plan.T) * D;
        Element* hidden = head.hidden + (start + count) * D;
        const Vector factor = of(gradients[target]);
        for (long i = 0; i < D; i += 16) {
            store(row + i, fma(factor, load(head.hidden_gradient + (start + count) * D + i), load(row + i)));
            store(hidden + i, load(hidden + i) * factor);
        }
    }
    pack<false>(head.hidden + start * D, D, count, end - start, D, head.packed_hidden, head.depth / EDGE, start / EDGE);
}

// ---- passes ----

// 32 rows of a weight from `rows` on, `valid` of which there are, as right operand of both directions.
template <class RowAt>
void pack_weight(long first, long valid, long in, long out, const RowAt& row_at, Element* forward, Element* backward,
                 Element* scratch) {
    for (long r = 0; r < valid; ++r)
        for (long i = 0; i < in; i += 16) store(scratch + r * in + i, load(row_at(first + r) + i));
    pack_transposed(scratch, in, valid, EDGE, in, forward + first * in);
    pack<false>(scratch, in, valid, EDGE, in, backward, out / EDGE, first / EDGE);
}

// The row of the head that a slot's id stands for.
long head_row(const Slot& slot, long id) {
    const int64_t* range = slot.ranges;
    for (; id >= range[1] - range[0]; range += 2) id -= range[1] - range[0];
    return range[0] + id;
}

void pack_weights(const Plan& plan) {
    struct Piece {
        const Weight* weight;
        const float* from;
        long head, first;
    };
    std::vector<Piece> pieces;
    for (long i = 0; i < plan.task.num_layers; ++i) {
        const Layer& layer = plan.layers[i];
        const std::pair<const Weight*, long> weights[] = {
            {&layer.qkv, QKV}, {&layer.out, OUT}, {&layer.up, UP}, {&layer.down, DOWN}};
        for (auto [weight, index] : weights)
            for (long first = 0; first < weight->out; first += EDGE)
                pieces.push_back({weight, plan.parameter(i, index), -1, first});
    }
    for (long i = 0; i < plan.task.num_slots; ++i)
        for (long first = 0; first < plan.heads[i].padded_n; first += EDGE) pieces.push_back({nullptr, nullptr, i, first});
    for_each(plan, pieces.size(), [&](long index, const Scratch& s) {
        const auto [weight, from, head_index, first] = pieces[index];
        if (weight)
            return pack_weight(first, EDGE, weight->in, weight->out,
                               [&, from = from, in = weight->in](long row) { return from + row * in; },
                               weight->forward, weight->backward, s.activated);
        const Head& head = plan.heads[head_index];
        const Slot& slot = plan.task.slots[head_index];
        pack_weight(first, std::min(EDGE, head.n - first), plan.D, head.padded_n,
                    [&](long id) { return plan.parameter(HEAD) + head_row(slot, id) * plan.D; }, head.forward,
                    head.backward, s.activated);
    });
}

void embed(const Plan& plan, long group, float* x) {
    const Task& task = plan.task;
    const float* added = task.positions == LEARNED ? plan.parameter(POSITIONS)
                         : task.positions == FIXED ? task.table
                                                   : nullptr;
    const Dropout dropout(task, 0);
    for (long r = 0; r < plan.num_rows(group); ++r) {
        const long sequence = group * plan.group_size + r / plan.T, t = r % plan.T;
        const float* row = plan.parameter(EMBEDDING) + task.token_ids[sequence * task.token_stride + t] * plan.D;
        for (long i = 0; i < plan.D; i += 16) {
            Vector sum = added ? load(row + i) + load(added + t * plan.D + i) : load(row + i);
            store(x + r * plan.D + i, sum * dropout.factors((group * plan.rows + r) * plan.D + i));
        }
    }
}

void forward(const Plan& plan, long group, const Scratch& s, float* nll) {
    const Task& task = plan.task;
    const long D = plan.D, rows = plan.num_rows(group), first = group * plan.rows;
    embed(plan, group, (task.num_layers ? plan.layers[0].before : plan.last) + first * D);
    for (long l = 0; l < task.num_layers; ++l) {
        const Layer& layer = plan.layers[l];
        auto parameter = [&](long index) { return plan.parameter(l, index); };
        float *x = layer.before + first * D, *between = layer.between + first * D;
        float* after = (l + 1 < task.num_layers ? plan.layers[l + 1].before : plan.last) + first * D;
        auto linear = [&](const Element* input, const Weight& weight, const float* bias, Element* to) {
            product(input, weight.in, rows, weight.forward, weight.out, weight.in, [&](long r, long column, float* c) {
                for (long i = column; i < column + EDGE; i += 16, c += 16)
                    store(to + r * weight.out + i, load(c) + bias_at(bias, i));
            });
        };
        norm(plan, x, rows, parameter(NORM_1), parameter(NORM_1_BIAS), s.normed);
        Element* heads = layer.heads + first * plan.heads_width;
        linear(s.normed, layer.qkv, parameter(QKV_BIAS), heads);
        for (long i = 0; i < plan.num_sequences(group); ++i)
            attend(plan, heads + i * plan.T * plan.heads_width, s, s.mixed + i * plan.T * D);
        if (task.with_gradients) keep_input(plan, s.mixed, group, layer.out);
        add_product(plan, s.mixed, layer.out, parameter(OUT_BIAS), Dropout(task, place_of(l, BEHIND_ATTENTION)), group,
                    x, between);

        norm(plan, between, rows, parameter(NORM_2), parameter(NORM_2_BIAS), s.normed);
        Element* wide = layer.wide + first * plan.wide;
        with_activation(task.activation, [&](auto kind) {
            activate<kind>(plan, s.normed, layer.up, parameter(UP_BIAS), rows, wide, s.activated);
        });
        add_product(plan, s.activated, layer.down, parameter(DOWN_BIAS), Dropout(task, place_of(l, BEHIND_FEED_FORWARD)),
                    group, between, after);
    }
    norm(plan, plan.last + first * D, rows, plan.parameter(FINAL_NORM), plan.parameter(FINAL_BIAS), s.normed);
    for (long i = 0, offset = 0; i < task.num_slots; offset += task.slots[i++].num_targets)
        losses(plan, plan.heads[i], task.slots[i], group, s.normed, s, nll + offset);
}

void backward(const Plan& plan, long group, const Scratch& s, const float* gradients) {
    const Task& task = plan.task;
    const long D = plan.D, rows = plan.num_rows(group), first = group * plan.rows;
    float* dx = s.stream;  // of the residual stream
    std::memset(dx, 0, rows * D * sizeof(float));
    std::memset(s.sums, 0, rows * D * sizeof(float));
    for (long i = 0, offset = 0; i < task.num_slots; offset += task.slots[i++].num_targets)
        losses_backward(plan, plan.heads[i], task.slots[i], group, gradients + offset, s.sums);
    norm_backward(plan, s.sums, plan.last + first * D, rows, plan.parameter(FINAL_NORM), plan.parameter(FINAL_BIAS), dx,
                  plan.final_norm + group * 2 * D, s.normed);
    for (long l = task.num_layers - 1; l >= 0; --l) {
        const Layer& layer = plan.layers[l];
        auto parameter = [&](long index) { return plan.parameter(l, index); };
        auto through = [&](const Element* gradient, const Weight& weight, auto* to) {
            product(gradient, weight.out, rows, weight.backward, weight.in, weight.out,
                    [&](long r, long column, float* c) {
                        for (long i = column; i < column + EDGE; i += 16, c += 16)
                            store(to + r * weight.in + i, load(c));
                    });
        };
        drop_gradient(plan, dx, Dropout(task, place_of(l, BEHIND_FEED_FORWARD)), group, layer.down, s.output);
        with_activation(task.activation, [&](auto kind) {
            activate_backward<kind>(plan, s.output, layer.down, layer.wide + first * plan.wide, rows, s.wide, s.activated);
        });
        keep_input(plan, s.activated, group, layer.down);
        keep_output_gradient(plan, s.wide, group, layer.up);
        through(s.wide, layer.up, s.sums);
        norm_backward(plan, s.sums, layer.between + first * D, rows, parameter(NORM_2), parameter(NORM_2_BIAS), dx,
                      layer.norm_2 + group * 2 * D, s.normed);
        keep_input(plan, s.normed, group, layer.up);

        drop_gradient(plan, dx, Dropout(task, place_of(l, BEHIND_ATTENTION)), group, layer.out, s.output);
        through(s.output, layer.out, s.mixed);
        const long sequence = plan.T * plan.heads_width;
        for (long i = 0; i < plan.num_sequences(group); ++i) {
            const Element* heads = layer.heads + first * plan.heads_width + i * sequence;
            fetch(heads + sequence, sequence);  // the next one's, meanwhile
            attend_backward(plan, heads, s.mixed + i * plan.T * D, s, s.heads + i * sequence);
        }
        keep_output_gradient(plan, s.heads, group, layer.qkv);
        through(s.heads, layer.qkv, s.sums);
        norm_backward(plan, s.sums, layer.before + first * D, rows, parameter(NORM_1), parameter(NORM_1_BIAS), dx,
                      layer.norm_1 + group * 2 * D, s.normed);
        keep_input(plan, s.normed, group, layer.qkv);
    }
    const Dropout dropout(task, 0);
    for (long i = 0; i < rows * D; i += 16)
        store(plan.embedded + first * D + i, load(dx + i) * dropout.factors(first * D + i));
}

// A piece of a weight's gradient, up to 128 rows and columns, so that operands that are read again are in cache.
constexpr long PIECE = 4 * EDGE;

// Adds the share of the `depth` rows from `start` on, the first of which set it.
void weight_gradient(const Plan& plan, const Weight& weight, long first_row, long first_column, long start, long depth,
                     float* to) {
    for (long column = first_column; column < std::min(weight.in, first_column + PIECE); column += EDGE)
        for (long row = first_row; row < std::min(weight.out, first_row + PIECE); row += EDGE)
            block(packed_rows(weight.output_gradient + row * plan.depth + start * EDGE),
                  weight.input + column * plan.depth + start * EDGE, depth, to + row * weight.in + column, weight.in, EDGE,
                  start > 0);
}

// Adds the share of the `depth` rows from `start` on, the first of which set it.
void bias_gradient(const Plan& plan, const Weight& weight, long first, long start, long depth, float* to) {
    for (long row = first; row < std::min(weight.out, first + PIECE); row += EDGE)
        sum_packed_rows(weight.output_gradient + row * plan.depth + start * EDGE, depth, to + row, start > 0);
}

// Adds 32 rows of the head's gradient.
void head_gradient(const Plan& plan, const Head& head, const Slot& slot, long first, float* to) {
    alignas(64) float c[EDGE * EDGE];
    for (long column = 0; column < plan.D; column += EDGE) {
        for (auto [start, depth] : head.parts)
            block(packed_rows(head.logit_gradient + first * head.depth + start * EDGE),
                  head.packed_hidden + column * head.depth + start * EDGE, depth, c, EDGE, EDGE, start > 0);
        for (long r = 0; r < EDGE && first + r < head.n; ++r) {
            float* row = to + head_row(slot, first + r) * plan.D + column;
            for (long i = 0; i < EDGE; i += 16) store(row + i, load(row + i) + load(c + r * EDGE + i));
        }
    }
}

// Sums what the groups found for the weight and bias of a norm.
void norm_gradient(const Plan& plan, const float* by_group, float* weight, float* bias) {
    for (long i = 0; i < plan.D; i += 16)
        for (long part = 0; part < (bias ? 2 : 1); ++part) {
            Vector total = of(0);
            for (long group = 0; group < plan.num_groups; ++group) total += load(by_group + (2 * group + part) * plan.D + i);
            store((part ? bias : weight) + i, total);
        }
}

// Adds 32 columns of the embeddings' gradients, and of the learned positions'.
void embedding_gradient(const Plan& plan, long column, float* tokens, float* positions) {
    const Task& task = plan.task;
    for (long sequence = 0; sequence < task.num_sequences; ++sequence) {
        const float* row = plan.embedded + (sequence / plan.group_size * plan.rows + sequence % plan.group_size * plan.T) * plan.D;
        for (long t = 0; t < plan.T; ++t, row += plan.D)
            for (long i = column; i < column + EDGE; i += 16) {
                float* at = tokens + task.token_ids[sequence * task.token_stride + t] * plan.D + i;
                store(at, load(at) + load(row + i));
                if (positions) store(positions + t * plan.D + i, load(positions + t * plan.D + i) + load(row + i));
            }
    }
}

void parameter_gradients(const Plan& plan, float* const* to) {
    const Task& task = plan.task;
    struct Piece {
        const Weight* weight;
        float *gradient, *bias;
        long row, column;
    };
    std::vector<Piece> pieces;
    for (long l = 0; l < task.num_layers; ++l) {
        const Layer& layer = plan.layers[l];
        float* const* gradients = to + FIRST_LAYER + l * PER_LAYER;
        norm_gradient(plan, layer.norm_1, gradients[NORM_1], gradients[NORM_1_BIAS]);
        norm_gradient(plan, layer.norm_2, gradients[NORM_2], gradients[NORM_2_BIAS]);
        const std::pair<const Weight*, long> weights[] = {
            {&layer.qkv, QKV}, {&layer.out, OUT}, {&layer.up, UP}, {&layer.down, DOWN}};
        for (auto [weight, index] : weights)
            for (long row = 0; row < weight->out; row += PIECE)
                for (long column = 0; column < weight->in; column += PIECE)
                    pieces.push_back({weight, gradients[index], gradients[index + 1], row, column});
    }
    norm_gradient(plan, plan.final_norm, to[FINAL_NORM], to[FINAL_BIAS]);
    const long num_pieces = pieces.size(), num_columns = plan.D / EDGE;
    for_each(plan, num_pieces + num_columns, [&](long i, const Scratch&) {
        if (i >= num_pieces)
            return embedding_gradient(plan, (i - num_pieces) * EDGE, to[EMBEDDING], to[POSITIONS]);
        const auto [weight, gradient, bias, row, column] = pieces[i];
        for (auto [start, depth] : plan.parts) weight_gradient(plan, *weight, row, column, start, depth, gradient);
        if (bias && column == 0)
            for (auto [start, depth] : plan.parts) bias_gradient(plan, *weight, row, start, depth, bias);
    });
    for (long i = 0; i < task.num_slots; ++i)  // one after the other: slots may share rows of the head
        for_each(plan, plan.heads[i].padded_n / EDGE, [&](long index, const Scratch&) {
            head_gradient(plan, plan.heads[i], task.slots[i], index * EDGE, to[HEAD]);
        });
}

}  // namespace

extern "C" {

// Bytes of workspace that a task needs; it must start at a multiple of 64.
int64_t smalti_train_bytes(const Task* task) { return Plan(*task).memory.used; }

// The negative log-likelihood of every target, in nats, one slot after the other.
void smalti_train_forward(const Task* task, float* nll) {
    Plan plan(*task);
    use_large_pages(plan);
    pack_weights(plan);
    for_each(plan, plan.num_groups, [&](long group, const Scratch& s) { forward(plan, group, s, nll); });
}

// Gradients of all parameters, from those of the targets' losses and the same workspace. Those of embeddings, positions
// and head must be zeros before.
void smalti_train_backward(const Task* task, const float* nll_gradients, float* const* gradients) {
    Plan plan(*task);
    for_each(plan, plan.num_groups, [&](long group, const Scratch& s) { backward(plan, group, s, nll_gradients); });
    parameter_gradients(plan, gradients);
}

}
