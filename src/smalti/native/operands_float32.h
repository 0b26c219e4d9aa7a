// Products of float32 matrices on any processor; what `train.cpp` needs of them is named in both operands_*.h.
//
// A product is made in blocks of 32 x 32 numbers. Its left operand is read as rows, or, where it would be transposed,
// packed; the right one is packed: for each 32 columns a panel, in it for each number of depth one row of 32. Within a
// block, tiles of a few rows and registers hold their sums while the depth goes by: sums run in its order.

#pragma once

#include <algorithm>

#include "vectors.h"

namespace smalti {

using Element = float;
constexpr long EDGE = 32, BLOCK = EDGE * EDGE;
constexpr bool DEPTH_IN_PARTS = true;  // a sum over all groups is made group by group, whose operands fit a cache

INLINE float to_float(float x) { return x; }
INLINE float to_element(float x) { return x; }

// 32 rows of a left operand: the steps from row to row and from number to number.
struct Rows {
    const float* at;
    long row_stride;
    bool packed;
};

INLINE Rows plain_rows(const float* at, long stride) { return {at, stride, false}; }
INLINE Rows packed_rows(const float* panel) { return {panel, 1, true}; }

// Packs `depth` rows of `columns` numbers, from depth step `step` on of panels that have `steps`, as a right operand, or
// as a left operand that is the transpose: that is the same here. Rows up to `padded` are zero.
template <bool LEFT, bool FOR_LATER = false>
void pack(const float* from, long stride, long depth, long padded, long columns, float* to, long steps, long step = 0) {
    for (long c = 0; c < columns; c += EDGE) {
        float* panel = to + (c / EDGE * steps + step) * BLOCK;
        for (long k = 0; k < depth; ++k)
            for (long i = 0; i < EDGE; i += 16) store(panel + k * EDGE + i, load(from + k * stride + c + i));
        for (long k = depth; k < padded; ++k)
            for (long i = 0; i < EDGE; i += 16) store(panel + k * EDGE + i, of(0));
    }
}

// Packs a right operand whose transpose is given: `columns` rows, up to `padded` as zeros, of `depth` numbers.
inline void pack_transposed(const float* from, long stride, long columns, long padded, long depth, float* to) {
    for (long c = 0; c < padded; ++c)
        for (long k = 0; k < depth; ++k)
            to[c / EDGE * EDGE * depth + k * EDGE + c % EDGE] = c < columns ? from[c * stride + k] : 0.0f;
}

// Sums the `depth` numbers of each of 32 packed left rows.
inline void sum_packed_rows(const float* panel, long depth, float* to, bool add) {
    for (long i = 0; i < EDGE; i += 16) {
        Vector total = add ? load(to + i) : of(0);
        for (long k = 0; k < depth; ++k) total += load(panel + k * EDGE + i);
        store(to + i, total);
    }
}

inline void fetch(const float* from, long count) {
    for (long i = 0; i < count; i += 16) __builtin_prefetch(from + i, 0, 2);
}

inline void tiles_on() {}
inline void tiles_off() {}

#if defined(__AVX512F__)
constexpr int TILE_ROWS = 12, TILE_REGISTERS = 2;  // 24 sums, 2 right numbers and a left one take 27 of 32 registers
#elif defined(__AVX__)
constexpr int TILE_ROWS = 6, TILE_REGISTERS = 2;  // 12 sums, 2 right numbers and a left one take 15 of 16
#else
constexpr int TILE_ROWS = 6, TILE_REGISTERS = 4;
#endif
constexpr int TILE_COLUMNS = TILE_REGISTERS * LANES;

// Up to this depth the numbers of a block stay in a core's first cache; beyond it they are taken a part at a time.
constexpr long PART_OF_DEPTH = 128;

template <int ROWS, bool PACKED>
void tile(const float* a, long row_stride, const float* b, long depth, float* c, long stride, bool add) {
    const long between_rows = PACKED ? 1 : row_stride, between_numbers = PACKED ? EDGE : 1;
    Register sums[ROWS][TILE_REGISTERS] = {};
#pragma GCC unroll 2
    for (long k = 0; k < depth; ++k)
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < TILE_REGISTERS; ++v)
                sums[r][v] += load_register(b + k * EDGE + v * LANES) * a[r * between_rows + k * between_numbers];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < TILE_REGISTERS; ++v) {
            float* to = c + r * stride + v * LANES;
            store_register(to, add ? load_register(to) + sums[r][v] : sums[r][v]);
        }
}

using Tile = decltype(&tile<1, false>);
template <bool PACKED>
constexpr Tile TILES[12] = {tile<1, PACKED>, tile<2, PACKED>, tile<3, PACKED>,  tile<4, PACKED>,
                            tile<5, PACKED>, tile<6, PACKED>,
#if defined(__AVX512F__)
                            tile<7, PACKED>, tile<8, PACKED>, tile<9, PACKED>, tile<10, PACKED>,
                            tile<11, PACKED>, tile<12, PACKED>
#endif
};

// How many of the rows that are left the next tile takes: few tiles, none of them small.
INLINE long next_tile(long rows) { return rows >= 2 * TILE_ROWS ? TILE_ROWS : rows > TILE_ROWS ? (rows + 1) / 2 : rows; }

// c, up to 32 rows of 32 numbers which are `stride` apart, of left rows and one right panel; added to it if so asked.
inline void block(Rows a, const float* b, long depth, float* c, long stride, long rows = EDGE, bool add = false) {
    const Tile* tiles = a.packed ? TILES<true> : TILES<false>;
    const long a_step = a.packed ? EDGE : 1;
    for (long k = 0; k < depth; k += PART_OF_DEPTH) {
        const long part = std::min(PART_OF_DEPTH, depth - k);
        for (long column = 0; column < EDGE; column += TILE_COLUMNS)
            for (long row = 0, height; row < rows; row += height) {
                height = next_tile(rows - row);
                tiles[height - 1](a.at + row * a.row_stride + k * a_step, a.row_stride, b + k * EDGE + column, part,
                                  c + row * stride + column, stride, add || k > 0);
            }
    }
}

}  // namespace smalti
