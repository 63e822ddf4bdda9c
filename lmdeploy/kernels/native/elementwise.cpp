// The operators around the matrix products: norms and SiLU (rotary embedding: rope.cpp). float32 inside, one
// rounding at each result. Threads start only when the work outweighs waking them (about 5 us).
#include <cmath>

#include "common.hpp"

namespace lmd {

constexpr long WORTH_THREADS = 1 << 18;  // elements; less is done before a second thread is awake (linear.cpp says what waking costs)

static int team(long elements, int threads) { return elements >= WORTH_THREADS ? threads : 1; }

template <typename E>
static float inverse_rms(const E* x, long n, float eps) {
    vf acc = {};
    long i = 0;
    for (; i + LANES <= n; i += LANES) {
        vf v = load(x + i);
        acc += v * v;
    }
    float s = sum(acc);
    for (; i < n; i++) s += to_float(x[i]) * to_float(x[i]);
    return 1.0f / std::sqrt(s / float(n) + eps);
}

template <typename E>
static void norm_row(const E* x, const E* w, float eps, E* out, long n) {
    const float inv = inverse_rms(x, n, eps);
    long i = 0;
    for (; i + LANES <= n; i += LANES) store(out + i, load(x + i) * inv * load(w + i));
    for (; i < n; i++) put(out + i, to_float(x[i]) * inv * to_float(w[i]));
}

template <typename E>
static void add_row(const E* x, E* residual, long n) {
    long i = 0;
    for (; i + LANES <= n; i += LANES) store(residual + i, load(residual + i) + load(x + i));
    for (; i < n; i++) put(residual + i, to_float(residual[i]) + to_float(x[i]));
}

// out [T, M] = rms_norm(x); with `residual`: residual += x first, and its norm is taken.
template <typename E>
static void rms_norm(const E* x, long x_stride, E* residual, const E* w, float eps, E* out, long T, long M, int threads) {
    share(T, team(T * M, threads), [=](long first, long last) {
        for (long t = first; t < last; t++) {
            const E* row = x + t * x_stride;
            if (residual) {
                add_row(row, residual + t * M, M);
                row = residual + t * M;
            }
            norm_row(row, w, eps, out + t * M, M);
        }
    });
}

template <typename E>
static void head_norm(E* x, long row_stride, long head_stride, const E* w, float eps, long T, long H, long D, int threads) {
    share(T * H, team(T * H * D, threads), [=](long first, long last) {
        for (long i = first; i < last; i++) {
            E* head = x + i / H * row_stride + i % H * head_stride;
            norm_row(head, w, eps, head, D);
        }
    });
}

template <typename E>
static void silu_piece(const E* gate, const E* up, E* out, long n) {
    long i = 0;
    for (; i + LANES <= n; i += LANES) {
        vf x = load(gate + i);
        store(out + i, x / (1.0f + exp(-x)) * load(up + i));
    }
    for (; i < n; i++) {
        const float x = to_float(gate[i]);
        put(out + i, x / (1.0f + exp(fill(-x))[0]) * to_float(up[i]));
    }
}

template <typename E>
static void silu_mul(const E* gate_up, E* out, long T, long F, int threads) {
    constexpr long PIECE = 4096;  // so that one long row is shared too
    const long pieces = (F + PIECE - 1) / PIECE;
    share(T * pieces, team(T * F, threads), [=](long first, long last) {
        for (long j = first; j < last; j++) {
            const long t = j / pieces, at = j % pieces * PIECE;
            const E* gate = gate_up + t * 2 * F + at;
            silu_piece(gate, gate + F, out + t * F + at, F - at < PIECE ? F - at : PIECE);
        }
    });
}

}  // namespace lmd

using namespace lmd;

#define FOR_EACH_TYPE(E, NAME)                                                                                                           \
    LMD_API void lmd_rms_norm_##NAME(const E* x, long x_stride, E* residual, const E* w, float eps, E* out, long T, long M, int threads) { \
        rms_norm(x, x_stride, residual, w, eps, out, T, M, threads);                                                                     \
    }                                                                                                                                    \
    LMD_API void lmd_head_norm_##NAME(E* x, long row, long head, const E* w, float eps, long T, long H, long D, int threads) {           \
        head_norm(x, row, head, w, eps, T, H, D, threads);                                                                               \
    }                                                                                                                                    \
    LMD_API void lmd_silu_mul_##NAME(const E* gate_up, E* out, long T, long F, int threads) { silu_mul(gate_up, out, T, F, threads); }

FOR_EACH_TYPE(float, f32)
FOR_EACH_TYPE(bf16, bf16)
