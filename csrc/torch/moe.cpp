// SPDX-License-Identifier: Apache-2.0
// Bindings of the routed experts: argument checks, then one call into csrc/cpu.
#include "../cpu/moe.h"

#include <vector>

#include "moe_binding.h"

namespace {

using namespace turbo::binding;
using namespace turbo::cpu;

/// What the ops differ in.
struct Scheme {
  const char* op;
  int64_t bits;
  Activations activations;
  Code code = Code::integer;
  DType byte_scale = DType::e8m0;  // of e2m1
  float w13_x_scale = 0, w2_x_scale = 0;
  int64_t x_group = 0;

  bool integer() const { return code == Code::integer; }
  bool sums() const { return integer() && bits == 8 && activations != Activations::kept; }
  const char* third() const { return !integer() ? "_channel_scale" : sums() ? "_weight_sum" : "_zero_point"; }
};

/// Weights of one product: `name` is "w13" or "w2"; layout.groups comes from the scales.
Experts check_experts(const Scheme& s, const std::string& name, int64_t experts, Layout layout, const Tensor& weight,
                      const Tensor& scale, ScalarType scale_type, const MaybeTensor& third, const MaybeTensor& bias) {
  const std::string scale_name = name + "_scale", third_name = name + s.third(),
                    bias_name = name + "_bias";
  STD_TORCH_CHECK(scale.dim() == 3 && scale.size(2) > 0, s.op, ": argument '", scale_name,
                  "': expected shape [experts, N, groups], given ", text(scale.sizes()));
  layout.groups = scale.size(2);
  STD_TORCH_CHECK(layout.groups == 1 || (!s.sums() && layout.k % (layout.groups * layout.dword_k()) == 0), s.op,
                  ": argument '", scale_name, "': expected K = ", layout.k,
                  s.sums() ? " in one group" : " to be cut into groups of whole dwords of weights", ", given ",
                  layout.groups, " groups");
  const int64_t channels = layout.padded_n();
  check(s.op, name.c_str(), weight, ScalarType::Int, {experts, channels, layout.dwords()});
  check(s.op, scale_name.c_str(), scale, scale_type, {experts, channels, layout.groups});
  if (third && s.sums())
    check(s.op, third_name.c_str(), *third, ScalarType::Int, {experts, channels});
  else if (third && s.integer())
    check(s.op, third_name.c_str(), *third, ScalarType::Int, {experts, channels / layout.dword_k(), layout.groups});
  else if (third)
    check(s.op, third_name.c_str(), *third, ScalarType::Float, {experts, channels});
  if (bias) check(s.op, bias_name.c_str(), *bias, ScalarType::Float, {experts, channels});
  const void* const more = third ? third->const_data_ptr() : nullptr;
  return {layout, static_cast<const uint32_t*>(weight.const_data_ptr()), scale.const_data_ptr(),
          s.integer() ? static_cast<const uint32_t*>(more) : nullptr,
          bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr,
          s.integer() ? nullptr : static_cast<const float*>(more)};
}

/// Indices into the weights, -1 for experts that are elsewhere; memory of this thread, for its next call too.
const int32_t* local_ids(const char* op, const Tensor& ids, const MaybeTensor& expert_map, int64_t experts) {
  static thread_local std::vector<int32_t> local;
  const int64_t count = ids.numel();
  local.resize(static_cast<size_t>(count));
  const bool wide = ids.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide || ids.scalar_type() == ScalarType::Int, op,
                  ": argument 'topk_ids': expected dtype Int or Long, given ", text(ids.scalar_type()));
  const void* data = ids.const_data_ptr();
  const int32_t* map = nullptr;
  int64_t known = experts;
  if (expert_map) {
    known = expert_map->numel();
    check(op, "expert_map", *expert_map, ScalarType::Int, {known});
    map = static_cast<const int32_t*>(expert_map->const_data_ptr());
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t id = wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
    STD_TORCH_CHECK(id >= -1 && id < known, op, ": argument 'topk_ids': expected -1 to ", known - 1, ", given ", id);
    const int64_t at = id >= 0 && map ? map[id] : id;
    STD_TORCH_CHECK(at >= -1 && at < experts, op, ": argument 'expert_map': expected -1 to ", experts - 1, ", given ",
                    at);
    local[static_cast<size_t>(i)] = static_cast<int32_t>(at);
  }
  return local.data();
}

Tensor multiply(const Scheme& s, Tensor x, Tensor topk_weights, Tensor topk_ids, const Tensor& w13,
                const Tensor& w13_scale, const MaybeTensor& w13_third, const MaybeTensor& w13_bias, const Tensor& w2,
                const Tensor& w2_scale, const MaybeTensor& w2_third, const MaybeTensor& w2_bias,
                int64_t intermediate_size, const std::string& activation, double alpha, double beta, double limit,
                const MaybeTensor& expert_map) {
  check_isa(s.op);
  check_cpu(s.op, "x", x);
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) > 0, s.op,
                  ": argument 'x': expected shape [tokens, hidden] with hidden > 0, given ", text(x.sizes()));
  STD_TORCH_CHECK(intermediate_size > 0 && intermediate_size <= kMost, s.op,
                  ": argument 'intermediate_size': expected 1 to ", kMost, ", given ", intermediate_size);
  const int64_t tokens = x.size(0), hidden = x.size(1);
  STD_TORCH_CHECK(topk_ids.dim() == 2 && topk_ids.size(0) == tokens && topk_ids.size(1) > 0, s.op,
                  ": argument 'topk_ids': expected shape [", tokens, ", top_k], given ", text(topk_ids.sizes()));
  check_cpu(s.op, "topk_ids", topk_ids);
  if (!topk_weights.is_contiguous()) topk_weights = torch::stable::contiguous(topk_weights);
  if (!topk_ids.is_contiguous()) topk_ids = torch::stable::contiguous(topk_ids);
  check(s.op, "topk_weights", topk_weights, ScalarType::Float, {tokens, topk_ids.size(1)});
  STD_TORCH_CHECK(w13.dim() == 3 && w13.size(0) > 0 && w13.size(0) <= kMost, s.op,
                  ": argument 'w13': expected shape [experts, N, dwords], given ", text(w13.sizes()));

  Moe m{};
  m.activation = activation_of(s.op, activation, alpha, beta, limit);
  m.tokens = tokens;
  m.top_k = topk_ids.size(1);
  m.experts = w13.size(0);
  m.intermediate = intermediate_size;
  m.dtype = float_dtype(s.op, "x", x.scalar_type());
  const bool kept = s.activations == Activations::kept;
  // Kept activations beside integers: one dtype for all. Rounded ones: scales as the checkpoint has them.
  const ScalarType scale_type = s.code == Code::e2m1               ? ScalarType::Byte
                                : s.code == Code::e4m3 || s.sums() ? ScalarType::Float
                                : kept                             ? x.scalar_type()
                                                                   : w13_scale.scalar_type();
  m.scale_dtype = s.code == Code::e2m1 ? s.byte_scale : float_dtype(s.op, "w13_scale", scale_type);
  m.activations = s.activations;
  m.x_group = s.x_group;
  const int64_t half = ceil_div(intermediate_size, kTileN) * kTileN;
  m.w13 = check_experts(s, "w13", m.experts, {m.activation.gated() ? 2 * half : intermediate_size, hidden, 0, s.bits, s.code}, w13,
                        w13_scale, scale_type, w13_third, w13_bias);
  m.w2 = check_experts(s, "w2", m.experts, {hidden, intermediate_size, 0, s.bits, s.code}, w2, w2_scale, scale_type, w2_third,
                       w2_bias);
  m.w13.x_scale = s.w13_x_scale;
  m.w2.x_scale = s.w2_x_scale;
  if (s.x_group > 0)
    for (const Layout& l : {m.w13.layout, m.w2.layout})
      STD_TORCH_CHECK(s.x_group >= l.k || s.x_group % (l.k / l.groups) == 0, s.op, ": argument 'x_group_size': expected a multiple of the ",
                      "weights' group sizes, ", l.k / l.groups, " among them, given ", s.x_group);
  Tensor y = torch::stable::new_empty(x, {tokens, hidden});
  if (tokens == 0) return y;
  if (x.stride(1) != 1) x = torch::stable::contiguous(x);
  m.x = x.const_data_ptr();
  m.x_stride = x.stride(0);
  m.topk_weights = static_cast<const float*>(topk_weights.const_data_ptr());
  m.topk_ids = local_ids(s.op, topk_ids, expert_map, m.experts);
  m.y = y.data_ptr();
  moe(m, chosen_isa().load(), torch_pool());
  return y;
}

Tensor w4a16_moe(TM_MOE_PARAMETERS(MaybeTensor)) {
  return multiply({"w4a16_moe", 4, Activations::kept}, TM_MOE_ARGUMENTS);
}
Tensor w8a16_moe(TM_MOE_PARAMETERS(MaybeTensor)) {
  return multiply({"w8a16_moe", 8, Activations::kept}, TM_MOE_ARGUMENTS);
}
Tensor w4a8_moe(TM_MOE_PARAMETERS(MaybeTensor), bool x_groups) {
  return multiply({"w4a8_moe", 4, x_groups ? Activations::grouped : Activations::dynamic}, TM_MOE_ARGUMENTS);
}
Tensor w8a8_moe(TM_MOE_PARAMETERS(Tensor)) {
  return multiply({"w8a8_moe", 8, Activations::dynamic}, TM_MOE_ARGUMENTS);
}

float one_scale(const char* op, const char* name, const MaybeTensor& scale, const std::string& rounding) {
  STD_TORCH_CHECK((rounding == "tensor") == scale.has_value(), op, ": argument '", name,
                  "': expected one where x_rounding is 'tensor' and none else, x_rounding is '", rounding, "'");
  return scale ? x_scale_of(op, name, *scale) : 0;
}

Tensor fp8_moe(TM_MOE_PARAMETERS(MaybeTensor), std::string x_rounding, MaybeTensor w13_x_scale, MaybeTensor w2_x_scale,
               int64_t x_group_size) {
  Scheme s{"fp8_moe", 8, activations_of("fp8_moe", "x_rounding", x_rounding), Code::e4m3};
  s.w13_x_scale = one_scale(s.op, "w13_x_scale", w13_x_scale, x_rounding);
  s.w2_x_scale = one_scale(s.op, "w2_x_scale", w2_x_scale, x_rounding);
  STD_TORCH_CHECK(x_group_size == -1 || x_group_size > 0, s.op,
                  ": argument 'x_group_size': expected -1 or more than 0, given ", x_group_size);
  if (s.activations == Activations::grouped && x_group_size > 0) s.x_group = x_group_size;
  return multiply(s, TM_MOE_ARGUMENTS);
}

Tensor fp4_moe(TM_MOE_PARAMETERS(MaybeTensor), std::string scale_type) {
  return multiply({"fp4_moe", 4, Activations::kept, Code::e2m1, byte_scale("fp4_moe", scale_type)}, TM_MOE_ARGUMENTS);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_plugin_tm, m) {
  const auto schema = [](const std::string& name, const std::string& third, const std::string& more = "") {
    const auto product = [&](const std::string& w) {
      return "Tensor " + w + ", Tensor " + w + "_scale, Tensor" + (third == "weight_sum" ? " " : "? ") + w + "_" + third +
             ", Tensor? " + w + "_bias, ";
    };
    return name + "(Tensor x, Tensor topk_weights, Tensor topk_ids, " + product("w13") + product("w2") +
           "int intermediate_size, str activation, float alpha, float beta, float limit, "
           "Tensor? expert_map=None" + more + ") -> Tensor";
  };
  m.def(schema("w4a16_moe", "zero_point").c_str());
  m.def(schema("w8a16_moe", "zero_point").c_str());
  m.def(schema("w4a8_moe", "zero_point", ", bool x_groups=False").c_str());
  m.def(schema("w8a8_moe", "weight_sum").c_str());
  m.def(schema("fp8_moe", "channel_scale", ", str x_rounding='none', Tensor? w13_x_scale=None, "
               "Tensor? w2_x_scale=None, int x_group_size=-1").c_str());
  m.def(schema("fp4_moe", "channel_scale", ", str scale_type='e8m0'").c_str());
}

// For every device, so that a tensor on a wrong one is named by our own check.
STABLE_TORCH_LIBRARY_IMPL(vllm_plugin_tm, CompositeExplicitAutograd, m) {
  m.impl("w4a16_moe", TORCH_BOX(&w4a16_moe));
  m.impl("w8a16_moe", TORCH_BOX(&w8a16_moe));
  m.impl("w4a8_moe", TORCH_BOX(&w4a8_moe));
  m.impl("w8a8_moe", TORCH_BOX(&w8a8_moe));
  m.impl("fp8_moe", TORCH_BOX(&fp8_moe));
  m.impl("fp4_moe", TORCH_BOX(&fp4_moe));
}
