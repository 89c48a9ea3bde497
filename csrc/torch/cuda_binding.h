// SPDX-License-Identifier: Apache-2.0
// What the bindings of the CUDA kernels share. They are the ops of linear.cpp and pack.cpp for tensors on a device,
// under the same schemas: a library of its own, loaded after the first one, so that a machine without CUDA needs none
// of it.
//
// Weights are in csrc/cuda/layout.h's order, as int32 and with their sizes as dimensions:
//   weight      [padded n, k padded to 64, * bits / 32]
//   scale       [padded n, rows of scales]
//   zero_point  [padded n / 8, rows of scales]
//   weight_sum  [padded n]
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <tuple>
#include <vector>

#include "../cuda/linear.h"
#include "binding.h"

namespace turbo::binding {

namespace accelerator = torch::stable::accelerator;

inline void check_device(const char* op, const char* name, const Tensor& t, int32_t device) {
  STD_TORCH_CHECK(t.defined(), op, ": argument '", name, "': expected a Tensor, given None");
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == device, op, ": argument '", name,
                  "': expected a tensor on CUDA device ", device, ", that of the first argument, given one elsewhere");
}

inline void check_cuda(const char* op, const char* name, const Tensor& t, int32_t device, ScalarType type,
                       std::initializer_list<int64_t> sizes) {
  check_device(op, name, t, device);
  STD_TORCH_CHECK(t.scalar_type() == type, op, ": argument '", name, "': expected dtype ", text(type), ", given ",
                  text(t.scalar_type()));
  STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), t.sizes().begin(), t.sizes().end()), op, ": argument '", name,
                  "': expected shape ", text(sizes), ", given ", text(t.sizes()));
  STD_TORCH_CHECK(t.is_contiguous(), op, ": argument '", name, "': expected a contiguous tensor");
}

inline cuda::DType half_dtype(const char* op, const char* name, ScalarType type) {
  if (type == ScalarType::BFloat16) return cuda::DType::bf16;
  STD_TORCH_CHECK(type == ScalarType::Half, op, ": argument '", name,
                  "': expected dtype BFloat16 or Half on a CUDA device, given ", text(type));
  return cuda::DType::f16;
}

inline cuda::ScaleType scale_type_of(const char* op, const char* name, ScalarType type) {
  if (type == ScalarType::Float) return cuda::ScaleType::f32;
  return half_dtype(op, name, type) == cuda::DType::f16 ? cuda::ScaleType::f16 : cuda::ScaleType::bf16;
}

inline void check_no_x_groups(const char* op, bool x_groups) {
  STD_TORCH_CHECK(!x_groups, op, ": argument 'x_groups': expected False: activations that are rounded by groups have no ",
                  "CUDA kernel");
}

inline cuda::Layout cuda_layout(const char* op, int64_t n, int64_t k, int64_t groups, int64_t bits) {
  const cuda::Layout layout{n, k, groups, bits};
  const std::string reason = layout.refusal();
  STD_TORCH_CHECK(reason.empty(), op, ": no CUDA kernel: ", reason);
  return layout;
}

inline int64_t row_dwords(const cuda::Layout& l) { return l.slabs() * cuda::kSlabK * l.bits / 32; }

inline cuda::DeviceTraits device_traits(const char* op, int32_t device) {
  static std::mutex mutex;
  static std::map<int32_t, cuda::DeviceTraits> known;
  const std::lock_guard lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  const auto attribute = [&](cudaDeviceAttr name) {
    int value = 0;
    const cudaError_t status = cudaDeviceGetAttribute(&value, name, device);
    STD_TORCH_CHECK(status == cudaSuccess, op, ": CUDA device ", device, ": ", cudaGetErrorString(status));
    return value;
  };
  return known[device] = cuda::device_traits(attribute(cudaDevAttrMultiProcessorCount),
                                             attribute(cudaDevAttrComputeCapabilityMajor),
                                             attribute(cudaDevAttrComputeCapabilityMinor));
}

/// Counters by device and stream: those that stay, and those of a time in which memory is made that will not be kept.
struct __attribute__((visibility("hidden"))) ArrivedCounters {
  std::mutex mutex;
  std::map<std::pair<int32_t, void*>, Tensor> kept, passing;
  bool pass = false;
};
__attribute__((visibility("hidden"))) inline ArrivedCounters& all_arrived_counters() {
  static auto* counters = new ArrivedCounters;  // torch may be gone before statics are
  return *counters;
}

/// From now on calls use counters that are forgotten when this is called with false.
inline void pass_arrived_counters(bool pass) {
  ArrivedCounters& all = all_arrived_counters();
  const std::lock_guard lock(all.mutex);
  all.pass = pass;
  if (!pass) all.passing.clear();
}

/// The counters of a stream, all 0 between launches: made at its first call, and so not while a graph is captured, if
/// the same stream ran once before. Launches on one stream follow each other and may share them.
inline Tensor arrived_counters(const Tensor& like, int32_t device, void* stream, int64_t words) {
  ArrivedCounters& all = all_arrived_counters();
  const std::lock_guard lock(all.mutex);
  auto& known = all.pass ? all.passing : all.kept;
  auto found = known.find({device, stream});
  if (found == known.end() || found->second.numel() < words) {
    // More than tiles that run apart: those are fewer than multiprocessors.
    constexpr int64_t kLeast = 1024;
    const std::vector<int64_t> size{words < kLeast ? kLeast : words};
    found = known.insert_or_assign({device, stream}, torch::stable::new_zeros(like, size, ScalarType::Int)).first;
  }
  return found->second;
}

}  // namespace turbo::binding
