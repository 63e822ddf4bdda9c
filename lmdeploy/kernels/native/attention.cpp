// Causal attention over the paged cache, one pass over the keys with an online softmax.
//
// A task is (sequence, KV head, run of query tokens); the G query heads of the KV head share every key and value read.
// Keys are met in blocks of 64 that start at position 0, whatever the query: so a token's result has the same bits
// decoded alone, prefilled at once, in chunks, or behind a cached prefix. Keys past a query add exactly nothing.
#include <algorithm>
#include <atomic>

#include "amx.hpp"

namespace lmd {

constexpr long BLOCK = 64;       // keys met at once
constexpr long TASK_ROWS = 256;  // query rows (tokens x heads of the group) of one task at most
constexpr long WORTH_THREADS = 1 << 16;  // products of a query with a key element
constexpr float NEVER = -1e30f;  // the maximum before any key was seen; finite, so that NEVER - NEVER is 0

struct AttentionArgs {
    const void *q, *key_cache, *value_cache;
    void* out;
    const int32_t *query_start, *kv_lens, *block_table;
    int64_t q_row, q_head, table_row, block_stride, head_stride, out_row;
    int64_t B, H, K, D, S, window;
    float scale;
};

struct Task {
    long sequence, kv_head, first, tokens;  // `first` counts in the sequence's new tokens
};

// Positions of one task's queries and the keys that they can see.
struct Span {
    long position, kv_len, begin, end;  // position of the first query; keys begin..end, begin a multiple of BLOCK

    Span(const AttentionArgs& p, const Task& t) {
        const long query_len = p.query_start[t.sequence + 1] - p.query_start[t.sequence];
        kv_len = p.kv_lens[t.sequence];
        position = kv_len - query_len + t.first;
        end = position + t.tokens;
        const long lowest = p.window > 0 ? std::max(0L, position - p.window + 1) : 0;
        begin = lowest / BLOCK * BLOCK;
    }
};

template <typename E>
static const E* cache_row(const AttentionArgs& p, const void* cache, const Task& t, long position) {
    const long block = p.block_table[t.sequence * p.table_row + position / p.S];
    return (const E*)cache + block * p.block_stride + t.kv_head * p.head_stride + position % p.S * p.D;
}

template <typename E>
static const E* query_row(const AttentionArgs& p, const Task& t, long row) {  // row = token * G + head of the group
    const long G = p.H / p.K;
    return (const E*)p.q + (p.query_start[t.sequence] + t.first + row / G) * p.q_row + (t.kv_head * G + row % G) * p.q_head;
}

template <typename E>
static E* out_row(const AttentionArgs& p, const Task& t, long row) {
    const long G = p.H / p.K;
    return (E*)p.out + (p.query_start[t.sequence] + t.first + row / G) * p.out_row + (t.kv_head * G + row % G) * p.D;
}

// ---- any type, any instruction set -----------------------------------------------------------------------------------

// Lanes are keys in the scores and dims in the sums; both chains run in one order for every query.
template <typename E>
static void attend_plain(const AttentionArgs& p, const Task& t) {
    const long G = p.H / p.K, rows = t.tokens * G, wide = (p.D + LANES - 1) / LANES * LANES;
    const Span span(p, t);
    float* keys = (float*)scratch((2 * BLOCK * wide + rows * (2 * wide + 2)) * sizeof(float), 1);  // [D][BLOCK]
    float *values = keys + BLOCK * wide, *queries = values + BLOCK * wide;                          // [BLOCK][wide], [rows][wide]
    float *sums = queries + rows * wide, *highest = sums + rows * wide, *total = highest + rows;
    std::memset(values, 0, BLOCK * wide * sizeof(float));
    for (long r = 0; r < rows; r++) {
        const E* q = query_row<E>(p, t, r);
        for (long d = 0; d < p.D; d++) queries[r * wide + d] = to_float(q[d]) * p.scale;
        std::memset(sums + r * wide, 0, wide * sizeof(float));
        highest[r] = NEVER, total[r] = 0;
    }
    for (long base = span.begin; base < span.end; base += BLOCK) {
        const long count = std::min(BLOCK, span.end - base);
        for (long j = 0; j < count; j++) {
            const E *k = cache_row<E>(p, p.key_cache, t, base + j), *v = cache_row<E>(p, p.value_cache, t, base + j);
            for (long d = 0; d < p.D; d++) keys[d * BLOCK + j] = to_float(k[d]), values[j * wide + d] = to_float(v[d]);
        }
        for (long r = 0; r < rows; r++) {
            const long at = span.position + r / G;
            const long low = std::max(0L, p.window > 0 ? at - p.window + 1 - base : 0L), high = std::min(count, at + 1 - base);
            if (low >= high) continue;
            vf s[BLOCK / LANES] = {};
            const float* q = queries + r * wide;
            for (long d = 0; d < p.D; d++)
                for (long i = 0; i < BLOCK / LANES; i++) s[i] += q[d] * load(keys + d * BLOCK + i * LANES);
            alignas(64) float w[BLOCK];
            for (long i = 0; i < BLOCK / LANES; i++) store(w + i * LANES, s[i]);
            float top = highest[r];
            for (long j = low; j < high; j++) top = std::max(top, w[j]);
            for (long j = 0; j < BLOCK; j++) w[j] = j >= low && j < high ? w[j] - top : NEVER;
            for (long i = 0; i < BLOCK / LANES; i++) store(w + i * LANES, exp(load(w + i * LANES)));
            const float keep = exp(fill(highest[r] - top))[0];
            float added = total[r] * keep;
            for (long j = low; j < high; j++) added += w[j];
            total[r] = added, highest[r] = top;
            for (long d = 0; d < wide; d += LANES) {
                vf acc = load(sums + r * wide + d) * keep;
                for (long j = low; j < high; j++) acc += w[j] * load(values + j * wide + d);
                store(sums + r * wide + d, acc);
            }
        }
    }
    for (long r = 0; r < rows; r++) {
        E* o = out_row<E>(p, t, r);
        for (long d = 0; d < p.D; d++) put(o + d, sums[r * wide + d] / total[r]);
    }
}

#ifdef LMD_AMX
// ---- bf16 with AMX ---------------------------------------------------------------------------------------------------

// Scores are S^T [keys][queries] = K Q^T with the cache rows as left tiles, the output is O^T [D][queries] = V^T P^T: lanes
// are queries throughout, so the softmax needs no reduction across lanes and 1 query costs what 16 do.
struct AmxTask {
    const AttentionArgs& p;
    const Task& t;
    Span span;
    long G, rows, tiles, k_steps, d_blocks;  // query tiles of 16 rows; D / 32 and D / 16 rounded up
    bf16 *queries, *values, *keys, *weights;  // right-hand tiles [tile][k step]; V^T tiles [d block][2]; K tiles [4][k step]; P^T tiles [2]
    float *scores, *sums;                    // [BLOCK][16]; [tile][d block * 16][16]
    float *highest, *total;                  // [tile][16]

    AmxTask(const AttentionArgs& p, const Task& t) : p(p), t(t), span(p, t) {
        G = p.H / p.K, rows = t.tokens * G, tiles = (rows + 15) / 16;
        k_steps = (p.D + 31) / 32, d_blocks = (p.D + 15) / 16;
        const size_t halves = (tiles * k_steps + d_blocks * 2 + 4 * k_steps + 2) * TILE;
        const size_t floats = BLOCK * 16 + tiles * d_blocks * 256 + tiles * 32;
        queries = (bf16*)scratch(halves * 2 + floats * 4, 1);
        values = queries + tiles * k_steps * TILE, keys = values + d_blocks * 2 * TILE, weights = keys + 4 * k_steps * TILE;
        scores = (float*)(weights + 2 * TILE), sums = scores + BLOCK * 16;
        highest = sums + tiles * d_blocks * 256, total = highest + tiles * 16;
    }

    void pack_queries() const {
        for (long i = 0; i < tiles; i++)
            for (long k = 0; k < k_steps; k++) {
                alignas(64) bf16 raw[TILE] = {};
                for (long r = 0; r < std::min(16L, rows - 16 * i); r++)
                    std::memcpy(raw + 32 * r, query_row<bf16>(p, t, 16 * i + r) + 32 * k, 2 * std::min(32L, p.D - 32 * k));
                pack_columns(raw, 32, 16, 32, queries + (i * k_steps + k) * TILE);
            }
        std::memset(sums, 0, tiles * d_blocks * 256 * sizeof(float));
        std::fill(highest, highest + tiles * 16, NEVER);
        std::fill(total, total + tiles * 16, 0.0f);
    }

    // V rows of one block -> V^T tiles [16 d][32 keys]; keys from `count` on are zero: unwritten slots may hold NaN.
    void pack_values(long base, long count) const {
        const bf16* row[BLOCK];
        for (long j = 0; j < count; j++) row[j] = cache_row<bf16>(p, p.value_cache, t, base + j);
        for (long d = 0; d < d_blocks; d++) {
            const __mmask16 mask = p.D - 16 * d >= 16 ? 0xffff : __mmask16((1u << (p.D - 16 * d)) - 1u);
            for (long half = 0; half < 2; half++) {
                __m512i pairs[16];
                for (long j = 0; j < 16; j++) {
                    const long key = half * 32 + 2 * j;
                    const __m256i even = key < count ? _mm256_maskz_loadu_epi16(mask, row[key] + 16 * d) : _mm256_setzero_si256();
                    const __m256i odd = key + 1 < count ? _mm256_maskz_loadu_epi16(mask, row[key + 1] + 16 * d) : _mm256_setzero_si256();
                    pairs[j] = _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
                }
                transpose16(pairs);
                for (long j = 0; j < 16; j++) _mm512_store_si512(values + (d * 2 + half) * TILE + 32 * j, pairs[j]);
            }
        }
    }

    // Where each 16 keys x 32 dims tile can be loaded from; packs when rows are not 64-byte multiples or cross cache blocks.
    void place_keys(long base, long count, const bf16* at[4], long& stride, long& step) const {
        const bool direct = p.D % 32 == 0 && p.S % 16 == 0;
        stride = direct ? p.D * 2 : 64, step = direct ? 32 : TILE;
        for (long i = 0; i < 4; i++) {
            const long left = count - 16 * i;
            at[i] = keys + i * k_steps * TILE;
            if (left > 0 && direct) at[i] = cache_row<bf16>(p, p.key_cache, t, base + 16 * i);
            if (direct ? left > 0 : left <= 0) continue;
            if (direct) {  // no keys here: any readable memory of the right shape, the scores are masked
                at[i] = at[0];
                continue;
            }
            for (long k = 0; k < k_steps; k++) {
                alignas(64) bf16 raw[TILE] = {};
                for (long r = 0; r < std::min(16L, left); r++)
                    std::memcpy(raw + 32 * r, cache_row<bf16>(p, p.key_cache, t, base + 16 * i + r) + 32 * k, 2 * std::min(32L, p.D - 32 * k));
                std::memcpy(keys + (i * k_steps + k) * TILE, raw, sizeof raw);
            }
        }
    }

    void score(long tile, const bf16* const at[4], long stride, long step) const {
        tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
        for (long k = 0; k < k_steps; k++) {
            tile_load<6>(queries + (tile * k_steps + k) * TILE, 64);
            tile_load<4>(at[0] + k * step, stride), tile_dot<0, 4, 6>();
            tile_load<5>(at[1] + k * step, stride), tile_dot<1, 5, 6>();
            tile_load<4>(at[2] + k * step, stride), tile_dot<2, 4, 6>();
            tile_load<5>(at[3] + k * step, stride), tile_dot<3, 5, 6>();
        }
        tile_store<0>(scores, 64), tile_store<1>(scores + 256, 64), tile_store<2>(scores + 512, 64), tile_store<3>(scores + 768, 64);
    }

    // Scores -> weights: P^T as right-hand tiles. Rescales the sums where the maximum rose.
    void softmax(long tile, long base) const {
        alignas(64) int32_t last[16], first[16];  // keys of this block that a query sees: first..last
        long least = BLOCK, most = 0;
        for (long i = 0; i < 16; i++) {
            const long at = span.position + std::min(16 * tile + i, rows - 1) / G - base;
            last[i] = int32_t(std::min(at, BLOCK)), first[i] = p.window > 0 ? int32_t(std::max(0L, at - p.window + 1)) : 0;
            least = std::min(least, long(last[i])), most = std::max(most, long(first[i]));
        }
        const bool whole = least >= BLOCK - 1 && most == 0;
        const __m512i low = _mm512_load_si512(first), high = _mm512_load_si512(last);
        const __m512 scale = _mm512_set1_ps(p.scale), never = _mm512_set1_ps(NEVER);
        const __m512 before = _mm512_load_ps(highest + 16 * tile);
        __m512 top = before;
        for (long j = 0; j < BLOCK; j++) {
            __m512 s = _mm512_mul_ps(_mm512_load_ps(scores + 16 * j), scale);
            if (!whole) {
                const __m512i key = _mm512_set1_epi32(int32_t(j));
                s = _mm512_mask_mov_ps(never, _mm512_cmple_epi32_mask(key, high) & _mm512_cmpge_epi32_mask(key, low), s);
            }
            _mm512_store_ps(scores + 16 * j, s);
            top = _mm512_max_ps(top, s);
        }
        const __m512 keep = (__m512)exp((vf)_mm512_sub_ps(before, top));
        __m512 added = _mm512_mul_ps(_mm512_load_ps(total + 16 * tile), keep);
        for (long j = 0; j < BLOCK; j += 2) {
            __m512 w[2];
            for (long i = 0; i < 2; i++) {
                const __m512 s = _mm512_load_ps(scores + 16 * (j + i));
                const __mmask16 seen = whole ? 0xffff : _mm512_cmp_ps_mask(s, never, _CMP_GT_OQ);
                w[i] = _mm512_maskz_mov_ps(seen, (__m512)exp((vf)_mm512_sub_ps(s, top)));
                added = _mm512_add_ps(added, w[i]);
            }
            const __m512i even = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(w[0]));
            const __m512i odd = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(w[1]));
            _mm512_store_si512(weights + 16 * j, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
        }
        _mm512_store_ps(total + 16 * tile, added);
        _mm512_store_ps(highest + 16 * tile, top);
        if (_mm512_cmp_ps_mask(keep, _mm512_set1_ps(1.0f), _CMP_NEQ_UQ)) {
            float* o = sums + tile * d_blocks * 256;
            for (long d = 0; d < d_blocks * 16; d++) _mm512_store_ps(o + 16 * d, _mm512_mul_ps(_mm512_load_ps(o + 16 * d), keep));
        }
    }

    void accumulate(long tile) const {
        tile_load<6>(weights, 64), tile_load<7>(weights + TILE, 64);
        float* o = sums + tile * d_blocks * 256;
        for (long d = 0; d < d_blocks; d++) {
            tile_load<0>(o + d * 256, 64);
            tile_load<4>(values + d * 2 * TILE, 64), tile_dot<0, 4, 6>();
            tile_load<5>(values + (d * 2 + 1) * TILE, 64), tile_dot<0, 5, 7>();
            tile_store<0>(o + d * 256, 64);
        }
    }

    void write(long tile) const {
        const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_load_ps(total + 16 * tile));
        for (long d = 0; d < d_blocks; d++) {
            __m512i r[16];
            const float* o = sums + (tile * d_blocks + d) * 256;
            for (long i = 0; i < 16; i++) r[i] = _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(o + 16 * i), inverse));
            transpose16(r);
            const __mmask16 mask = p.D - 16 * d >= 16 ? 0xffff : __mmask16((1u << (p.D - 16 * d)) - 1u);
            for (long i = 0; i < std::min(16L, rows - 16 * tile); i++)
                _mm256_mask_storeu_epi16(out_row<bf16>(p, t, 16 * tile + i) + 16 * d, mask,
                                         (__m256i)_mm512_cvtneps_pbh(_mm512_castsi512_ps(r[i])));
        }
    }

    void run() const {
        pack_queries();
        for (long base = span.begin; base < span.end; base += BLOCK) {
            const long count = std::min(BLOCK, span.end - base);
            const bf16* at[4];
            long stride, step;
            place_keys(base, count, at, stride, step);
            pack_values(base, count);
            for (long tile = 0; tile < tiles; tile++) {
                const long low = span.position + 16 * tile / G, high = span.position + std::min(16 * tile + 15, rows - 1) / G;
                if (high < base || (p.window > 0 && low - p.window + 1 >= base + BLOCK)) continue;
                score(tile, at, stride, step), softmax(tile, base), accumulate(tile);
            }
        }
        for (long tile = 0; tile < tiles; tile++) write(tile);
    }
};
#endif

// Take tasks until none is left; whoever is free takes the next.
template <typename E>
static void attend(const AttentionArgs& p, const Task* tasks, long n, std::atomic<long>& next) {
#ifdef LMD_AMX
    if constexpr (sizeof(E) == 2) {
        Tiles state;
        for (long i = next++; i < n; i = next++) AmxTask(p, tasks[i]).run();
        return;
    }
#endif
    for (long i = next++; i < n; i = next++) attend_plain<E>(p, tasks[i]);
}

template <typename E>
static void attention(const AttentionArgs& p, int threads) {
    const long chunk = std::max(1L, TASK_ROWS / (p.H / p.K));
    long count = 0, work = 0;
    for (long b = 0; b < p.B; b++) {
        const long length = p.query_start[b + 1] - p.query_start[b];
        count += (length + chunk - 1) / chunk * p.K, work += length * p.kv_lens[b] * p.H * p.D;
    }
    Task* tasks = (Task*)scratch(size_t(count) * sizeof(Task), 3);
    long n = 0;
    for (long b = 0; b < p.B; b++) {  // the last chunk of a prompt sees most keys: it goes first
        const long length = p.query_start[b + 1] - p.query_start[b];
        for (long c = (length + chunk - 1) / chunk - 1; c >= 0; c--)
            for (long h = 0; h < p.K; h++) tasks[n++] = {b, h, c * chunk, std::min(chunk, length - c * chunk)};
    }
    std::atomic<long> next{0};
    const int team = work < WORTH_THREADS ? 1 : threads;
    share(team, team, [&](long, long) { attend<E>(p, tasks, n, next); });
}

}  // namespace lmd

using namespace lmd;

LMD_API void lmd_attention_f32(const AttentionArgs* p, int threads) { attention<float>(*p, threads); }
LMD_API void lmd_attention_bf16(const AttentionArgs* p, int threads) { attention<bf16>(*p, threads); }
