// Rotary embedding, the cache's own rotation of q, k and v, and the write of k and v to their slots. float32 inside, one rounding at
// each result; what is quantised is the rounded row, as the reference does it.
#include "kv_cache.hpp"
#include "rotation.hpp"

namespace lmd {

constexpr long WORTH_THREADS = 1 << 18;  // elements; less is done before a second thread is awake (linear.cpp says what waking costs)

// (x1, x2) of the two halves of the first R dims -> (x1 cos - x2 sin, x2 cos + x1 sin), all D dims times `scale`, less `center` [D].
template <bool CENTRED, typename E>
static void rotate(E* x, const float* cos, const float* sin, long D, long R, float scale, const float* center) {
    const long half = R / 2;
    const auto less = [&](long j) { return CENTRED ? load(center + j) : vf{}; };
    const auto less_one = [&](long j) { return CENTRED ? center[j] : 0.0f; };
    long i = 0;
    for (; i + LANES <= half; i += LANES) {
        vf a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
        store(x + i, (a * c - b * s) * scale - less(i));
        store(x + half + i, (b * c + a * s) * scale - less(half + i));
    }
    for (; i < half; i++) {
        const float a = to_float(x[i]), b = to_float(x[half + i]);
        put(x + i, (a * cos[i] - b * sin[i]) * scale - less_one(i));
        put(x + half + i, (b * cos[i] + a * sin[i]) * scale - less_one(half + i));
    }
    if (CENTRED || scale != 1.0f)
        for (long j = R; j < D; j++) put(x + j, to_float(x[j]) * scale - less_one(j));
}

// A head's row times the cache's rotation.
template <typename E>
static void turn(E* x, long D) {
    float row[MAX_DIMS];
    for (long d = 0; d < D; d++) row[d] = to_float(x[d]);
    rotate_dims(row, D);
    for (long d = 0; d < D; d++) put(x + d, row[d]);
}

struct RopeArgs {  // one call's numbers in one block: a call with 30 arguments costs more than the work at T = 1
    void *q, *k, *v;
    const float *cos, *sin, *q_scale, *key_center;
    const int64_t* slots;
    Store key, value;
    int64_t q_row, q_head, k_row, k_head, v_row, v_head;
    int64_t T, H, K, D, R, S, rotated;
};

template <typename E>
static void rope_row(const RopeArgs& p, long t) {
    const float *cos = p.cos + t * (p.R / 2), *sin = p.sin + t * (p.R / 2);
    for (long h = 0; h < p.H; h++) {
        E* q = (E*)p.q + t * p.q_row + h * p.q_head;
        rotate<false>(q, cos, sin, p.D, p.R, p.q_scale ? p.q_scale[t] : 1.0f, nullptr);
        if (p.rotated) turn(q, p.D);
    }
    const long block = p.slots[t] / p.S, slot = p.slots[t] % p.S;
    for (long h = 0; h < p.K; h++) {
        E *k = (E*)p.k + t * p.k_row + h * p.k_head, *v = (E*)p.v + t * p.v_row + h * p.v_head;
        if (p.key_center)
            rotate<true>(k, cos, sin, p.D, p.R, 1.0f, p.key_center + h * p.D);
        else
            rotate<false>(k, cos, sin, p.D, p.R, 1.0f, nullptr);
        if (p.rotated) turn(k, p.D), turn(v, p.D);
        write_row(p.key, block, h, slot, k, p.D);
        write_row(p.value, block, h, slot, v, p.D);
    }
}

template <typename E>
static void rope_write_kv(const RopeArgs& p, int threads) {
    const int team = p.T * (p.H + 2 * p.K) * p.D >= WORTH_THREADS ? threads : 1;
    share(p.T, team, [&](long first, long last) {
        for (long t = first; t < last; t++) rope_row<E>(p, t);
    });
}

}  // namespace lmd

using namespace lmd;

LMD_API void lmd_rope_write_kv_f32(const RopeArgs* p, int threads) { rope_write_kv<float>(*p, threads); }
LMD_API void lmd_rope_write_kv_bf16(const RopeArgs* p, int threads) { rope_write_kv<bf16>(*p, threads); }
