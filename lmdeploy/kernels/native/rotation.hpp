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

inline vf mix_lanes(vf x) { return butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(x)))); }

// n = 16 V dims, held in registers for V known to the compiler.
template <long V>
inline void hadamard_vectors(float* x, float factor) {
    vf v[V];
    for (long i = 0; i < V; i++) v[i] = mix_lanes(load(x + i * LANES) * factor);
    for (long step = 1; step < V; step *= 2)
        for (long i = 0; i < V; i++)
            if (!(i & step)) {
                const vf a = v[i], b = v[i + step];
                v[i] = a + b, v[i + step] = a - b;
            }
    for (long i = 0; i < V; i++) store(x + i * LANES, v[i]);
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

inline void hadamard(float* x, long n, float factor) {
    switch (n / LANES) {
        case 1: return hadamard_vectors<1>(x, factor);
        case 2: return hadamard_vectors<2>(x, factor);
        case 4: return hadamard_vectors<4>(x, factor);
        case 8: return hadamard_vectors<8>(x, factor);
        case 16: return hadamard_vectors<16>(x, factor);
        default: return hadamard_scalars(x, n, factor);  // n is below 16: dims are at most 256
    }
}

inline void rotate_dims(float* x, long D) {
    const long n = D & -D, m = D / n;
    const float factor = 1.0f / std::sqrt(float(n));
    for (long b = 0; b < m; b++) hadamard(x + b * n, n, factor);
    for (long place = 0; m > 1 && place < n; place++) {
        float total = 0;
        for (long b = 0; b < m; b++) total += x[b * n + place];
        for (long b = 0; b < m; b++) x[b * n + place] -= 2.0f / float(m) * total;
    }
}

}  // namespace lmd
