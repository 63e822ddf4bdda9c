// What the loaded library can do in this process.
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>

#include "amx.hpp"

// 1: the AMX kernels may run. The kernel hands out the 8 KiB of tile state only after this request, once per process.
LMD_API int lmd_enable_amx() {
#ifdef LMD_AMX
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return 0;
#endif
}

// Reads n bytes (a multiple of 256) once, as fast as memory gives them: the ceiling that benchmark/kernels.py compares with.
// The sum makes sure that every byte was really read.
LMD_API uint64_t lmd_read(const char* data, long n, int threads) {
    std::atomic<uint64_t> total{0};
    lmd::share(n / 256, threads, [&](long first, long last) {
        lmd::vu sum[4] = {};
        for (const char* p = data + first * 256; p < data + last * 256; p += 256)
            for (int i = 0; i < 4; i++) {
                __builtin_prefetch(p + 1024 + 64 * i, 0, 2);
                sum[i] += *reinterpret_cast<const lmd::vu*>(p + 64 * i);
            }
        uint64_t all = 0;
        for (auto& part : sum)
            for (int lane = 0; lane < lmd::LANES; lane++) all += part[lane];
        total += all;
    });
    return total;
}
