// Products of packed bf16 activations with weights of any format by AMX: the weight is the LEFT operand (16 rows x 32 k), the
// activations are right-hand tiles. Every output is one chain of tdpbf16ps over the k blocks in order, whatever T is (a spill
// of the fp32 tile is exact), hence a row's bits do not depend on T.
#pragma once
#include <algorithm>

#include "amx.hpp"

namespace lmd {

// What is multiplied besides the weights. E: type of x and out; Sum: float for tiles of bf16, int32_t for tiles of int8.
template <typename E, typename Sum = float>
struct Product {
    const E* x;
    long x_stride;
    const E* bias;
    E* out;
    long out_stride;
    long T, K, N;
    const float* scales = nullptr;    // [N]: a scale of each weight row, or none
    const float* x_scales = nullptr;  // [T]: a scale of each row of x, or none
    long k_blocks = 0;                // of 64 bytes
    bf16* packed = nullptr;           // right-hand tiles [t block of 16][k block]

    long t_blocks() const { return T <= 16 ? 1 : (T + 31) / 32 * 2; }
    // Columns of the right-hand tiles: few rows of x need less of L2 and L1 each time that they meet a block. 4 % at T = 1.
    long columns() const { return T <= 4 ? 4 : T <= 8 ? 8 : 16; }
};

#ifdef LMD_AMX
inline void store_some(bf16* to, __mmask16 mask, __m512 v) { _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(v)); }
inline void store_some(float* to, __mmask16 mask, __m512 v) { _mm512_mask_storeu_ps(to, mask, v); }
inline __m512 load_some(const bf16* from, __mmask16 mask) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}
inline __m512 load_some(const float* from, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, from); }

// One tile of sums [16 n][16 t] -> rows of out, with scales and bias.
template <typename E, typename Sum>
inline void write_tile(const Product<E, Sum>& p, const float* tile, long n, long t) {
    const long cols = std::min(16L, p.N - n), rows = std::min(16L, p.T - t);
    const __mmask16 mask = cols >= 16 ? 0xffff : __mmask16((1u << cols) - 1u);
    __m512i r[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_load_si512(tile + 16 * i);
    transpose16(r);
    const __m512 scale = p.scales ? load_some(p.scales + n, mask) : _mm512_set1_ps(1);
    const __m512 bias = p.bias ? load_some(p.bias + n, mask) : _mm512_setzero_ps();
    for (long i = 0; i < rows; i++) {
        __m512 v = std::is_same_v<Sum, float> ? _mm512_castsi512_ps(r[i]) : _mm512_cvtepi32_ps(r[i]);
        if (p.x_scales) v = _mm512_mul_ps(v, _mm512_set1_ps(p.x_scales[t + i]));
        if (p.scales) v = _mm512_mul_ps(v, scale);
        if (p.bias) v = _mm512_add_ps(v, bias);
        store_some(p.out + (t + i) * p.out_stride + n, mask, v);
    }
}

// Many rows: panels of PANEL weight rows x DEPTH k blocks become tiles in L2 and meet all t blocks; the fp32 sums of a
// panel wait in L2 between two depths. Meanwhile the next panel's weights are prefetched.
constexpr long PANEL = 256, DEPTH = 16;  // rows; k blocks

// A rectangle of memory to bring to L2 bit by bit.
struct Fetch {
    const char* at;
    long row, width, rows;  // bytes between rows; bytes of each; how many are left
    long column = 0;

    long lines() const { return rows * ((width + 63) / 64); }
    void fetch(long count) {
        for (long i = 0; i < count && rows > 0; i++) {
            _mm_prefetch(at + column, _MM_HINT_T1);
            column += 64;
            if (column >= width) column = 0, at += row, rows--;
        }
    }
};

template <typename Sum>
inline void multiply_2x2(const bf16* a, const bf16* x0, const bf16* x1, float* c, bool fresh, long depth, Fetch& next, long lines) {
    if (fresh) {
        tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    } else {
        tile_load<0>(c, 64), tile_load<1>(c + 256, 64), tile_load<2>(c + 512, 64), tile_load<3>(c + 768, 64);
    }
    for (long j = 0; j < depth; j++) {
        tile_load<4>(a + j * 2 * TILE, 64);
        tile_load<6>(x0 + j * TILE, 64);
        tile_dot<0, 4, 6, Sum>();
        tile_load<7>(x1 + j * TILE, 64);
        tile_dot<1, 4, 7, Sum>();
        tile_load<5>(a + (j * 2 + 1) * TILE, 64);
        tile_dot<2, 5, 6, Sum>();
        tile_dot<3, 5, 7, Sum>();
        next.fetch(lines);
    }
    tile_store<0>(c, 64), tile_store<1>(c + 256, 64), tile_store<2>(c + 512, 64), tile_store<3>(c + 768, 64);
}

// `weight.pack(n, k, depth, a, step)` writes 16 rows as left-hand tiles a, a + step, ..., zero past N and K;
// `weight.slice(n, rows, k, depth)` is the memory that it will read for that.
template <typename E, typename Sum, class Weight>
inline void many_rows(const Product<E, Sum>& p, const Weight& weight, long first, long last) {
    const long t_pairs = (p.T + 31) / 32;
    bf16* a = (bf16*)scratch(PANEL * DEPTH * 32 * 2, 1);                // [n pair][k block of DEPTH][2]
    float* c = (float*)scratch(size_t(PANEL) * t_pairs * 32 * 4, 2);    // [t pair][n pair][4 tiles]
    const long end = std::min(last * 16, p.N);
    Tiles tiles;
    for (long n = first * 16; n < end; n += PANEL) {
        const long rows = std::min(PANEL, end - n), n_pairs = (rows + 31) / 32;
        for (long k = 0; k < p.k_blocks; k += DEPTH) {
            const long depth = std::min(DEPTH, p.k_blocks - k);
            for (long i = 0; i < 2 * n_pairs; i++) weight.pack(n + 16 * i, k, depth, a + (i / 2 * DEPTH * 2 + i % 2) * TILE, 2 * TILE);
            const bool last_k = k + DEPTH >= p.k_blocks;
            Fetch next = last_k ? weight.slice(n + PANEL, std::max(0L, std::min(PANEL, end - n - PANEL)), 0, std::min(DEPTH, p.k_blocks))
                                : weight.slice(n, rows, k + DEPTH, std::min(DEPTH, p.k_blocks - k - DEPTH));
            const long steps = t_pairs * n_pairs * depth, lines = (next.lines() + steps - 1) / steps;
            for (long t = 0; t < t_pairs; t++) {
                const bf16* x0 = p.packed + (2 * t * p.k_blocks + k) * TILE;
                for (long i = 0; i < n_pairs; i++)
                    multiply_2x2<Sum>(a + i * DEPTH * 2 * TILE, x0, x0 + p.k_blocks * TILE, c + (t * (PANEL / 32) + i) * 1024, k == 0, depth, next, lines);
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

#endif

}  // namespace lmd
