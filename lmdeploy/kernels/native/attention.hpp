// What both attention kernels share: arguments, tasks, the state of a query row and the order in which keys are met.
//
// A row's keys are met in blocks of 64 and in splits of 1024, both counted from position 0 whatever the query. Each split
// starts from an empty state and is merged into the ones before it, in order: so splits may run on different threads, and a
// token's result has the same bits decoded alone, prefilled at once, in chunks, or behind a cached prefix. Keys that a row
// does not see add exactly nothing, so it does not matter which rows a task puts together.
#pragma once
#include <algorithm>

#include "kv_cache.hpp"
#include "rotation.hpp"
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace lmd {

constexpr long BLOCK = 64;       // keys met at once
constexpr long SPLIT = 1024;     // keys whose sums one thread makes alone; a multiple of BLOCK
constexpr long MOST_ROWS = 256, LEAST_ROWS = 64;  // query rows (tokens x heads of the group) of one task at most
constexpr float NEVER = -1e30f;  // the maximum before any key was seen; finite, so that NEVER - NEVER is 0
constexpr float LOG2E = 1.44269504f;

struct AttentionArgs {
    const void* q;
    void* out;
    const int32_t *query_start, *kv_lens, *block_table;
    Store key, value;
    int64_t q_row, q_head, table_row, out_row;
    int64_t B, H, K, D, S, window, rotated;
    float scale;
};

// `first` counts in the sequence's new tokens. With `state`, only keys of split number `split` are met and left there.
struct Task {
    long sequence, kv_head, first, tokens, split;
    float* state;
};

// Positions of one task's queries and the keys that they can see.
struct Span {
    long position, begin, end;  // position of the first query; keys begin..end, begin a multiple of BLOCK

    Span(const AttentionArgs& p, const Task& t) {
        const long query_len = p.query_start[t.sequence + 1] - p.query_start[t.sequence];
        position = p.kv_lens[t.sequence] - query_len + t.first;
        end = position + t.tokens;
        const long lowest = p.window > 0 ? std::max(0L, position - p.window + 1) : 0;
        begin = lowest / BLOCK * BLOCK;
    }
};

// Addresses of up to BLOCK rows of a store, and their pairs where it is quantised.
struct Rows {
    const char* at[BLOCK];
    uint32_t pair[BLOCK];
};

// The `count` rows from `position` on; `bytes` is the size of one.
inline void find_rows(const AttentionArgs& p, const Store& s, long bytes, const Task& t, long position, long count, Rows& rows) {
    const int32_t* table = p.block_table + t.sequence * p.table_row + position / p.S;
    long slot = position % p.S;
    for (long j = 0; j < count; table++, slot = 0) {
        const char* at = s.rows + *table * s.block + t.kv_head * s.head + slot * bytes;
        const long run = std::min(count - j, p.S - slot);
        if (s.quantised()) std::memcpy(rows.pair + j, s.pairs + *table * s.pair_block + t.kv_head * s.pair_head + slot, run * sizeof(uint32_t));
        for (long i = 0; i < run; i++) rows.at[j++] = at + i * bytes;
    }
}

template <typename E>
inline const E* query_row(const AttentionArgs& p, const Task& t, long row) {  // row = token * G + head of the group
    const long G = p.H / p.K;
    return (const E*)p.q + (p.query_start[t.sequence] + t.first + row / G) * p.q_row + (t.kv_head * G + row % G) * p.q_head;
}

template <typename E>
inline E* out_row(const AttentionArgs& p, const Task& t, long row) {
    const long G = p.H / p.K;
    return (E*)p.out + (p.query_start[t.sequence] + t.first + row / G) * p.out_row + (t.kv_head * G + row % G) * p.D;
}

inline long rounded(long n, long unit) { return (n + unit - 1) / unit * unit; }

// 2^x for x below 1, relative error below 2e-7, exactly 1 at 0; very negative x give 0.
inline vf exp2(vf x) {
#ifdef __AVX512DQ__
    const vf f = (vf)_mm512_reduce_ps((__m512)x, 0x09);  // x - floor(x)
    vf y = f * 0.0018671263242140412f + 0.0090170381590724f;
    y = y * f + 0.05579990893602371f;
    y = y * f + 0.24016445875167847f;
    y = y * f + 0.6931512951850891f;
    y = y * f + 1.0f;
    return (vf)_mm512_scalef_ps((__m512)y, (__m512)x);
#else
    return exp(x * 0.693147181f);
#endif
}

#ifdef __AVX512F__
// Lane i: the 16 lanes of a[i] joined, always in the same order.
template <class Join>
inline __m512 reduce16(const __m512 a[16], const Join& join) {
    __m512 t[8], u[4], v[2];
    for (int i = 0; i < 8; i++) t[i] = join(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
    for (int i = 0; i < 4; i++) {
        const __m512d x = _mm512_castps_pd(t[2 * i]), y = _mm512_castps_pd(t[2 * i + 1]);
        u[i] = join(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    for (int i = 0; i < 2; i++)
        v[i] = join(_mm512_shuffle_f32x4(u[2 * i], u[2 * i + 1], 0x88), _mm512_shuffle_f32x4(u[2 * i], u[2 * i + 1], 0xdd));
    return join(_mm512_shuffle_f32x4(v[0], v[1], 0x88), _mm512_shuffle_f32x4(v[0], v[1], 0xdd));
}
#endif

// What the keys seen so far made of each query row: the highest score (base 2), and relative to it the sum of the weights (one
// part per lane) and of the weighted values. Rows are padded to 16 and dims to 32.
struct State {
    long rows, wide;
    float *sums, *total, *top;  // [rows][wide], [rows][LANES], [rows]

    static size_t floats(long rows, long D) { return size_t(rounded(rows, 16)) * (rounded(D, 32) + LANES + 1); }

    State(float* memory, long rows, long D) : rows(rounded(rows, 16)), wide(rounded(D, 32)), sums(memory) {
        total = sums + this->rows * wide, top = total + this->rows * LANES;
    }
    void clear() const {
        std::memset(sums, 0, rows * (wide + LANES) * sizeof(float));
        std::fill(top, top + rows, NEVER);
    }
};

// Adds the next split. Out of line, so that every caller runs the very same instructions.
static __attribute__((noinline)) void merge(const State& into, const State& next) {
    for (long r = 0; r < into.rows; r++) {
        const float high = std::max(into.top[r], next.top[r]);
        const vf old_share = exp2(fill(into.top[r] - high)), new_share = exp2(fill(next.top[r] - high));
        into.top[r] = high;
        const auto add = [&](float* a, const float* b) { store(a, load(a) * old_share + load(b) * new_share); };
        add(into.total + r * LANES, next.total + r * LANES);
        for (long d = 0; d < into.wide; d += LANES) add(into.sums + r * into.wide + d, next.sums + r * into.wide + d);
    }
}

template <typename E>
static void write(const AttentionArgs& p, const Task& t, const State& s) {
    for (long r = 0; r < t.tokens * (p.H / p.K); r++) {
        E* o = out_row<E>(p, t, r);
        float* x = s.sums + r * s.wide;
        const float inverse = 1.0f / sum(load(s.total + r * LANES));
        if (p.rotated) rotate_dims(x, p.D);
        long d = 0;
        for (; d + LANES <= p.D; d += LANES) store(o + d, load(x + d) * inverse);
        for (; d < p.D; d++) put(o + d, x[d] * inverse);
    }
}

}  // namespace lmd
