// Quantised cache rows as bf16 rows for AMX: number * scale + offset in float32, rounded once. Only the D dims are written.
#pragma once
#include <immintrin.h>

#include "kv_cache.hpp"

namespace lmd {

inline __mmask16 lanes16(long count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : __mmask16((1u << count) - 1u); }
inline __mmask32 lanes32(long count) { return count >= 32 ? 0xffffffffu : count <= 0 ? 0 : (1u << count) - 1u; }

inline __m512 numbers(__m128i bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)); }

inline void unpack8(const char* from, uint32_t pair, long D, bf16* to) {
    const __m512 scale = _mm512_set1_ps(scale_of(pair)), offset = _mm512_set1_ps(offset_of(pair));
    const auto two = [&](__m128i a, __m128i b) {
        return (__m512i)_mm512_cvtne2ps_pbh(_mm512_fmadd_ps(numbers(b), scale, offset), _mm512_fmadd_ps(numbers(a), scale, offset));
    };
    long d = 0;
    for (; d + 32 <= D; d += 32)
        _mm512_storeu_si512(to + d, two(_mm_loadu_si128((const __m128i*)(from + d)), _mm_loadu_si128((const __m128i*)(from + d + 16))));
    if (d == D) return;
    const __m128i a = _mm_maskz_loadu_epi8(lanes16(D - d), from + d), b = _mm_maskz_loadu_epi8(lanes16(D - d - 16), from + d + 16);
    _mm512_mask_storeu_epi16(to + d, lanes32(D - d), two(a, b));
}

// The sixteen values that a row can have, twice: a table that the low five bits of a word look into.
inline __m512i levels(uint32_t pair) {
    const __m512 number = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512 value = _mm512_fmadd_ps(number, _mm512_set1_ps(scale_of(pair)), _mm512_set1_ps(offset_of(pair)));
    return _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(value));
}

inline void unpack4(const char* from, uint32_t pair, long D, bf16* to) {
    const __m512i table = levels(pair);
    const long half = D / 2;
    long j = 0;
    for (; j + 32 <= half; j += 32) {
        const __m512i x = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(from + j)));
        _mm512_storeu_si512(to + j, _mm512_permutexvar_epi16(x, table));
        _mm512_storeu_si512(to + half + j, _mm512_permutexvar_epi16(_mm512_srli_epi16(x, 4), table));
    }
    if (j == half) return;
    const __mmask32 mask = lanes32(half - j);
    const __m512i x = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(mask, from + j));
    _mm512_mask_storeu_epi16(to + j, mask, _mm512_permutexvar_epi16(x, table));
    _mm512_mask_storeu_epi16(to + half + j, mask, _mm512_permutexvar_epi16(_mm512_srli_epi16(x, 4), table));
}

}  // namespace lmd
