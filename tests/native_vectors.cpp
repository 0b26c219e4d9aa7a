// Compares native/vectors.h and native/operands_float32.h with plain loops in double precision; prints what is wrong.

#include <cstdio>
#include <functional>
#include <random>
#include <vector>

#include "operands_float32.h"

using namespace smalti;

static int failures = 0;

static void expect(bool fine, const char* what, double found, double expected) {
    if (fine) return;
    ++failures;
    std::printf("%s: %.9g, expected %.9g\n", what, found, expected);
}

static void check_function(const char* name, Vector (*ours)(const Vector&), double (*exact)(double), float low,
                           float high, double tolerance) {
    for (int i = 0; i <= 4000; i += 16) {
        float x[16], y[16];
        for (int j = 0; j < 16; ++j) x[j] = low + (high - low) * float(i + j) / 4016;
        store(y, ours(load(x)));
        for (int j = 0; j < 16; ++j) {
            const double expected = exact(x[j]), error = std::fabs(y[j] - expected);
            expect(error <= tolerance * std::fmax(std::fabs(expected), 1e-3), name, y[j], expected);
        }
    }
}

static void check_lanes() {
    float x[16], y[16];
    for (int j = 0; j < 16; ++j) x[j] = float(j * j % 7) - 3;
    expect(sum(load(x)) == 29 - 3 * 16, "sum", sum(load(x)), 29 - 3 * 16);  // squares modulo 7 add up to 29
    expect(largest(load(x)) == 1, "largest", largest(load(x)), 1);
    for (long count : {-1L, 0L, 1L, 5L, 15L, 16L, 20L}) {
        store(y, select(first_lanes(count), of(1), of(2)));
        for (int j = 0; j < 16; ++j) expect(y[j] == (j < count ? 1 : 2), "first_lanes", y[j], j < count ? 1 : 2);
    }
    for (int j = 0; j < 16; ++j) x[j] = NAN;
    store(y, exp(load(x)));
    for (float found : y) expect(std::isnan(found), "exp of NaN", found, NAN);
}

static void check_product(long rows, long depth, bool packed, bool add) {
    std::mt19937 generator(rows * 1000 + depth);
    std::uniform_real_distribution<float> number(-1, 1);
    std::vector<float> a(EDGE * depth), b(EDGE * depth), left(EDGE * depth), right(EDGE * depth), c(EDGE * EDGE, 7);
    for (auto* numbers : {&a, &b})
        for (float& x : *numbers) x = number(generator);
    pack_transposed(b.data(), depth, EDGE, EDGE, depth, right.data());  // b holds a row of `depth` for each column
    if (packed)  // a is given as `depth` rows of 32, and read as its transpose
        pack<true>(a.data(), EDGE, depth, depth, EDGE, left.data(), (depth + EDGE - 1) / EDGE);
    block(packed ? packed_rows(left.data()) : plain_rows(a.data(), depth), right.data(), depth, c.data(), EDGE, rows, add);
    for (long i = 0; i < EDGE; ++i)
        for (long j = 0; j < EDGE; ++j) {
            double expected = add || i >= rows ? 7 : 0;
            for (long k = 0; k < depth && i < rows; ++k)
                expected += double(packed ? a[k * EDGE + i] : a[i * depth + k]) * b[j * depth + k];
            expect(std::fabs(c[i * EDGE + j] - expected) < 1e-4, "product", c[i * EDGE + j], expected);
        }
}

int main() {
    check_function("exp", exp, std::exp, -86, 86, 3e-7);
    check_function("erf", erf, std::erf, -6, 6, 1e-6);
    check_function("tanh", tanh, std::tanh, -9, 9, 2e-4);  // relative to at least 1e-3: 2e-7 in absolute terms
    check_lanes();
    for (long rows : {1L, 3L, 7L, 8L, 13L, 32L})
        for (long depth : {1L, 32L, 57L, 130L, 300L})
            for (bool packed : {false, true})
                for (bool add : {false, true}) check_product(rows, depth, packed, add);
    std::printf("%d lanes, %d failures\n", LANES, failures);
    return failures != 0;
}
