// What the loaded library can do in this process.
#include <sys/syscall.h>
#include <unistd.h>

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
