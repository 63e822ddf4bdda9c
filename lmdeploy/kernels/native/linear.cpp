// out [T, N] = x [T, K] @ weight [N, K].T + bias, weights row-major as in the checkpoint (no copy, no repack).
//
// bf16: the weight is the LEFT operand of AMX (16 rows x 32 k straight from memory), the activations are packed once per
// call into right-hand tiles, so T = 1..16 costs the same memory traffic as T = 1. Every output is one chain of
// tdpbf16ps over k = 0, 32, 64, ... whatever T is (a spill of the fp32 tile is exact), hence bits do not depend on T.
// float32: dot products of 16 lanes, the same chain for every blocking.
#include <algorithm>

#include "amx.hpp"

namespace lmd {

// Waking a thread costs some 10 us on an idle machine, and a scheduler slice of 4 to 8 ms when another program has its core:
// a 20M-parameter model fell from 360 to 20 tokens/s beside one busy neighbour. So only about a quarter of a millisecond of
// work is shared: 3M weights to read, or 2^27 multiplications.
static bool worth_threads(long T, long K, long N) { return K * N >= 3L << 20 || T * K * N >= 1L << 27; }

// ---- float32 -------------------------------------------------------------------------------------------------------

template <int TB, int NB>
static void dot_block(const float* x, long xs, const float* w, long K, const float* bias, float* out, long os) {
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
            for (long i = k; i < K; i++) s = __builtin_fmaf(x[t * xs + i], w[n * K + i], s);
            out[t * os + n] = bias ? s + bias[n] : s;
        }
}

template <int NB>
static void dot_rows(const float* x, long xs, const float* w, long K, const float* bias, float* out, long os, long T) {
    long t = 0;
    for (; t + 4 <= T; t += 4) dot_block<4, NB>(x + t * xs, xs, w, K, bias, out + t * os, os);
    if (T - t == 3) dot_block<3, NB>(x + t * xs, xs, w, K, bias, out + t * os, os);
    if (T - t == 2) dot_block<2, NB>(x + t * xs, xs, w, K, bias, out + t * os, os);
    if (T - t == 1) dot_block<1, NB>(x + t * xs, xs, w, K, bias, out + t * os, os);
}

static void linear_f32(const float* x, long xs, const float* w, const float* bias, float* out, long os, long T, long K, long N,
                       int threads) {
    share((N + 3) / 4, worth_threads(T, K, N) ? threads : 1, [=](long first_group, long last_group) {
        const long first = first_group * 4, last = std::min(N, last_group * 4);
        // 16 rows of x at a time stay in L1/L2 while a panel of 64 weight rows passes
        for (long panel = first; panel < last; panel += 64)
            for (long t = 0; t < T; t += 16) {
                const long rows = std::min(16L, T - t), end = std::min(last, panel + 64);
                long n = panel;
                for (; n + 4 <= end; n += 4)
                    dot_rows<4>(x + t * xs, xs, w + n * K, K, bias ? bias + n : nullptr, out + t * os + n, os, rows);
                for (; n < end; n++)
                    dot_rows<1>(x + t * xs, xs, w + n * K, K, bias ? bias + n : nullptr, out + t * os + n, os, rows);
            }
    });
}

#ifdef LMD_AMX
// ---- bf16 ----------------------------------------------------------------------------------------------------------

struct Bf16Linear {
    const bf16* x;
    long x_stride;
    const bf16* w;
    const bf16* bias;
    bf16* out;
    long out_stride;
    long T, K, N;
    long k_blocks;         // of 32
    bf16* packed;          // right-hand tiles [t block of 16][k block]
};

// One fp32 tile [16 n][16 t] -> rows of out, with bias.
static void write_tile(const Bf16Linear& p, const float* tile, long n, long t) {
    const long cols = std::min(16L, p.N - n), rows = std::min(16L, p.T - t);
    const __mmask16 mask = cols >= 16 ? 0xffff : __mmask16((1u << cols) - 1u);
    __m512i r[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_load_si512(tile + 16 * i);
    transpose16(r);
    __m512 bias = _mm512_setzero_ps();
    if (p.bias) {
        const __m256i b = _mm256_maskz_loadu_epi16(mask, p.bias + n);
        bias = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
    }
    for (long i = 0; i < rows; i++) {
        __m512 v = _mm512_castsi512_ps(r[i]);
        if (p.bias) v = _mm512_add_ps(v, bias);
        _mm256_mask_storeu_epi16(p.out + (t + i) * p.out_stride + n, mask, (__m256i)_mm512_cvtneps_pbh(v));
    }
}

// Few rows (T <= 32): each weight byte is used once, so the point is to keep enough reads in flight. The loads of one
// tile are 16 rows apart by 2K bytes; the hardware does not follow so many streams, hence a prefetch per row, 512 bytes
// ahead. Measured on one core: 512 bytes into L1 16.4 GB/s, 1 KiB into L2 16.0, 3 KiB 15.7, whole rows in order 14.9.
template <int TB>
static void few_rows(const Bf16Linear& p, long first, long last) {
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
        const char* w = (const char*)(p.w + n * p.K);
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
                pack_rows(p.w + n * p.K + k * 32, p.K, p.N - n, p.K - k * 32, edge);
                tile_load<4>(edge, 64);
                if (pair) {
                    pack_rows(p.w + (n + 16) * p.K + k * 32, p.K, p.N - n - 16, p.K - k * 32, edge + TILE);
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

// Many rows: panels of PANEL weight rows x DEPTH k are copied into tiles in L2 and meet all t blocks; the fp32 sums of a
// panel wait in L2 between two depths. Meanwhile the next panel's weights are prefetched.
constexpr long PANEL = 256, DEPTH = 16;  // rows; k blocks

struct Panel {
    const Bf16Linear& p;
    bf16* a;    // left-hand tiles [n pair][k block of DEPTH][2]
    float* c;   // sums [t pair][n pair][4 tiles]

    void pack(long n, long rows, long k, long depth) const {
        for (long i = 0; i < (rows + 15) / 16; i++)
            for (long j = 0; j < depth; j++)
                pack_rows(p.w + (n + 16 * i) * p.K + (k + j) * 32, p.K, p.N - n - 16 * i, p.K - (k + j) * 32,
                          a + ((i / 2 * DEPTH + j) * 2 + i % 2) * TILE);
        if ((rows + 15) / 16 % 2)  // the odd half of the last pair: zeros, so that the inner loop has one form
            for (long j = 0; j < depth; j++) std::memset(a + ((rows / 32 * DEPTH + j) * 2 + 1) * TILE, 0, TILE * 2);
    }
};

static inline void multiply_2x2(const bf16* a, const bf16* x0, const bf16* x1, float* c, bool fresh, long depth, const char*& ahead,
                                const char* ahead_end, long row, long& ahead_row, long ahead_rows, long lines) {
    if (fresh) {
        tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    } else {
        tile_load<0>(c, 64), tile_load<1>(c + 256, 64), tile_load<2>(c + 512, 64), tile_load<3>(c + 768, 64);
    }
    for (long j = 0; j < depth; j++) {
        tile_load<4>(a + j * 2 * TILE, 64);
        tile_load<6>(x0 + j * TILE, 64);
        tile_dot<0, 4, 6>();
        tile_load<7>(x1 + j * TILE, 64);
        tile_dot<1, 4, 7>();
        tile_load<5>(a + (j * 2 + 1) * TILE, 64);
        tile_dot<2, 5, 6>();
        tile_dot<3, 5, 7>();
        for (long i = 0; i < lines && ahead_row < ahead_rows; i++) {
            _mm_prefetch(ahead + ahead_row * row, _MM_HINT_T1);
            ahead += 64;
            if (ahead >= ahead_end) ahead -= DEPTH * 64, ahead_row++;
        }
    }
    tile_store<0>(c, 64), tile_store<1>(c + 256, 64), tile_store<2>(c + 512, 64), tile_store<3>(c + 768, 64);
}

static void many_rows(const Bf16Linear& p, long first, long last) {
    const long t_pairs = (p.T + 31) / 32;
    bf16* a = (bf16*)scratch(PANEL * DEPTH * 32 * 2, 1);
    float* c = (float*)scratch(size_t(PANEL) * t_pairs * 32 * 4, 2);
    const Panel panel{p, a, c};
    const long row = p.K * 2, end = std::min(last * 16, p.N);
    Tiles tiles;
    for (long n = first * 16; n < end; n += PANEL) {
        const long rows = std::min(PANEL, end - n), n_pairs = (rows + 31) / 32;
        for (long k = 0; k < p.k_blocks; k += DEPTH) {
            const long depth = std::min(DEPTH, p.k_blocks - k);
            panel.pack(n, rows, k, depth);
            const bool last_k = k + DEPTH >= p.k_blocks;
            const char* ahead = (const char*)(last_k ? p.w + (n + PANEL) * p.K : p.w + n * p.K + (k + DEPTH) * 32);
            long ahead_row = 0;
            const long ahead_rows = last_k ? std::max(0L, std::min(PANEL, end - n - PANEL)) : rows;
            const long lines = (ahead_rows * DEPTH + t_pairs * n_pairs * depth - 1) / (t_pairs * n_pairs * depth);
            const char* ahead_end = ahead + DEPTH * 64;
            for (long t = 0; t < t_pairs; t++) {
                const bf16* x0 = p.packed + (2 * t * p.k_blocks + k) * TILE;
                for (long i = 0; i < n_pairs; i++)
                    multiply_2x2(a + i * DEPTH * 2 * TILE, x0, x0 + p.k_blocks * TILE, c + (t * (PANEL / 32) + i) * 1024, k == 0, depth,
                                 ahead, ahead_end, row, ahead_row, ahead_rows, lines);
            }
        }
        for (long t = 0; t < t_pairs; t++)
            for (long i = 0; i < n_pairs; i++)
                for (long h = 0; h < 4; h++) {
                    const long at_n = n + i * 32 + (h / 2) * 16, at_t = t * 32 + (h % 2) * 16;
                    if (at_n < end && at_t < p.T) write_tile(p, c + (t * (PANEL / 32) + i) * 1024 + h * 256, at_n, at_t);
                }
    }
}

static bool linear_bf16(Bf16Linear p, int threads) {
    const long t_blocks = p.T <= 16 ? 1 : (p.T + 31) / 32 * 2;
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
    share(n_blocks, team, [&p](long first, long last) {
        if (p.T <= 16) few_rows<1>(p, first, last);
        else if (p.T <= 32) few_rows<2>(p, first, last);
        else many_rows(p, first, last);
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
        if (!linear_bf16({x + t * x_stride, x_stride, w, bias, out + t * out_stride, out_stride, std::min(512L, T - t), K, N, 0, nullptr}, threads))
            return 0;
    return 1;
#else
    return 0;
#endif
}
