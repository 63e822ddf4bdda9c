// out [T, N] = x [T, K] @ W.T + bias with 4-bit weights W[n, k] = (q - zeros[n, k / g]) * scales[n, k / g], packed two to a byte
// along k. Memory is read packed; weights exist in 16 or 32 bit only in the core's own cache.
//
// bf16: weights become left-hand AMX tiles, rounded to bf16 as a checkpoint written out in bf16 would be. 64 bytes of a row are 32
// words of four inputs each, so one shift and one table look-up (vpermw) give every fourth of 128 inputs: tile j of a chunk
// holds inputs 4i + j, and activations are packed in the same order. Other types and CPUs: rows are written out in float32.
// A row's bits do not depend on T, the batch or the threads: one chain over k for every blocking.
#include <algorithm>

#include "dot.hpp"
#include "packed_weights.hpp"
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

constexpr long CHUNK = 128;  // inputs of a chunk

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

template <int PARTS>
struct Tiles4 {
    static constexpr long BLOCKS = 4;
    const Weight4& w;
    const long row = w.K / 2;

    const char* start(long n) const { return (const char*)w.row(n); }

    void unpack(long n, long first, long last, long chunk, bf16* to, long step) const {
        const long k = chunk * CHUNK, width = std::min(CHUNK, w.K - k), count = (width + w.group - 1) / w.group, groups = w.groups();
        const __mmask64 mask = first_bytes(width / 2);
        const uint8_t* q = w.row(n) + k / 2;
        const long group = n * groups + k / w.group;
        for (long r = first; r < std::min(last, w.N - n); r++) {
            if constexpr (PARTS == 0) {
                unpack_slowly(w, n + r, k, to + r * 32, step);
            } else {
                const __m512i codes = _mm512_maskz_loadu_epi8(mask, q + r * row);
                lmd::unpack<PARTS>(codes, w.scales + group + r * groups, w.zeros + group + r * groups, count, to + r * 32, step);
            }
        }
        for (long r = std::max(first, w.N - n); r < last; r++)
            for (long j = 0; j < BLOCKS; j++) _mm512_store_si512(to + j * step + r * 32, _mm512_setzero_si512());
    }

    // Scales and zeros lie as the numbers do, row after row.
    void prefetch(long n, long chunk, long chunks) const {
        const long bytes = 32 * w.groups() * 4, from = bytes * chunk / chunks / 64 * 64, to = bytes * (chunk + 1) / chunks;
        for (long at = from; at < to; at += 64) {
            _mm_prefetch((const char*)(w.scales + n * w.groups()) + at, _MM_HINT_T1);
            _mm_prefetch((const char*)(w.zeros + n * w.groups()) + at, _MM_HINT_T1);
        }
    }

    // Tile j holds inputs 4i + j.
    static void sort(const __m512i v[4], __m512i out[4]) {
        alignas(64) static const uint16_t pick[32] = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                                      32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
        const __m512i even = _mm512_load_si512(pick), odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
        const __m512i e0 = _mm512_permutex2var_epi16(v[0], even, v[1]), e1 = _mm512_permutex2var_epi16(v[2], even, v[3]);
        const __m512i o0 = _mm512_permutex2var_epi16(v[0], odd, v[1]), o1 = _mm512_permutex2var_epi16(v[2], odd, v[3]);
        out[0] = _mm512_permutex2var_epi16(e0, even, e1), out[1] = _mm512_permutex2var_epi16(o0, even, o1);
        out[2] = _mm512_permutex2var_epi16(e0, odd, e1), out[3] = _mm512_permutex2var_epi16(o0, odd, o1);
    }
};

static bool linear_tiles(const Product<bf16>& p, const Weight4& w, int threads) {
    switch (parts(w)) {
        case 1: return linear_unpacked(p, p.x, p.x_stride, Tiles4<1>{w}, threads);
        case 2: return linear_unpacked(p, p.x, p.x_stride, Tiles4<2>{w}, threads);
        case 4: return linear_unpacked(p, p.x, p.x_stride, Tiles4<4>{w}, threads);
        default: return linear_unpacked(p, p.x, p.x_stride, Tiles4<0>{w}, threads);
    }
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
