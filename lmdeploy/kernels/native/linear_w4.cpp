// out [T, N] = x [T, K] @ W.T + bias with 4-bit weights W[n, k] = (q - zeros[n, k / g]) * scales[n, k / g], packed two to a byte
// along k. Memory is read packed; weights exist in 16 or 32 bit only in the core's own cache.
//
// bf16: weights become left-hand AMX tiles, rounded to bf16 as a checkpoint written out in bf16 would be. 64 bytes of a row are 32
// words of four inputs each, so one shift and one table look-up (vpermw) give every fourth of 128 inputs: tile j of a chunk
// holds inputs 4i + j, and activations are packed in the same order. Other types and CPUs: rows are written out in float32.
// A row's bits do not depend on T, the batch or the threads: one chain over k for every blocking.
#include <algorithm>

#include "dot.hpp"
#include "panels.hpp"
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace lmd {

struct Weight4 {
    const uint8_t* q;
    const float *scales, *zeros;
    long N, K, group;

    long groups() const { return K / group; }
    const uint8_t* row(long n) const { return q + n * (K / 2); }
};

// ---- any CPU: float32 rows -----------------------------------------------------------------------------------------

static void write_out(const Weight4& w, long n, float* to) {
    const uint8_t* q = w.row(n);
    for (long i = 0; i < w.groups(); i++, q += w.group / 2, to += w.group) {
        const float scale = w.scales[n * w.groups() + i], zero = w.zeros[n * w.groups() + i];
        float table[16];
        for (int code = 0; code < 16; code++) table[code] = (float(code) - zero) * scale;
        long j = 0;
#ifdef __AVX512F__
        const __m512 codes = _mm512_loadu_ps(table);
        for (; j + 8 <= w.group / 2; j += 8) {
            const __m512i b = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)(q + j)));
            _mm512_storeu_ps(to + 2 * j, _mm512_permutexvar_ps(_mm512_or_si512(b, _mm512_slli_epi64(b, 28)), codes));
        }
#endif
        for (; j < w.group / 2; j++) to[2 * j] = table[q[j] & 15], to[2 * j + 1] = table[q[j] >> 4];
    }
}

template <typename E>
static bool linear_rows(const E* x, long xs, const Weight4& w, const E* bias, E* out, long os, long T, int threads) {
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
            for (long i = 0; i < count; i++) write_out(w, n + i, rows + i * w.K);
            dot_panel(x, xs, rows, w.K, bias ? bias + n : nullptr, out + n, os, T, count);
        }
    });
    return enough;
}

#ifdef LMD_AMX
// ---- bf16 with AMX -------------------------------------------------------------------------------------------------

constexpr long CHUNK = 128, BLOCKS = CHUNK / 32;    // inputs of a chunk; k blocks
constexpr long STREAMS = 8;                         // 64 bytes of each for a k block of 32 rows, which is 512 bytes

// The 16 values of a group.
static inline __m256i table(const float* scale, const float* zero) {
    const __m512 codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_sub_ps(codes, _mm512_set1_ps(*zero)), _mm512_set1_ps(*scale)));
}

static inline __m512i join(__m256i low, __m256i high) { return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1); }

// One row of a chunk from the 32 words of its codes; PARTS groups share the chunk, of which the first `count` exist.
template <int PARTS>
static inline void unpack(__m512i codes, const float* scale, const float* zero, long count, bf16* to, long step) {
    alignas(64) static const uint16_t half[32] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16};
    alignas(64) static const uint16_t quarter[32] = {0,  0,  0,  0,  0,  0,  0,  0,  16, 16, 16, 16, 16, 16, 16, 16,
                                                     32, 32, 32, 32, 32, 32, 32, 32, 48, 48, 48, 48, 48, 48, 48, 48};
    const __m512i fifteen = _mm512_set1_epi16(15);
    const auto part = [&](long i) { return i < count ? table(scale + i, zero + i) : _mm256_setzero_si256(); };
    if constexpr (PARTS == 1) {
        const __m256i values = table(scale, zero);
        const __m512i both = join(values, values);  // vpermw reads five bits; the fifth belongs to the next input
        _mm512_store_si512(to, _mm512_permutexvar_epi16(codes, both));
        _mm512_store_si512(to + step, _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), both));
        _mm512_store_si512(to + 2 * step, _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), both));
        _mm512_store_si512(to + 3 * step, _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 12), both));
    } else if constexpr (PARTS == 2) {
        const __m512i both = join(part(0), part(1)), place = _mm512_load_si512(half);
        for (int j = 0; j < 4; j++) {
            const __m512i index = _mm512_ternarylogic_epi32(_mm512_srli_epi16(codes, 4 * j), fifteen, place, 0xea);  // (a & b) | c
            _mm512_store_si512(to + j * step, _mm512_permutexvar_epi16(index, both));
        }
    } else {
        const __m512i low = join(part(0), part(1)), high = join(part(2), part(3)), place = _mm512_load_si512(quarter);
        for (int j = 0; j < 4; j++) {
            const __m512i index = _mm512_ternarylogic_epi32(_mm512_srli_epi16(codes, 4 * j), fifteen, place, 0xea);
            _mm512_store_si512(to + j * step, _mm512_permutex2var_epi16(low, index, high));
        }
    }
}

// Any group size, one weight at a time.
static void unpack_slowly(const Weight4& w, long n, long k, bf16* to, long step) {
    for (long i = 0; i < CHUNK; i++) {
        float value = 0;
        if (k + i < w.K) {
            const int byte = w.row(n)[(k + i) / 2], code = i % 2 ? byte >> 4 : byte & 15;
            const long at = n * w.groups() + (k + i) / w.group;
            value = (float(code) - w.zeros[at]) * w.scales[at];
        }
        put(to + i % 4 * step + i / 4, value);
    }
}

// PARTS: how many groups share a chunk; 0 for sizes that do not fit.
static int parts(const Weight4& w) {
    if (w.group == w.K || w.group % CHUNK == 0) return 1;
    return w.group == 64 ? 2 : w.group == 32 ? 4 : 0;
}

// Rows first..last of the 16 from n on, one chunk -> four left-hand tiles, `step` apart; zero past N and K.
template <int PARTS>
static inline void unpack_rows(const Weight4& w, long n, long first, long last, long k, bf16* to, long step) {
    const long width = std::min(CHUNK, w.K - k), count = (width + w.group - 1) / w.group, groups = w.groups();
    const __mmask64 mask = width == CHUNK ? ~0ull : (1ull << (width / 2)) - 1;
    const uint8_t* q = w.row(n) + k / 2;
    const long group = n * groups + k / w.group;
    for (long r = first; r < std::min(last, w.N - n); r++) {
        if constexpr (PARTS == 0) {
            unpack_slowly(w, n + r, k, to + r * 32, step);
        } else {
            const __m512i codes = _mm512_maskz_loadu_epi8(mask, q + r * (w.K / 2));
            unpack<PARTS>(codes, w.scales + group + r * groups, w.zeros + group + r * groups, count, to + r * 32, step);
        }
    }
    for (long r = std::max(first, w.N - n); r < last; r++)
        for (long j = 0; j < 4; j++) _mm512_store_si512(to + j * step + r * 32, _mm512_setzero_si512());
}

template <int PARTS>
struct PackedRows {
    const Weight4& w;

    void pack(long n, long k, long depth, bf16* a, long step) const {
        for (long j = 0; j < depth; j += BLOCKS) unpack_rows<PARTS>(w, n, 0, 16, (k + j) * 32, a + j * step, step);
    }
    Fetch slice(long n, long rows, long k, long depth) const { return {(const char*)w.row(n) + k * 16, w.K / 2, depth * 16, rows}; }
};

// Columns of the activations' tiles: few rows of x need less of L2 and L1 each time that they meet a block. 4 % at T = 1.
static long columns(const Product& p) { return p.T <= 4 ? 4 : p.T <= 8 ? 8 : 16; }

// Few rows of x: each byte is used once. Between the products of one chunk the next is written out, and the next pair of blocks,
// which lies behind this one in memory, is brought to L2 as STREAMS parts side by side, far enough apart for the hardware to follow
// each. Measured for K = 2048 and 8192, GB/s of one core: 1 stream 9.7 and 10.3, 2: 12.1 and 11.2, 4: 13.1 and 12.5, 8: 13.2 and
// 12.7, 16: 11.2 and 11.9; row by row 512 bytes ahead 8.9 and 12.0.
template <int TB, int PARTS>
static void few_rows(const Product& p, const Weight4& w, long first, long last) {
    const long chunks = p.k_blocks / BLOCKS, part = 16 * w.K / STREAMS, scale_bytes = 32 * w.groups() * 4;
    const long stride = 4 * columns(p), x_tile = 32 * columns(p);
    alignas(64) bf16 a[2][2 * BLOCKS * TILE];
    alignas(64) float tile[256];
    Tiles tiles(columns(p));
    const auto unpack_quarter = [&](long n, long c, long j, bf16* to) {  // 8 of the 32 rows
        const long half = j / 2;
        unpack_rows<PARTS>(w, n + 16 * half, j % 2 * 8, j % 2 * 8 + 8, c * CHUNK, to + half * BLOCKS * TILE, TILE);
    };
    for (long b = first; b < last; b += 2) {
        const long n = b * 16;
        const char* next = (const char*)w.row(n + 32);
        Fetch scales{(const char*)(w.scales + (n + 32) * w.groups()), 0, scale_bytes, 1}, zeros{(const char*)(w.zeros + (n + 32) * w.groups()), 0, scale_bytes, 1};
        const long scale_lines = (scales.lines() + chunks - 1) / chunks;
        for (long j = 0; j < BLOCKS; j++) unpack_quarter(n, 0, j, a[0]);
        tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
        for (long c = 0; c < chunks; c++) {
            const bf16 *x = p.packed + c * BLOCKS * x_tile, *left = a[c % 2];
            scales.fetch(scale_lines), zeros.fetch(scale_lines);
            for (long j = 0; j < BLOCKS; j++, x += x_tile, left += TILE) {
                for (long i = 0; i < STREAMS; i++) _mm_prefetch(next + i * part, _MM_HINT_T1);
                next += 64;
                tile_load<6>(x, stride);
                if (TB == 2) tile_load<7>(x + p.k_blocks * x_tile, stride);
                tile_load<4>(left, 64), tile_dot<0, 4, 6>();
                if (TB == 2) tile_dot<2, 4, 7>();
                tile_load<5>(left + BLOCKS * TILE, 64), tile_dot<1, 5, 6>();
                if (TB == 2) tile_dot<3, 5, 7>();
                if (c + 1 < chunks) unpack_quarter(n, c + 1, j, a[(c + 1) % 2]);
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

// 16 rows x 128 inputs -> four right-hand tiles in the order of the weights.
static void pack_chunk(const Product& p, long t, long k, bf16* to) {
    alignas(64) bf16 sorted[BLOCKS][16 * 32];
    alignas(64) static const uint16_t pick[32] = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
    const __m512i even = _mm512_load_si512(pick), odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
    const long rows = std::min(16L, p.T - t);
    for (long r = 0; r < rows; r++) {
        __m512i v[4];
        for (long i = 0; i < 4; i++) {
            const long left = std::min(32L, p.K - k - 32 * i);
            const __mmask32 mask = left <= 0 ? 0 : left == 32 ? 0xffffffffu : (1u << left) - 1u;
            v[i] = _mm512_maskz_loadu_epi16(mask, p.x + (t + r) * p.x_stride + k + 32 * i);
        }
        const __m512i e0 = _mm512_permutex2var_epi16(v[0], even, v[1]), e1 = _mm512_permutex2var_epi16(v[2], even, v[3]);
        const __m512i o0 = _mm512_permutex2var_epi16(v[0], odd, v[1]), o1 = _mm512_permutex2var_epi16(v[2], odd, v[3]);
        _mm512_store_si512(sorted[0] + 32 * r, _mm512_permutex2var_epi16(e0, even, e1));
        _mm512_store_si512(sorted[1] + 32 * r, _mm512_permutex2var_epi16(o0, even, o1));
        _mm512_store_si512(sorted[2] + 32 * r, _mm512_permutex2var_epi16(e0, odd, e1));
        _mm512_store_si512(sorted[3] + 32 * r, _mm512_permutex2var_epi16(o0, odd, o1));
    }
    const long wide = columns(p);
    for (long j = 0; j < BLOCKS; j++, to += 32 * wide) {
        alignas(64) bf16 full[TILE];
        pack_columns(sorted[j], 32, rows, 32, wide == 16 ? to : full);
        for (long i = 0; i < 16 && wide < 16; i++) _mm256_mask_storeu_epi32(to + i * 2 * wide, wide == 8 ? 0xff : 0xf, _mm256_load_si256((const __m256i*)(full + i * 32)));
    }
}

template <int PARTS>
static void multiply(const Product& p, const Weight4& w, long first, long last) {
    if (p.T <= 16) few_rows<1, PARTS>(p, w, first, last);
    else if (p.T <= 32) few_rows<2, PARTS>(p, w, first, last);
    else many_rows(p, PackedRows<PARTS>{w}, first, last);
}

static bool linear_tiles(Product p, const Weight4& w, int threads) {
    const long chunks = (p.K + CHUNK - 1) / CHUNK, pieces = p.t_blocks() * chunks;
    p.k_blocks = chunks * BLOCKS;
    p.packed = (bf16*)scratch(size_t(pieces) * BLOCKS * TILE * 2, 0);
    if (!p.packed) return false;
    const int team = worth_threads(p.T, p.K, p.N) ? threads : 1;
    share(pieces, pieces < 64 ? 1 : team, [&p, chunks](long first, long last) {
        for (long i = first; i < last; i++) pack_chunk(p, i / chunks * 16, i % chunks * CHUNK, p.packed + i * BLOCKS * 32 * columns(p));
    });
    share((p.N + 15) / 16, team, [&p, &w](long first, long last) {
        switch (parts(w)) {
            case 1: return multiply<1>(p, w, first, last);
            case 2: return multiply<2>(p, w, first, last);
            case 4: return multiply<4>(p, w, first, last);
            default: return multiply<0>(p, w, first, last);
        }
    });
    return true;
}
#endif

}  // namespace lmd

using namespace lmd;

// Both return 0 where memory ran out.
LMD_API int lmd_linear_w4_f32(const float* x, long x_stride, const uint8_t* q, const float* scales, const float* zeros, const float* bias, float* out,
                              long out_stride, long T, long K, long N, long group, int threads) {
    return linear_rows(x, x_stride, Weight4{q, scales, zeros, N, K, group}, bias, out, out_stride, T, threads);
}

// At most 512 rows at a time: the packed rows then stay in cache.
LMD_API int lmd_linear_w4_bf16(const bf16* x, long x_stride, const uint8_t* q, const float* scales, const float* zeros, const bf16* bias, bf16* out,
                               long out_stride, long T, long K, long N, long group, int threads) {
    const Weight4 w{q, scales, zeros, N, K, group};
#ifdef LMD_AMX
    for (long t = 0; t < T; t += 512)
        if (!linear_tiles({x + t * x_stride, x_stride, bias, out + t * out_stride, out_stride, std::min(512L, T - t), K, N}, w, threads)) return 0;
    return 1;
#else
    return linear_rows(x, x_stride, w, bias, out, out_stride, T, threads);
#endif
}
