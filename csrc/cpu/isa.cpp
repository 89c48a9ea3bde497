// SPDX-License-Identifier: Apache-2.0
// Processor detection: what each kernel family needs, asked once.
#include "isa.h"

#include "amx_permission.h"

namespace turbo::cpu {
namespace {

bool detect(Isa isa) {
  // __builtin_cpu_supports checks cpuid and that the operating system saves the registers.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  switch (isa) {
    case Isa::none: return false;
    case Isa::avx2: return avx2;
    case Isa::avxvnni: return avx2 && __builtin_cpu_supports("avxvnni");
    case Isa::avx512: return avx512;
    case Isa::avx512vnni: return vnni;
    case Isa::avx512bf16: return vnni && __builtin_cpu_supports("avx512bf16");
#ifdef TM_AMX_SIMULATOR
    case Isa::amx: return avx2;
#else
    case Isa::amx:
      return vnni && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") && has_amx() &&
             tiles_refused().empty();
#endif
  }
  return false;
}

struct Detected {
  bool supported[kIsas];
  Detected() {
    for (int i = 0; i < kIsas; ++i) supported[i] = detect(static_cast<Isa>(i));
  }
};

constexpr const char* kNames[kIsas] = {"none", "avx2", "avxvnni", "avx512", "avx512vnni", "avx512bf16", "amx"};

}  // namespace

bool isa_supported(Isa isa) {
  static const Detected detected;
  return detected.supported[static_cast<int>(isa)];
}

const char* amx_problem() { return tiles_refused().c_str(); }

bool has_vbmi() {
  static const bool vbmi = __builtin_cpu_supports("avx512vbmi");
  return vbmi;
}

Isa vector_isa(Isa isa) {
  if (isa != Isa::amx) return isa;
  return isa_supported(Isa::avx512) ? Isa::avx512 : Isa::avx2;
}

namespace {

/// Whether vpdpbf16ps does less than two vfmadd231ps of as many products. Intel's processors with AMX start one only
/// every other cycle, and two multiply-adds a cycle: 226 against 470 GFLOP/s on two cores of what has the last-level
/// cache of a Granite Rapids (docs/benchmarks_xeon.md). AMX itself is no sign of them, since virtual machines hide it;
/// Cooper Lake, the first with BF16 and not measured, lacks VBMI. By model and not by measurement: every process of a
/// model must choose the same.
bool slow_bf16_dot() { return __builtin_cpu_is("intel") && has_vbmi(); }

}  // namespace

Isa best_isa() {
  for (int i = kIsas - 1; i > 0; --i) {
    const Isa isa = static_cast<Isa>(i);
    if (isa_supported(isa) && !(isa == Isa::avx512bf16 && slow_bf16_dot())) return isa;
  }
  return Isa::none;
}

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

Isa isa_from_name(std::string_view name) {
  for (int i = 1; i < kIsas; ++i)
    if (name == kNames[i]) return static_cast<Isa>(i);
  return Isa::none;
}

}  // namespace turbo::cpu
