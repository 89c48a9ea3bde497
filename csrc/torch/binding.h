// SPDX-License-Identifier: Apache-2.0
// What all bindings share: torch's thread pool, the chosen instruction set, checks of arguments. A message names
// the argument, what was expected, what was given. Only libtorch's stable ABI is used.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <initializer_list>
#include <optional>
#include <string>

#include "../cpu/isa.h"
#include "../cpu/gemm.h"
#include "../cpu/parallel.h"

namespace turbo::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

/// torch's own thread pool: vLLM's thread binding holds, and there is no second OpenMP runtime.
inline cpu::Parallel torch_pool() {
  return {[](int64_t tasks, cpu::Parallel::Body body, void* context) {
            torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
              for (int64_t task = begin; task < end; ++task) body(task, context);
            });
          },
          static_cast<int64_t>(torch::stable::get_num_threads())};
}

/// The instruction set in use in this process.
inline std::atomic<cpu::Isa>& chosen_isa() {
  static std::atomic<cpu::Isa> isa{cpu::best_isa()};
  return isa;
}

inline std::string text(ScalarType type) { return torch::headeronly::toString(type); }

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

inline void check_isa(const char* op) {
  STD_TORCH_CHECK(chosen_isa().load() != cpu::Isa::none, op,
                  ": this processor has no AVX2 with FMA and F16C; there is no kernel for it");
}

inline void check_cpu(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.defined(), op, ": argument '", name, "': expected a Tensor, given None");
  STD_TORCH_CHECK(t.is_cpu(), op, ": argument '", name,
                  "': expected a tensor on the CPU, given one on another device");
}

inline void check(const char* op, const char* name, const Tensor& t, ScalarType type,
                  std::initializer_list<int64_t> sizes) {
  check_cpu(op, name, t);
  STD_TORCH_CHECK(t.scalar_type() == type, op, ": argument '", name, "': expected dtype ", text(type),
                  ", given ", text(t.scalar_type()));
  STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), t.sizes().begin(), t.sizes().end()), op,
                  ": argument '", name, "': expected shape ", text(sizes),
                  ", given ", text(t.sizes()));
  STD_TORCH_CHECK(t.is_contiguous(), op, ": argument '", name, "': expected a contiguous tensor");
}

inline cpu::DType float_dtype(const char* op, const char* name, ScalarType type) {
  if (type == ScalarType::BFloat16) return cpu::DType::bf16;
  if (type == ScalarType::Half) return cpu::DType::f16;
  STD_TORCH_CHECK(type == ScalarType::Float, op, ": argument '", name,
                  "': expected dtype BFloat16, Half or Float, given ", text(type));
  return cpu::DType::f32;
}

inline cpu::Activations activations_of(const char* op, const char* name, const std::string& rounding) {
  if (rounding == "none") return cpu::Activations::kept;
  if (rounding == "token") return cpu::Activations::dynamic;
  if (rounding == "tensor") return cpu::Activations::fixed;
  STD_TORCH_CHECK(rounding == "group", op, ": argument '", name,
                  "': expected none, token, group or tensor, given '", rounding, "'");
  return cpu::Activations::grouped;
}

/// The one scale of a product's activations.
inline float x_scale_of(const char* op, const char* name, const Tensor& scale) {
  check(op, name, scale, ScalarType::Float, {1});
  const float value = *static_cast<const float*>(scale.const_data_ptr());
  STD_TORCH_CHECK(value > 0 && value <= 3.4e38f, op, ": argument '", name,
                  "': expected a positive finite number, given ", value);
  return value;
}

/// The dtype of scales of one byte.
inline cpu::DType byte_scale(const char* op, const std::string& type) {
  if (type == "e8m0") return cpu::DType::e8m0;
  STD_TORCH_CHECK(type == "e4m3", op, ": argument 'scale_type': expected e8m0 or e4m3, given '", type, "'");
  return cpu::DType::e4m3;
}

/// Sizes up to this keep every offset within 63 bits.
inline constexpr int64_t kMost = int64_t{1} << 31;

}  // namespace turbo::binding
