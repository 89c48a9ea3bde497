// SPDX-License-Identifier: Apache-2.0
// Binding of the quantizer of weights.
#include "../cpu/quantize_weights.h"

#include <tuple>

#include "binding.h"

namespace {

using namespace turbo::binding;
using namespace turbo::cpu;

WeightRange range_of(const char* op, const std::string& range) {
  if (range == "centred") return WeightRange::centred;
  if (range == "signed") return WeightRange::signed_;
  STD_TORCH_CHECK(range == "asymmetric", op, ": argument 'range': expected centred, signed or asymmetric, given '",
                  range, "'");
  return WeightRange::asymmetric;
}

/// (codes, scale, zero point or empty, first row that is not finite or -1).
std::tuple<Tensor, Tensor, Tensor, int64_t> quantize_weights(Tensor weight, int64_t group_size, int64_t bits,
                                                             std::string range, bool packed,
                                                             ScalarType scale_dtype) {
  constexpr const char* kOp = "quantize_weights";
  check_isa(kOp);
  check_cpu(kOp, "weight", weight);
  STD_TORCH_CHECK(weight.dim() == 2 && weight.numel() > 0, kOp,
                  ": argument 'weight': expected shape [N, K], neither 0, given ", text(weight.sizes()));
  STD_TORCH_CHECK(weight.is_contiguous(), kOp, ": argument 'weight': expected a contiguous tensor");
  STD_TORCH_CHECK(bits == 4 || bits == 8, kOp, ": argument 'bits': expected 4 or 8, given ", bits);
  const int64_t n = weight.size(0), k = weight.size(1);
  STD_TORCH_CHECK(group_size > 0 && group_size % 8 == 0 && k % group_size == 0, kOp,
                  ": argument 'group_size': expected a multiple of 8 that divides K = ", k, ", given ", group_size);
  const DType dtype = float_dtype(kOp, "weight", weight.scalar_type());
  const DType scales = float_dtype(kOp, "scale_dtype", scale_dtype);
  const WeightRange how = range_of(kOp, range);
  const int64_t groups = k / group_size;
  const auto made = [&](int64_t columns, ScalarType type) {
    return torch::stable::new_empty(weight, {n, columns}, type);
  };
  Tensor codes = packed ? made(k * bits / 32, ScalarType::Int) : made(k, ScalarType::Char);
  Tensor scale = made(groups, scale_dtype);
  Tensor zero = made(how == WeightRange::asymmetric ? groups : 0, ScalarType::Char);
  const int64_t bad = quantize_weights_avx2(
      {weight.const_data_ptr(), dtype, n, k, group_size, static_cast<int>(bits), how, packed, scales,
       codes.data_ptr(), scale.data_ptr(),
       how == WeightRange::asymmetric ? static_cast<int8_t*>(zero.data_ptr()) : nullptr},
      torch_pool());
  return {codes, scale, zero, bad};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_plugin_tm, m) {
  m.def(
      "quantize_weights(Tensor weight, int group_size, int bits, str range, bool packed, ScalarType scale_dtype)"
      " -> (Tensor, Tensor, Tensor, int)");
}

// For every device, so that a tensor on a wrong one is named by our own check.
STABLE_TORCH_LIBRARY_IMPL(vllm_plugin_tm, CompositeExplicitAutograd, m) {
  m.impl("quantize_weights", TORCH_BOX(&quantize_weights));
}
