// Shared by the native CPU kernels: number formats, 16-lane vectors, exp.
// Invariant kept by every kernel here: the bits of one output row depend on that row's inputs only, never on the other
// rows of the call, on its place among them or on the number of threads. So sums run in one fixed order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include <omp.h>

#if defined(__AVX512F__) && defined(__AVX512BF16__) && defined(__AMX_BF16__)
#define LMD_AMX 1
#endif

#define LMD_API extern "C" __attribute__((visibility("default")))

namespace lmd {

constexpr long LANES = 16;
typedef float vf __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(32), aligned(2), may_alias));

struct bf16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
    uint32_t u = uint32_t(x.bits) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
inline void put(float* p, float x) { *p = x; }
inline void put(bf16* p, float x) {  // round to nearest even; NaN stays NaN
    uint32_t u;
    std::memcpy(&u, &x, 4);
    p->bits = x != x ? uint16_t(0x7fc0) : uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
inline vf load(const float* p) { return *reinterpret_cast<const vf*>(p); }
inline vf load(const bf16* p) {
    vu wide = __builtin_convertvector(*reinterpret_cast<const vh*>(p), vu) << 16;
    return (vf)wide;
}
inline void store(float* p, vf x) { *reinterpret_cast<vf*>(p) = x; }
inline void store(bf16* p, vf x) {
    vu u = (vu)x;
    vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    vu nan = (vu)(x != x);
    rounded = (nan & 0x7fc0u) | (~nan & rounded);
    *reinterpret_cast<vh*>(p) = __builtin_convertvector(rounded, vh);
}
inline vf fill(float x) { return vf{} + x; }

// One order for the 16 lanes, whatever the instruction set: halves, quarters, pairs.
inline float sum(vf v) {
    float a[16];
    std::memcpy(a, &v, 64);
    for (int w = 8; w; w /= 2)
        for (int i = 0; i < w; i++) a[i] += a[i + w];
    return a[0];
}

// e^x, relative error below 2e-7; arguments under -87 give 0 (softmax weights that round to nothing).
inline vf exp(vf x) {
    const vf magic = fill(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    vi tiny = x < -87.0f;
    vf clipped = (vf)((tiny & (vi)fill(-87.0f)) | (~tiny & (vi)x));
    vi huge = clipped > 88.0f;
    clipped = (vf)((huge & (vi)fill(88.0f)) | (~huge & (vi)clipped));
    vf shifted = clipped * 1.44269504f + magic;
    vf n = shifted - magic;
    vf r = clipped - n * 0.693359375f + n * 2.12194440e-4f;
    vf p = fill(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    vi scale = ((vi)shifted << 23) + 0x3f800000;
    vf result = p * (vf)scale;
    return (vf)(~tiny & (vi)result);
}

// Run body(first, last) over 0..n on `threads` threads of the pool that torch uses, or right here: an OpenMP region of one
// thread still costs some microseconds, more than a norm of one row.
template <class Body>
inline void share(long n, int threads, const Body& body) {
    if (threads <= 1 || n <= 1) return body(0, n);
#pragma omp parallel num_threads(threads)
    {
        const long team = omp_get_num_threads(), me = omp_get_thread_num();
        const long first = n * me / team, last = n * (me + 1) / team;
        if (first < last) body(first, last);
    }
}

// Scratch of the calling thread, grown and kept: a step must not allocate. `slot` lets one call hold several buffers.
inline void* scratch(size_t bytes, int slot) {
    struct Buffer {
        void* data = nullptr;
        size_t size = 0;
        ~Buffer() { std::free(data); }
    };
    static thread_local Buffer buffers[4];
    Buffer& b = buffers[slot];
    if (b.size < bytes) {
        std::free(b.data);
        size_t rounded = (bytes + 4095) & ~size_t(4095);
        b.data = std::aligned_alloc(4096, rounded);
        b.size = b.data ? rounded : 0;
    }
    return b.data;
}

}  // namespace lmd
