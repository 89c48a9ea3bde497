// SPDX-License-Identifier: Apache-2.0
// The library, the choice of the instruction set, and the loops that measure the machine's limits.
#include "../cpu/machine_limits.h"
#include "binding.h"

namespace {

using namespace turbo::binding;
using namespace turbo::cpu;

// ---- instruction set ------------------------------------------------------------------------------

std::string cpu_isas() {
  std::string out;
  for (int i = kIsas - 1; i > 0; --i) {
    if (!isa_supported(static_cast<Isa>(i))) continue;
    if (!out.empty()) out += ',';
    out += isa_name(static_cast<Isa>(i));
  }
  return out;
}

std::string amx_problem_text() { return amx_problem(); }

std::string get_isa() { return isa_name(chosen_isa().load()); }

void set_isa(std::string name) {
  const Isa isa = isa_from_name(name);
  STD_TORCH_CHECK(isa != Isa::none && isa_supported(isa), "set_isa: argument 'isa': expected one of {",
                  cpu_isas(), "} on this processor, given '", name, "'");
  chosen_isa().store(isa);
}

// ---- limits of the machine, for the bench ---------------------------------------------------------

int64_t limit_read(Tensor buffer) {
  constexpr const char* kOp = "limit_read";
  check_cpu(kOp, "buffer", buffer);
  STD_TORCH_CHECK(buffer.is_contiguous(), kOp, ": argument 'buffer': expected a contiguous tensor");
  const char* data = static_cast<const char*>(buffer.const_data_ptr());
  const int64_t lines = buffer.numel() * static_cast<int64_t>(buffer.element_size()) / 64;
  const Parallel pool = torch_pool();
  std::atomic<uint64_t> total{0};
  pool(pool.threads, [&](int64_t task) {
    const Range range = part(lines, pool.threads, task);
    total += read_lines(data + range.begin * 64, static_cast<size_t>(range.end - range.begin) * 64);
  });
  return static_cast<int64_t>(total.load());
}

int64_t limit_dot(std::string kind, int64_t iterations) {
  constexpr std::pair<const char*, DotKind> kKinds[] = {{"bf16", DotKind::bf16},
                                                        {"int8", DotKind::int8},
                                                        {"fma32", DotKind::fma32},
                                                        {"amx_bf16", DotKind::amx_bf16},
                                                        {"amx_int8", DotKind::amx_int8},
                                                        {"amx_bf16_l2", DotKind::amx_bf16_l2},
                                                        {"amx_int8_l2", DotKind::amx_int8_l2}};
  const auto* found =
      std::find_if(std::begin(kKinds), std::end(kKinds), [&](const auto& one) { return kind == one.first; });
  STD_TORCH_CHECK(found != std::end(kKinds),
                  "limit_dot: argument 'kind': expected bf16, int8, fma32, amx_bf16, amx_int8, amx_bf16_l2 or "
                  "amx_int8_l2, given '",
                  kind, "'");
  const DotKind dot = found->second;
  STD_TORCH_CHECK(iterations >= 0, "limit_dot: argument 'iterations': expected 0 or more, given ",
                  iterations);
  const Parallel pool = torch_pool();
  std::atomic<int64_t> total{0};
  pool(pool.threads, [&](int64_t) { total += dot_loop(dot, iterations); });
  return total.load();
}

}  // namespace

STABLE_TORCH_LIBRARY(vllm_plugin_tm, m) {
  m.def("cpu_isas() -> str");
  m.def("get_isa() -> str");
  m.def("set_isa(str isa) -> ()");
  m.def("amx_problem() -> str");
  m.def("limit_read(Tensor buffer) -> int");
  m.def("limit_dot(str kind, int iterations) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_plugin_tm, CompositeExplicitAutograd, m) {
  m.impl("cpu_isas", TORCH_BOX(&cpu_isas));
  m.impl("get_isa", TORCH_BOX(&get_isa));
  m.impl("set_isa", TORCH_BOX(&set_isa));
  m.impl("amx_problem", TORCH_BOX(&amx_problem_text));
  m.impl("limit_dot", TORCH_BOX(&limit_dot));
  // For every device, so that a tensor on a wrong one is named by our own check.
  m.impl("limit_read", TORCH_BOX(&limit_read));
}
