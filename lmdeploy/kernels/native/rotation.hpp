// The rotation of a quantised cache, x -> x R in place with R = (I - 2/m J) (x) H / sqrt(n) of kv_layer.rotation_matrix: dims are m blocks
// of n, n the largest power of two in D; Sylvester's Hadamard matrix mixes places by butterflies, the reflection mixes blocks. R is its
// own inverse, and symmetric. Sums run in one order for any instruction set.
#pragma once
#include <cmath>

#include "common.hpp"

namespace lmd {

// Butterflies between lanes `STEP` apart.
template <int STEP>
inline vf butterfly(vf x) {
    vi other, sign;
    for (int i = 0; i < LANES; i++) other[i] = i ^ STEP, sign[i] = i & STEP ? int32_t(0x80000000) : 0;
    return __builtin_shuffle(x, other) + (vf)((vi)x ^ sign);
}

// n a multiple of 16.
inline void hadamard_vectors(float* x, long n, float factor) {
    for (long d = 0; d < n; d += LANES) store(x + d, butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(load(x + d) * factor)))));
    for (long step = LANES; step < n; step *= 2)
        for (long first = 0; first < n; first += 2 * step)
            for (long d = first; d < first + step; d += LANES) {
                const vf a = load(x + d), b = load(x + d + step);
                store(x + d, a + b), store(x + d + step, a - b);
            }
}

inline void hadamard_scalars(float* x, long n, float factor) {
    for (long d = 0; d < n; d++) x[d] *= factor;
    for (long step = 1; step < n; step *= 2)
        for (long first = 0; first < n; first += 2 * step)
            for (long d = first; d < first + step; d++) {
                const float a = x[d], b = x[d + step];
                x[d] = a + b, x[d + step] = a - b;
            }
}

inline void rotate_dims(float* x, long D) {
    const long n = D & -D, m = D / n;
    const float factor = 1.0f / std::sqrt(float(n));
    for (long b = 0; b < m; b++) n % LANES ? hadamard_scalars(x + b * n, n, factor) : hadamard_vectors(x + b * n, n, factor);
    for (long place = 0; m > 1 && place < n; place++) {
        float total = 0;
        for (long b = 0; b < m; b++) total += x[b * n + place];
        for (long b = 0; b < m; b++) x[b * n + place] -= 2.0f / float(m) * total;
    }
}

}  // namespace lmd
