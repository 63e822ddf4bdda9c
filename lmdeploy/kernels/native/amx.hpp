// AMX tile set-up and the 16 x 16 transposes that feed it. Only compiled where the CPU has AMX bf16 and AVX512 bf16.
#pragma once
#include "common.hpp"
#ifdef LMD_AMX
#include <immintrin.h>

namespace lmd {

constexpr long TILE = 512;  // bf16 elements of a full tile: 16 rows of 32

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
template <int C, int A, int B>
inline void tile_dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
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

// bf16 rows [rows][cols] -> one tile whose row p holds (x[r][2p], x[r][2p + 1]) for r = 0..15: the right-hand operand of
// tdpbf16ps with the rows of x as columns. Missing rows and columns are zero.
inline void pack_columns(const bf16* x, long stride, long rows, long cols, bf16* tile) {
    __m512i r[16];
    const __mmask32 mask = cols >= 32 ? 0xffffffffu : ((1u << cols) - 1u);
    for (int i = 0; i < 16; i++)
        r[i] = i < rows ? _mm512_maskz_loadu_epi16(mask, x + i * stride) : _mm512_setzero_si512();
    transpose16(r);
    for (int i = 0; i < 16; i++) _mm512_store_si512(tile + 32 * i, r[i]);
}

// bf16 rows -> a left-hand tile: copied as they are, missing rows and columns zero.
inline void pack_rows(const bf16* x, long stride, long rows, long cols, bf16* tile) {
    const __mmask32 mask = cols >= 32 ? 0xffffffffu : ((1u << cols) - 1u);
    for (int i = 0; i < 16; i++)
        _mm512_store_si512(tile + 32 * i, i < rows ? _mm512_maskz_loadu_epi16(mask, x + i * stride) : _mm512_setzero_si512());
}

}  // namespace lmd
#endif
