// out [T, N] = x [T, K] @ weight [N, K].T + bias, weights row-major as in the checkpoint (no copy, no repack).
//
// bf16: tiles of AMX straight from memory (in_place.hpp), one chain of products over k whatever T is.
// float32: dot products of 16 lanes, the same chain for every blocking.
#include <algorithm>

#include "dot.hpp"
#include "in_place.hpp"

namespace lmd {

// ---- float32 -------------------------------------------------------------------------------------------------------

static void linear_f32(const float* x, long xs, const float* w, const float* bias, float* out, long os, long T, long K, long N,
                       int threads) {
    share((N + 3) / 4, worth_threads(T, K, N) ? threads : 1, [=](long first_group, long last_group) {
        const long first = first_group * 4, last = std::min(N, last_group * 4);
        for (long n = first; n < last; n += 64)
            dot_panel(x, xs, w + n * K, K, bias ? bias + n : nullptr, out + n, os, T, std::min(64L, last - n));
    });
}

#ifdef LMD_AMX
// ---- bf16 ----------------------------------------------------------------------------------------------------------

static bool linear_bf16(Product<bf16> p, const bf16* weight, int threads) {
    const long t_blocks = p.t_blocks();
    p.k_blocks = (p.K + 31) / 32;
    p.packed = (bf16*)scratch(size_t(t_blocks) * p.k_blocks * TILE * 2, 0);
    if (!p.packed) return false;
    const long pieces = t_blocks * p.k_blocks, n_blocks = (p.N + 15) / 16;
    const int team = worth_threads(p.T, p.K, p.N) ? threads : 1;
    share(pieces, pieces < 64 ? 1 : team, [&p](long first, long last) {
        for (long i = first; i < last; i++) {
            const long t = i / p.k_blocks * 16, k = i % p.k_blocks * 32;
            pack_columns(p.x + t * p.x_stride + k, p.x_stride, p.T - t, p.K - k, p.packed + i * 32 * p.columns(), p.columns());
        }
    });
    const InPlace rows{(const char*)weight, p.K * 2, p.N};
    share(n_blocks, team, [&](long first, long last) { multiply_in_place(p, rows, first, last); });
    return true;
}
#endif

}  // namespace lmd

using namespace lmd;

LMD_API void lmd_linear_f32(const float* x, long x_stride, const float* w, const float* bias, float* out, long out_stride, long T, long K,
                            long N, int threads) {
    linear_f32(x, x_stride, w, bias, out, out_stride, T, K, N, threads);
}

// Returns 0 where this build has no AMX or memory ran out. At most 512 rows at a time: the packed rows then stay in cache.
LMD_API int lmd_linear_bf16(const bf16* x, long x_stride, const bf16* w, const bf16* bias, bf16* out, long out_stride, long T, long K, long N,
                            int threads) {
#ifdef LMD_AMX
    for (long t = 0; t < T; t += 512)
        if (!linear_bf16({x + t * x_stride, x_stride, bias, out + t * out_stride, out_stride, std::min(512L, T - t), K, N}, w, threads))
            return 0;
    return 1;
#else
    return 0;
#endif
}
