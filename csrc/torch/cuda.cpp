// SPDX-License-Identifier: Apache-2.0
// Bindings of the CUDA kernels: the ops of csrc/torch/linear.cpp and pack.cpp for tensors on a device, under the same
// schemas. A library of its own, loaded after the first one, so that a machine without CUDA needs none of it.
//
// Weights are in csrc/cuda/layout.h's order, as int32 and with their sizes as dimensions:
//   weight [padded n, k padded to 64, / 8]    scale [padded n, rows of scales]    zero_point [padded n / 8, rows]
#include <torch/csrc/stable/accelerator.h>

#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <tuple>
#include <vector>

#include "../cuda/linear.h"
#include "../cuda/pack.h"
#include "binding.h"

namespace {

using namespace turbo::binding;
namespace cuda = turbo::cuda;
namespace accelerator = torch::stable::accelerator;

void check_device(const char* op, const char* name, const Tensor& t, int32_t device) {
  STD_TORCH_CHECK(t.defined(), op, ": argument '", name, "': expected a Tensor, given None");
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == device, op, ": argument '", name,
                  "': expected a tensor on CUDA device ", device, ", that of the first argument, given one elsewhere");
}

void check_cuda(const char* op, const char* name, const Tensor& t, int32_t device, ScalarType type,
                std::initializer_list<int64_t> sizes) {
  check_device(op, name, t, device);
  STD_TORCH_CHECK(t.scalar_type() == type, op, ": argument '", name, "': expected dtype ", text(type), ", given ",
                  text(t.scalar_type()));
  STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), t.sizes().begin(), t.sizes().end()), op, ": argument '", name,
                  "': expected shape ", text(sizes), ", given ", text(t.sizes()));
  STD_TORCH_CHECK(t.is_contiguous(), op, ": argument '", name, "': expected a contiguous tensor");
}

cuda::DType half_dtype(const char* op, const char* name, ScalarType type) {
  if (type == ScalarType::BFloat16) return cuda::DType::bf16;
  STD_TORCH_CHECK(type == ScalarType::Half, op, ": argument '", name, "': expected dtype BFloat16 or Half on a CUDA device, given ",
                  text(type));
  return cuda::DType::f16;
}

cuda::Layout layout_of(const char* op, int64_t n, int64_t k, int64_t groups) {
  const cuda::Layout layout{n, k, groups};
  const std::string reason = layout.refusal();
  STD_TORCH_CHECK(reason.empty(), op, ": no CUDA kernel: ", reason);
  return layout;
}

int multiprocessors(const char* op, int32_t device) {
  static std::mutex mutex;
  static std::map<int32_t, int> known;
  const std::lock_guard lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  int count = 0;
  const cudaError_t status = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  STD_TORCH_CHECK(status == cudaSuccess, op, ": CUDA device ", device, ": ", cudaGetErrorString(status));
  return known[device] = count;
}

/// The counters of a stream, all 0 between launches: made at its first call, and so not while a graph is captured, if
/// the same stream ran once before. Launches on one stream follow each other and may share them.
Tensor arrived_counters(const Tensor& like, int32_t device, void* stream, int64_t words) {
  static std::mutex mutex;
  static auto* known = new std::map<std::pair<int32_t, void*>, Tensor>;  // torch may be gone before statics are
  const std::lock_guard lock(mutex);
  auto found = known->find({device, stream});
  if (found == known->end() || found->second.numel() < words) {
    // More than tiles that run apart: those are fewer than multiprocessors.
    constexpr int64_t kLeast = 1024;
    const std::vector<int64_t> size{words < kLeast ? kLeast : words};
    found = known->insert_or_assign({device, stream}, torch::stable::new_zeros(like, size, ScalarType::Int)).first;
  }
  return found->second;
}

Tensor w4a16_linear(Tensor x, Tensor weight, Tensor scale, MaybeTensor zero_point, MaybeTensor bias, int64_t n,
                    int64_t group_size) {
  constexpr const char* kOp = "w4a16_linear";
  STD_TORCH_CHECK(x.is_cuda(), kOp, ": argument 'x': expected a tensor on a CUDA device");
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) > 0, kOp,
                  ": argument 'x': expected shape [..., K] with K > 0, given ", text(x.sizes()));
  STD_TORCH_CHECK(n > 0 && n <= kMost, kOp, ": argument 'n': expected 1 to ", kMost, ", given ", n);
  const int32_t device = x.get_device_index();
  const int64_t k = x.size(x.dim() - 1);
  const bool channel = group_size == -1 || group_size == k;
  STD_TORCH_CHECK(channel || (group_size > 0 && k % group_size == 0), kOp,
                  ": argument 'group_size': expected -1 or a divisor of K = ", k, ", given ", group_size);
  const cuda::Layout layout = layout_of(kOp, n, k, channel ? 1 : k / group_size);
  const ScalarType type = x.scalar_type();
  check_cuda(kOp, "weight", weight, device, ScalarType::Int, {layout.padded_n(), layout.slabs() * cuda::kSlabK / 8});
  check_cuda(kOp, "scale", scale, device, type, {layout.padded_n(), layout.scale_rows()});
  if (zero_point)
    check_cuda(kOp, "zero_point", *zero_point, device, ScalarType::Int, {layout.padded_n() / 8, layout.scale_rows()});
  if (bias) check_cuda(kOp, "bias", *bias, device, type, {n});

  cuda::Linear args{};
  args.layout = layout;
  args.dtype = half_dtype(kOp, "x", type);
  args.rows = x.numel() / k;
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = n;
  Tensor y = torch::stable::new_empty(x, sizes);
  if (args.rows == 0) return y;

  // Rows with unit inner stride are read where they lie; any other x is copied once.
  if (!(x.is_contiguous() || (x.dim() == 2 && x.stride(1) == 1))) x = torch::stable::contiguous(x);
  const accelerator::DeviceGuard guard(device);
  void* stream = accelerator::getCurrentStream(device).nativeHandle();
  const cuda::LinearPlan plan = cuda::plan_linear(layout, args.rows, multiprocessors(kOp, device));
  const int64_t sums_bytes = cuda::sums_bytes(plan, layout, args.rows);
  const int64_t words = cuda::arrived_words(plan, layout, args.rows);
  Tensor sums, arrived;
  if (sums_bytes) {
    sums = torch::stable::new_empty(x, std::vector<int64_t>{sums_bytes / 4}, ScalarType::Float);
    args.sums = sums.data_ptr();
  }
  if (words) {
    arrived = arrived_counters(x, device, stream, words);
    args.arrived = arrived.data_ptr();
  }
  args.x = x.const_data_ptr();
  args.x_stride = x.is_contiguous() ? k : x.stride(0);
  args.weight = weight.const_data_ptr();
  args.scale = scale.const_data_ptr();
  args.zero = zero_point ? zero_point->const_data_ptr() : nullptr;
  args.bias = bias ? bias->const_data_ptr() : nullptr;
  args.y = y.data_ptr();
  args.y_stride = n;
  const std::string error = cuda::w4a16_linear(args, plan, stream);
  STD_TORCH_CHECK(error.empty(), error);
  return y;
}

/// The disk tensors of one layer, wherever they are, in the device's layout: packed on the host, for now.
std::tuple<Tensor, Tensor, Tensor> w4a16_pack(Tensor codes, Tensor scale, MaybeTensor zero_point, int64_t k,
                                              int64_t bits, bool gate_up) {
  constexpr const char* kOp = "w4a16_pack";
  STD_TORCH_CHECK(!gate_up, kOp, ": argument 'gate_up': experts have no CUDA kernel");
  STD_TORCH_CHECK(bits >= 2 && bits <= 4, kOp, ": argument 'bits': expected 2 to 4, given ", bits);
  STD_TORCH_CHECK(codes.is_cuda() && codes.dim() == 2 && codes.size(0) > 0, kOp,
                  ": argument 'weight_packed': expected [N, ceil(k*", bits, "/32)], or int8 [N, k], on a CUDA device, given ",
                  text(codes.sizes()));
  STD_TORCH_CHECK(scale.dim() == 2 && scale.size(1) > 0, kOp, ": argument 'scale': expected shape [N, groups], given ",
                  text(scale.sizes()));
  const int32_t device = codes.get_device_index();
  const int64_t n = codes.size(0), groups = scale.size(1);
  const cuda::Layout layout = layout_of(kOp, n, k, groups);
  const bool bytes = codes.scalar_type() == ScalarType::Char;
  const int64_t row = bytes ? k : (k * bits + 31) / 32;
  check_cuda(kOp, "weight_packed", codes, device, bytes ? ScalarType::Char : ScalarType::Int, {n, row});
  half_dtype(kOp, "scale", scale.scalar_type());
  check_cuda(kOp, "scale", scale, device, scale.scalar_type(), {n, groups});
  STD_TORCH_CHECK(!(bytes && zero_point), kOp, ": argument 'zero_point': expected none with codes of bytes");
  if (zero_point) check_cuda(kOp, "zero_point", *zero_point, device, ScalarType::Int, {(n * bits + 31) / 32, groups});

  const auto host = torch::stable::Device(torch::headeronly::DeviceType::CPU);
  const auto to_host = [&](const Tensor& t) { return torch::stable::to(t, host); };
  const Tensor host_codes = to_host(codes), host_scale = to_host(scale);
  const MaybeTensor host_zero = zero_point ? MaybeTensor(to_host(*zero_point)) : MaybeTensor();
  const auto made = [&](const Tensor& like, std::vector<int64_t> sizes, ScalarType type) {
    return torch::stable::new_empty(like, sizes, type);
  };
  Tensor weight_out = made(host_codes, {layout.padded_n(), layout.slabs() * cuda::kSlabK / 8}, ScalarType::Int);
  Tensor scale_out = made(host_scale, {layout.padded_n(), layout.scale_rows()}, scale.scalar_type());
  const std::vector<int64_t> zero_sizes{layout.padded_n() / 8, layout.scale_rows()}, none{0};
  Tensor zero_out = made(host_codes, zero_point ? zero_sizes : none, ScalarType::Int);
  turbo::cpu::Pack pack{};
  pack.layout = {n, k, groups, 4};
  pack.code_bits = bits;
  const void* data = host_codes.const_data_ptr();
  pack.packed = bytes ? nullptr : static_cast<const uint32_t*>(data);
  pack.bytes = bytes ? static_cast<const int8_t*>(data) : nullptr;
  pack.codes_stride = row;
  pack.scale = host_scale.const_data_ptr();
  pack.scale_stride = groups;
  pack.scale_size = 2;
  pack.zero_point = host_zero ? static_cast<const uint32_t*>(host_zero->const_data_ptr()) : nullptr;
  pack.zero_point_stride = groups;
  pack.weight_out = static_cast<uint32_t*>(weight_out.data_ptr());
  pack.scale_out = scale_out.data_ptr();
  pack.zero_out = zero_point ? static_cast<uint32_t*>(zero_out.data_ptr()) : nullptr;
  cuda::pack(pack, torch_pool());
  const auto to_device = [&](const Tensor& t) { return torch::stable::to(t, codes.device()); };
  return {to_device(weight_out), to_device(scale_out), to_device(zero_out)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vllm_plugin_tm, CUDA, m) {
  m.impl("w4a16_linear", TORCH_BOX(&w4a16_linear));
  m.impl("w4a16_pack", TORCH_BOX(&w4a16_pack));
}
