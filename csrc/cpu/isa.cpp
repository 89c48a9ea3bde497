// SPDX-License-Identifier: Apache-2.0
// Processor detection: what each kernel family needs, asked once.
#include "isa.h"

namespace turbo::cpu {
namespace {

Isa detect() {
  // __builtin_cpu_supports checks cpuid and that the operating system saves the registers.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (!avx2) return Isa::none;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!avx512) return Isa::avx2;
  return __builtin_cpu_supports("avx512bf16") ? Isa::avx512bf16 : Isa::avx512;
}

constexpr const char* kNames[] = {"none", "avx2", "avx512", "avx512bf16"};

}  // namespace

Isa best_isa() {
  static const Isa isa = detect();
  return isa;
}

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

Isa isa_from_name(std::string_view name) {
  for (int i = 1; i <= static_cast<int>(Isa::avx512bf16); ++i)
    if (name == kNames[i]) return static_cast<Isa>(i);
  return Isa::none;
}

}  // namespace turbo::cpu
