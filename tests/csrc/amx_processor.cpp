// SPDX-License-Identifier: Apache-2.0
// The processor's own tiles, for amx_simulator_test.cpp.

// This file compares the real instructions with the simulator, which the other tests are built with.
#undef TM_AMX_SIMULATOR

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "amx_product.h"

namespace test {

bool processor_has_tiles() {
  constexpr unsigned kOsxsave = 1u << 27, kTiles = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kOsxsave)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTiles) != kTiles) return false;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned kTileState = 3u << 17;
  if ((low & kTileState) != kTileState) return false;
  // Without this request of Linux, the first use of a tile is SIGILL.
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

void multiply_on_processor(const TileProduct& p) { multiply_on_tiles(p); }

}  // namespace test
