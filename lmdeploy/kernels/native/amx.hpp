// AMX tile set-up and the 16 x 16 transposes that feed it. Only compiled where the CPU has AMX bf16 and AVX512 bf16.
#pragma once
#include "common.hpp"
#ifdef LMD_AMX
#include <immintrin.h>

#include <type_traits>

namespace lmd {

constexpr long TILE = 512;  // bf16 elements of a full tile: 16 rows of 32; or 1024 of int8

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Tiles are per-thread state; the destructor gives them up so that the kernel need not save 8 KiB at each switch.
// Tiles 4 and 5 are left-hand operands everywhere; the others may have fewer than 16 columns.
struct Tiles {
    explicit Tiles(long columns = 16) {
        TileConfig c;
        for (int i = 0; i < 8; i++) c.row_bytes[i] = i == 4 || i == 5 ? 64 : uint16_t(4 * columns), c.rows[i] = 16;
        _tile_loadconfig(&c);
    }
    ~Tiles() { _tile_release(); }
};

// Tile instructions as functions. Not the compiler's macros: their loads do not say that they read memory, so a packing
// store before them may be moved behind.
template <int R>
inline void tile_load(const void* p, long stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(R) : "memory");
}
template <int R>
inline void tile_store(void* p, long stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(R) : "memory");
}
template <int R>
inline void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(R));
}
// Sums of bf16 pairs in float, or of int8 fours in int32, which are exact.
template <int C, int A, int B, typename Sum = float>
inline void tile_dot() {
    static_assert(sizeof(Sum) == 4);
    if constexpr (std::is_same_v<Sum, float>) asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
    else asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// Transpose 16 x 16 dwords in registers.
inline void transpose16(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    }
}

inline __mmask64 first_bytes(long count) { return count >= 64 ? ~0ull : count <= 0 ? 0 : (1ull << count) - 1; }

// Rows of bytes -> one tile whose row p holds the 4 bytes at 4p of each row r = 0..15: the right-hand operand with the rows of x
// as columns. Missing rows and bytes are zero. `columns` 4 or 8: a narrower tile, for that many rows of x at most.
inline void pack_columns(const char* x, long stride, long rows, long bytes, bf16* tile, long columns = 16) {
    __m512i r[16];
    const __mmask64 mask = first_bytes(bytes);
    for (int i = 0; i < 16; i++) r[i] = i < rows ? _mm512_maskz_loadu_epi8(mask, x + i * stride) : _mm512_setzero_si512();
    transpose16(r);
    if (columns == 16)
        for (int i = 0; i < 16; i++) _mm512_store_si512(tile + 32 * i, r[i]);
    else
        for (int i = 0; i < 16; i++) _mm256_mask_storeu_epi32(tile + 2 * columns * i, columns == 8 ? 0xff : 0xf, _mm512_castsi512_si256(r[i]));
}
inline void pack_columns(const bf16* x, long stride, long rows, long count, bf16* tile, long columns = 16) {
    pack_columns((const char*)x, 2 * stride, rows, 2 * count, tile, columns);
}

// Rows of bytes -> a left-hand tile: copied as they are, missing rows and bytes zero.
inline void pack_rows(const char* x, long stride, long rows, long bytes, bf16* tile) {
    const __mmask64 mask = first_bytes(bytes);
    for (int i = 0; i < 16; i++)
        _mm512_store_si512(tile + 32 * i, i < rows ? _mm512_maskz_loadu_epi8(mask, x + i * stride) : _mm512_setzero_si512());
}

}  // namespace lmd
#endif
