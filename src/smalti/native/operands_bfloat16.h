// Products of bfloat16 matrices with float32 sums; what `train.cpp` needs of them is named in both operands_*.h.
//
// A product is made in blocks of 32 x 32 numbers in steps of depth 32, on AMX tiles where the processor has them, else on
// AVX-512's bfloat16 products; both take the same operands. The left operand is read as rows. The right one is packed:
// for each 32 columns a panel, in it for each 32 of depth two tiles of 16 columns, in it for each two of depth one row
// of 16 pairs. Left operands that would be transposed are packed likewise, in tiles of 16 rows of depth 32.

#pragma once

#include <immintrin.h>
#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>

#include "vectors.h"

#ifndef __AVX512BF16__
#error "bfloat16 products need AVX512_BF16"
#endif

namespace smalti {

using bf16 = uint16_t;
using Element = bf16;
constexpr long EDGE = 32, TILE = 16 * 32, BLOCK = 2 * TILE;
constexpr bool DEPTH_IN_PARTS = false;  // a sum over all groups is one product: parts are padded with zeros

INLINE __m512i widened(const bf16* from) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)); }
INLINE Vector load(const bf16* from) { return {{(Register)_mm512_castsi512_ps(_mm512_slli_epi32(widened(from), 16))}}; }
INLINE void store(bf16* to, const Vector& x) {
    _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh((__m512)x.part[0]));
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float found;
    std::memcpy(&found, &bits, 4);
    return found;
}

inline bf16 to_element(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bf16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// 16 × 16 numbers of 32 bits, transposed in place.
INLINE void transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 2; ++j) {
            t[8 * j + i] = _mm512_shuffle_i32x4(r[8 * j + i], r[8 * j + i + 4], 0x88);
            t[8 * j + i + 4] = _mm512_shuffle_i32x4(r[8 * j + i], r[8 * j + i + 4], 0xdd);
        }
    for (int i = 0; i < 8; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

// Panels that only a later pass reads go past the caches, which then hold more of what is at hand.
INLINE void store_tile_row(bf16* to, __m512i row, bool for_later) {
    if (for_later)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to), row);
    else
        _mm512_store_si512(to, row);
}

// Packs `depth` rows of `columns` numbers, from depth step `step` on of panels that have `steps`, as a right operand, or
// as a left operand that is the transpose. Rows up to `padded` are zero.
template <bool LEFT, bool FOR_LATER = false>
void pack(const bf16* from, long stride, long depth, long padded, long columns, bf16* to, long steps, long step = 0) {
    for (long k = 0; k < padded; k += EDGE, ++step)
        for (long c = 0; c < columns; c += 16) {
            __m512i r[16];
            for (int i = 0; i < 16; ++i) {
                long even = k + 2 * i;
                r[i] = even < depth ? widened(from + even * stride + c) : _mm512_setzero_si512();
                if (even + 1 < depth)
                    r[i] = _mm512_or_si512(r[i], _mm512_slli_epi32(widened(from + (even + 1) * stride + c), 16));
            }
            if (LEFT) transpose(r);
            bf16* tile = to + (c / EDGE * steps + step) * BLOCK + c % EDGE / 16 * TILE;
            for (int i = 0; i < 16; ++i) store_tile_row(tile + i * 32, r[i], FOR_LATER);
        }
}

// Packs a right operand whose transpose is given: `columns` rows, up to `padded` as zeros, of `depth` numbers.
inline void pack_transposed(const bf16* from, long stride, long columns, long padded, long depth, bf16* to) {
    for (long c = 0; c < padded; c += 16)
        for (long k = 0; k < depth; k += EDGE) {
            __m512i r[16];
            for (int i = 0; i < 16; ++i)
                r[i] = c + i < columns ? _mm512_loadu_si512(from + (c + i) * stride + k) : _mm512_setzero_si512();
            transpose(r);
            bf16* tile = to + (c / EDGE * (depth / EDGE) + k / EDGE) * BLOCK + c % EDGE / 16 * TILE;
            for (int i = 0; i < 16; ++i) _mm512_store_si512(tile + i * 32, r[i]);
        }
}

// Has memory brought to the cache that will be read soon, out of order.
// Sums the `depth` numbers of each of 32 packed left rows.
inline void sum_packed_rows(const bf16* panel, long depth, float* to, bool) {
    for (long row = 0; row < EDGE; ++row) {
        const bf16* numbers = panel + row * 32;
        Vector total = of(0);
        for (long k = 0; k < depth; k += EDGE, numbers += BLOCK) total += load(numbers) + load(numbers + 16);
        to[row] = sum(total);
    }
}

inline void fetch(const bf16* from, long count) {
    for (long i = 0; i < count; i += 32) _mm_prefetch(reinterpret_cast<const char*>(from + i), _MM_HINT_T1);
}

// 32 rows of a left operand: from row to row, and from one step of depth to the next.
struct Rows {
    const bf16* at;
    long stride, step;
};

inline Rows plain_rows(const bf16* at, long stride) { return {at, stride, EDGE}; }
inline Rows packed_rows(const bf16* panel) { return {panel, 32, BLOCK}; }

#ifdef __AMX_BF16__
// Linux grants the tiles' registers to a process that asks (ARCH_REQ_XCOMP_PERM for XTILEDATA).
inline const bool has_tiles = syscall(SYS_arch_prctl, 0x1023, 18) == 0;

inline void tiles_on() {
    alignas(64) static const struct {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    if (has_tiles) _tile_loadconfig(&config);
}

inline void tiles_off() {
    if (has_tiles) _tile_release();
}

inline void block_on_tiles(Rows a, const bf16* b, long steps, float* c, long stride) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long k = 0; k < steps; ++k, a.at += a.step, b += BLOCK) {
        _tile_loadd(4, a.at, a.stride * 2);
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + TILE, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a.at + 16 * a.stride, a.stride * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, stride * 4);
    _tile_stored(1, c + 16, stride * 4);
    _tile_stored(2, c + 16 * stride, stride * 4);
    _tile_stored(3, c + 16 * stride + 16, stride * 4);
}
#else
constexpr bool has_tiles = false;
inline void tiles_on() {}
inline void tiles_off() {}
inline void block_on_tiles(Rows, const bf16*, long, float*, long) {}
#endif

inline void block_on_vectors(Rows a, const bf16* b, long steps, float* c, long stride) {
    for (long row = 0; row < EDGE; row += 8) {
        __m512 sums[8][2] = {};
        for (long k = 0; k < steps; ++k)
            for (int pair = 0; pair < 16; ++pair) {
                const bf16* right = b + k * BLOCK + pair * 32;
                auto b0 = (__m512bh)_mm512_load_si512(right), b1 = (__m512bh)_mm512_load_si512(right + TILE);
                for (int i = 0; i < 8; ++i) {
                    int32_t two;
                    std::memcpy(&two, a.at + (row + i) * a.stride + k * a.step + 2 * pair, 4);
                    auto left = (__m512bh)_mm512_set1_epi32(two);
                    sums[i][0] = _mm512_dpbf16_ps(sums[i][0], left, b0);
                    sums[i][1] = _mm512_dpbf16_ps(sums[i][1], left, b1);
                }
            }
        for (int i = 0; i < 8; ++i)
            for (int half = 0; half < 2; ++half) _mm512_storeu_ps(c + (row + i) * stride + 16 * half, sums[i][half]);
    }
}

// c, 32 x 32 numbers whose rows are `stride` apart, of left rows and one right panel. Beyond the depth both hold zeros;
// more rows than asked for may be written.
inline void block(Rows a, const bf16* b, long depth, float* c, long stride, long = EDGE, bool = false) {
    (has_tiles ? block_on_tiles : block_on_vectors)(a, b, (depth + EDGE - 1) / EDGE, c, stride);
}

}  // namespace smalti
