// 8-bit weights: int8 or float8 e4m3 numbers (no infinities; 0x7f and 0xff are NaN) and float32 scales of groups along k. How a row
// is written out in float32, and with AMX how 64 bytes become two bf16 tiles.
#pragma once
#include <array>

#include "packed_weights.hpp"

namespace lmd {

struct Weight8 {
    const uint8_t* q;
    const float* scales;
    long N, K, group;
    bool fp8;

    long groups() const { return K / group; }
    const uint8_t* row(long n) const { return q + n * K; }
};

// bf16 bits of count * 2^(exponent - 127), 0 < count < 256.
constexpr uint16_t bits_of_integer(int count, int exponent) {
    int top = 0;
    while (count >> (top + 1)) top++;
    return uint16_t((exponent + top) << 7 | (count - (1 << top)) << (7 - top));
}

// bf16 bits of the numbers 0..127 and of the e4m3 codes 0..127; both types fit bf16 exactly.
struct Magnitudes {
    std::array<uint16_t, 128> bits{};

    constexpr explicit Magnitudes(bool fp8) {
        for (int code = 1; code < 128; code++) {
            if (!fp8) bits[code] = bits_of_integer(code, 127);
            else if (code < 8) bits[code] = bits_of_integer(code, 127 - 9);
            else bits[code] = uint16_t(code == 127 ? 0x7fc0 : ((code >> 3) + 120) << 7 | (code & 7) << 4);
        }
    }
};
inline constexpr Magnitudes INT8{false}, E4M3{true};

inline float value_of(uint8_t code, bool fp8) {
    if (!fp8) return float(int8_t(code));
    return to_float(bf16{uint16_t(E4M3.bits[code & 127] | (code & 128) << 8)});
}

// One row in float32; without scales the bare numbers.
inline void write_out(const Weight8& w, long n, bool scaled, float* to) {
    const uint8_t* q = w.row(n);
    for (long i = 0; i < w.groups(); i++, q += w.group, to += w.group) {
        const float scale = scaled ? w.scales[n * w.groups() + i] : 1.0f;
        if (w.fp8) {
            float table[256];
            for (int code = 0; code < 256 && w.group >= 256; code++) table[code] = value_of(uint8_t(code), true) * scale;
            for (long j = 0; j < w.group; j++) to[j] = w.group >= 256 ? table[q[j]] : value_of(q[j], true) * scale;
        } else {
            for (long j = 0; j < w.group; j++) to[j] = float(int8_t(q[j])) * scale;
        }
    }
}

#ifdef LMD_AMX
// High or low bytes of the bf16 magnitudes, as the two halves of a look-up table of 128 bytes (vpermi2b).
struct alignas(64) ByteTable {
    uint8_t bytes[128] = {};

    constexpr ByteTable(const Magnitudes& from, int shift) {
        for (int i = 0; i < 128; i++) bytes[i] = uint8_t(from.bits[i] >> shift);
    }
    __m512i at(__m512i index) const {  // reads seven bits of each index
        return _mm512_permutex2var_epi8(_mm512_load_si512(bytes), index, _mm512_load_si512(bytes + 64));
    }
};
inline constexpr ByteTable INT8_LOW{INT8, 0}, INT8_HIGH{INT8, 8}, E4M3_LOW{E4M3, 0}, E4M3_HIGH{E4M3, 8};

// 64 codes -> bf16 numbers: low[8l + i] is code 16l + i, high[8l + i] is code 16l + 8 + i.
template <bool FP8>
inline void to_bf16(__m512i codes, __m512i& low, __m512i& high) {
    const __m512i sign = _mm512_set1_epi8(char(0x80)), index = FP8 ? codes : _mm512_abs_epi8(codes);
    const __m512i right = FP8 ? E4M3_LOW.at(index) : INT8_LOW.at(index);
    __m512i left = _mm512_ternarylogic_epi32(FP8 ? E4M3_HIGH.at(index) : INT8_HIGH.at(index), codes, sign, 0xf8);  // a | (b & c)
    if (!FP8) left = _mm512_mask_blend_epi8(_mm512_cmpeq_epi8_mask(codes, sign), left, _mm512_set1_epi8(char(0xc3)));  // -128
    low = _mm512_unpacklo_epi8(right, left), high = _mm512_unpackhi_epi8(right, left);
}

// Times the group's scale, rounded to bf16 as a checkpoint written out in bf16 would be.
inline __m512i scaled(__m512i numbers, __m512 scale) {
    alignas(64) static const uint16_t zip[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(numbers, 16));
    const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(numbers, _mm512_set1_epi32(int(0xffff0000))));
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(odd, scale), _mm512_mul_ps(even, scale));
    return _mm512_permutexvar_epi16(_mm512_load_si512(zip), halves);
}

// How scales meet the numbers: AFTER the sums (one a row, exact numbers in the tiles), CHUNKS (one for 64 inputs), or one by one.
enum class Scaling { AFTER, CHUNKS, SINGLE };

template <bool FP8, Scaling SCALING>
struct Tiles8 {
    static constexpr long BLOCKS = 2, CHUNK = 64;
    const Weight8& w;
    const long row = w.K;

    const char* start(long n) const { return (const char*)w.row(n); }

    struct Steps {};  // scales are read as they are
    long room(long, long) const { return 0; }
    Steps expand(long, long, long, long, float*) const { return {}; }

    template <long ROWS>
    void unpack(long n, long chunk, Steps, bf16* to, long step) const {
        const long k = chunk * CHUNK, left = w.N - n, row = this->row, groups = w.groups();
        const __mmask64 mask = first_bytes(w.K - k);
        const uint8_t* q = w.row(n) + k;
        const float* scale = SCALING == Scaling::CHUNKS ? w.scales + n * groups + k / w.group : nullptr;
        if (left >= ROWS) {
#pragma GCC unroll 16
            for (long r = 0; r < ROWS; r++) unpack_row(_mm512_maskz_loadu_epi8(mask, q + r * row), scale + r * groups, to + r * 32, step);
        } else {
            for (long r = 0; r < left; r++) unpack_row(_mm512_maskz_loadu_epi8(mask, q + r * row), scale + r * groups, to + r * 32, step);
        }
        for (long r = 0; r < std::min(ROWS, left) && SCALING == Scaling::SINGLE; r++) scale_singly(n + r, k, to + r * 32, step);
        for (long r = std::max(0L, left); r < ROWS; r++)
            for (long j = 0; j < BLOCKS; j++) _mm512_store_si512(to + j * step + r * 32, _mm512_setzero_si512());
    }
    static void unpack_row(__m512i codes, const float* scale, bf16* to, long step) {
        __m512i low, high;
        to_bf16<FP8>(codes, low, high);
        if constexpr (SCALING == Scaling::CHUNKS) low = scaled(low, _mm512_set1_ps(*scale)), high = scaled(high, _mm512_set1_ps(*scale));
        _mm512_store_si512(to, low), _mm512_store_si512(to + step, high);
    }

    // Any group size, one weight at a time.
    void scale_singly(long n, long k, bf16* to, long step) const {
        for (long i = 0; i < std::min(CHUNK, w.K - k); i++) {
            bf16* at = to + i / 8 % 2 * step + i / 16 * 8 + i % 8;
            put(at, to_float(*at) * w.scales[n * w.groups() + (k + i) / w.group]);
        }
    }

    void prefetch(long n, long chunk, long chunks) const {
        if constexpr (SCALING == Scaling::AFTER) return;
        const long bytes = 32 * w.groups() * 4, from = bytes * chunk / chunks / 64 * 64, to = bytes * (chunk + 1) / chunks;
        for (long at = from; at < to; at += 64) _mm_prefetch((const char*)(w.scales + n * w.groups()) + at, _MM_HINT_T1);
    }

    static void sort(const __m512i in[2], __m512i out[2]) {
        out[0] = _mm512_shuffle_i32x4(in[0], in[1], 0x88), out[1] = _mm512_shuffle_i32x4(in[0], in[1], 0xdd);
    }
};

// The product of rows x in bf16.
template <typename E>
inline bool linear_tiles8(Product<E> p, const bf16* x, long x_stride, const Weight8& w, int threads) {
    if (w.group == w.K) {
        p.scales = w.scales;
        return w.fp8 ? linear_unpacked(p, x, x_stride, Tiles8<true, Scaling::AFTER>{w}, threads)
                     : linear_unpacked(p, x, x_stride, Tiles8<false, Scaling::AFTER>{w}, threads);
    }
    if (w.group % 64 == 0)
        return w.fp8 ? linear_unpacked(p, x, x_stride, Tiles8<true, Scaling::CHUNKS>{w}, threads)
                     : linear_unpacked(p, x, x_stride, Tiles8<false, Scaling::CHUNKS>{w}, threads);
    return w.fp8 ? linear_unpacked(p, x, x_stride, Tiles8<true, Scaling::SINGLE>{w}, threads)
                 : linear_unpacked(p, x, x_stride, Tiles8<false, Scaling::SINGLE>{w}, threads);
}
#endif

}  // namespace lmd
