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

inline float half_to_float(uint16_t bits) {
    const uint32_t size = uint32_t(bits & 0x7fff) << 13 | (size_t(bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u), sign = uint32_t(bits & 0x8000) << 16;
    float value;
    std::memcpy(&value, &size, 4);
    value *= 0x1p112f;  // the other type's exponents; exact for the smallest numbers too
    return sign ? -value : value;
}

// Scales are float16 and zeros uint8 (`small`), or both float32.
struct Weight4 {
    const uint8_t* q;
    const void *scales, *zeros;
    long N, K, group;
    bool small;

    long groups() const { return K / group; }
    const uint8_t* row(long n) const { return q + n * (K / 2); }
    float scale(long at) const { return small ? half_to_float(((const uint16_t*)scales)[at]) : ((const float*)scales)[at]; }
    float zero(long at) const { return small ? float(((const uint8_t*)zeros)[at]) : ((const float*)zeros)[at]; }
};

// ---- any CPU: float32 rows -----------------------------------------------------------------------------------------

static void write_out(const Weight4& w, long n, float* to) {
    const uint8_t* q = w.row(n);
    for (long i = 0; i < w.groups(); i++, q += w.group / 2, to += w.group) {
        const float scale = w.scale(n * w.groups() + i), zero = w.zero(n * w.groups() + i);
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

// Scales of some groups of some rows in float32, and what a code of 0 stands for: -zero * scale, exact where zeros are integers and
// scales were float16. Rows are `width` apart, a multiple of 16, and zero behind their last group.
struct Steps4 {
    float *scales, *offsets;
    long start, first, width;  // row; group

    long at(long n, long group) const { return (n - start) * width + group - first; }
};

// The 16 values of a group.
static inline __m512 table(const Steps4& steps, long at) {
    const __m512 codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_fmadd_ps(codes, _mm512_set1_ps(steps.scales[at]), _mm512_set1_ps(steps.offsets[at]));
}

// Two groups in bf16.
static inline __m512i tables(const Steps4& steps, long low, long high) {
    return (__m512i)_mm512_cvtne2ps_pbh(table(steps, high), table(steps, low));
}

// One row of a chunk from the 32 words of its codes; PARTS groups share the chunk.
template <int PARTS>
static inline void unpack(__m512i codes, const Steps4& steps, long at, bf16* to, long step) {
    alignas(64) static const uint16_t half[32] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16};
    alignas(64) static const uint16_t quarter[32] = {0,  0,  0,  0,  0,  0,  0,  0,  16, 16, 16, 16, 16, 16, 16, 16,
                                                     32, 32, 32, 32, 32, 32, 32, 32, 48, 48, 48, 48, 48, 48, 48, 48};
    const __m512i fifteen = _mm512_set1_epi16(15);
    if constexpr (PARTS == 1) {
        const __m512 values = table(steps, at);
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(values, values);  // vpermw reads five bits; the fifth belongs to the next input
        _mm512_store_si512(to, _mm512_permutexvar_epi16(codes, both));
        _mm512_store_si512(to + step, _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), both));
        _mm512_store_si512(to + 2 * step, _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), both));
        _mm512_store_si512(to + 3 * step, _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 12), both));
    } else if constexpr (PARTS == 2) {
        const __m512i both = tables(steps, at, at + 1), place = _mm512_load_si512(half);
        for (int j = 0; j < 4; j++) {
            const __m512i index = _mm512_ternarylogic_epi32(_mm512_srli_epi16(codes, 4 * j), fifteen, place, 0xea);  // (a & b) | c
            _mm512_store_si512(to + j * step, _mm512_permutexvar_epi16(index, both));
        }
    } else {
        const __m512i low = tables(steps, at, at + 1), high = tables(steps, at + 2, at + 3), place = _mm512_load_si512(quarter);
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
            value = (float(code) - w.zero(at)) * w.scale(at);
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


    // Room for the steps of `rows` rows and `chunks` chunks, in floats.
    long room(long rows, long chunks) const { return 2 * rows * ((chunks * PARTS + 15) / 16 * 16); }

    Steps4 expand(long n, long rows, long chunk, long chunks, float* to) const {
        const long first = chunk * CHUNK / w.group, last = std::min(w.groups(), ((chunk + chunks) * CHUNK + w.group - 1) / w.group);
        const Steps4 steps{to, to + room(rows, chunks) / 2, n, first, room(1, chunks) / 2};
        for (long r = 0; r < std::min(rows, w.N - n) && PARTS; r++)
            for (long i = 0; i < steps.width; i += 16) {
                const long at = (n + r) * w.groups() + first + i, left = last - first - i;
                const __mmask16 mask = __mmask16(left >= 16 ? 0xffff : left <= 0 ? 0 : (1 << left) - 1);
                const __m512 scale = w.small ? _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, (const uint16_t*)w.scales + at))
                                             : _mm512_maskz_loadu_ps(mask, (const float*)w.scales + at);
                const __m512 zero = w.small ? _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, (const uint8_t*)w.zeros + at)))
                                            : _mm512_maskz_loadu_ps(mask, (const float*)w.zeros + at);
                _mm512_storeu_ps(steps.scales + r * steps.width + i, scale);
                _mm512_storeu_ps(steps.offsets + r * steps.width + i, _mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(zero, scale)));
            }
        return steps;
    }

    template <long ROWS>
    void unpack(long n, long chunk, const Steps4& steps, bf16* to, long step) const {
        const long k = chunk * CHUNK, left = w.N - n, width = steps.width, row = this->row;
        const __mmask64 mask = first_bytes((w.K - k) / 2);
        const uint8_t* q = w.row(n) + k / 2;
        long at = steps.at(n, w.group == CHUNK ? chunk : k / w.group);
        const Steps4 local = steps;
        if constexpr (PARTS == 0) {
            for (long r = 0; r < std::min(ROWS, left); r++) unpack_slowly(w, n + r, k, to + r * 32, step);
        } else if (left >= ROWS) {
#pragma GCC unroll 8
            for (long r = 0; r < ROWS; r++, q += row, at += width, to += 32) lmd::unpack<PARTS>(_mm512_maskz_loadu_epi8(mask, q), local, at, to, step);
        } else {
            for (long r = 0; r < left; r++) lmd::unpack<PARTS>(_mm512_maskz_loadu_epi8(mask, q + r * row), local, at + r * width, to + r * 32, step);
        }
        for (long r = std::max(0L, left); r < ROWS; r++)
            for (long j = 0; j < BLOCKS; j++) _mm512_store_si512(to + j * step + r * 32, _mm512_setzero_si512());
    }

    // Scales and zeros lie as the numbers do, row after row.
    void prefetch(long n, long chunk, long chunks) const {
        fetch_share(w.scales, n * w.groups(), w.small ? 2 : 4, chunk, chunks);
        fetch_share(w.zeros, n * w.groups(), w.small ? 1 : 4, chunk, chunks);
    }
    void fetch_share(const void* from, long first, long size, long chunk, long chunks) const {
        const long bytes = 32 * w.groups() * size;
        for (long at = bytes * chunk / chunks / 64 * 64; at < bytes * (chunk + 1) / chunks; at += 64)
            _mm_prefetch((const char*)from + first * size + at, _MM_HINT_T1);
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
LMD_API int lmd_linear_w4_f32(const float* x, long x_stride, const uint8_t* q, const void* scales, const void* zeros, const float* bias, float* out,
                              long out_stride, long T, long K, long N, long group, int small, int threads) {
    return linear_rows(x, x_stride, Weight4{q, scales, zeros, N, K, group, small != 0}, bias, out, out_stride, T, threads);
}

// At most 512 rows at a time: the packed rows then stay in cache.
LMD_API int lmd_linear_w4_bf16(const bf16* x, long x_stride, const uint8_t* q, const void* scales, const void* zeros, const bf16* bias, bf16* out,
                               long out_stride, long T, long K, long N, long group, int small, int threads) {
    const Weight4 w{q, scales, zeros, N, K, group, small != 0};
#ifdef LMD_AMX
    for (long t = 0; t < T; t += 512)
        if (!linear_tiles({x + t * x_stride, x_stride, bias, out + t * out_stride, out_stride, std::min(512L, T - t), K, N}, w, threads)) return 0;
    return 1;
#else
    return linear_rows(x, x_stride, w, bias, out, out_stride, T, threads);
#endif
}
