// SPDX-License-Identifier: Apache-2.0
// Bindings of the linear kernels: argument checks, then one call into csrc/cpu.
#include <vector>

#include "../cpu/gemm.h"
#include "binding.h"

namespace {

using namespace turbo::binding;
using namespace turbo::cpu;

void check_input(const char* op, const Tensor& x, int64_t n) {
  check_isa(op);
  check_cpu(op, "x", x);
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) > 0, op,
                  ": argument 'x': expected shape [..., K] with K > 0, given ", text(x.sizes()));
  STD_TORCH_CHECK(n > 0 && n <= kMost, op, ": argument 'n': expected 1 to ", kMost, ", given ", n);
}

Layout grouped_layout(const char* op, int64_t n, int64_t k, int64_t group_size, int64_t bits) {
  const bool channel = group_size == -1 || group_size == k;
  const int64_t dword_k = 32 / bits;
  STD_TORCH_CHECK(channel || (group_size > 0 && group_size % dword_k == 0 && k % group_size == 0), op,
                  ": argument 'group_size': expected -1 or a multiple of ", dword_k, " that divides K = ", k,
                  ", given ", group_size);
  return {n, k, channel ? 1 : k / group_size, bits};
}

/// What becomes of activations beside e4m3 weights, into `args`.
void round_x(const char* op, Gemm& args, const std::string& rounding, const MaybeTensor& x_scale, int64_t x_group_size) {
  const int64_t k = args.layout.k;
  args.activations = activations_of(op, "x_rounding", rounding);
  STD_TORCH_CHECK((args.activations == Activations::fixed) == x_scale.has_value(), op,
                  ": argument 'x_scale': expected one where x_rounding is 'tensor' and none else, x_rounding is '",
                  rounding, "'");
  if (x_scale) args.x_scale = x_scale_of(op, "x_scale", *x_scale);
  if (args.activations != Activations::grouped) return;
  const int64_t width = k / args.layout.groups;
  STD_TORCH_CHECK(x_group_size == -1 || x_group_size >= k || (x_group_size > 0 && x_group_size % width == 0), op,
                  ": argument 'x_group_size': expected -1, a multiple of the weights' group size ", width,
                  ", or all of K = ", k, " and more, given ", x_group_size);
  args.x_group = x_group_size == -1 ? width : x_group_size;
}

/// Checks what all products share, fills in the pointers and calls the kernel.
Tensor multiply(const char* op, Tensor x, const Tensor& weight, const Tensor& scale, ScalarType scale_type,
                const char* zero_name, const MaybeTensor& zero, int64_t zero_rows, const MaybeTensor& bias,
                Gemm gemm_args) {
  const Layout& layout = gemm_args.layout;
  const ScalarType type = x.scalar_type();
  gemm_args.dtype = float_dtype(op, "x", type);
  check(op, "weight", weight, ScalarType::Int, {layout.padded_n(), layout.dwords()});
  check(op, "scale", scale, scale_type, {layout.padded_n(), layout.groups});
  if (zero && zero->dim() == 1)
    check(op, zero_name, *zero, ScalarType::Int, {zero_rows});
  else if (zero)
    check(op, zero_name, *zero, ScalarType::Int, {zero_rows, layout.groups});
  if (bias) check(op, "bias", *bias, type, {layout.n});

  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  gemm_args.rows = x.numel() / layout.k;
  sizes.back() = layout.n;
  Tensor y = torch::stable::new_empty(x, sizes);
  if (gemm_args.rows == 0) return y;

  // Contiguous x, and rows of a matrix with unit inner stride, are read where they lie; any other x is
  // copied once.
  if (!(x.is_contiguous() || (x.dim() == 2 && x.stride(1) == 1))) x = torch::stable::contiguous(x);
  gemm_args.x_stride = x.is_contiguous() ? layout.k : x.stride(0);
  gemm_args.x = x.const_data_ptr();
  gemm_args.weight = static_cast<const uint32_t*>(weight.const_data_ptr());
  gemm_args.scale = scale.const_data_ptr();
  gemm_args.zero = zero ? static_cast<const uint32_t*>(zero->const_data_ptr()) : nullptr;
  gemm_args.bias = bias ? bias->const_data_ptr() : nullptr;
  gemm_args.y_dtype = gemm_args.dtype;
  gemm_args.y = y.data_ptr();
  gemm_args.y_stride = layout.n;
  gemm(gemm_args, chosen_isa().load(), torch_pool());
  return y;
}

Tensor grouped_linear(const char* op, Tensor x, const Tensor& weight, const Tensor& scale,
                      const MaybeTensor& zero_point, const MaybeTensor& bias, int64_t n,
                      int64_t group_size, int64_t bits, Activations activations) {
  check_input(op, x, n);
  Gemm args{};
  args.layout = grouped_layout(op, n, x.size(x.dim() - 1), group_size, bits);
  args.activations = activations;
  // Kept activations: one dtype for all. Integers: scales as the checkpoint has them.
  const ScalarType scale_type = activations == Activations::kept ? x.scalar_type() : scale.scalar_type();
  args.scale_dtype = float_dtype(op, activations == Activations::kept ? "x" : "scale", scale_type);
  STD_TORCH_CHECK(!zero_point || zero_point->dim() == 2, op,
                  ": argument 'zero_point': expected 2 dimensions, given shape ",
                  zero_point ? text(zero_point->sizes()) : "");
  return multiply(op, x, weight, scale, scale_type, "zero_point", zero_point,
                  args.layout.padded_n() / args.layout.dword_k(), bias, args);
}

Tensor w4a16_linear(Tensor x, Tensor weight, Tensor scale, MaybeTensor zero_point, MaybeTensor bias,
                    int64_t n, int64_t group_size) {
  return grouped_linear("w4a16_linear", x, weight, scale, zero_point, bias, n, group_size, 4,
                        Activations::kept);
}

Tensor w8a16_linear(Tensor x, Tensor weight, Tensor scale, MaybeTensor zero_point, MaybeTensor bias,
                    int64_t n, int64_t group_size) {
  return grouped_linear("w8a16_linear", x, weight, scale, zero_point, bias, n, group_size, 8,
                        Activations::kept);
}

Tensor w4a8_linear(Tensor x, Tensor weight, Tensor scale, MaybeTensor zero_point, MaybeTensor bias,
                   int64_t n, int64_t group_size, bool x_groups) {
  return grouped_linear("w4a8_linear", x, weight, scale, zero_point, bias, n, group_size, 4,
                        x_groups ? Activations::grouped : Activations::dynamic);
}

Tensor w8a8_linear(Tensor x, Tensor weight, Tensor scale, Tensor weight_sum, MaybeTensor bias, int64_t n,
                   MaybeTensor x_scale, MaybeTensor x_zero_point, bool x_symmetric) {
  constexpr const char* kOp = "w8a8_linear";
  check_input(kOp, x, n);
  Gemm args{};
  args.layout = {n, x.size(x.dim() - 1), 1, 8};
  args.activations = x_scale ? Activations::fixed : Activations::dynamic;
  args.symmetric = x_symmetric;
  STD_TORCH_CHECK(x_scale || !x_zero_point, kOp, ": argument 'x_zero_point': expected none without x_scale, given one");
  // What an int32 can hold of the sum of (c - zx) * q: 255 or 128, times 128, times K.
  const int64_t most_k = (x_symmetric && !x_zero_point) ? 131071 : 65793;
  STD_TORCH_CHECK(args.layout.k <= most_k, kOp, ": argument 'x': expected K of at most ", most_k,
                  x_zero_point || !x_symmetric ? " with zero points" : "", ", given ", args.layout.k);
  if (x_scale) args.x_scale = x_scale_of(kOp, "x_scale", *x_scale);
  if (x_zero_point) {
    check(kOp, "x_zero_point", *x_zero_point, ScalarType::Int, {1});
    args.x_zero_point = *static_cast<const int32_t*>(x_zero_point->const_data_ptr());
    STD_TORCH_CHECK(args.x_zero_point >= -128 && args.x_zero_point <= 127, kOp,
                    ": argument 'x_zero_point': expected -128 to 127, given ", args.x_zero_point);
  }
  STD_TORCH_CHECK(weight_sum.dim() == 1, kOp, ": argument 'weight_sum': expected 1 dimension, given shape ",
                  text(weight_sum.sizes()));
  args.scale_dtype = DType::f32;
  return multiply(kOp, x, weight, scale, ScalarType::Float, "weight_sum", weight_sum,
                  args.layout.padded_n(), bias, args);
}

Tensor fp8_linear(Tensor x, Tensor weight, Tensor scale, MaybeTensor bias, int64_t n, int64_t group_size,
                  std::string x_rounding, MaybeTensor x_scale, int64_t x_group_size) {
  constexpr const char* kOp = "fp8_linear";
  check_input(kOp, x, n);
  Gemm args{};
  args.layout = grouped_layout(kOp, n, x.size(x.dim() - 1), group_size, 8);
  args.layout.code = Code::e4m3;
  args.scale_dtype = DType::f32;
  round_x(kOp, args, x_rounding, x_scale, x_group_size);
  return multiply(kOp, x, weight, scale, ScalarType::Float, "", {}, 0, bias, args);
}

Tensor fp4_linear(Tensor x, Tensor weight, Tensor scale, MaybeTensor channel_scale, MaybeTensor bias, int64_t n,
                  int64_t group_size, std::string scale_type) {
  constexpr const char* kOp = "fp4_linear";
  check_input(kOp, x, n);
  Gemm args{};
  args.layout = grouped_layout(kOp, n, x.size(x.dim() - 1), group_size, 4);
  args.layout.code = Code::e2m1;
  args.scale_dtype = byte_scale(kOp, scale_type);
  if (channel_scale) {
    check(kOp, "channel_scale", *channel_scale, ScalarType::Float, {args.layout.padded_n()});
    args.channel_scale = static_cast<const float*>(channel_scale->const_data_ptr());
  }
  return multiply(kOp, x, weight, scale, ScalarType::Byte, "", {}, 0, bias, args);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_plugin_tm, m) {
  const char* const kWeights = "Tensor x, Tensor weight, Tensor scale, Tensor? zero_point, Tensor? bias, int n, "
                               "int group_size";
  const auto def = [&](const std::string& schema) { m.def(schema.c_str()); };
  def(std::string("w4a16_linear(") + kWeights + ") -> Tensor");
  def(std::string("w8a16_linear(") + kWeights + ") -> Tensor");
  def(std::string("w4a8_linear(") + kWeights + ", bool x_groups=False) -> Tensor");
  def("fp8_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias, int n, int group_size, str x_rounding, "
      "Tensor? x_scale=None, int x_group_size=-1) -> Tensor");
  def("fp4_linear(Tensor x, Tensor weight, Tensor scale, Tensor? channel_scale, Tensor? bias, int n, int group_size, "
      "str scale_type) -> Tensor");
  def("w8a8_linear(Tensor x, Tensor weight, Tensor scale, Tensor weight_sum, Tensor? bias, int n, "
      "Tensor? x_scale=None, Tensor? x_zero_point=None, bool x_symmetric=True) -> Tensor");
}

// For every device, so that a tensor on a wrong one is named by our own check.
STABLE_TORCH_LIBRARY_IMPL(vllm_plugin_tm, CompositeExplicitAutograd, m) {
  m.impl("w4a16_linear", TORCH_BOX(&w4a16_linear));
  m.impl("w8a16_linear", TORCH_BOX(&w8a16_linear));
  m.impl("w4a8_linear", TORCH_BOX(&w4a8_linear));
  m.impl("w8a8_linear", TORCH_BOX(&w8a8_linear));
  m.impl("fp8_linear", TORCH_BOX(&fp8_linear));
  m.impl("fp4_linear", TORCH_BOX(&fp4_linear));
}
