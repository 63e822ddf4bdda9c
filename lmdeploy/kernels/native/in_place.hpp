// Products with weights whose rows in memory are tile rows already: bf16, and int8 against int8 activations. No copy, no repack.
// The activations are packed once per call into right-hand tiles, so T = 1..16 costs the same memory traffic as T = 1.
#pragma once
#include "panels.hpp"
#ifdef LMD_AMX

namespace lmd {

struct InPlace {
    const char* w;
    long row;  // bytes of a row of weights
    long N;

    void pack(long n, long k, long depth, bf16* a, long step) const {
        for (long j = k; j < k + depth; j++, a += step) pack_rows(w + n * row + j * 64, row, N - n, row - j * 64, a);
    }
    Fetch slice(long n, long rows, long k, long depth) const { return {w + n * row + k * 64, row, depth * 64, rows}; }
};

// Few rows (T <= 32): each weight byte is used once, so the point is to keep enough reads in flight. The loads of one
// tile are 16 rows apart by a row's bytes; the hardware does not follow so many streams, hence a prefetch per row, 512 bytes
// ahead. Measured on one core with bf16: 512 bytes into L1 16.4 GB/s, 1 KiB into L2 16.0, 3 KiB 15.7, whole rows in order 14.9.
template <int TB, typename E, typename Sum>
inline void few_in_place(const Product<E, Sum>& p, const InPlace& weight, long first, long last) {
    constexpr long AHEAD = 8;
    const long row = weight.row, whole = row / 64, stride = 4 * p.columns(), x_tile = 32 * p.columns();
    alignas(64) bf16 edge[2 * TILE];
    alignas(64) float tile[256];
    Tiles tiles(p.columns());
    for (long b = first; b < last; b += 2) {
        const long n = b * 16;
        const bool pair = b + 1 < last;
        const long direct = n + (pair ? 32 : 16) <= p.N ? whole : 0;  // k blocks whose tiles may be loaded in place
        const char* w = weight.w + n * row;
        tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
        for (long k = 0; k < p.k_blocks; k++) {
            const bf16* x = p.packed + k * x_tile;
            tile_load<6>(x, stride);
            if (TB == 2) tile_load<7>(x + p.k_blocks * x_tile, stride);
            if (k < direct) {
                const char* next = k + AHEAD < whole ? w + (k + AHEAD) * 64 : w + 32 * row + (k + AHEAD - whole) * 64;
                for (long r = 0; r < 32; r++) _mm_prefetch(next + r * row, _MM_HINT_T0);
                tile_load<4>(w + k * 64, row);
                if (pair) tile_load<5>(w + 16 * row + k * 64, row);
            } else {
                weight.pack(n, k, 1, edge, TILE);
                tile_load<4>(edge, 64);
                if (pair) {
                    weight.pack(n + 16, k, 1, edge + TILE, TILE);
                    tile_load<5>(edge + TILE, 64);
                }
            }
            tile_dot<0, 4, 6, Sum>();
            if (TB == 2) tile_dot<2, 4, 7, Sum>();
            if (pair) {
                tile_dot<1, 5, 6, Sum>();
                if (TB == 2) tile_dot<3, 5, 7, Sum>();
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

// The blocks first..last of 16 weight rows.
template <typename E, typename Sum>
inline void multiply_in_place(const Product<E, Sum>& p, const InPlace& weight, long first, long last) {
    if (p.T <= 16) few_in_place<1>(p, weight, first, last);
    else if (p.T <= 32) few_in_place<2>(p, weight, first, last);
    else many_rows(p, weight, first, last);
}

}  // namespace lmd
#endif
