// Sixteen float32 numbers at a time, on any processor: one register of AVX-512, two of AVX, four of NEON or SSE.
//
// Written with the vector types of GCC and Clang, so that no instruction set is named. Sums over the sixteen run in one
// order, whatever a register holds, so that a result does not depend on how wide the registers are.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#define INLINE inline __attribute__((always_inline))

namespace smalti {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int PARTS = 16 / LANES;

template <int COUNT>
struct Lanes {
    typedef float Float __attribute__((vector_size(4 * COUNT), aligned(4), may_alias));
    typedef int32_t Int __attribute__((vector_size(4 * COUNT), aligned(4), may_alias));
    typedef uint32_t Unsigned __attribute__((vector_size(4 * COUNT), aligned(4), may_alias));
};
using Register = Lanes<LANES>::Float;

INLINE Register load_register(const float* from) { return *reinterpret_cast<const Register*>(from); }
INLINE void store_register(float* to, Register x) { *reinterpret_cast<Register*>(to) = x; }

struct Vector {
    Register part[PARTS];
};
struct Unsigned {
    Lanes<LANES>::Unsigned part[PARTS];
};
struct Mask {
    Lanes<LANES>::Int part[PARTS];  // all bits of a number are set where it is true
};

#define SMALTI_EACH for (int p = 0; p < PARTS; ++p)
#define SMALTI_OPERATOR(sign, Type, Result)                     \
    INLINE Result operator sign(const Type& a, const Type& b) { \
        Result y;                                               \
        SMALTI_EACH y.part[p] = a.part[p] sign b.part[p];       \
        return y;                                               \
    }
SMALTI_OPERATOR(+, Vector, Vector)
SMALTI_OPERATOR(-, Vector, Vector)
SMALTI_OPERATOR(*, Vector, Vector)
SMALTI_OPERATOR(/, Vector, Vector)
SMALTI_OPERATOR(<, Vector, Mask)
SMALTI_OPERATOR(>, Vector, Mask)
SMALTI_OPERATOR(+, Unsigned, Unsigned)
SMALTI_OPERATOR(*, Unsigned, Unsigned)
SMALTI_OPERATOR(^, Unsigned, Unsigned)
SMALTI_OPERATOR(<, Unsigned, Mask)
#undef SMALTI_OPERATOR

INLINE Vector of(float x) {
    Vector y;
    SMALTI_EACH y.part[p] = x - Register{};
    return y;
}
INLINE Unsigned of_unsigned(uint32_t x) {
    Unsigned y;
    SMALTI_EACH y.part[p] = x - Lanes<LANES>::Unsigned{};
    return y;
}
// start, start + 1, ... start + 15
INLINE Unsigned counted_from(uint32_t start) {
    Unsigned y;
    SMALTI_EACH for (int i = 0; i < LANES; ++i) y.part[p][i] = start + uint32_t(p * LANES + i);
    return y;
}
INLINE Unsigned shifted_right(const Unsigned& x, int bits) {
    Unsigned y;
    SMALTI_EACH y.part[p] = x.part[p] >> bits;
    return y;
}
INLINE Vector load(const float* from) {
    Vector y;
    SMALTI_EACH y.part[p] = load_register(from + p * LANES);
    return y;
}
INLINE void store(float* to, const Vector& x) { SMALTI_EACH store_register(to + p * LANES, x.part[p]); }
INLINE Vector operator-(const Vector& x) { return of(0) - x; }
INLINE Vector& operator+=(Vector& a, const Vector& b) { return a = a + b; }
INLINE Vector& operator*=(Vector& a, const Vector& b) { return a = a * b; }
INLINE Vector fma(const Vector& a, const Vector& b, const Vector& c) { return a * b + c; }
INLINE Vector select(const Mask& where, const Vector& a, const Vector& b) {
    Vector y;
    SMALTI_EACH y.part[p] = where.part[p] ? a.part[p] : b.part[p];
    return y;
}
INLINE Vector larger(const Vector& a, const Vector& b) { return select(a > b, a, b); }

// The first `count` of the sixteen.
INLINE Mask first_lanes(long count) {
    return counted_from(0) < of_unsigned(uint32_t(count < 0 ? 0 : count > 16 ? 16 : count));
}

// Combines the sixteen as ((0, 8), (4, 12)), ((2, 10), ...) ...
template <int COUNT, class Combine>
INLINE float combined(typename Lanes<COUNT>::Float x, const Combine& combine) {
    if constexpr (COUNT == 1) {
        return x[0];
    } else {
        typename Lanes<COUNT / 2>::Float halves[2];
        std::memcpy(halves, &x, sizeof(x));
        return combined<COUNT / 2>(combine(halves[0], halves[1]), combine);
    }
}
template <class Combine>
INLINE float combined(const Vector& x, const Combine& combine) {
    Register parts[PARTS];
    SMALTI_EACH parts[p] = x.part[p];
    for (int count = PARTS / 2; count > 0; count /= 2)
        for (int p = 0; p < count; ++p) parts[p] = combine(parts[p], parts[p + count]);
    return combined<LANES>(parts[0], combine);
}
INLINE float sum(const Vector& x) {
    return combined(x, [](auto a, auto b) { return a + b; });
}
INLINE float largest(const Vector& x) {
    return combined(x, [](auto a, auto b) { return a > b ? a : b; });
}

// e^x within 2 units in the last place: 2^(whole part of x / ln 2), times the Taylor series of the rest. It stays at
// 1e-38 below -87: smaller numbers are not normal, and take a processor a hundred times as long. NaN stays NaN.
INLINE Register exp(Register x) {
    const Register low = -87.0f - Register{}, high = 88.0f - Register{};
    x = x < low ? low : x > high ? high : x;
    const float rounder = 12582912.0f;  // 1.5 x 2^23: adding it rounds to whole numbers, which stand in the low bits
    Register shifted = x * 1.44269504f + rounder, whole = shifted - rounder;
    Register rest = x - whole * 0.693145752f - whole * 1.42860677e-6f;  // ln 2 in two parts: the product is exact
    Register series = 1 / 5040.0f - Register{};
    for (float factor : {1 / 720.0f, 1 / 120.0f, 1 / 24.0f, 1 / 6.0f, 1 / 2.0f, 1.0f, 1.0f})
        series = series * rest + factor;
    const auto bits = (reinterpret_cast<Lanes<LANES>::Int>(shifted) + 127) << 23;  // those of `rounder` drop out
    return series * reinterpret_cast<Register>(bits);
}

// erf within 4e-7 of its value: x P(x^2) / Q(x^2), fitted for the least relative error on |x| < 4, where it is 1 - 2e-8.
INLINE Register erf(Register x) {
    const Register low = -4.0f - Register{}, high = 4.0f - Register{};
    x = x < low ? low : x > high ? high : x;
    Register u = x * x, P = 1.98677768e-06f - Register{}, Q = 3.74202100e-05f - Register{};
    for (float factor : {2.84567475e-4f, 3.88339767e-3f, 5.31019121e-2f, 0.193546265f, 1.12837911f}) P = P * u + factor;
    for (float factor : {1.18558481e-3f, 1.52073586e-2f, 0.11535050f, 0.504858434f, 1.0f}) Q = Q * u + factor;
    return x * P / Q;
}

INLINE Register tanh(Register x) { return 1.0f - 2.0f / (exp(x + x) + 1.0f); }

#define SMALTI_FUNCTION(name)                       \
    INLINE Vector name(const Vector& x) {           \
        Vector y;                                   \
        SMALTI_EACH y.part[p] = name(x.part[p]);    \
        return y;                                   \
    }
SMALTI_FUNCTION(exp)
SMALTI_FUNCTION(erf)
SMALTI_FUNCTION(tanh)
#undef SMALTI_FUNCTION
#undef SMALTI_EACH

}  // namespace smalti
