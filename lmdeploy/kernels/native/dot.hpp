// Dot products of rows with float32 weight rows: one chain of 16 lanes per output for every blocking.
#pragma once
#include "common.hpp"

namespace lmd {

// Waking a thread costs some 10 us on an idle machine, and a scheduler slice of 4 to 8 ms when another program has its core:
// a 20M-parameter model fell from 360 to 20 tokens/s beside one busy neighbour. So only about a quarter of a millisecond of
// work is shared: 3M weights to read, or 2^27 multiplications.
inline bool worth_threads(long T, long K, long N) { return K * N >= 3L << 20 || T * K * N >= 1L << 27; }

template <int TB, int NB, typename E>
inline void dot_block(const E* x, long xs, const float* w, long K, const E* bias, E* out, long os) {
    vf acc[TB][NB] = {};
    long k = 0;
    for (; k + LANES <= K; k += LANES) {
        vf b[NB];
        for (int n = 0; n < NB; n++) {
            b[n] = load(w + n * K + k);
            __builtin_prefetch(w + n * K + k + 256, 0, 2);
        }
        for (int t = 0; t < TB; t++) {
            vf a = load(x + t * xs + k);
            for (int n = 0; n < NB; n++) acc[t][n] += a * b[n];
        }
    }
    for (int t = 0; t < TB; t++)
        for (int n = 0; n < NB; n++) {
            float s = sum(acc[t][n]);
            for (long i = k; i < K; i++) s = __builtin_fmaf(to_float(x[t * xs + i]), w[n * K + i], s);
            put(out + t * os + n, bias ? s + to_float(bias[n]) : s);
        }
}

template <int NB, typename E>
inline void dot_rows(const E* x, long xs, const float* w, long K, const E* bias, E* out, long os, long T) {
    long t = 0;
    for (; t + 4 <= T; t += 4) dot_block<4, NB>(x + t * xs, xs, w, K, bias, out + t * os, os);
    if (T - t == 3) dot_block<3, NB>(x + t * xs, xs, w, K, bias, out + t * os, os);
    if (T - t == 2) dot_block<2, NB>(x + t * xs, xs, w, K, bias, out + t * os, os);
    if (T - t == 1) dot_block<1, NB>(x + t * xs, xs, w, K, bias, out + t * os, os);
}

// All T rows of x with N weight rows that stay in cache: 16 rows of x at a time meet them.
template <typename E>
inline void dot_panel(const E* x, long xs, const float* w, long K, const E* bias, E* out, long os, long T, long N) {
    for (long t = 0; t < T; t += 16) {
        const long rows = T - t < 16 ? T - t : 16;
        long n = 0;
        for (; n + 4 <= N; n += 4) dot_rows<4>(x + t * xs, xs, w + n * K, K, bias ? bias + n : nullptr, out + t * os + n, os, rows);
        for (; n < N; n++) dot_rows<1>(x + t * xs, xs, w + n * K, K, bias ? bias + n : nullptr, out + t * os + n, os, rows);
    }
}

}  // namespace lmd
