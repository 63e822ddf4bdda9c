// The operators around the matrix products: norms, rotary embedding with the cache write, SiLU. float32 inside, one
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

// (x1, x2) of the two halves of the first R dims -> (x1 cos - x2 sin, x2 cos + x1 sin), all D dims times `scale`.
template <typename E>
static void rotate(E* x, const float* cos, const float* sin, long D, long R, float scale) {
    const long half = R / 2;
    long i = 0;
    for (; i + LANES <= half; i += LANES) {
        vf a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
        store(x + i, (a * c - b * s) * scale);
        store(x + half + i, (b * c + a * s) * scale);
    }
    for (; i < half; i++) {
        const float a = to_float(x[i]), b = to_float(x[half + i]);
        put(x + i, (a * cos[i] - b * sin[i]) * scale);
        put(x + half + i, (b * cos[i] + a * sin[i]) * scale);
    }
    if (scale != 1.0f)
        for (long j = R; j < D; j++) put(x + j, to_float(x[j]) * scale);
}

struct RopeArgs {  // one call's numbers in one block: a call with 20 arguments costs more than the work at T = 1
    void *q, *k, *v;
    const float *cos, *sin, *q_scale;
    void *key_cache, *value_cache;
    const int64_t* slots;
    int64_t q_row, q_head, k_row, k_head, v_row, v_head;
    int64_t T, H, K, D, R, S, block_stride, head_stride;  // of the caches, in elements
};

template <typename E>
static void rope_row(const RopeArgs& p, long t) {
    const float *cos = p.cos + t * (p.R / 2), *sin = p.sin + t * (p.R / 2);
    for (long h = 0; h < p.H; h++)
        rotate((E*)p.q + t * p.q_row + h * p.q_head, cos, sin, p.D, p.R, p.q_scale ? p.q_scale[t] : 1.0f);
    const int64_t at = p.slots[t] / p.S * p.block_stride + p.slots[t] % p.S * p.D;
    for (long h = 0; h < p.K; h++) {
        E* k = (E*)p.k + t * p.k_row + h * p.k_head;
        rotate(k, cos, sin, p.D, p.R, 1.0f);
        std::memcpy((E*)p.key_cache + at + h * p.head_stride, k, p.D * sizeof(E));
        std::memcpy((E*)p.value_cache + at + h * p.head_stride, (E*)p.v + t * p.v_row + h * p.v_head, p.D * sizeof(E));
    }
}

template <typename E>
static void rope_write_kv(const RopeArgs& p, int threads) {
    share(p.T, team(p.T * (p.H + 2 * p.K) * p.D, threads), [&](long first, long last) {
        for (long t = first; t < last; t++) rope_row<E>(p, t);
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
    LMD_API void lmd_silu_mul_##NAME(const E* gate_up, E* out, long T, long F, int threads) { silu_mul(gate_up, out, T, F, threads); }   \
    LMD_API void lmd_rope_write_kv_##NAME(const RopeArgs* p, int threads) { rope_write_kv<E>(*p, threads); }

FOR_EACH_TYPE(float, f32)
FOR_EACH_TYPE(bf16, bf16)
