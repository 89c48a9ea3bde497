// SPDX-License-Identifier: Apache-2.0
// Bindings of routed experts for tensors on a device: argument checks, memory for the launch, then a call into
// csrc/cuda. Nothing here waits for the device, so ids are not looked at: one that names no expert adds nothing.
#include "../cuda/moe.h"

#include "cuda_binding.h"
#include "moe_binding.h"

namespace {

using namespace turbo::binding;
namespace cuda = turbo::cuda;

/// The groups of k in packed scales: those of 32 have two rows for each slab, and no other ones have so many.
int64_t groups_of(int64_t k, int64_t scale_rows) {
  const cuda::Layout whole{1, k, 1};
  return scale_rows == 2 * whole.slabs() && k % cuda::kSmallGroup == 0 ? k / cuda::kSmallGroup : scale_rows;
}

/// What the ops differ in.
struct Scheme {
  const char* op;
  cuda::Scheme scheme;
  int64_t bits;
};

/// Weights of one product; `third` are zero points, or with 8 bits sums of weights, which symmetric codes do not need.
cuda::ExpertWeights check_experts(const Scheme& s, const std::string& name, int32_t device, ScalarType type,
                                  int64_t experts, int64_t n, int64_t k, const Tensor& weight, const Tensor& scale,
                                  const MaybeTensor& third, const MaybeTensor& bias) {
  const char* op = s.op;
  const bool sums = s.bits == 8;
  const std::string scale_name = name + "_scale", third_name = name + (sums ? "_weight_sum" : "_zero_point"),
                    bias_name = name + "_bias";
  STD_TORCH_CHECK(scale.dim() == 3 && scale.size(2) > 0, op, ": argument '", scale_name,
                  "': expected shape [experts, N, rows], given ", text(scale.sizes()));
  const cuda::Layout l = cuda_layout(op, n, k, groups_of(k, scale.size(2)), s.bits);
  check_cuda(op, name.c_str(), weight, device, ScalarType::Int, {experts, l.padded_n(), row_dwords(l)});
  check_cuda(op, scale_name.c_str(), scale, device, type, {experts, l.padded_n(), l.scale_rows()});
  if (third && sums) check_cuda(op, third_name.c_str(), *third, device, ScalarType::Int, {experts, l.padded_n()});
  if (third && !sums)
    check_cuda(op, third_name.c_str(), *third, device, ScalarType::Int, {experts, l.padded_n() / 8, l.scale_rows()});
  if (bias) check_cuda(op, bias_name.c_str(), *bias, device, ScalarType::Float, {experts, l.padded_n()});
  return {l, weight.const_data_ptr(), scale.const_data_ptr(), third && !sums ? third->const_data_ptr() : nullptr,
          bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr};
}

Tensor multiply(const Scheme& s, Tensor x, Tensor topk_weights, Tensor topk_ids, const Tensor& w13, const Tensor& w13_scale,
                const MaybeTensor& w13_third, const MaybeTensor& w13_bias, const Tensor& w2, const Tensor& w2_scale,
                const MaybeTensor& w2_third, const MaybeTensor& w2_bias, int64_t intermediate_size,
                const std::string& activation, double alpha, double beta, double limit, const MaybeTensor& expert_map) {
  const char* op = s.op;
  STD_TORCH_CHECK(x.is_cuda() && x.dim() == 2 && x.size(1) > 0, op,
                  ": argument 'x': expected shape [tokens, hidden] with hidden > 0 on a CUDA device, given ",
                  text(x.sizes()));
  STD_TORCH_CHECK(intermediate_size > 0 && intermediate_size <= kMost, op,
                  ": argument 'intermediate_size': expected 1 to ", kMost, ", given ", intermediate_size);
  const int32_t device = x.get_device_index();
  cuda::Moe m{};
  m.scheme = s.scheme;
  m.dtype = half_dtype(op, "x", x.scalar_type());
  const ScalarType type = s.scheme == cuda::Scheme::w4a16  ? x.scalar_type()
                          : s.scheme == cuda::Scheme::w8a8 ? ScalarType::Float
                                                              : w13_scale.scalar_type();
  m.scale_type = scale_type_of(op, "w13_scale", type);
  m.tokens = x.size(0);
  m.hidden = x.size(1);
  m.intermediate = intermediate_size;
  check_device(op, "topk_ids", topk_ids, device);
  STD_TORCH_CHECK(topk_ids.dim() == 2 && topk_ids.size(0) == m.tokens && topk_ids.size(1) > 0, op,
                  ": argument 'topk_ids': expected shape [", m.tokens, ", top_k], given ", text(topk_ids.sizes()));
  m.wide_ids = topk_ids.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(m.wide_ids || topk_ids.scalar_type() == ScalarType::Int, op,
                  ": argument 'topk_ids': expected dtype Int or Long, given ", text(topk_ids.scalar_type()));
  m.top_k = topk_ids.size(1);
  if (!topk_ids.is_contiguous()) topk_ids = torch::stable::contiguous(topk_ids);
  if (!topk_weights.is_contiguous()) topk_weights = torch::stable::contiguous(topk_weights);
  check_cuda(op, "topk_weights", topk_weights, device, ScalarType::Float, {m.tokens, m.top_k});
  STD_TORCH_CHECK(w13.dim() == 3 && w13.size(0) > 0 && w13.size(0) <= kMost, op,
                  ": argument 'w13': expected shape [experts, N, dwords], given ", text(w13.sizes()));
  m.experts = m.known = w13.size(0);
  if (expert_map) {
    m.known = expert_map->numel();
    check_cuda(op, "expert_map", *expert_map, device, ScalarType::Int, {m.known});
    m.expert_map = static_cast<const int32_t*>(expert_map->const_data_ptr());
  }
  m.activation = activation_of(op, activation, alpha, beta, limit);
  constexpr int64_t kTile = cuda::kSlabChannels;
  const int64_t half = (intermediate_size + kTile - 1) / kTile * kTile;
  m.w13 = check_experts(s, "w13", device, type, m.experts, m.activation.gated() ? 2 * half : intermediate_size,
                        m.hidden, w13, w13_scale, w13_third, w13_bias);
  m.w2 = check_experts(s, "w2", device, type, m.experts, m.hidden, intermediate_size, w2, w2_scale, w2_third, w2_bias);
  Tensor y = torch::stable::new_empty(x, {m.tokens, m.hidden});
  if (m.tokens == 0) return y;
  if (x.stride(1) != 1) x = torch::stable::contiguous(x);
  const accelerator::DeviceGuard guard(device);
  const int tile = cuda::plan_moe_tile(m, device_traits(op, device).wgmma);
  Tensor memory = torch::stable::new_empty(x, std::vector<int64_t>{cuda::moe_bytes(m, tile)}, ScalarType::Byte);
  m.x = x.const_data_ptr();
  m.x_stride = x.stride(0);
  m.topk_weights = static_cast<const float*>(topk_weights.const_data_ptr());
  m.topk_ids = topk_ids.const_data_ptr();
  m.y = y.data_ptr();
  m.memory = memory.data_ptr();
  const std::string error = cuda::moe(m, tile, accelerator::getCurrentStream(device).nativeHandle());
  STD_TORCH_CHECK(error.empty(), error);
  return y;
}

Tensor w4a16_moe(TM_MOE_PARAMETERS(MaybeTensor)) {
  return multiply({"w4a16_moe", cuda::Scheme::w4a16, 4}, TM_MOE_ARGUMENTS);
}
Tensor w4a8_moe(TM_MOE_PARAMETERS(MaybeTensor), bool x_groups) {
  constexpr Scheme kScheme{"w4a8_moe", cuda::Scheme::w4a8, 4};
  check_no_x_groups(kScheme.op, x_groups);
  return multiply(kScheme, TM_MOE_ARGUMENTS);
}
Tensor w8a8_moe(TM_MOE_PARAMETERS(Tensor)) {
  return multiply({"w8a8_moe", cuda::Scheme::w8a8, 8}, TM_MOE_ARGUMENTS);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vllm_plugin_tm, CUDA, m) {
  m.impl("w4a16_moe", TORCH_BOX(&w4a16_moe));
  m.impl("w4a8_moe", TORCH_BOX(&w4a8_moe));
  m.impl("w8a8_moe", TORCH_BOX(&w8a8_moe));
}
