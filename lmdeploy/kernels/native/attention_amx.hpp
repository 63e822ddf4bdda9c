// Attention of bf16 heads with AMX: scores S = Q K^T and sums O += P V in tiles of 16 rows, softmax between them with one
// query per row. tdpbf16ps gives an element the same bits in S^T = K Q^T as in S, which decides between two ways:
// few query rows take cache rows as they are (left tiles) and transpose the scores, many have the keys packed once.
#pragma once
#include "amx.hpp"
#include "attention.hpp"
#ifdef LMD_AMX
#include "unpack.hpp"

namespace lmd {

alignas(64) static const bf16 zeros[256] = {};
constexpr long GROUP = 4;      // blocks packed together, so that a query tile's sums stay in L1 meanwhile
constexpr long FEW_TILES = 2;  // query tiles for which packing the keys does not pay
constexpr long FEW_ROWS = 4;   // query rows whose scores are gathered one by one

// Brings the next block's rows to L2 bit by bit: all at once they would wait for each other, and the arithmetic for them.
// How many rows each step fetches was found by trial: 1 a pair of values, 2 around the scores, 1 a tile of sums.
struct Ahead {
    const char *const *key, *const *value;
    long count, key_bytes, value_bytes, next = 0;

    void fetch(long rows) {
        for (const long stop = std::min(count, next + rows); next < stop; next++) {
            for (long i = 0; i < key_bytes; i += 64) _mm_prefetch(key[next] + i, _MM_HINT_T1);
            for (long i = 0; i < value_bytes; i += 64) _mm_prefetch(value[next] + i, _MM_HINT_T1);
        }
    }
};

struct AmxKernel {
    using Element = bf16;
    const AttentionArgs& p;
    const Task& t;
    Span span;
    long rows, tiles, k_steps, d_blocks, wide;  // query tiles of 16 rows; D / 32 and D / 16 rounded up; D rounded up to 32
    long key_bytes, value_bytes;                // of a row
    bf16 *queries, *keys, *values, *weights;    // [rows][wide] or right-hand tiles; tiles [block][4][k step]; pairs [block][32][2 wide]; left-hand tiles [2][2]
    bf16* plain;                                // rows [BLOCK][wide] of a quantised store, written out
    float *scores, *columns;                    // [32][BLOCK]; S^T [BLOCK][16]
    int32_t* place;                             // position of each row
    float* states[2];
    bool few;

    AmxKernel(const AttentionArgs& p, const Task& t) : p(p), t(t), span(p, t) {
        rows = t.tokens * (p.H / p.K), tiles = (rows + 15) / 16, few = tiles <= FEW_TILES;
        k_steps = (p.D + 31) / 32, d_blocks = (p.D + 15) / 16, wide = 32 * k_steps;
        key_bytes = p.key.row_bytes(p.D, 2), value_bytes = p.value.row_bytes(p.D, 2);
        const size_t halves = (tiles * k_steps + 8 * GROUP * k_steps + 4 + 4 * k_steps) * TILE, state = State::floats(rows, p.D);
        const size_t words = 32 * BLOCK + BLOCK * 16 + 16 * tiles + 2 * state;
        queries = (bf16*)scratch(halves * 2 + words * 4, 1);
        keys = queries + tiles * k_steps * TILE, values = keys + GROUP * 4 * k_steps * TILE, weights = values + GROUP * 4 * k_steps * TILE;
        plain = weights + 4 * TILE;
        scores = (float*)(plain + 4 * k_steps * TILE), columns = scores + 32 * BLOCK;
        states[0] = columns + BLOCK * 16, states[1] = states[0] + state;
        place = (int32_t*)(states[1] + state);
        prepare();
        shape();
    }

    // Queries as left-hand tiles are rows; as right-hand tiles they are packed.
    void prepare() const {
        const long G = p.H / p.K;
        for (long r = 0, token = 0, head = 0; r < 16 * tiles; r++) {
            place[r] = int32_t(span.position + std::min(token, t.tokens - 1));
            if (++head == G) token++, head = 0;
        }
        bf16* row = few ? keys : queries;  // `keys` is free until the first block
        std::memset(weights, 0, (4 + 4 * k_steps) * TILE * sizeof(bf16));  // and `plain`: dims from D to `wide` stay zero
        if (!few) std::memset(queries + (tiles - 1) * 16 * wide, 0, 16 * wide * sizeof(bf16));
        for (long i = 0; i < tiles; i++) {
            if (few) std::memset(keys, 0, 16 * wide * sizeof(bf16));
            for (long r = 16 * i; r < std::min(16 * i + 16, rows); r++) {
                bf16* to = row + (few ? r - 16 * i : r) * wide;
                const bf16* from = query_row<bf16>(p, t, r);
                for (long d = 0; d < p.D; d += 32) _mm512_store_si512(to + d, _mm512_maskz_loadu_epi16(dims(d), from + d));
            }
            for (long k = 0; few && k < k_steps; k++) pack_columns(keys + 32 * k, wide, 16, 32, queries + (i * k_steps + k) * TILE);
        }
        if (p.D % 32 == 0) return;  // dims from D on are never written
        if (few && p.key.quantised()) std::memset(keys, 0, BLOCK * wide * sizeof(bf16));
        if (p.value.quantised()) std::memset(values, 0, (few ? 1 : GROUP) * BLOCK * wide * sizeof(bf16));
    }

    __mmask32 dims(long d) const { return p.D - d >= 32 ? 0xffffffffu : (1u << (p.D - d)) - 1u; }

    // Keys as right-hand tiles [16 keys][k step]; those from `count` on are zero.
    void pack_keys(const bf16* const* row, long count, bf16* to) const {
        const long steps = k_steps, whole = p.D / 32;
        const __mmask32 tail = dims(32 * whole);
        for (long i = 0; i < rounded(count, 32); i += 16)
            for (long k = 0; k < steps; k++, to += TILE) {
                __m512i r[16];
                for (long j = 0; j < 16; j++) {
                    const bf16* from = (i + j < count ? row[i + j] : zeros) + 32 * k;
                    r[j] = k < whole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(tail, from);
                }
                transpose16(r);
                for (long j = 0; j < 16; j++) _mm512_store_si512(to + 32 * j, r[j]);
            }
    }

    // Values as rows of pairs: a right-hand tile of 32 keys x 16 dims is 16 of them, 64 bytes each. Keys from `count` on are zero: unwritten slots may hold NaN.
    void pack_values(const bf16* const* row, long count, bf16* to, Ahead& ahead) const {
        alignas(64) static const uint16_t order[32] = {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
                                                       8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
        const __m512i low = _mm512_load_si512(order), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
        const long steps = k_steps, whole = p.D / 32, pairs = rounded(count, 32) / 2;
        const __mmask32 tail = dims(32 * whole);
        for (long j = 0; j < pairs; j++, to += 64 * steps) {
            ahead.fetch(1);
            const bf16 *even = 2 * j < count ? row[2 * j] : zeros, *odd = 2 * j + 1 < count ? row[2 * j + 1] : zeros;
            const auto put_pairs = [&](__m512i x, __m512i y, bf16* at) {
                _mm512_store_si512(at, _mm512_permutex2var_epi16(x, low, y));
                _mm512_store_si512(at + 32, _mm512_permutex2var_epi16(x, high, y));
            };
            for (long k = 0; k < whole; k++) put_pairs(_mm512_loadu_si512(even + 32 * k), _mm512_loadu_si512(odd + 32 * k), to + 64 * k);
            if (whole < steps) put_pairs(_mm512_maskz_loadu_epi16(tail, even + 32 * whole), _mm512_maskz_loadu_epi16(tail, odd + 32 * whole), to + 64 * whole);
        }
    }

    // The same of quantised values; dims from D on stay as they are.
    void pack_values(const Store& from, const Rows& rows, long count, bf16* to, Ahead& ahead) const {
        if (!from.quantised()) return pack_values((const bf16* const*)rows.at, count, to, ahead);
        p.D == 64 ? pair_values<64>(from, rows, count, to, ahead) : p.D == 128 ? pair_values<128>(from, rows, count, to, ahead) : pair_values<0>(from, rows, count, to, ahead);
    }

    template <long DIMS>
    void pair_values(const Store& from, const Rows& rows, long count, bf16* to, Ahead& ahead) const {
        const uint32_t nothing = 0;
        for (long j = 0; j < rounded(count, 32); j += 2, to += 2 * wide) {
            ahead.fetch(1);
            const bool one = j < count, two = j + 1 < count;
            const char *even = one ? rows.at[j] : (const char*)zeros, *odd = two ? rows.at[j + 1] : (const char*)zeros;
            const uint32_t &a = one ? rows.pair[j] : nothing, &b = two ? rows.pair[j + 1] : nothing;
            from.width == 8 ? pair8<DIMS>(even, odd, a, b, p.D, to) : pair4<DIMS>(even, odd, a, b, p.D, to);
        }
    }

    // S of one or two query tiles with packed keys.
    template <int N>
    void score_packed(long tile, long halves, const bf16* packed) const {
        const bf16* q = queries + tile * 16 * wide;
        for (long half = 0; half < halves; half++) {
            const bf16* k = packed + half * 2 * k_steps * TILE;
            tile_zero<0>(), tile_zero<1>();
            if (N == 2) tile_zero<2>(), tile_zero<3>();
            for (long s = 0; s < k_steps; s++) {
                tile_load<6>(k + s * TILE, 64), tile_load<7>(k + (k_steps + s) * TILE, 64);
                tile_load<4>(q + 32 * s, wide * 2), tile_dot<0, 4, 6>(), tile_dot<1, 4, 7>();
                if (N == 2) tile_load<5>(q + 16 * wide + 32 * s, wide * 2), tile_dot<2, 5, 6>(), tile_dot<3, 5, 7>();
            }
            float* to = scores + 32 * half;
            tile_store<0>(to, BLOCK * 4), tile_store<1>(to + 16, BLOCK * 4);
            if (N == 2) tile_store<2>(to + 16 * BLOCK, BLOCK * 4), tile_store<3>(to + 16 * BLOCK + 16, BLOCK * 4);
        }
    }

    // Where 16 keys x 32 dims can be loaded from: the cache itself unless rows have odd sizes or a tile would cross its blocks.
    void place_keys(const bf16* const* row, long count, const bf16* at[4], long& stride, long& step) const {
        if (p.key.quantised()) {  // rows were written to `keys`, tiles are where they are
            stride = wide * 2, step = 32;
            for (long i = 0; i < 4; i++) at[i] = keys + 16 * i * wide;
            return;
        }
        const bool direct = p.D % 32 == 0 && p.S % 16 == 0;
        stride = direct ? p.D * 2 : 64, step = direct ? 32 : TILE;
        for (long i = 0; i < 4; i++) {
            at[i] = direct ? row[std::min(16 * i, (count - 1) / 16 * 16)] : keys + i * k_steps * TILE;  // past the end: masked later
            for (long r = 0; !direct && r < 16; r++)
                for (long k = 0; k < k_steps; k++) {
                    const __m512i x = 16 * i + r < count ? _mm512_maskz_loadu_epi16(dims(32 * k), row[16 * i + r] + 32 * k) : _mm512_setzero_si512();
                    _mm512_store_si512(keys + (i * k_steps + k) * TILE + 32 * r, x);
                }
        }
    }

    // S of one query tile from S^T; a few rows are gathered, more are transposed.
    void score_placed(long tile, long halves, const bf16* const at[4], long stride, long step, Ahead& ahead) const {
        for (long i = 0; i < 2 * halves; i += 2) {
            tile_zero<0>(), tile_zero<1>();
            for (long k = 0; k < k_steps; k++) {
                tile_load<6>(queries + (tile * k_steps + k) * TILE, 64);
                tile_load<4>(at[i] + k * step, stride), tile_dot<0, 4, 6>();
                ahead.fetch(1);
                tile_load<5>(at[i + 1] + k * step, stride), tile_dot<1, 5, 6>();
            }
            tile_store<0>(columns + 256 * i, 64), tile_store<1>(columns + 256 * (i + 1), 64);
        }
        const __m512i line = _mm512_slli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 4);
        for (long i = 0; i < 2 * halves; i++) {
            ahead.fetch(2);
            if (rows <= FEW_ROWS) {
                for (long j = 0; j < rows; j++) _mm512_store_ps(scores + BLOCK * j + 16 * i, _mm512_i32gather_ps(line, columns + 256 * i + j, 4));
                continue;
            }
            __m512i r[16];
            for (long j = 0; j < 16; j++) r[j] = _mm512_load_si512(columns + 256 * i + 16 * j);
            transpose16(r);
            for (long j = 0; j < 16; j++) _mm512_store_si512(scores + BLOCK * j + 16 * i, r[j]);
        }
    }

    // Which of the block's keys a row sees.
    uint64_t seen(long row, long base) const {
        const long last = place[row] - base, first = p.window > 0 ? std::max(0L, last - p.window + 1) : 0;
        if (last < 0 || first >= BLOCK) return 0;
        return ~0ull >> (63 - std::min(last, BLOCK - 1)) & ~0ull << first;
    }

    // Lane i: the highest lane of most[i].
    static __m512 highest(const __m512 most[16], long live) {
        if (live > FEW_ROWS) return reduce16(most, [](__m512 a, __m512 b) { return _mm512_max_ps(a, b); });
        __m512 all = _mm512_set1_ps(NEVER);
        for (long i = 0; i < live; i++) all = _mm512_mask_mov_ps(all, __mmask16(1u << i), _mm512_set1_ps(_mm512_reduce_max_ps(most[i])));
        return all;
    }

    // Scores of a tile -> weights as left-hand tiles; sums are rescaled where the maximum rose.
    template <bool WHOLE>
    void softmax(const State& s, long tile, const float* score, long base, long halves, bf16* weight) const {
        const long live = std::min(16L, rows - 16 * tile);
        const __m512 never = _mm512_set1_ps(NEVER), scale = _mm512_set1_ps(p.scale * LOG2E);
        __m512 most[16];
        uint64_t mask[16];
        for (long r = 0; r < 16; r++) {
            most[r] = never;
            if (r >= live) continue;
            if (!WHOLE) mask[r] = seen(16 * tile + r, base);
            for (long i = 0; i < 2 * halves; i++) {
                const __m512 x = _mm512_load_ps(score + BLOCK * r + 16 * i);
                most[r] = WHOLE ? _mm512_max_ps(most[r], x) : _mm512_mask_max_ps(most[r], __mmask16(mask[r] >> (16 * i)), most[r], x);
            }
        }
        float *top = s.top + 16 * tile, *total = s.total + 16 * tile * LANES;
        const __m512 before = _mm512_load_ps(top), high = _mm512_max_ps(before, _mm512_mul_ps(highest(most, live), scale));
        alignas(64) float keep[16];
        _mm512_store_ps(keep, (__m512)exp2((vf)_mm512_sub_ps(before, high)));
        _mm512_store_ps(top, high);
        for (uint32_t rose = _mm512_cmp_ps_mask(before, high, _CMP_NEQ_UQ); rose; rose &= rose - 1) {
            const long r = __builtin_ctz(rose);
            float* o = s.sums + (16 * tile + r) * wide;
            for (long d = 0; d < wide; d += 16) _mm512_store_ps(o + d, _mm512_mul_ps(_mm512_load_ps(o + d), _mm512_set1_ps(keep[r])));
        }
        for (long r = 0; r < live; r++) {
            const __m512 shift = _mm512_set1_ps(top[r]);
            __m512 w[4] = {};
            for (long i = 0; i < 2 * halves; i++) {
                w[i] = (__m512)exp2((vf)_mm512_fmsub_ps(_mm512_load_ps(score + BLOCK * r + 16 * i), scale, shift));
                if (!WHOLE) w[i] = _mm512_maskz_mov_ps(__mmask16(mask[r] >> (16 * i)), w[i]);
            }
            const __m512 added = _mm512_add_ps(_mm512_add_ps(w[0], w[1]), _mm512_add_ps(w[2], w[3]));
            _mm512_store_ps(total + r * LANES, _mm512_fmadd_ps(_mm512_load_ps(total + r * LANES), _mm512_set1_ps(keep[r]), added));
            for (long i = 0; i < halves; i++) _mm512_store_si512(weight + i * TILE + 32 * r, (__m512i)_mm512_cvtne2ps_pbh(w[2 * i + 1], w[2 * i]));
        }
    }

    // O += P V of one or two query tiles.
    template <int N>
    void accumulate(const State& s, long tile, long halves, const bf16* v, Ahead& ahead) const {
        float *o = s.sums + tile * 16 * wide, *o2 = o + 16 * wide;
        const long row = wide * 4;
        tile_load<4>(weights, 64);
        if (halves == 2) tile_load<5>(weights + TILE, 64);
        if (N == 2) tile_load<6>(weights + 2 * TILE, 64);
        if (N == 2 && halves == 2) tile_load<7>(weights + 3 * TILE, 64);
        for (long d = 0; d < d_blocks; d++) {
            ahead.fetch(1);
            tile_load<0>(o + 16 * d, row);
            tile_load<2>(v + 32 * d, row), tile_dot<0, 4, 2>();
            if (N == 2) tile_load<1>(o2 + 16 * d, row), tile_dot<1, 6, 2>();
            if (halves == 2) {
                tile_load<3>(v + 32 * (wide + d), row), tile_dot<0, 5, 3>();
                if (N == 2) tile_dot<1, 7, 3>();
            }
            tile_store<0>(o + 16 * d, row);
            if (N == 2) tile_store<1>(o2 + 16 * d, row);
        }
    }

    // The same of one tile whose rows beyond the live ones are left out: tiles of `shape`.
    void accumulate_few(const State& s, long tile, long halves, const bf16* v, Ahead& ahead) const {
        float* o = s.sums + tile * 16 * wide;
        const long row = wide * 4;
        const auto add = [&](auto C, auto V, long d) {
            constexpr int c = decltype(C)::value, b = decltype(V)::value;
            tile_load<c>(o + 16 * d, row);
            tile_load<7>(weights, 64), tile_load<b>(v + 32 * d, row), tile_dot<c, 7, b>();
            if (halves == 2) tile_load<7>(weights + TILE, 64), tile_load<b>(v + 32 * (wide + d), row), tile_dot<c, 7, b>();
            tile_store<c>(o + 16 * d, row);
        };
        for (long d = 0; d < d_blocks; d += 2) {
            ahead.fetch(2);
            add(std::integral_constant<int, 2>(), std::integral_constant<int, 4>(), d);
            if (d + 1 < d_blocks) add(std::integral_constant<int, 3>(), std::integral_constant<int, 5>(), d + 1);
        }
    }

    // Few rows: scores are tiles 0 and 1 of 16 keys x live queries, queries tile 6; sums 2 and 3 and weights 7 have only the live rows.
    void shape() const {
        const long live = tiles == 1 ? rows : 16;
        TileConfig c;
        for (int i = 0; i < 8; i++) c.rows[i] = 16, c.row_bytes[i] = 64;
        if (few) {
            for (int i : {0, 1, 6}) c.row_bytes[i] = uint16_t(4 * live);
            for (int i : {2, 3, 7}) c.rows[i] = uint8_t(live);
        }
        asm volatile("ldtilecfg %0" ::"m"(c) : "memory");
    }

    // One block of keys with N query tiles from `tile` on; `score(halves)` makes S.
    template <int N, class Score>
    void meet(const State& s, long tile, long base, const bf16* v, Ahead& ahead, const Score& score) const {
        const long low = place[16 * tile], high = place[16 * (tile + N) - 1];
        if (high < base || (p.window > 0 && low - p.window + 1 >= base + BLOCK)) return;
        const long halves = high - base >= 32 ? 2 : 1;
        const bool whole = low - base >= BLOCK - 1 && (p.window <= 0 || high - p.window + 1 <= base);
        score(halves);
        for (long i = 0; i < N; i++) {
            if (whole) softmax<true>(s, tile + i, scores + i * 16 * BLOCK, base, halves, weights + i * 2 * TILE);
            else softmax<false>(s, tile + i, scores + i * 16 * BLOCK, base, halves, weights + i * 2 * TILE);
        }
        if (few) accumulate_few(s, tile, halves, v, ahead);
        else accumulate<N>(s, tile, halves, v, ahead);
    }

    // A group of packed blocks with N query tiles.
    template <int N>
    void meet_group(const State& s, long tile, long first, long end, Ahead& ahead) const {
        for (long base = first, at = 0; base < end; base += BLOCK, at += 4 * k_steps * TILE)
            meet<N>(s, tile, base, values + at, ahead, [&](long halves) { score_packed<N>(tile, halves, keys + at); });
    }

    // Rows of bf16: the cache's own, or those of a quantised store written to `to`.
    void write_out(const Store& from, const Rows& rows, long count, bf16* to, const bf16** row) const {
        for (long j = 0; j < count; j++) row[j] = from.quantised() ? to + j * wide : (const bf16*)rows.at[j];
        if (!from.quantised()) return;
        p.D == 64 ? unpack<64>(from, rows, count, to) : p.D == 128 ? unpack<128>(from, rows, count, to) : unpack<0>(from, rows, count, to);
    }

    template <long DIMS>
    void unpack(const Store& from, const Rows& rows, long count, bf16* to) const {
        const __m512i first = _mm512_setzero_si512(), second = _mm512_set1_epi16(16);
        for (long j = 0; from.width == 8 && j < count; j++) unpack8<DIMS>(rows.at[j], rows.pair[j], p.D, to + j * wide);
        for (long j = 0; from.width == 4 && j < count; j += 2) {
            const long next = std::min(j + 1, count - 1);
            const __m512i table = levels(rows.pair[j], rows.pair[next]);
            unpack4<DIMS>(rows.at[j], table, first, p.D, to + j * wide);
            if (next > j) unpack4<DIMS>(rows.at[next], table, second, p.D, to + next * wide);
        }
    }

    void run_many(const State& s, long begin, long end) const {
        Ahead nothing = {nullptr, nullptr, 0, 0, 0};
        for (long first = begin; first < end; first += GROUP * BLOCK) {
            const long last = std::min(end, first + GROUP * BLOCK);
            for (long base = first, at = 0; base < last; base += BLOCK, at += 4 * k_steps * TILE) {
                Rows rows;
                const bf16* row[BLOCK];
                const long count = std::min(BLOCK, last - base);
                find_rows(p, p.key, key_bytes, t, base, count, rows), write_out(p.key, rows, count, plain, row), pack_keys(row, count, keys + at);
                find_rows(p, p.value, value_bytes, t, base, count, rows), pack_values(p.value, rows, count, values + at, nothing);
            }
            long tile = 0;
            for (; tile + 2 <= tiles; tile += 2) meet_group<2>(s, tile, first, last, nothing);
            if (tile < tiles) meet_group<1>(s, tile, first, last, nothing);
        }
    }

    void run_few(const State& s, long begin, long end) const {
        Rows k[2], v[2];
        const bf16 *row[BLOCK], *at[4];
        const auto find = [&](long base, long count, long slot) {
            find_rows(p, p.key, key_bytes, t, base, count, k[slot]), find_rows(p, p.value, value_bytes, t, base, count, v[slot]);
        };
        long count = std::min(BLOCK, end - begin), stride, step;
        find(begin, count, 0);
        for (long base = begin, now = 0; base < end; base += BLOCK, now ^= 1) {
            const long next = std::min(BLOCK, end - base - count);
            if (next > 0) find(base + BLOCK, next, now ^ 1);
            Ahead ahead = {k[now ^ 1].at, v[now ^ 1].at, next, key_bytes, value_bytes};
            write_out(p.key, k[now], count, keys, row);
            place_keys(row, count, at, stride, step);
            pack_values(p.value, v[now], count, values, ahead);
            for (long tile = 0; tile < tiles; tile++)
                meet<1>(s, tile, base, values, ahead, [&](long halves) { score_placed(tile, halves, at, stride, step, ahead); });
            ahead.fetch(BLOCK);
            count = next;
        }
    }

    void run(const State& s, long begin, long end) const { few ? run_few(s, begin, end) : run_many(s, begin, end); }
};

}  // namespace lmd
#endif
