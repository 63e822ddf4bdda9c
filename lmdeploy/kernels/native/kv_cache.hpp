// Rows of the paged cache as kernels read and write them: what lmdeploy/kernels/kv_quant.py defines. A row is one head's key or
// value of one token: activations as they are, or unsigned integers of 8 or 4 bits with a pair (scale, offset) of bfloat16.
#pragma once
#include <algorithm>

#include "common.hpp"

namespace lmd {

typedef uint8_t vb __attribute__((vector_size(16), aligned(1), may_alias));
constexpr long MAX_DIMS = 256;       // cpu.py hands larger heads to the reference
constexpr float TINY = 1.17549435e-38f;  // 2^-126: the scale of a row whose numbers are all equal

// Keys or values of a layer. Strides are of blocks and heads; slots follow each other.
struct Store {
    char* rows;
    uint32_t* pairs;                  // scale in the low half, offset in the high half
    int64_t block, head;              // bytes
    int64_t pair_block, pair_head;    // pairs
    int64_t width;                    // bits: 16 stands for the activations' own type, 8, 4

    bool quantised() const { return width != 16; }
    long row_bytes(long D, size_t element) const { return width == 16 ? D * long(element) : D * width / 8; }
};

inline float from_bits(uint32_t u) {
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
inline uint32_t to_bits(float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    return u;
}
inline float scale_of(uint32_t pair) { return from_bits(pair << 16); }
inline float offset_of(uint32_t pair) { return from_bits(pair & 0xffff0000u); }

// The largest bfloat16 that is not above x. NaN stays NaN.
inline float floor_bf16(float x) {
    const uint32_t u = to_bits(x);
    if (x != x) return from_bits(u | 0x400000u);
    return from_bits((u & 0xffff0000u) + (u >> 31 && u & 0xffffu ? 0x10000u : 0u));
}
inline float ceil_bf16(float x) { return -floor_bf16(-x); }

inline vf widen(vb x) { return __builtin_convertvector(__builtin_convertvector(x, vi), vf); }
inline vb load_bytes(const uint8_t* p) { return *reinterpret_cast<const vb*>(p); }

// A quantised row as float32 [D].
inline void read_row(const uint8_t* from, uint32_t pair, long width, long D, float* to) {
    const float scale = scale_of(pair), offset = offset_of(pair);
    const long bytes = D * width / 8;
    long j = 0;
    for (; j + LANES <= bytes; j += LANES) {
        const vb x = load_bytes(from + j);
        store(to + j, widen(width == 4 ? x & 15 : x) * scale + offset);
        if (width == 4) store(to + bytes + j, widen(x >> 4) * scale + offset);
    }
    for (; j < bytes; j++) {
        to[j] = float(width == 4 ? from[j] & 15 : from[j]) * scale + offset;
        if (width == 4) to[bytes + j] = float(from[j] >> 4) * scale + offset;
    }
}

inline vf choose(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

// Lowest and highest of a row; NaN where it holds one.
inline void range(const float* x, long D, float& low, float& high) {
    vf least = fill(x[0]), most = least;
    vi nan = {};
    long d = 0;
    for (; d + LANES <= D; d += LANES) {
        const vf v = load(x + d);
        least = choose(v < least, v, least), most = choose(v > most, v, most), nan |= v != v;
    }
    low = high = x[0];
    bool bad = false;
    for (long i = 0; i < LANES; i++) low = std::min(low, least[i]), high = std::max(high, most[i]), bad |= nan[i] != 0;
    for (; d < D; d++) low = std::min(low, x[d]), high = std::max(high, x[d]), bad |= x[d] != x[d];
    if (bad) low = high = from_bits(0x7fc00000u);
}

// float32 [D] -> the numbers of a row, one a byte; returns its pair. Divisions, not products with an inverse: kv_quant.py's numbers.
inline uint32_t quantise(const float* x, long D, int levels, uint8_t* number) {
    constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: a sum with it is an integer, rounded to nearest even, in its low bits
    float low, high;
    range(x, D, low, high);
    const float offset = floor_bf16(low), least = ceil_bf16((high - offset) / float(levels));
    const float scale = least < TINY ? TINY : least;
    long d = 0;
    for (; d + LANES <= D; d += LANES) {
        const vf n = (load(x + d) - offset) / scale + ROUND;
        const vi whole = ((vi)n - int(to_bits(ROUND))) & (n == n), over = whole > levels;
        *reinterpret_cast<vb*>(number + d) = __builtin_convertvector((over & levels) | (~over & whole), vb);
    }
    for (; d < D; d++) {
        const float n = (x[d] - offset) / scale + ROUND;
        number[d] = n == n ? uint8_t(std::min(int(to_bits(n) - to_bits(ROUND)), levels)) : uint8_t(0);
    }
    return to_bits(scale) >> 16 | (to_bits(offset) & 0xffff0000u);
}

// A row of activations to its place in the cache.
template <typename E>
inline void write_row(const Store& s, long block, long head, long slot, const E* x, long D) {
    char* to = s.rows + block * s.block + head * s.head + slot * s.row_bytes(D, sizeof(E));
    if (!s.quantised()) {
        std::memcpy(to, x, D * sizeof(E));
        return;
    }
    float row[MAX_DIMS];
    uint8_t number[MAX_DIMS];
    for (long d = 0; d < D; d++) row[d] = to_float(x[d]);
    s.pairs[block * s.pair_block + head * s.pair_head + slot] = quantise(row, D, s.width == 8 ? 255 : 15, number);
    if (s.width == 4)
        for (long j = 0; j < D / 2; j++) number[j] = uint8_t(number[j] | number[D / 2 + j] << 4);
    std::memcpy(to, number, s.row_bytes(D, sizeof(E)));
}

}  // namespace lmd
