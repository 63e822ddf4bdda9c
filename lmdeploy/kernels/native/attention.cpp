// Causal attention over the paged cache, one pass over the keys with an online softmax.
//
// A task is (sequence, KV head, run of query tokens); the G query heads of the KV head share every key and value read. Where
// there are few tasks for the threads, each is cut along the keys at the splits of attention.hpp.
#include <atomic>

#include "attention_amx.hpp"

namespace lmd {

constexpr long WORTH_THREADS = 1 << 19;  // products of a query with a key element; linear.cpp says what waking a thread costs

#ifdef __AVX512F__
constexpr long TOGETHER = 8, KEYS = 16;  // running sums of values and of products that fit the registers
#else
constexpr long TOGETHER = 4, KEYS = 4;
#endif

// Any type, any instruction set. Lanes are dims in the products of a query and a key, keys in the softmax, dims in the sums.
template <typename E>
struct PlainKernel {
    using Element = E;
    const AttentionArgs& p;
    const Task& t;
    Span span;
    long G, rows, wide;
    float *queries, *keys, *values;  // [rows][wide]; [BLOCK][wide] where the cache is not float32 or rows are no whole vectors
    float* states[2];

    PlainKernel(const AttentionArgs& p, const Task& t) : p(p), t(t), span(p, t) {
        G = p.H / p.K, rows = t.tokens * G, wide = rounded(p.D, 32);
        const size_t state = State::floats(rows, p.D);
        states[0] = (float*)scratch((2 * state + (rows + 2 * BLOCK) * wide) * sizeof(float), 1);
        states[1] = states[0] + state, queries = states[1] + state;
        keys = queries + rows * wide, values = keys + BLOCK * wide;
        std::memset(queries, 0, (rows + 2 * BLOCK) * wide * sizeof(float));
        for (long r = 0; r < rows; r++) {
            const E* q = query_row<E>(p, t, r);
            for (long d = 0; d < p.D; d++) queries[r * wide + d] = to_float(q[d]) * (p.scale * LOG2E);
        }
    }

    // Rows of the cache as float32: as they are, or converted to `copy`.
    void read(const Store& from, long base, long count, float* copy, const float** row) const {
        const bool direct = !from.quantised() && sizeof(E) == 4 && p.D % LANES == 0;
        Rows rows;
        find_rows(p, from, from.row_bytes(p.D, sizeof(E)), t, base, count, rows);
        for (long j = 0; j < count; j++) {
            float* to = copy + j * wide;
            row[j] = direct ? (const float*)rows.at[j] : to;
            if (direct) continue;
            if (from.quantised()) read_row((const uint8_t*)rows.at[j], rows.pair[j], from.width, p.D, to);
            else widen_row((const E*)rows.at[j], to);
        }
    }

    void widen_row(const E* from, float* to) const {
        long d = 0;
        for (; d + LANES <= p.D; d += LANES) store(to + d, load(from + d));
        for (; d < p.D; d++) to[d] = to_float(from[d]);
    }

    // Scores of the keys low..high; the rest is NEVER.
    void score(const float* q, const float* const* key, long low, long high, float* w) const {
        std::fill(w, w + BLOCK, NEVER);
        for (long j = low; j < high; j += KEYS) {
            vf acc[KEYS] = {};
            const float* k[KEYS];
            for (long i = 0; i < KEYS; i++) k[i] = key[std::min(j + i, high - 1)];
            const long D = p.D;
            for (long d = 0; d < D; d += LANES) {
                const vf x = load(q + d);
                for (long i = 0; i < KEYS; i++) acc[i] += x * load(k[i] + d);
            }
            float* to = w + j;
#ifdef __AVX512F__
            const __mmask16 mask = __mmask16(0xffff >> (KEYS - std::min(KEYS, high - j)));
            _mm512_mask_storeu_ps(to, mask, reduce16((const __m512*)acc, [](__m512 a, __m512 b) { return _mm512_add_ps(a, b); }));
#else
            for (long i = 0; i < std::min(KEYS, high - j); i++) to[i] = sum(acc[i]);
#endif
        }
    }

    // Weights from scores, in place; returns by how much the sums so far shrink.
    float weigh(float* w, float& top, float* total) const {
        vf most = load(w);
        for (long i = LANES; i < BLOCK; i += LANES) {
            const vf x = load(w + i);
            most = (vf)(((vi)x & (vi)(x > most)) | ((vi)most & ~(vi)(x > most)));
        }
        float high = top;
        for (long i = 0; i < LANES; i++) high = std::max(high, most[i]);
        vf added = {};
        for (long i = 0; i < BLOCK; i += LANES) {
            const vf s = load(w + i), x = exp2(s - high);
            const vf weight = (vf)((vi)x & ~(vi)(s <= NEVER));  // a NaN stays one
            store(w + i, weight), added += weight;
        }
        const float keep = exp2(fill(top - high))[0];
        store(total, load(total) * keep + added), top = high;
        return keep;
    }

    template <long N>
    static void accumulate(const float* w, const float* const* value, long low, long high, float keep, float* o, long d) {
        vf acc[N];
        for (long i = 0; i < N; i++) acc[i] = load(o + d + i * LANES) * keep;
        for (long j = low; j < high; j++)
            for (long i = 0; i < N; i++) acc[i] += w[j] * load(value[j] + d + i * LANES);
        for (long i = 0; i < N; i++) store(o + d + i * LANES, acc[i]);
    }

    void run(const State& s, long begin, long end) const {
        const float *k[BLOCK], *v[BLOCK];
        alignas(64) float w[BLOCK];
        for (long base = begin; base < end; base += BLOCK) {
            const long count = std::min(BLOCK, end - base);
            read(p.key, base, count, keys, k), read(p.value, base, count, values, v);
            for (long r = 0; r < rows; r++) {
                const long at = span.position + r / G;
                const long low = std::max(0L, p.window > 0 ? at - p.window + 1 - base : 0L), high = std::min(count, at + 1 - base);
                if (low >= high) continue;
                score(queries + r * wide, k, low, high, w);
                const float keep = weigh(w, s.top[r], s.total + r * LANES);
                float* o = s.sums + r * wide;
                long d = 0;
                for (; d + TOGETHER * LANES <= p.D; d += TOGETHER * LANES) accumulate<TOGETHER>(w, v, low, high, keep, o, d);
                for (; d < p.D; d += LANES) accumulate<1>(w, v, low, high, keep, o, d);
            }
        }
    }
};

// All keys of a task, split by split, or only those of its split.
template <class Kernel>
static void attend(const AttentionArgs& p, const Task& t) {
    const Kernel kernel(p, t);
    const long G = p.H / p.K, begin = kernel.span.begin, end = kernel.span.end;
    if (t.state) {
        const State s(t.state, t.tokens * G, p.D);
        s.clear();
        const long first = std::max(begin, t.split * SPLIT), last = std::min(end, (t.split + 1) * SPLIT);
        if (first < last) kernel.run(s, first, last);
        return;
    }
    const State whole(kernel.states[0], t.tokens * G, p.D), part(kernel.states[1], t.tokens * G, p.D);
    for (long at = begin, next; at < end; at = next) {
        next = std::min(end, (at / SPLIT + 1) * SPLIT);
        const State& s = at == begin ? whole : part;
        s.clear();
        kernel.run(s, at, next);
        if (at != begin) merge(whole, part);
    }
    write<typename Kernel::Element>(p, t, whole);
}

// Take tasks until none is left; whoever is free takes the next.
template <typename E>
static void work(const AttentionArgs& p, const Task* tasks, long n, std::atomic<long>& next) {
#ifdef LMD_AMX
    if constexpr (sizeof(E) == 2) {
        Tiles state;
        for (long i = next++; i < n; i = next++) attend<AmxKernel>(p, tasks[i]);
        return;
    }
#endif
    for (long i = next++; i < n; i = next++) attend<PlainKernel<E>>(p, tasks[i]);
}

// The tasks of a call, whole or cut into splits; the last chunk of a prompt sees most keys: it goes first.
struct Plan {
    const AttentionArgs& p;
    long chunk = 1, products = 0;

    // Long chunks share the packing of the keys; shorter ones where threads would go without.
    Plan(const AttentionArgs& p, int threads) : p(p) {
        const long G = p.H / p.K;
        for (long rows = MOST_ROWS; rows >= LEAST_ROWS; rows /= 2) {
            chunk = std::max(1L, rows / G);
            if (tasks() >= 4 * threads) break;
        }
        for (long b = 0; b < p.B; b++) products += long(p.query_start[b + 1] - p.query_start[b]) * p.kv_lens[b] * p.H * p.D;
    }

    long tasks() const {
        long n = 0;
        for (long b = 0; b < p.B; b++) n += (p.query_start[b + 1] - p.query_start[b] + chunk - 1) / chunk * p.K;
        return n;
    }

    // Calls visit(task, splits) for each task.
    template <class Visit>
    void each(const Visit& visit) const {
        for (long b = 0; b < p.B; b++) {
            const long length = p.query_start[b + 1] - p.query_start[b];
            for (long c = (length + chunk - 1) / chunk - 1; c >= 0; c--)
                for (long h = 0; h < p.K; h++) {
                    const Task t = {b, h, c * chunk, std::min(chunk, length - c * chunk), 0, nullptr};
                    const Span span(p, t);
                    visit(t, span.begin / SPLIT, (span.end + SPLIT - 1) / SPLIT);
                }
        }
    }
};

static bool same_rows(const Task& a, const Task& b) {
    return a.sequence == b.sequence && a.kv_head == b.kv_head && a.first == b.first;
}

template <typename E>
static void attention(const AttentionArgs& p, int threads) {
    const Plan plan(p, threads);
    const int team = plan.products < WORTH_THREADS ? 1 : threads;
    long whole = 0, cut = 0, floats = 0;
    plan.each([&](const Task& t, long first, long last) {
        whole++, cut += last - first, floats += (last - first) * long(State::floats(t.tokens * (p.H / p.K), p.D));
    });
    const bool split = team > 1 && whole < 4 * team && cut > whole;
    Task* tasks = (Task*)scratch(size_t(split ? cut : whole) * sizeof(Task), 3);
    float* states = split ? (float*)scratch(size_t(floats) * sizeof(float), 2) : nullptr;
    long n = 0;
    plan.each([&](Task t, long first, long last) {
        for (t.split = first; split && t.split < last; t.split++) {
            t.state = states, tasks[n++] = t;
            states += State::floats(t.tokens * (p.H / p.K), p.D);
        }
        if (!split) tasks[n++] = t;
    });
    std::atomic<long> next{0};
    share(team, team, [&](long, long) { work<E>(p, tasks, n, next); });
    for (long i = 0, j; split && i < n; i = j) {
        const long rows = tasks[i].tokens * (p.H / p.K);
        const State s(tasks[i].state, rows, p.D);
        for (j = i + 1; j < n && same_rows(tasks[i], tasks[j]); j++) merge(s, State(tasks[j].state, rows, p.D));
        write<E>(p, tasks[i], s);
    }
}

}  // namespace lmd

using namespace lmd;

LMD_API void lmd_attention_f32(const AttentionArgs* p, int threads) { attention<float>(*p, threads); }
LMD_API void lmd_attention_bf16(const AttentionArgs* p, int threads) { attention<bf16>(*p, threads); }
