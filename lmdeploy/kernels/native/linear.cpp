// out [T, N] = x [T, K] @ weight [N, K].T + bias, weights row-major as in the checkpoint (no copy, no repack).
//
// bf16: the weight is the LEFT operand of AMX (16 rows x 32 k straight from memory), the activations are packed once per
// call into right-hand tiles, so T = 1..16 costs the same memory traffic as T = 1. Every output is one chain of
// tdpbf16ps over k = 0, 32, 64, ... whatever T is (a spill of the fp32 tile is exact), hence bits do not depend on T.
// float32: dot products of 16 lanes, the same chain for every blocking.
#include <algorithm>

#include "dot.hpp"
#include "panels.hpp"

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

// Rows of the checkpoint as left-hand tiles.
struct DenseRows {
    const bf16* w;
    long K, N;

    void pack(long n, long k, long depth, bf16* a, long step) const {
        for (long j = k; j < k + depth; j++, a += step) {
            if (n < N) pack_rows(w + n * K + j * 32, K, N - n, K - j * 32, a);
            else std::memset(a, 0, TILE * 2);
        }
    }
    Fetch slice(long n, long rows, long k, long depth) const { return {(const char*)(w + n * K + k * 32), K * 2, depth * 64, rows}; }
};

// Few rows (T <= 32): each weight byte is used once, so the point is to keep enough reads in flight. The loads of one
// tile are 16 rows apart by 2K bytes; the hardware does not follow so many streams, hence a prefetch per row, 512 bytes
// ahead. Measured on one core: 512 bytes into L1 16.4 GB/s, 1 KiB into L2 16.0, 3 KiB 15.7, whole rows in order 14.9.
template <int TB>
static void few_rows(const Product& p, const bf16* weight, long first, long last) {
    constexpr long AHEAD = 8;
    const long row = p.K * 2;  // bytes
    const long whole = p.K / 32;
    alignas(64) bf16 edge[2 * TILE];
    alignas(64) float tile[256];
    Tiles tiles;
    for (long b = first; b < last; b += 2) {
        const long n = b * 16;
        const bool pair = b + 1 < last;
        const long direct = n + (pair ? 32 : 16) <= p.N ? whole : 0;  // k blocks whose tiles may be loaded in place
        const char* w = (const char*)(weight + n * p.K);
        tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
        for (long k = 0; k < p.k_blocks; k++) {
            const bf16* x = p.packed + k * TILE;
            tile_load<6>(x, 64);
            if (TB == 2) tile_load<7>(x + p.k_blocks * TILE, 64);
            if (k < direct) {
                const char* next = k + AHEAD < whole ? w + (k + AHEAD) * 64 : w + 32 * row + (k + AHEAD - whole) * 64;
                for (long r = 0; r < 32; r++) _mm_prefetch(next + r * row, _MM_HINT_T0);
                tile_load<4>(w + k * 64, row);
                if (pair) tile_load<5>(w + 16 * row + k * 64, row);
            } else {
                pack_rows(weight + n * p.K + k * 32, p.K, p.N - n, p.K - k * 32, edge);
                tile_load<4>(edge, 64);
                if (pair) {
                    pack_rows(weight + (n + 16) * p.K + k * 32, p.K, p.N - n - 16, p.K - k * 32, edge + TILE);
                    tile_load<5>(edge + TILE, 64);
                }
            }
            tile_dot<0, 4, 6>();
            if (TB == 2) tile_dot<2, 4, 7>();
            if (pair) {
                tile_dot<1, 5, 6>();
                if (TB == 2) tile_dot<3, 5, 7>();
            }
        }
        tile_store<0>(tile, 64), write_tile(p, tile, n, 0);
        if (TB == 2) tile_store<2>(tile, 64), write_tile(p, tile, n, 16);
        if (pair) {
            tile_store<1>(tile, 64), write_tile(p, tile, n + 16, 0);
            if (TB == 2) tile_store<3>(tile, 64), write_tile(p, tile, n + 16, 16);
        }
    }
}

static bool linear_bf16(Product p, const bf16* weight, int threads) {
    const long t_blocks = p.t_blocks();
    p.k_blocks = (p.K + 31) / 32;
    p.packed = (bf16*)scratch(size_t(t_blocks) * p.k_blocks * TILE * 2, 0);
    if (!p.packed) return false;
    const long pieces = t_blocks * p.k_blocks, n_blocks = (p.N + 15) / 16;
    const int team = worth_threads(p.T, p.K, p.N) ? threads : 1;
    share(pieces, pieces < 64 ? 1 : team, [&p](long first, long last) {
        for (long i = first; i < last; i++) {
            const long t = i / p.k_blocks * 16, k = i % p.k_blocks * 32;
            pack_columns(p.x + t * p.x_stride + k, p.x_stride, p.T - t, p.K - k, p.packed + i * TILE);
        }
    });
    share(n_blocks, team, [&p, weight](long first, long last) {
        if (p.T <= 16) few_rows<1>(p, weight, first, last);
        else if (p.T <= 32) few_rows<2>(p, weight, first, last);
        else many_rows(p, DenseRows{weight, p.K, p.N}, first, last);
    });
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
