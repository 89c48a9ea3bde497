// SPDX-License-Identifier: Apache-2.0
#include "amx_permission.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>

namespace turbo::cpu {
namespace {

constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
constexpr long kTileData = 18;               // the bit of XCR0

/// Whether the operating system saves the tiles' configuration and data.
bool saves_tiles() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kOsSavesMore = 1u << 27;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & kOsSavesMore)) return false;
  asm("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  constexpr unsigned kTileState = 3u << 17;
  return (eax & kTileState) == kTileState;
}

long arch_prctl(long code, long feature) { return syscall(SYS_arch_prctl, code, feature); }

}  // namespace

bool has_amx() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kAll = kBf16 | kTile | kInt8;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kAll) == kAll;
}

std::string ask_for_tiles(ArchPrctl ask) {
  if (ask(kRequestPermission, kTileData) == 0) return "";
  return std::string("this processor has AMX, but the system refuses it to this process (arch_prctl: ") +
         std::strerror(errno) + "); AVX-512 kernels run instead";
}

const std::string& tiles_refused() {
  static const std::string refused = [] {
    if (!has_amx()) return std::string();
    if (saves_tiles()) return ask_for_tiles(arch_prctl);
    return std::string(
        "this processor has AMX, but the operating system does not save its registers; AVX-512 kernels run "
        "instead");
  }();
  return refused;
}

}  // namespace turbo::cpu
