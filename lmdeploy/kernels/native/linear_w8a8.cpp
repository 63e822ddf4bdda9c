// out [T, N] = (xq @ q.T) * sx * scales + bias: 8-bit weights with a scale a row, and activations quantised row by row to the weights'
// type, x ~ xq * sx, while it runs. int8: exact int32 sums, by AMX straight from memory, by integer dot products elsewhere.
// float8 e4m3: the rounded activations and the weights are exact in bf16 and float32, and go the way of linear_w8.
// A row of x with NaN or infinity gives a row of NaN. A row's bits do not depend on T, the batch or the threads.
#include <limits>

#include "in_place.hpp"
#include "weight8.hpp"

namespace lmd {

typedef int8_t vb __attribute__((vector_size(16), aligned(1), may_alias));
constexpr float MOST_INT8 = 127, MOST_E4M3 = 448;

inline vf choose(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
inline vf clamp(vf x, float most) { return choose(x > most, fill(most), choose(x < -most, fill(-most), x)); }

// Nearest integers, ties to even: adding 1.5 * 2^23 leaves them in the low bits.
inline void put_quantised(int8_t* to, vf x) { *(vb*)to = __builtin_convertvector((vi)(clamp(x, MOST_INT8) + 12582912.0f) - 0x4b400000, vb); }

// Nearest e4m3 numbers: three bits behind the leading one, and multiples of 2^-9 below 2^-6.
inline vf nearest_e4m3(vf x) {
    const vf magic = fill(24576.0f), v = clamp(x, MOST_E4M3);
    const vu bits = (vu)v, rounded = (bits + 0x7ffffu + ((bits >> 20) & 1u)) & 0xfff00000u;
    const vf size = (vf)(bits & 0x7fffffffu);
    return choose(size < 0.015625f, (v + magic) - magic, (vf)rounded);
}
template <typename E>
inline void put_quantised(E* to, vf x) {
    store(to, nearest_e4m3(x));
}

// One row in Q = int8_t, or in e4m3 numbers kept as bf16 or float. Returns sx; NaN for a row that is not finite, with zeros as numbers.
template <typename Q, typename E>
inline float quantise_row(const E* x, long K, Q* to) {
    vi most = {};
    E rest[LANES] = {};
    const long whole = K / LANES * LANES;
    std::memcpy(rest, x + whole, size_t(K - whole) * sizeof(E));
    const auto at = [&](long k) { return load(k < whole ? x + k : rest); };
    for (long k = 0; k < K; k += LANES) {
        const vi size = (vi)at(k) & 0x7fffffff;  // magnitudes of floats are in the order of their bits, NaN above infinity
        const vi more = size > most;
        most = (more & size) | (~more & most);
    }
    int32_t top = 0;
    for (int i = 0; i < LANES; i++) top = std::max(top, most[i]);
    float largest, scale = std::numeric_limits<float>::quiet_NaN();
    std::memcpy(&largest, &top, 4);
    const bool finite = top < 0x7f800000;
    if (finite) scale = largest / (std::is_same_v<Q, int8_t> ? MOST_INT8 : MOST_E4M3);
    if (scale == 0) scale = 1;
    const vf divisor = fill(scale);
    Q last[LANES];
    for (long k = 0; k < whole; k += LANES) put_quantised(to + k, finite ? at(k) / divisor : vf{});
    put_quantised(last, finite ? load(rest) / divisor : vf{});
    std::memcpy(to + whole, last, size_t(K - whole) * sizeof(Q));
    return scale;
}

// All rows to `numbers` [T, K]. False where memory ran out.
template <typename Q, typename E>
static bool quantise_rows(const Product<E>& p, int threads, Q*& numbers, float*& x_scales) {
    const size_t bytes = (size_t(p.T) * p.K * sizeof(Q) + 63) / 64 * 64;
    char* memory = (char*)scratch(bytes + size_t(p.T) * 4, 3);
    numbers = (Q*)memory, x_scales = (float*)(memory + bytes);
    if (!memory) return false;
    share(p.T, p.T * p.K < 1 << 18 ? 1 : threads, [&](long first, long last) {
        for (long t = first; t < last; t++) x_scales[t] = quantise_row(p.x + t * p.x_stride, p.K, numbers + t * p.K);
    });
    return true;
}

template <typename E>
static void put_sums(const Product<E>& p, const float* x_scales, const float* scales, long t, long n, float sum) {
    const float value = sum * x_scales[t] * scales[n];
    put(p.out + t * p.out_stride + n, p.bias ? value + to_float(p.bias[n]) : value);
}

// ---- any CPU -------------------------------------------------------------------------------------------------------

static int32_t dot_int8(const int8_t* a, const int8_t* b, long K) {
    int32_t total = 0;
    for (long k = 0; k < K; k++) total += int16_t(a[k]) * int16_t(b[k]);
    return total;
}

template <typename E>
static bool linear_int8(const Product<E>& p, const Weight8& w, int threads) {
    int8_t* x;
    float* x_scales;
    if (!quantise_rows(p, threads, x, x_scales)) return false;
    share(p.N, worth_threads(p.T, p.K, p.N) ? threads : 1, [&](long first, long last) {
        for (long n = first; n < last; n++)
            for (long t = 0; t < p.T; t++) put_sums(p, x_scales, w.scales, t, n, float(dot_int8(x + t * p.K, (const int8_t*)w.row(n), p.K)));
    });
    return true;
}

template <typename E>
static bool linear_e4m3(const Product<E>& p, const Weight8& w, int threads) {
    constexpr long PANEL = 16;
    float *x, *x_scales;
    if (!quantise_rows(p, threads, x, x_scales)) return false;
    bool enough = true;
    share((p.N + 3) / 4, worth_threads(p.T, p.K, p.N) ? threads : 1, [&](long first_four, long last_four) {
        const long last = std::min(p.N, last_four * 4);
        float *rows = (float*)scratch(size_t(PANEL) * p.K * 4, 0), *sums = (float*)scratch(size_t(PANEL) * p.T * 4, 1);
        if (!rows || !sums) {
            __atomic_store_n(&enough, false, __ATOMIC_RELAXED);
            return;
        }
        for (long n = first_four * 4; n < last; n += PANEL) {
            const long count = std::min(PANEL, last - n);
            for (long i = 0; i < count; i++) write_out(w, n + i, false, rows + i * p.K);
            dot_panel(x, p.K, rows, p.K, (const float*)nullptr, sums, PANEL, p.T, count);
            for (long t = 0; t < p.T; t++)
                for (long i = 0; i < count; i++) put_sums(p, x_scales, w.scales, t, n + i, sums[t * PANEL + i]);
        }
    });
    return enough;
}

#ifdef LMD_AMX
// ---- AMX -----------------------------------------------------------------------------------------------------------

template <typename E>
static bool tiles_int8(const Product<E>& given, const Weight8& w, int threads) {
    int8_t* x;
    float* x_scales;
    if (!quantise_rows(given, threads, x, x_scales)) return false;
    Product<E, int32_t> p{given.x, given.x_stride, given.bias, given.out, given.out_stride, given.T, given.K, given.N, w.scales, x_scales};
    p.k_blocks = (p.K + 63) / 64;
    const long pieces = p.t_blocks() * p.k_blocks;
    p.packed = (bf16*)scratch(size_t(pieces) * TILE * 2, 0);
    if (!p.packed) return false;
    const int team = worth_threads(p.T, p.K, p.N) ? threads : 1;
    share(pieces, pieces < 256 ? 1 : team, [&](long first, long last) {
        for (long i = first; i < last; i++) {
            const long t = i / p.k_blocks * 16, k = i % p.k_blocks * 64;
            pack_columns((const char*)x + t * p.K + k, p.K, p.T - t, p.K - k, p.packed + i * 32 * p.columns(), p.columns());
        }
    });
    const InPlace rows{(const char*)w.q, p.K, p.N};
    share((p.N + 15) / 16, team, [&](long first, long last) { multiply_in_place(p, rows, first, last); });
    return true;
}

template <typename E>
static bool tiles_e4m3(Product<E> p, const Weight8& w, int threads) {
    bf16* x;
    float* x_scales;
    if (!quantise_rows(p, threads, x, x_scales)) return false;
    p.x_scales = x_scales;
    return linear_tiles8(p, x, p.K, w, threads);
}
#endif

// At most 512 rows at a time: the packed rows then stay in cache.
template <typename E>
static bool linear(const E* x, long xs, const Weight8& w, const E* bias, E* out, long os, long T, int threads) {
    for (long t = 0; t < T; t += 512) {
        const Product<E> p{x + t * xs, xs, bias, out + t * os, os, std::min(512L, T - t), w.K, w.N};
#ifdef LMD_AMX
        const bool done = w.fp8 ? tiles_e4m3(p, w, threads) : tiles_int8(p, w, threads);
#else
        const bool done = w.fp8 ? linear_e4m3(p, w, threads) : linear_int8(p, w, threads);
#endif
        if (!done) return false;
    }
    return true;
}

}  // namespace lmd

using namespace lmd;

// Both return 0 where memory ran out. K is at most 2^17, so that int32 sums cannot overflow.
LMD_API int lmd_linear_w8a8_f32(const float* x, long x_stride, const uint8_t* q, const float* scales, const float* bias, float* out,
                                long out_stride, long T, long K, long N, int fp8, int threads) {
    return lmd::linear(x, x_stride, Weight8{q, scales, N, K, K, fp8 != 0}, bias, out, out_stride, T, threads);
}

LMD_API int lmd_linear_w8a8_bf16(const bf16* x, long x_stride, const uint8_t* q, const float* scales, const bf16* bias, bf16* out,
                                 long out_stride, long T, long K, long N, int fp8, int threads) {
    return lmd::linear(x, x_stride, Weight8{q, scales, N, K, K, fp8 != 0}, bias, out, out_stride, T, threads);
}
