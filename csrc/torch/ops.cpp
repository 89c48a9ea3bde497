// SPDX-License-Identifier: Apache-2.0
// Bindings: argument checks, then one call into csrc/cpu. Only libtorch's stable ABI is used.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../cpu/gemm_u4g.h"
#include "../cpu/isa.h"
#include "../cpu/machine_limits.h"
#include "../cpu/pack_u4g.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace turbo::cpu;

/// torch's own thread pool: vLLM's thread binding holds, and there is no second OpenMP runtime.
Parallel torch_pool() {
  return {[](int64_t tasks, Parallel::Body body, void* context) {
            torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
              for (int64_t task = begin; task < end; ++task) body(task, context);
            });
          },
          static_cast<int64_t>(torch::stable::get_num_threads())};
}

// ---- messages: which argument, what was expected, what was given ----------------------------------

std::string text(ScalarType type) { return torch::headeronly::toString(type); }

template <class Sizes>
std::string text(const Sizes& sizes) {
  std::string out = "[";
  for (const int64_t size : sizes) {
    if (out.size() > 1) out += ", ";
    out += std::to_string(size);
  }
  out += "]";
  return out;
}

void check_cpu(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu(), op, ": argument '", name,
                  "': expected a tensor on the CPU, given one on another device");
}

void check(const char* op, const char* name, const Tensor& t, ScalarType type,
           std::initializer_list<int64_t> sizes) {
  check_cpu(op, name, t);
  STD_TORCH_CHECK(t.scalar_type() == type, op, ": argument '", name, "': expected dtype ", text(type),
                  ", given ", text(t.scalar_type()));
  STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), t.sizes().begin(), t.sizes().end()), op,
                  ": argument '", name, "': expected shape ", text(sizes),
                  ", given ", text(t.sizes()));
  STD_TORCH_CHECK(t.is_contiguous(), op, ": argument '", name, "': expected a contiguous tensor");
}

DType activation_dtype(const char* op, const char* name, ScalarType type) {
  if (type == ScalarType::BFloat16) return DType::bf16;
  if (type == ScalarType::Half) return DType::f16;
  STD_TORCH_CHECK(type == ScalarType::Float, op, ": argument '", name,
                  "': expected dtype BFloat16, Half or Float, given ", text(type));
  return DType::f32;
}

/// Sizes up to this keep every offset within 63 bits.
constexpr int64_t kMost = int64_t{1} << 31;

// ---- instruction set ------------------------------------------------------------------------------

std::atomic<Isa>& chosen_isa() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

std::string cpu_isas() {
  std::string out;
  for (int i = static_cast<int>(best_isa()); i > 0; --i) {
    if (!out.empty()) out += ',';
    out += isa_name(static_cast<Isa>(i));
  }
  return out;
}

std::string get_isa() { return isa_name(chosen_isa().load()); }

void set_isa(std::string name) {
  const Isa isa = isa_from_name(name);
  STD_TORCH_CHECK(isa != Isa::none && isa <= best_isa(), "set_isa: argument 'isa': expected one of {",
                  cpu_isas(), "} on this processor, given '", name, "'");
  chosen_isa().store(isa);
}

// ---- grouped 4-bit weights, 16- or 32-bit activations ---------------------------------------------

std::tuple<Tensor, Tensor, Tensor> w4a16_pack(Tensor codes, Tensor scale,
                                              std::optional<Tensor> zero_point, int64_t k) {
  constexpr const char* kOp = "w4a16_pack";
  STD_TORCH_CHECK(k > 0 && k <= kMost, kOp, ": argument 'k': expected 1 to ", kMost, ", given ", k);
  STD_TORCH_CHECK(codes.dim() == 2 && codes.size(0) > 0, kOp,
                  ": argument 'weight_packed': expected shape [N, ceil(k/8)] with N > 0, given ",
                  text(codes.sizes()));
  STD_TORCH_CHECK(scale.dim() == 2 && scale.size(1) > 0, kOp,
                  ": argument 'scale': expected shape [N, groups], given ", text(scale.sizes()));
  const LayoutU4g layout{codes.size(0), k, scale.size(1)};
  const int64_t n = layout.n, groups = layout.groups;
  check(kOp, "weight_packed", codes, ScalarType::Int, {n, layout.k8()});
  activation_dtype(kOp, "scale", scale.scalar_type());
  check(kOp, "scale", scale, scale.scalar_type(), {n, groups});
  STD_TORCH_CHECK(groups == 1 || k % (groups * kDwordK) == 0, kOp, ": argument 'scale': expected k = ", k,
                  " to be cut into groups of a multiple of ", kDwordK, " weights, given ", groups,
                  " groups");
  if (zero_point) check(kOp, "zero_point", *zero_point, ScalarType::Int, {ceil_div(n, 8), groups});

  Tensor weight_out = torch::stable::new_empty(codes, {layout.padded_n(), layout.k8()});
  Tensor scale_out = torch::stable::new_empty(scale, {layout.padded_n(), groups});
  Tensor zero_out = zero_point ? torch::stable::new_empty(codes, {layout.padded_n() / 8, groups})
                               : torch::stable::new_empty(codes, {0});
  pack_u4g({layout, static_cast<const uint32_t*>(codes.const_data_ptr()), layout.k8(),
            scale.const_data_ptr(), groups, static_cast<int64_t>(scale.element_size()),
            zero_point ? static_cast<const uint32_t*>(zero_point->const_data_ptr()) : nullptr, groups,
            static_cast<uint32_t*>(weight_out.data_ptr()), scale_out.data_ptr(),
            zero_point ? static_cast<uint32_t*>(zero_out.data_ptr()) : nullptr},
           torch_pool());
  return {weight_out, scale_out, zero_out};
}

Tensor w4a16_linear(Tensor x, Tensor weight, Tensor scale, std::optional<Tensor> zero_point,
                    std::optional<Tensor> bias, int64_t n, int64_t group_size) {
  constexpr const char* kOp = "w4a16_linear";
  STD_TORCH_CHECK(chosen_isa().load() != Isa::none, kOp,
                  ": this processor has no AVX2 with FMA and F16C; there is no kernel for it");
  check_cpu(kOp, "x", x);
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) > 0, kOp,
                  ": argument 'x': expected shape [..., K] with K > 0, given ", text(x.sizes()));
  STD_TORCH_CHECK(n > 0 && n <= kMost, kOp, ": argument 'n': expected 1 to ", kMost, ", given ", n);
  const int64_t k = x.size(x.dim() - 1);
  const bool channel = group_size == -1 || group_size == k;
  STD_TORCH_CHECK(channel || (group_size > 0 && group_size % kDwordK == 0 && k % group_size == 0), kOp,
                  ": argument 'group_size': expected -1 or a multiple of ", kDwordK, " that divides K = ", k,
                  ", given ", group_size);
  const LayoutU4g layout{n, k, channel ? 1 : k / group_size};
  const ScalarType type = x.scalar_type();
  const DType dtype = activation_dtype(kOp, "x", type);
  check(kOp, "weight", weight, ScalarType::Int, {layout.padded_n(), layout.k8()});
  check(kOp, "scale", scale, type, {layout.padded_n(), layout.groups});
  if (zero_point)
    check(kOp, "zero_point", *zero_point, ScalarType::Int, {layout.padded_n() / 8, layout.groups});
  if (bias) check(kOp, "bias", *bias, type, {n});

  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  const int64_t rows = x.numel() / k;
  sizes.back() = n;
  Tensor y = torch::stable::new_empty(x, sizes);
  if (rows == 0) return y;

  // Contiguous x, and rows of a matrix with unit inner stride, are read where they lie; any other x is
  // copied once.
  if (!(x.is_contiguous() || (x.dim() == 2 && x.stride(1) == 1))) x = torch::stable::contiguous(x);
  const int64_t stride = x.is_contiguous() ? k : x.stride(0);
  gemm_u4g({layout, dtype, rows, x.const_data_ptr(), stride,
            static_cast<const uint32_t*>(weight.const_data_ptr()), scale.const_data_ptr(),
            zero_point ? static_cast<const uint32_t*>(zero_point->const_data_ptr()) : nullptr,
            bias ? bias->const_data_ptr() : nullptr, y.data_ptr()},
           chosen_isa().load(), torch_pool());
  return y;
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
  DotKind dot = DotKind::bf16;
  if (kind == "int8")
    dot = DotKind::int8;
  else if (kind == "fma32")
    dot = DotKind::fma32;
  else
    STD_TORCH_CHECK(kind == "bf16", "limit_dot: argument 'kind': expected bf16, int8 or fma32, given '",
                    kind, "'");
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
  m.def("w4a16_pack(Tensor weight_packed, Tensor scale, Tensor? zero_point, int k) "
        "-> (Tensor, Tensor, Tensor)");
  m.def("w4a16_linear(Tensor x, Tensor weight, Tensor scale, Tensor? zero_point, Tensor? bias, int n, "
        "int group_size) -> Tensor");
  m.def("limit_read(Tensor buffer) -> int");
  m.def("limit_dot(str kind, int iterations) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_plugin_tm, CompositeExplicitAutograd, m) {
  m.impl("cpu_isas", TORCH_BOX(&cpu_isas));
  m.impl("get_isa", TORCH_BOX(&get_isa));
  m.impl("set_isa", TORCH_BOX(&set_isa));
  m.impl("limit_dot", TORCH_BOX(&limit_dot));
  // For every device, so that a tensor on a wrong one is named by our own check.
  m.impl("w4a16_pack", TORCH_BOX(&w4a16_pack));
  m.impl("w4a16_linear", TORCH_BOX(&w4a16_linear));
  m.impl("limit_read", TORCH_BOX(&limit_read));
}
