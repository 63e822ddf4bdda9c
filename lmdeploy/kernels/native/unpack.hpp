// Quantised cache rows as bf16 rows for AMX: number * scale + offset in float32, rounded once. Only the D dims are written.
#pragma once
#include <immintrin.h>

#include "kv_cache.hpp"

namespace lmd {

inline __mmask16 lanes16(long count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : __mmask16((1u << count) - 1u); }
inline __mmask32 lanes32(long count) { return count >= 32 ? 0xffffffffu : count <= 0 ? 0 : (1u << count) - 1u; }

// Sixteen bytes as the floats 2^15 + n: a shuffle puts each byte next to the exponent, which saves the conversion. BASE goes off again with the
// offset, whose rounding then costs 2^-9 of a step at most.
constexpr float BASE = 32768.0f;
inline __m512 numbers(__m128i bytes) {
    const __m512i place = _mm512_set_epi32(15 << 8, 14 << 8, 13 << 8, 12 << 8, 11 << 8, 10 << 8, 9 << 8, 8 << 8, 7 << 8, 6 << 8, 5 << 8, 4 << 8, 3 << 8, 2 << 8, 1 << 8, 0);
    return (__m512)_mm512_mask_shuffle_epi8((__m512i)_mm512_set1_ps(BASE), 0x2222222222222222ull, _mm512_broadcast_i32x4(bytes), place);
}

// Scale and offset of a row in all lanes, taken apart there: moving them through a general register would cost more.
struct Pair {
    __m512 scale, offset;
    explicit Pair(const uint32_t& pair) {
        __m512i both;
        asm("vpbroadcastd %1, %0" : "=v"(both) : "m"(pair));
        scale = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
        offset = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000u))));
    }
    __m512 value(__m512 number) const { return _mm512_fmadd_ps(number, scale, offset); }
    Pair& from(float base) {  // of numbers that are too high by `base`
        offset = _mm512_fnmadd_ps(_mm512_set1_ps(base), scale, offset);
        return *this;
    }
};

inline __m512 numbers(const char* from) { return numbers(_mm_loadu_si128((const __m128i*)from)); }
inline __m512 numbers(const char* from, __mmask16 mask) { return numbers(_mm_maskz_loadu_epi8(mask, from)); }

// DIMS is D where that is known to the compiler, or 0.
// A row of 8-bit numbers as bf16 [D].
template <long DIMS>
inline void unpack8(const char* from, const uint32_t& pair, long dims, bf16* to) {
    const long D = DIMS ? DIMS : dims;
    const Pair row = Pair(pair).from(BASE);
    const auto two = [&](__m512 a, __m512 b) { return (__m512i)_mm512_cvtne2ps_pbh(row.value(b), row.value(a)); };
    long d = 0;
    for (; d + 32 <= D; d += 32) _mm512_storeu_si512(to + d, two(numbers(from + d), numbers(from + d + 16)));
    if (d < D) _mm512_mask_storeu_epi16(to + d, lanes32(D - d), two(numbers(from + d, lanes16(D - d)), numbers(from + d + 16, lanes16(D - d - 16))));
}

// The sixteen values that each of two rows can have, in a table that the low five bits of a word look into.
inline __m512i levels(const uint32_t& low, const uint32_t& high) {
    const __m512 number = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const Pair a(low), b(high);
    return (__m512i)_mm512_cvtne2ps_pbh(b.value(number), a.value(number));
}

// (x & 15) | row: what to look for in the table.
inline __m512i index4(__m512i x, __m512i row) { return _mm512_ternarylogic_epi32(x, _mm512_set1_epi16(15), row, 0xEA); }

// A row of 4-bit numbers as bf16 [D]; `row` is 0 or 16 in each word, the half of the table that is its own.
template <long DIMS>
inline void unpack4(const char* from, __m512i table, __m512i row, long dims, bf16* to) {
    const long half = (DIMS ? DIMS : dims) / 2;
    const auto low = [&](__m512i x) { return _mm512_permutexvar_epi16(index4(x, row), table); };
    long j = 0;
    for (; j + 32 <= half; j += 32) {
        const __m512i x = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(from + j)));
        _mm512_storeu_si512(to + j, low(x)), _mm512_storeu_si512(to + half + j, low(_mm512_srli_epi16(x, 4)));
    }
    if (j == half) return;
    const __mmask32 mask = lanes32(half - j);
    const __m512i x = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(mask, from + j));
    _mm512_mask_storeu_epi16(to + j, mask, low(x)), _mm512_mask_storeu_epi16(to + half + j, mask, low(_mm512_srli_epi16(x, 4)));
}

// Two rows (even, odd) of 8-bit numbers as pairs [D][2] of bf16.
template <long DIMS>
inline void pair8(const char* even, const char* odd, const uint32_t& even_pair, const uint32_t& odd_pair, long dims, bf16* to) {
    alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const long D = DIMS ? DIMS : dims;
    const __m512i mixed = _mm512_load_si512(order);
    const Pair e = Pair(even_pair).from(BASE), o = Pair(odd_pair).from(BASE);
    const auto both = [&](__m512 x, __m512 y) { return _mm512_permutexvar_epi16(mixed, (__m512i)_mm512_cvtne2ps_pbh(o.value(y), e.value(x))); };
    long d = 0;
    for (; d + 16 <= D; d += 16) _mm512_storeu_si512(to + 2 * d, both(numbers(even + d), numbers(odd + d)));
    if (d < D) _mm512_mask_storeu_epi32(to + 2 * d, lanes16(D - d), both(numbers(even + d, lanes16(D - d)), numbers(odd + d, lanes16(D - d))));
}

// The same of 4-bit numbers.
template <long DIMS>
inline void pair4(const char* even, const char* odd, const uint32_t& even_pair, const uint32_t& odd_pair, long dims, bf16* to) {
    const __m512i table = levels(even_pair, odd_pair), row = _mm512_set1_epi32(16 << 16);
    const long half = (DIMS ? DIMS : dims) / 2;
    const auto both = [](__m128i x, __m128i y) { return _mm512_or_si512(_mm512_cvtepu8_epi32(x), _mm512_slli_epi32(_mm512_cvtepu8_epi32(y), 16)); };
    const auto low = [&](__m512i x) { return _mm512_permutexvar_epi16(index4(x, row), table); };
    long d = 0;
    for (; d + 16 <= half; d += 16) {
        const __m512i x = both(_mm_loadu_si128((const __m128i*)(even + d)), _mm_loadu_si128((const __m128i*)(odd + d)));
        _mm512_storeu_si512(to + 2 * d, low(x)), _mm512_storeu_si512(to + 2 * (half + d), low(_mm512_srli_epi32(x, 4)));
    }
    if (d == half) return;
    const __mmask16 mask = lanes16(half - d);
    const __m512i x = both(_mm_maskz_loadu_epi8(mask, even + d), _mm_maskz_loadu_epi8(mask, odd + d));
    _mm512_mask_storeu_epi32(to + 2 * d, mask, low(x)), _mm512_mask_storeu_epi32(to + 2 * (half + d), mask, low(_mm512_srli_epi32(x, 4)));
}

}  // namespace lmd
