// out [T, N] = x [T, K] @ W.T + bias with 8-bit weights W[n, k] = q * scales[n, k / g], int8 or float8 e4m3. Memory is read packed.
//
// bf16: weights become left-hand AMX tiles; one scale a row multiplies the sums, scales of groups the weights, which are then rounded
// to bf16. Other types and CPUs: rows are written out in float32. A row's bits do not depend on T, the batch or the threads.
#include "weight8.hpp"

namespace lmd {

template <typename E>
static bool linear_rows(const E* x, long xs, const Weight8& w, const E* bias, E* out, long os, long T, int threads) {
    const long panel = T <= 4 ? 4 : 64;
    bool enough = true;
    share((w.N + 3) / 4, worth_threads(T, w.K, w.N) ? threads : 1, [&, panel](long first_four, long last_four) {
        const long last = std::min(w.N, last_four * 4);
        float* rows = (float*)scratch(size_t(panel) * w.K * 4, 0);
        if (!rows) {
            __atomic_store_n(&enough, false, __ATOMIC_RELAXED);
            return;
        }
        for (long n = first_four * 4; n < last; n += panel) {
            const long count = std::min(panel, last - n);
            for (long i = 0; i < count; i++) write_out(w, n + i, true, rows + i * w.K);
            dot_panel(x, xs, rows, w.K, bias ? bias + n : nullptr, out + n, os, T, count);
        }
    });
    return enough;
}

}  // namespace lmd

using namespace lmd;

// Both return 0 where memory ran out.
LMD_API int lmd_linear_w8_f32(const float* x, long x_stride, const uint8_t* q, const float* scales, const float* bias, float* out,
                              long out_stride, long T, long K, long N, long group, int fp8, int threads) {
    return linear_rows(x, x_stride, Weight8{q, scales, N, K, group, fp8 != 0}, bias, out, out_stride, T, threads);
}

// At most 512 rows at a time: the packed rows then stay in cache.
LMD_API int lmd_linear_w8_bf16(const bf16* x, long x_stride, const uint8_t* q, const float* scales, const bf16* bias, bf16* out,
                               long out_stride, long T, long K, long N, long group, int fp8, int threads) {
    const Weight8 w{q, scales, N, K, group, fp8 != 0};
#ifdef LMD_AMX
    for (long t = 0; t < T; t += 512) {
        const bf16* rows = x + t * x_stride;
        if (!linear_tiles8(Product<bf16>{rows, x_stride, bias, out + t * out_stride, out_stride, std::min(512L, T - t), K, N}, rows, x_stride, w, threads))
            return 0;
    }
    return 1;
#else
    return linear_rows(x, x_stride, w, bias, out, out_stride, T, threads);
#endif
}
