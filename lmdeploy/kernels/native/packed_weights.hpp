// Products with weights that become bf16 tiles on the way from memory: they are read packed and exist in 16 bit only in the core's
// own cache. A format says how 64 bytes of a row become BLOCKS left-hand tiles and in which order the inputs then stand:
//   BLOCKS, row (bytes of a row), start(n) (its first byte);
//   expand(n, rows, chunk, chunks, to): what scales become before rows n.. of those chunks are unpacked; room(rows, chunks): its floats;
//   unpack<ROWS>(n, chunk, steps, to, step): ROWS rows from n on, one chunk, zero past N and K;
//   sort(in, out): 32 * BLOCKS activations in the order of the tiles; prefetch(n, chunk, chunks): scales of the 32 rows from n on.
#pragma once
#include "dot.hpp"
#include "panels.hpp"
#ifdef LMD_AMX

namespace lmd {

template <class Weight>
struct Panels {
    const Weight& w;

    void pack(long n, long k, long depth, bf16* a, long step) const {
        constexpr long BLOCKS = Weight::BLOCKS;
        alignas(64) float memory[2 * 16 * 16];
        const auto steps = w.expand(n, 16, k / BLOCKS, depth / BLOCKS, memory);
        for (long j = 0; j < depth; j += BLOCKS) w.template unpack<16>(n, (k + j) / BLOCKS, steps, a + j * step, step);
    }
    Fetch slice(long n, long rows, long k, long depth) const {
        return {w.start(n) + k / Weight::BLOCKS * 64, w.row, depth / Weight::BLOCKS * 64, rows};
    }
};

// Few rows of x: each byte is used once. Between the products of one chunk the next is written out, and the next pair of blocks,
// which lies behind this one in memory, is brought to L2 as STREAMS parts side by side, far enough apart for the hardware to follow
// each. Measured with 4 bits for K = 2048 and 8192, GB/s of one core: 1 stream 9.7 and 10.3, 2: 12.1 and 11.2, 4: 13.1 and 12.5,
// 8: 13.2 and 12.7, 16: 11.2 and 11.9; row by row 512 bytes ahead 8.9 and 12.0.
template <int TB, class Weight, typename E>
inline void few_unpacked(const Product<E>& p, const Weight& w, long first, long last) {
    constexpr long STREAMS = 8, BLOCKS = Weight::BLOCKS, ROWS = 32 / BLOCKS, LINES = 32 / BLOCKS / STREAMS;
    const long chunks = p.k_blocks / BLOCKS, part = 32 * w.row / STREAMS, stride = 4 * p.columns(), x_tile = 32 * p.columns();
    alignas(64) bf16 a[2][2 * BLOCKS * TILE];
    alignas(64) float tile[256];
    Tiles tiles(p.columns());
    float* memory = (float*)scratch(size_t(w.room(32, chunks)) * 4, 1);
    for (long b = first; b < last; b += 2) {
        const long n = b * 16;
        const auto steps = w.expand(n, 32, 0, chunks, memory);
        const auto unpack_some = [&](long c, long j, bf16* to) {  // ROWS of the 32
            const long half = j * ROWS / 16, row = j * ROWS % 16;
            w.template unpack<ROWS>(n + j * ROWS, c, steps, to + half * BLOCKS * TILE + row * 32, TILE);
        };
        const char* next = w.start(n + 32);
        for (long j = 0; j < BLOCKS; j++) unpack_some(0, j, a[0]);
        tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
        for (long c = 0; c < chunks; c++) {
            const bf16 *x = p.packed + c * BLOCKS * x_tile, *left = a[c % 2];
            w.prefetch(n + 32, c, chunks);
            for (long j = 0; j < BLOCKS; j++, x += x_tile, left += TILE) {
                for (long l = 0; l < LINES; l++, next += 64)
                    for (long i = 0; i < STREAMS; i++) _mm_prefetch(next + i * part, _MM_HINT_T1);
                tile_load<6>(x, stride);
                if (TB == 2) tile_load<7>(x + p.k_blocks * x_tile, stride);
                tile_load<4>(left, 64), tile_dot<0, 4, 6>();
                if (TB == 2) tile_dot<2, 4, 7>();
                tile_load<5>(left + BLOCKS * TILE, 64), tile_dot<1, 5, 6>();
                if (TB == 2) tile_dot<3, 5, 7>();
                if (c + 1 < chunks) unpack_some(c + 1, j, a[(c + 1) % 2]);
            }
        }
        tile_store<0>(tile, 64), write_tile(p, tile, n, 0);
        if (TB == 2) tile_store<2>(tile, 64), write_tile(p, tile, n, 16);
        if (b + 1 < last) {
            tile_store<1>(tile, 64), write_tile(p, tile, n + 16, 0);
            if (TB == 2) tile_store<3>(tile, 64), write_tile(p, tile, n + 16, 16);
        }
    }
}

// 16 rows of x, one chunk -> right-hand tiles in the order of the weights.
template <class Weight, typename E>
inline void pack_sorted(const Product<E>& p, const bf16* x, long x_stride, long rows, long left, bf16* to) {
    constexpr long BLOCKS = Weight::BLOCKS;
    alignas(64) bf16 sorted[BLOCKS][16 * 32];
    for (long r = 0; r < std::min(16L, rows); r++) {
        __m512i in[BLOCKS], out[BLOCKS];
        for (long i = 0; i < BLOCKS; i++) in[i] = _mm512_maskz_loadu_epi8(first_bytes(2 * (left - 32 * i)), x + r * x_stride + 32 * i);
        Weight::sort(in, out);
        for (long i = 0; i < BLOCKS; i++) _mm512_store_si512(sorted[i] + 32 * r, out[i]);
    }
    for (long j = 0; j < BLOCKS; j++) pack_columns(sorted[j], 32, rows, 32, to + j * 32 * p.columns(), p.columns());
}

template <class Weight, typename E>
inline void multiply_unpacked(const Product<E>& p, const Weight& w, long first, long last) {
    if (p.T <= 16) few_unpacked<1>(p, w, first, last);
    else if (p.T <= 32) few_unpacked<2>(p, w, first, last);
    else many_rows(p, Panels<Weight>{w}, first, last);
}

// The product; `x` are p's rows in bf16. False where memory ran out.
template <class Weight, typename E>
inline bool linear_unpacked(Product<E> p, const bf16* x, long x_stride, const Weight& w, int threads) {
    constexpr long BLOCKS = Weight::BLOCKS;
    const long chunks = (p.K + 32 * BLOCKS - 1) / (32 * BLOCKS), pieces = p.t_blocks() * chunks;
    p.k_blocks = chunks * BLOCKS;
    p.packed = (bf16*)scratch(size_t(pieces) * BLOCKS * TILE * 2, 0);
    if (!p.packed) return false;
    const int team = worth_threads(p.T, p.K, p.N) ? threads : 1;
    share(pieces, pieces < 64 ? 1 : team, [&p, x, x_stride, chunks](long first, long last) {
        for (long i = first; i < last; i++) {
            const long t = i / chunks * 16, k = i % chunks * 32 * BLOCKS;
            pack_sorted<Weight>(p, x + t * x_stride + k, x_stride, p.T - t, p.K - k, p.packed + i * BLOCKS * 32 * p.columns());
        }
    });
    share((p.N + 15) / 16, team, [&p, &w](long first, long last) { multiply_unpacked(p, w, first, last); });
    return true;
}

}  // namespace lmd
#endif
