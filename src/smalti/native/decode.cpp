// A transformer's pass over a few new tokens of each row of a batch, behind the keys and values of a state; float32, with
// weights that may be stored in fewer bits.
//
// Reads top to bottom: the arithmetic of a vector, the matrix product, attention, the pass, the head.
// `engine/executors/native.py` is the other side of the C functions at the end and mirrors the structures, field by
// field.
//
// Letters: R rows (all new tokens), D width, n outputs and k inputs of a matrix, S slots of the state.

#include <math.h>
#include <string.h>
#include <time.h>

#include <type_traits>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "threads.h"
#include "vectors.h"

namespace {

// ---- vectors ----

using smalti::LANES;
typedef smalti::Register Vector;  // of LANES numbers

#if defined(__AVX512F__)
constexpr int VECTORS = 4;  // 6 x 4 sums, 4 weights and a factor take 29 of 32 registers
#elif defined(__AVX__)
constexpr int VECTORS = 2;  // 6 x 2 sums, 2 weights and a factor take 15 of 16
#else
constexpr int VECTORS = 4;
#endif
constexpr int PANEL = LANES * VECTORS;  // outputs of a matrix that are computed together
constexpr int TILE_ROWS = 6;            // rows that are computed together

inline Vector load(const float* x) { return smalti::load_register(x); }
inline void store(float* x, Vector value) { smalti::store_register(x, value); }

inline float dot(const float* a, const float* b, long n) {
    Vector sums = {};
    long i = 0;
    for (; i + LANES <= n; i += LANES) sums += load(a + i) * load(b + i);
    float sum = smalti::combined<LANES>(sums, [](auto x, auto y) { return x + y; });
    for (; i < n; ++i) sum += a[i] * b[i];
    return sum;
}

// ---- matrices ----

// How weights are stored. They are expanded to float32 in registers, so that all sums are of float32.
struct Bfloat16 {
    uint16_t bits;
};
enum Storage : long { FLOAT32, BFLOAT16, INT8 };

inline Vector expanded(const float* x) { return load(x); }
inline Vector expanded(const Bfloat16* x) {
    typedef uint16_t Narrow __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
    typedef smalti::Lanes<LANES>::Unsigned Wide;
    const Wide bits = __builtin_convertvector(*reinterpret_cast<const Narrow*>(x), Wide) << 16;
    return reinterpret_cast<Vector>(bits);
}
inline Vector expanded(const int8_t* x) {
    // GCC 12 makes ten instructions, or sixty, of the conversion below.
#if defined(__AVX512F__)
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
#elif defined(__AVX2__)
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x))));
#else
    typedef int8_t Narrow __attribute__((vector_size(LANES), aligned(1), may_alias));
    typedef smalti::Lanes<LANES>::Int Wide;
    return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const Narrow*>(x), Wide), Vector);
#endif
}

// Calls use(weights) with the weights as what they are stored as.
template <class Use>
void with_weights(long storage, const void* weight, const Use& use) {
    if (storage == FLOAT32)
        use(static_cast<const float*>(weight));
    else if (storage == BFLOAT16)
        use(static_cast<const Bfloat16*>(weight));
    else
        use(static_cast<const int8_t*>(weight));
}

// y = W x + b. As torch has it, W is (outputs, inputs), and there may be no bias. Packed, it is panels of PANEL
// outputs, each (inputs, PANEL), so that what one step of a sum reads lies side by side; zeros fill the last panel, and
// the bias.
struct Matrix {
    const void* weight;
    const float* bias;
    const float* scales;  // int8: what the weights of each output are multiplied by; else null
    long inputs, outputs, is_gated;  // gated: the first half of the outputs are SwiGLU's gates, the others its values
    long storage;

    long num_panels() const {
        const long half = PANEL / 2;
        return is_gated ? (outputs / 2 + half - 1) / half : (outputs + PANEL - 1) / PANEL;
    }
    long panel_bytes() const { return inputs * PANEL * (storage == FLOAT32 ? 4 : storage == BFLOAT16 ? 2 : 1); }

    // The output in a place of a panel, or -1. Half of a gated panel are gates, the other half their values.
    long output_at(long panel, long place) const {
        if (!is_gated) return panel * PANEL + place < outputs ? panel * PANEL + place : -1;
        const long gate = panel * (PANEL / 2) + place % (PANEL / 2);
        return gate < outputs / 2 ? gate + place / (PANEL / 2) * (outputs / 2) : -1;
    }
};

template <class Weight>
void pack_panel(const Matrix& matrix, const Weight* weight, long panel, Weight* packed) {
    constexpr long RUN = 64 / sizeof(Weight);  // of a cache line
    for (long first = 0; first < matrix.inputs; first += RUN)
        for (long place = 0; place < PANEL; ++place) {
            const long output = matrix.output_at(panel, place);
            const long end = first + RUN < matrix.inputs ? first + RUN : matrix.inputs;
            for (long k = first; k < end; ++k)
                packed[k * PANEL + place] = output < 0 ? Weight{} : weight[output * matrix.inputs + k];
        }
}

void pack_outputs(const Matrix& matrix, long panel, const float* given, float* packed) {
    for (long place = 0; place < PANEL; ++place) {
        const long output = matrix.output_at(panel, place);
        packed[place] = output < 0 || !given ? 0.0f : given[output];
    }
}

// One panel for a few rows. A row's sums run over the inputs in their order, whatever other rows there are: that makes
// what a row computes independent of its batch, to the last bit.
//
// Meanwhile `ahead` is fetched, a part of the next panel: of each step of the sum `ahead_step` weights.
template <int ROWS, class Weight>
void multiply_tile(const float* x, long stride, const Weight* panel, const float* bias, const float* scales,
                   long inputs, const Weight* ahead, long ahead_step, float* sums) {
    constexpr long LINE = 64 / sizeof(Weight);
    Vector sum[ROWS][VECTORS];
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) sum[r][v] = scales ? Vector{} : load(bias + v * LANES);
    for (long k = 0; k < inputs; ++k, panel += PANEL, ahead += ahead_step) {
        if (ROWS > 1)
            for (long i = 0; i < PANEL; i += LINE) __builtin_prefetch(ahead + i, 0, 2);
        Vector weights[VECTORS];
        for (int v = 0; v < VECTORS; ++v) weights[v] = expanded(panel + v * LANES);
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < VECTORS; ++v) sum[r][v] += weights[v] * x[r * stride + k];
    }
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) {
            if (scales) sum[r][v] = sum[r][v] * load(scales + v * LANES) + load(bias + v * LANES);
            store(sums + r * PANEL + v * LANES, sum[r][v]);
        }
}

template <class Weight>
constexpr decltype(&multiply_tile<1, Weight>) MULTIPLY_TILE[TILE_ROWS] = {
    multiply_tile<1, Weight>, multiply_tile<2, Weight>, multiply_tile<3, Weight>,
    multiply_tile<4, Weight>, multiply_tile<5, Weight>, multiply_tile<6, Weight>};

// Calls use(row, panel, sums) with PANEL sums for each of the rows and panels.
template <class Use>
void multiply(const Matrix& matrix, const float* x, long stride, smalti::Share rows, smalti::Share panels,
              const Use& use) {
    const long count = rows.end - rows.begin, tiles = (count + TILE_ROWS - 1) / TILE_ROWS;
    alignas(64) float sums[TILE_ROWS * PANEL];
    with_weights(matrix.storage, matrix.weight, [&](auto* weight) {
        typedef std::remove_const_t<std::remove_reference_t<decltype(*weight)>> Weight;
        for (long panel = panels.begin; panel < panels.end; ++panel)
            for (long t = 0; t < tiles; ++t) {
                const smalti::Share tile(count, static_cast<int>(t), static_cast<int>(tiles));
                const long first = rows.begin + tile.begin, height = tile.end - tile.begin, ahead_step = PANEL / tiles;
                const Weight* at = weight + panel * PANEL * matrix.inputs;
                const Weight* ahead = panel + 1 < panels.end ? at + PANEL * matrix.inputs : at;
                const float* scales = matrix.scales ? matrix.scales + panel * PANEL : nullptr;
                MULTIPLY_TILE<Weight>[height - 1](x + first * stride, stride, at, matrix.bias + panel * PANEL, scales,
                                                  matrix.inputs, ahead + t * ahead_step * matrix.inputs, ahead_step,
                                                  sums);
                for (long r = 0; r < height; ++r) use(first + r, panel, sums + r * PANEL);
            }
    });
}

// ---- the model ----

struct Norm {
    const float* weight;  // null: there is no norm
    const float* bias;    // null: RMSNorm
    double eps;

    void apply(const float* x, float* y, long n) const {
        float mean = 0, squares = 0;
        if (bias) {
#pragma omp simd reduction(+ : mean)
            for (long i = 0; i < n; ++i) mean += x[i];
            mean /= static_cast<float>(n);
        }
#pragma omp simd reduction(+ : squares)
        for (long i = 0; i < n; ++i) squares += (x[i] - mean) * (x[i] - mean);
        const float scale = 1 / sqrtf(squares / static_cast<float>(n) + static_cast<float>(eps));
        for (long i = 0; i < n; ++i) y[i] = (x[i] - mean) * scale * weight[i] + (bias ? bias[i] : 0.0f);
    }
};

struct Layer {
    Norm attention_norm, q_norm, k_norm, feed_forward_norm, cross_norm;  // no cross_norm: no cross-attention
    Matrix qkv, out, up, down, cross_q, cross_out;
    Matrix modulation;  // (6 D, D), where a label and the token's number modulate the blocks (adaLN); or no weight
};

// What an encoder made of a row's text.
struct Context {
    long length;
    const float* const* keys;  // for each layer (num_heads, length, head_width)
    const float* const* values;
};

enum FeedForward : long { GELU, GELU_TANH, RELU, TANH, SWIGLU };  // in the order of transformer.FEED_FORWARDS
enum Positions : long { NONE, ADDED, ROTARY };

struct Model {
    long vocab_size, num_layers, width, num_heads, kv_heads, head_width, wide, feed_forward, positions;
    const float* embedding;  // (V, D)
    const float* table;      // (max_length, D), or (max_length, head_width / 2, 2) cosines and sines
    const float* steps;      // (max_length, D): added to a row's label where blocks are modulated; else null
    Norm norm;
    Matrix modulation;  // (2 D, D), of the last norm
    const Layer* layers;
};

// New tokens of some rows of a state, those of one row after those of another; rows may have any numbers of them.
struct Batch {
    long size, num_tokens;
    const long* token_ids;  // (num_tokens)
    const long* slots;      // (num_tokens): where each goes in its row of the state
    const long* positions;  // (num_tokens)
    const float* const* vectors;  // (num_tokens): what stands in place of the token's embedding, or null; null: nothing
    const long* firsts;     // (size + 1): each row's first token, and num_tokens; null: one token each
    const long* rows;       // (size): which rows of the state they are
    long most_slots;        // filled in any of the rows, the new tokens included
    float* const* keys;     // for each layer (capacity, kv_heads, S, head_width), contiguous but for the first axis
    float* const* values;
    long row_stride, head_stride;
    const Context* const* contexts;  // (size): what cross-attention sees of each row's text, where there is any
    const float* const* labels;      // (size): the embedding of each row's label, where blocks are modulated
    long every;     // whether the hidden states of all tokens are wanted
    float* hidden;  // (size, D), of the last token of each row; or (num_tokens, D)
    float* workspace;

    long first(long row) const { return firsts ? firsts[row] : row; }
};

long padded(long n) { return (n + PANEL - 1) / PANEL * PANEL; }

// What the rows hold on their way; a thread's own part behind what all of them share.
struct Workspace {
    long width, qkv_width, attended_width, wide, modulating_width, modulated_width, own;
    float *x, *qkv, *attended, *up, *modulating, *modulated, *owned;

    Workspace(const Model& model, long rows, long slots, float* memory)
        : width(padded(model.width)),
          qkv_width(padded((model.num_heads + 2 * model.kv_heads) * model.head_width)),
          attended_width(padded(model.num_heads * model.head_width)),
          wide(padded(model.wide)),
          modulating_width(model.steps ? width : 0),
          modulated_width(model.steps ? padded(6 * model.width) : 0),
          own(rows * width + padded(slots)),
          x(memory),
          qkv(x + rows * width),
          attended(qkv + rows * qkv_width),
          up(attended + rows * attended_width),
          modulating(up + rows * wide),
          modulated(modulating + rows * modulating_width),
          owned(modulated + rows * modulated_width) {}

    long floats(int threads) const { return owned - x + threads * own; }
};

// ---- a pass ----

// Threads that work on rows [begin, end) of the batch together, as one of them sees it: rows are independent, so crews
// never wait for one another; within a crew the outputs of every product are shared out.
struct Crew {
    int rank, size;
    smalti::Share batch;
    smalti::Barrier* barrier;

    void wait() const { barrier->wait(size); }
    smalti::Share part(long count) const { return smalti::Share(count, rank, size); }
    smalti::Share part(smalti::Share whole) const {
        smalti::Share share = part(whole.end - whole.begin);
        share.begin += whole.begin, share.end += whole.begin;
        return share;
    }
};

constexpr int MOST_CREWS = 64;
constexpr long FEWEST_ROWS = 16;  // of a crew: with fewer, reading the weights takes longer than computing with them

// On a busy machine a call takes as long as the last of its threads is kept from a core, tens of milliseconds. Where
// one comes late, the next calls run on the calling thread alone: what they compute is the same. They are few where
// that is rare, as on a virtual machine, and more where it goes on.
constexpr double LATE_S = 3e-4;
constexpr int FEWEST_ALONE = 8, MOST_ALONE = 200;
int calls_alone = 0, next_alone = FEWEST_ALONE;

void came(bool late) {
    const int next = __atomic_load_n(&next_alone, __ATOMIC_RELAXED);
    if (late) __atomic_store_n(&calls_alone, next, __ATOMIC_RELAXED);
    const int changed = late ? 2 * next : next - 1;
    __atomic_store_n(&next_alone, changed < FEWEST_ALONE ? FEWEST_ALONE : changed > MOST_ALONE ? MOST_ALONE : changed,
                     __ATOMIC_RELAXED);
}

double clock_s() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Calls work(crew, rank) on up to num_threads threads.
template <class Work>
void in_crews(long batch_size, int num_threads, const Work& work) {
    struct alignas(64) {
        smalti::Barrier barrier;
    } barriers[MOST_CREWS] = {};
    const int alone = __atomic_load_n(&calls_alone, __ATOMIC_RELAXED);
    if (alone) __atomic_store_n(&calls_alone, alone - 1, __ATOMIC_RELAXED);
    const double started_at = clock_s();
    smalti::parallel(alone ? 1 : num_threads, [&](int rank, int size) {
        if (rank) came(clock_s() - started_at > LATE_S);
        int crews = size < MOST_CREWS ? size : MOST_CREWS;
        while (crews > 1 && batch_size / crews < FEWEST_ROWS) --crews;
        const int crew_size = size / crews, number = rank / crew_size;
        if (number >= crews) return;
        work(Crew{rank % crew_size, crew_size, smalti::Share(batch_size, number, crews), &barriers[number].barrier},
             rank);
    });
}

smalti::Share tokens_of(const Batch& batch, const Crew& crew) {
    smalti::Share tokens = crew.batch;
    tokens.begin = batch.first(tokens.begin), tokens.end = batch.first(tokens.end);
    return tokens;
}

void embed(const Model& model, const Batch& batch, const Workspace& space, const Crew& crew) {
    const smalti::Share share = crew.part(tokens_of(batch, crew));
    for (long t = share.begin; t < share.end; ++t) {
        float* x = space.x + t * space.width;
        const float* given = batch.vectors ? batch.vectors[t] : nullptr;
        memcpy(x, given ? given : model.embedding + batch.token_ids[t] * model.width, sizeof(float) * model.width);
        if (model.positions == ADDED) {
            const float* added = model.table + batch.positions[t] * model.width;
            for (long i = 0; i < model.width; ++i) x[i] += added[i];
        }
    }
}

// silu(label + step) of each token.
void modulate(const Model& model, const Batch& batch, const Workspace& space, const Crew& crew) {
    const smalti::Share share = crew.part(crew.batch);
    for (long b = share.begin; b < share.end; ++b)
        for (long t = batch.first(b); t < batch.first(b + 1); ++t) {
            const float* step = model.steps + batch.positions[t] * model.width;
            float* y = space.modulating + t * space.modulating_width;
            for (long i = 0; i < model.width; ++i) y[i] = batch.labels[b][i] + step[i];
            for (long i = 0; i < space.modulating_width; i += LANES) {  // what fills the row up is not read
                const Vector x = load(y + i);
                store(y + i, x / (1.0f + smalti::exp(-x)));
            }
        }
}

// y = y (1 + scale) + shift
void shift_and_scale(float* y, const float* shift, const float* scale, long n) {
    for (long i = 0; i < n; ++i) y[i] = y[i] * (1 + scale[i]) + shift[i];
}

void rotate(float* x, const float* table, long width) {
    for (long i = 0; i < width; i += 2) {
        const float a = x[i], b = x[i + 1], cos = table[i], sin = table[i + 1];
        x[i] = a * cos - b * sin;
        x[i + 1] = b * cos + a * sin;
    }
}

// A few vectors of the weighted mean of values.
template <int COUNT>
void mix(const float* weights, const float* values, long count, long width, float share, float* out) {
    Vector mixed[COUNT] = {};
    for (long s = 0; s < count; ++s)
        for (int v = 0; v < COUNT; ++v) mixed[v] += weights[s] * load(values + s * width + v * LANES);
    for (int v = 0; v < COUNT; ++v) store(out + v * LANES, mixed[v] * share);
}

// softmax(q k / sqrt(width)) v over `count` slots. Meanwhile the keys and values `next` numbers further on are fetched,
// into the second cache: a core waits for few lines at a time on their way to its first one, and attention to 64 rows
// took twice as long so.
void attend(const float* q, const float* keys, const float* values, long count, long width, long next, float* scores,
            float* out) {
    const float scale = 1 / sqrtf(static_cast<float>(width));
    float most = -INFINITY;
    for (long s = 0; s < count; ++s) {
        for (long i = s * width + next; i < (s + 1) * width + next; i += 16) {
            __builtin_prefetch(keys + i, 0, 2);
            __builtin_prefetch(values + i, 0, 2);
        }
        scores[s] = scale * dot(q, keys + s * width, width);
        most = scores[s] > most ? scores[s] : most;
    }
    smalti::Vector sums = smalti::of(0);
    for (long s = 0; s < count; s += 16) {  // the scores' memory is padded
        const smalti::Vector weights = smalti::exp(smalti::load(scores + s) - smalti::of(most));
        smalti::store(scores + s, weights);
        sums += smalti::select(smalti::first_lanes(count - s), weights, smalti::of(0));
    }
    const float share = 1 / smalti::sum(sums);
    long i = 0;
    for (; i + 4 * LANES <= width; i += 4 * LANES) mix<4>(scores, values + i, count, width, share, out + i);
    for (; i + 2 * LANES <= width; i += 2 * LANES) mix<2>(scores, values + i, count, width, share, out + i);
    for (; i + LANES <= width; i += LANES) mix<1>(scores, values + i, count, width, share, out + i);
    for (; i < width; ++i) {
        float mixed = 0;
        for (long s = 0; s < count; ++s) mixed += scores[s] * values[s * width + i];
        out[i] = mixed * share;
    }
}

// One key-value head of one row of the batch: its new keys and values enter the state, its query heads attend.
void attend_head(const Model& model, const Batch& batch, const Workspace& space, long layer, long b, long head,
                 float* scores) {
    const Norm &q_norm = model.layers[layer].q_norm, &k_norm = model.layers[layer].k_norm;
    const long width = model.head_width, group = model.num_heads / model.kv_heads;
    float* keys = batch.keys[layer] + batch.rows[b] * batch.row_stride + head * batch.head_stride;
    float* values = batch.values[layer] + batch.rows[b] * batch.row_stride + head * batch.head_stride;
    for (long t = batch.first(b); t < batch.first(b + 1); ++t) {
        float *row = space.qkv + t * space.qkv_width, *q = row + head * group * width;
        float *k = row + (model.num_heads + head) * width, *v = k + model.kv_heads * width;
        const long slot = batch.slots[t];
        for (long i = 0; i <= group; ++i) {
            float* x = i < group ? q + i * width : k;
            const Norm& norm = i < group ? q_norm : k_norm;
            if (norm.weight) norm.apply(x, x, width);
            if (model.positions == ROTARY) rotate(x, model.table + batch.positions[t] * width, width);
        }
        memcpy(keys + slot * width, k, sizeof(float) * width);
        memcpy(values + slot * width, v, sizeof(float) * width);
        float* out = space.attended + t * space.attended_width + head * group * width;
        for (long i = 0; i < group; ++i)
            attend(q + i * width, keys, values, slot + 1, width, batch.head_stride, scores, out + i * width);
    }
}

// One head of all new tokens of one row of the batch attends to the row's text.
void attend_to_text(const Model& model, const Batch& batch, const Workspace& space, long layer, long b, long head,
                    float* scores) {
    const Context& context = *batch.contexts[b];
    const long width = model.head_width, start = head * context.length * width;
    for (long t = batch.first(b); t < batch.first(b + 1); ++t)
        attend(space.qkv + t * space.qkv_width + head * width, context.keys[layer] + start,
               context.values[layer] + start, context.length, width, context.length * width, scores,
               space.attended + t * space.attended_width + head * width);
}

// y = f(sums), PANEL numbers to PANEL, or for SwiGLU gates and values, PANEL / 2 each, to PANEL / 2.
void activate(long kind, const float* sums, float* y) {
    auto each = [&](int count, auto f) {
        for (int i = 0; i < count; i += LANES) store(y + i, f(load(sums + i), i));
    };
    if (kind == GELU)
        each(PANEL, [](Vector x, int) { return x * 0.5f * (1.0f + smalti::erf(x * 0.707106781f)); });
    else if (kind == GELU_TANH)
        each(PANEL, [](Vector x, int) {
            return x * 0.5f * (1.0f + smalti::tanh(0.797884561f * (x + 0.044715f * x * x * x)));
        });
    else if (kind == SWIGLU)
        each(PANEL / 2, [&](Vector x, int i) { return x / (1.0f + smalti::exp(-x)) * load(sums + PANEL / 2 + i); });
    else if (kind == RELU)
        each(PANEL, [](Vector x, int) { return x > 0.0f ? x : Vector{}; });
    else
        each(PANEL, [](Vector x, int) { return smalti::tanh(x); });
}

// `own` is the thread's own part of the workspace.
void run_layer(const Model& model, const Batch& batch, const Workspace& space, const Crew& crew, float* own,
               long index) {
    const Layer& layer = model.layers[index];
    const smalti::Share rows = tokens_of(batch, crew);
    float *normed = own, *scores = own + batch.num_tokens * space.width;
    // Of what a row is modulated by: shift, scale and gate of attention, then those of the feed-forward.
    auto modulated = [&](long r, long which) {
        return space.modulated + r * space.modulated_width + which * model.width;
    };
    auto normalise = [&](const Norm& norm, long shift) {  // each thread all rows: cheaper than to wait for one another
        for (long r = rows.begin; r < rows.end; ++r) {
            float* y = normed + r * space.width;
            norm.apply(space.x + r * space.width, y, model.width);
            if (model.steps) shift_and_scale(y, modulated(r, shift), modulated(r, shift + 1), model.width);
        }
    };
    auto product = [&](const Matrix& matrix, const float* x, long stride, const auto& use) {
        multiply(matrix, x, stride, rows, crew.part(matrix.num_panels()), use);
        crew.wait();
    };
    long gate = 2;
    auto add_to_x = [&](long r, long panel, const float* sums) {
        float* x = space.x + r * space.width + panel * PANEL;
        if (model.steps) {
            const long left = model.width - panel * PANEL;
            const float* share = modulated(r, gate) + panel * PANEL;
            for (long i = 0; i < (left < PANEL ? left : PANEL); ++i) x[i] += share[i] * sums[i];
        } else {
            for (int i = 0; i < PANEL; ++i) x[i] += sums[i];
        }
    };
    auto write_qkv = [&](long r, long panel, const float* sums) {
        memcpy(space.qkv + r * space.qkv_width + panel * PANEL, sums, sizeof(float) * PANEL);
    };
    if (model.steps)
        product(layer.modulation, space.modulating, space.modulating_width,
                [&](long r, long panel, const float* sums) {
                    memcpy(modulated(r, 0) + panel * PANEL, sums, sizeof(float) * PANEL);
                });
    normalise(layer.attention_norm, 0);
    product(layer.qkv, normed, space.width, write_qkv);
    const smalti::Share heads = crew.part((crew.batch.end - crew.batch.begin) * model.kv_heads);
    for (long i = heads.begin; i < heads.end; ++i)
        attend_head(model, batch, space, index, crew.batch.begin + i / model.kv_heads, i % model.kv_heads, scores);
    crew.wait();
    product(layer.out, space.attended, space.attended_width, add_to_x);
    if (layer.cross_norm.weight) {
        normalise(layer.cross_norm, 0);
        product(layer.cross_q, normed, space.width, write_qkv);
        const smalti::Share text_heads = crew.part((crew.batch.end - crew.batch.begin) * model.num_heads);
        for (long i = text_heads.begin; i < text_heads.end; ++i)
            attend_to_text(model, batch, space, index, crew.batch.begin + i / model.num_heads, i % model.num_heads,
                           scores);
        crew.wait();
        product(layer.cross_out, space.attended, space.attended_width, add_to_x);
    }
    normalise(layer.feed_forward_norm, 3);
    gate = 5;
    const long step = model.feed_forward == SWIGLU ? PANEL / 2 : PANEL;
    product(layer.up, normed, space.width, [&](long r, long panel, const float* sums) {
        activate(model.feed_forward, sums, space.up + r * space.wide + panel * step);
    });
    product(layer.down, space.up, space.wide, add_to_x);
}

// ---- drawing ----

constexpr long BLOCK = 64;

double sum(const float* x, long n) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < n; ++i) sum += x[i];
    return sum;
}

// weights = e^(logits - their greatest), which comes back with the weights' sum.
struct Weighed {
    float most;
    double total;

    Weighed(const float* logits, long n, float* weights) : most(-INFINITY), total(0) {
#pragma omp simd reduction(max : most)
        for (long i = 0; i < n; ++i) most = logits[i] > most ? logits[i] : most;
        long i = 0;
        for (; i + LANES <= n; i += LANES) store(weights + i, smalti::exp(load(logits + i) - most));
        if (i < n) {
            float rest[LANES] = {};
            memcpy(rest, logits + i, sizeof(float) * (n - i));
            store(rest, smalti::exp(load(rest) - most));
            memcpy(weights + i, rest, sizeof(float) * (n - i));
        }
        for (long i = 0; i < n; i += BLOCK) total += sum(weights + i, n - i < BLOCK ? n - i : BLOCK);
    }
    float log_prob(float logit) const { return static_cast<float>(static_cast<double>(logit) - most - log(total)); }
};

// The first place at which the sum of the weights so far passes a number below their total.
long place_of(const float* weights, long n, double number) {
    double before = 0;
    long i = 0, last = 0;
    for (; i + BLOCK <= n; i += BLOCK) {
        const double through = before + sum(weights + i, BLOCK);
        if (through > number) break;
        before = through;
    }
    for (; i < n; ++i) {
        if (weights[i] > 0) last = i;  // rounding must not lead past the last one that is possible
        before += weights[i];
        if (before > number) break;
    }
    return last;
}

struct Draw {
    long rows, stride;         // of the hidden states
    const float* hidden;       // (rows, k)
    const float* null_hidden;  // (rows, k); null: nothing is guided
    const float* scales;       // (rows): guidance, where there is
    const double* uniforms;    // (rows), in [0, 1)
    long scale_stride, uniform_stride;
    const long* ids;  // (n): what the outputs stand for
    double temperature;
    long* token_ids;        // (rows): what was drawn,
    float* log_probs;       // ... its ln p under the model,
    float* draw_log_probs;  // ... and under what it was drawn from
    float* workspace;       // (3, rows, n)
};

void write_logits(const Matrix& matrix, const float* hidden, long stride, const Crew& crew, float* logits) {
    multiply(
        matrix, hidden, stride, crew.batch, crew.part(matrix.num_panels()), [&](long r, long panel, const float* sums) {
            const long rest = matrix.outputs - panel * PANEL;
            memcpy(logits + r * matrix.outputs + panel * PANEL, sums, sizeof(float) * (rest < PANEL ? rest : PANEL));
        });
}

void draw_row(const Draw& draw, long r, long n, const float* logits, float* guided, float* weights) {
    const float temperature = static_cast<float>(draw.temperature),
                scale = draw.null_hidden ? draw.scales[r * draw.scale_stride] : 1;
    const bool reshaped = draw.null_hidden || temperature != 1;
    if (draw.null_hidden)
        for (long i = 0; i < n; ++i) guided[i] = (guided[i] + scale * (logits[i] - guided[i])) / temperature;
    else if (reshaped)
        for (long i = 0; i < n; ++i) guided[i] = logits[i] / temperature;
    const float* drawn_from = reshaped ? guided : logits;
    const Weighed weighed(drawn_from, n, weights);
    const double below_one = 1 - 0x1p-52;  // the last id must not be drawn where its probability is 0
    const long place = place_of(weights, n, draw.uniforms[r * draw.uniform_stride] * (weighed.total * below_one));
    draw.token_ids[r] = draw.ids[place];
    draw.draw_log_probs[r] = draw.log_probs[r] = weighed.log_prob(drawn_from[place]);
    if (reshaped) draw.log_probs[r] = Weighed(logits, n, weights).log_prob(logits[place]);
}

}  // namespace

extern "C" {

// Bytes that a packed matrix takes.
long packed_bytes(const Matrix* matrix) {
    return matrix->num_panels() * (matrix->panel_bytes() + PANEL * (matrix->scales ? 2 : 1) * (long)sizeof(float));
}

// Packs a matrix into memory that is to stay as long as it is used.
void pack(Matrix* matrix, char* memory, int num_threads) {
    float* bias = reinterpret_cast<float*>(memory + matrix->num_panels() * matrix->panel_bytes());
    float* scales = matrix->scales ? bias + matrix->num_panels() * PANEL : nullptr;
    smalti::parallel(num_threads, [&](int rank, int size) {
        const smalti::Share panels(matrix->num_panels(), rank, size);
        for (long p = panels.begin; p < panels.end; ++p) {
            with_weights(matrix->storage, matrix->weight, [&](auto* weight) {
                typedef std::remove_const_t<std::remove_reference_t<decltype(*weight)>> Weight;
                pack_panel(*matrix, weight, p, reinterpret_cast<Weight*>(memory) + p * PANEL * matrix->inputs);
            });
            pack_outputs(*matrix, p, matrix->bias, bias + p * PANEL);
            if (scales) pack_outputs(*matrix, p, matrix->scales, scales + p * PANEL);
        }
    });
    matrix->weight = memory, matrix->bias = bias, matrix->scales = scales;
}

long workspace_floats(const Model* model, long rows, long slots, int threads) {
    return Workspace(*model, rows, slots, nullptr).floats(threads);
}

// New tokens of rows of a state: writes their keys and values, and the hidden states that predict the next ones.
// Returns 0, or 1 without having done anything if a token id is out of range.
int decode(const Model* model, const Batch* batch, int num_threads) {
    for (long t = 0; t < batch->num_tokens; ++t)
        if (batch->token_ids[t] < 0 || batch->token_ids[t] >= model->vocab_size) return 1;
    const Workspace space(*model, batch->num_tokens, batch->most_slots, batch->workspace);
    in_crews(batch->size, num_threads, [&](const Crew& crew, int rank) {
        embed(*model, *batch, space, crew);
        if (model->steps) modulate(*model, *batch, space, crew);
        crew.wait();
        for (long layer = 0; layer < model->num_layers; ++layer)
            run_layer(*model, *batch, space, crew, space.owned + rank * space.own, layer);
        if (model->steps) {
            multiply(model->modulation, space.modulating, space.modulating_width, tokens_of(*batch, crew),
                     crew.part(model->modulation.num_panels()), [&](long r, long panel, const float* sums) {
                         memcpy(space.modulated + r * space.modulated_width + panel * PANEL, sums,
                                sizeof(float) * PANEL);
                     });
            crew.wait();
        }
        const smalti::Share share = crew.part(batch->every ? tokens_of(*batch, crew) : crew.batch);
        for (long i = share.begin; i < share.end; ++i) {
            const long token = batch->every ? i : batch->first(i + 1) - 1;
            float* hidden = batch->hidden + i * model->width;
            model->norm.apply(space.x + token * space.width, hidden, model->width);
            const float* scale = space.modulated + token * space.modulated_width;
            if (model->steps) shift_and_scale(hidden, scale + model->width, scale, model->width);
        }
    });
    return 0;
}

// logits (rows, n) = hidden (rows, k) times the matrix.
void head(const Matrix* matrix, const float* hidden, long stride, long rows, float* logits, int num_threads) {
    in_crews(rows, num_threads, [&](const Crew& crew, int) { write_logits(*matrix, hidden, stride, crew, logits); });
}

// The head, guidance, temperature, softmax, and an id per row by the inverse of the cumulative distribution.
void draw(const Matrix* matrix, const Draw* draw, int num_threads) {
    const long n = matrix->outputs;
    float *logits = draw->workspace, *guided = logits + draw->rows * n, *weights = guided + draw->rows * n;
    in_crews(draw->rows, num_threads, [&](const Crew& crew, int) {
        write_logits(*matrix, draw->hidden, draw->stride, crew, logits);
        if (draw->null_hidden) write_logits(*matrix, draw->null_hidden, draw->stride, crew, guided);
        crew.wait();
        const smalti::Share share = crew.part(crew.batch);
        for (long r = share.begin; r < share.end; ++r)
            draw_row(*draw, r, n, logits + r * n, guided + r * n, weights + r * n);
    });
}

}  // extern "C"
