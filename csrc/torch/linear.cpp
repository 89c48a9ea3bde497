// SPDX-License-Identifier: Apache-2.0
// Bindings of the packer and of the linear kernels: argument checks, then one call into csrc/cpu.
#include <optional>
#include <tuple>
#include <vector>

#include "../cpu/pack.h"
#include "binding.h"

namespace {

using namespace turbo::binding;
using namespace turbo::cpu;

using MaybeTensor = std::optional<Tensor>;

// ---- packing --------------------------------------------------------------------------------------

/// The disk tensors of one layer in the kernel layout for `bits`-bit weights: (weight, scale, zero point).
std::tuple<Tensor, Tensor, Tensor> pack_grouped(const char* op, const Tensor& codes, const Tensor& scale,
                                                const MaybeTensor& zero_point, int64_t k, int64_t bits,
                                                int64_t code_bits) {
  STD_TORCH_CHECK(code_bits >= (bits == 8 ? 5 : 2) && code_bits <= bits, op,
                  ": argument 'bits': expected ", bits == 8 ? 5 : 2, " to ", bits, ", given ", code_bits);
  STD_TORCH_CHECK(k > 0 && k <= kMost, op, ": argument 'k': expected 1 to ", kMost, ", given ", k);
  STD_TORCH_CHECK(codes.dim() == 2 && codes.size(0) > 0, op,
                  ": argument 'weight_packed': expected shape [N, ceil(k*", code_bits,
                  "/32)], or int8 [N, k], with N > 0, given ", text(codes.sizes()));
  STD_TORCH_CHECK(scale.dim() == 2 && scale.size(1) > 0, op,
                  ": argument 'scale': expected shape [N, groups], given ", text(scale.sizes()));
  const Layout layout{codes.size(0), k, scale.size(1), bits};
  const int64_t n = layout.n, groups = layout.groups, dword_k = layout.dword_k();
  const bool bytes = codes.scalar_type() == ScalarType::Char;
  const int64_t row = bytes ? k : ceil_div(k * code_bits, 32);
  check(op, "weight_packed", codes, bytes ? ScalarType::Char : ScalarType::Int, {n, row});
  float_dtype(op, "scale", scale.scalar_type());
  check(op, "scale", scale, scale.scalar_type(), {n, groups});
  STD_TORCH_CHECK(groups == 1 || k % (groups * dword_k) == 0, op, ": argument 'scale': expected k = ", k,
                  " to be cut into groups of a multiple of ", dword_k, " weights, given ", groups, " groups");
  if (zero_point)
    check(op, "zero_point", *zero_point, ScalarType::Int, {ceil_div(n * code_bits, 32), groups});

  const auto new_int = [&](std::vector<int64_t> sizes) {
    return torch::stable::new_empty(codes, sizes, ScalarType::Int);
  };
  Tensor weight_out = new_int({layout.padded_n(), layout.dwords()});
  Tensor scale_out = torch::stable::new_empty(scale, {layout.padded_n(), groups});
  Tensor zero_out = zero_point ? new_int({layout.padded_n() / dword_k, groups}) : new_int({0});
  const auto* data = codes.const_data_ptr();
  pack({layout, code_bits, bytes ? nullptr : static_cast<const uint32_t*>(data),
        bytes ? static_cast<const int8_t*>(data) : nullptr, row, scale.const_data_ptr(), groups,
        static_cast<int64_t>(scale.element_size()),
        zero_point ? static_cast<const uint32_t*>(zero_point->const_data_ptr()) : nullptr, groups,
        static_cast<uint32_t*>(weight_out.data_ptr()), scale_out.data_ptr(),
        zero_point ? static_cast<uint32_t*>(zero_out.data_ptr()) : nullptr, nullptr},
       torch_pool());
  return {weight_out, scale_out, zero_out};
}

std::tuple<Tensor, Tensor, Tensor> w4a16_pack(Tensor codes, Tensor scale, MaybeTensor zero_point,
                                              int64_t k, int64_t bits) {
  return pack_grouped("w4a16_pack", codes, scale, zero_point, k, 4, bits);
}

std::tuple<Tensor, Tensor, Tensor> w8a16_pack(Tensor codes, Tensor scale, MaybeTensor zero_point,
                                              int64_t k, int64_t bits) {
  return pack_grouped("w8a16_pack", codes, scale, zero_point, k, 8, bits);
}

/// (weight, scale, sum of each channel's weights).
std::tuple<Tensor, Tensor, Tensor> w8a8_pack(Tensor weight, Tensor scale) {
  constexpr const char* kOp = "w8a8_pack";
  STD_TORCH_CHECK(weight.dim() == 2 && weight.numel() > 0, kOp,
                  ": argument 'weight': expected shape [N, K], neither 0, given ", text(weight.sizes()));
  const Layout layout{weight.size(0), weight.size(1), 1, 8};
  check(kOp, "weight", weight, ScalarType::Char, {layout.n, layout.k});
  check(kOp, "scale", scale, ScalarType::Float, {layout.n, 1});
  Tensor weight_out =
      torch::stable::new_empty(weight, {layout.padded_n(), layout.dwords()}, ScalarType::Int);
  Tensor scale_out = torch::stable::new_empty(scale, {layout.padded_n(), 1});
  Tensor sums_out = torch::stable::new_empty(weight, {layout.padded_n()}, ScalarType::Int);
  pack({layout, 8, nullptr, static_cast<const int8_t*>(weight.const_data_ptr()), layout.k,
        scale.const_data_ptr(), 1, 4, nullptr, 0, static_cast<uint32_t*>(weight_out.data_ptr()),
        scale_out.data_ptr(), nullptr, static_cast<int32_t*>(sums_out.data_ptr())},
       torch_pool());
  return {weight_out, scale_out, sums_out};
}

// ---- products -------------------------------------------------------------------------------------

void check_input(const char* op, const Tensor& x, int64_t n) {
  STD_TORCH_CHECK(chosen_isa().load() != Isa::none, op,
                  ": this processor has no AVX2 with FMA and F16C; there is no kernel for it");
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

/// Checks what all products share, fills in the pointers and calls the kernel.
Tensor multiply(const char* op, Tensor x, const Tensor& weight, const Tensor& scale, ScalarType scale_type,
                const char* zero_name, const MaybeTensor& zero, int64_t zero_rows, const MaybeTensor& bias,
                Gemm gemm_args) {
  const Layout& layout = gemm_args.layout;
  const ScalarType type = x.scalar_type();
  gemm_args.dtype = float_dtype(op, "x", type);
  gemm_args.scale_dtype = float_dtype(op, "scale", scale_type);
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
  gemm_args.y = y.data_ptr();
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
  if (x_scale) {
    check(kOp, "x_scale", *x_scale, ScalarType::Float, {1});
    args.x_scale = *static_cast<const float*>(x_scale->const_data_ptr());
    STD_TORCH_CHECK(args.x_scale > 0 && args.x_scale <= 3.4e38f, kOp,
                    ": argument 'x_scale': expected a positive finite number, given ", args.x_scale);
  }
  if (x_zero_point) {
    check(kOp, "x_zero_point", *x_zero_point, ScalarType::Int, {1});
    args.x_zero_point = *static_cast<const int32_t*>(x_zero_point->const_data_ptr());
    STD_TORCH_CHECK(args.x_zero_point >= -128 && args.x_zero_point <= 127, kOp,
                    ": argument 'x_zero_point': expected -128 to 127, given ", args.x_zero_point);
  }
  STD_TORCH_CHECK(weight_sum.dim() == 1, kOp, ": argument 'weight_sum': expected 1 dimension, given shape ",
                  text(weight_sum.sizes()));
  return multiply(kOp, x, weight, scale, ScalarType::Float, "weight_sum", weight_sum,
                  args.layout.padded_n(), bias, args);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_plugin_tm, m) {
  const char* const kWeights = "Tensor x, Tensor weight, Tensor scale, Tensor? zero_point, Tensor? bias, int n, "
                               "int group_size";
  const char* const kDisk = "Tensor weight_packed, Tensor scale, Tensor? zero_point, int k, ";
  const char* const kPacked = ") -> (Tensor, Tensor, Tensor)";
  const auto def = [&](const std::string& schema) { m.def(schema.c_str()); };
  def(std::string("w4a16_pack(") + kDisk + "int bits=4" + kPacked);
  def(std::string("w8a16_pack(") + kDisk + "int bits=8" + kPacked);
  def(std::string("w8a8_pack(Tensor weight, Tensor scale") + kPacked);
  def(std::string("w4a16_linear(") + kWeights + ") -> Tensor");
  def(std::string("w8a16_linear(") + kWeights + ") -> Tensor");
  def(std::string("w4a8_linear(") + kWeights + ", bool x_groups=False) -> Tensor");
  def("w8a8_linear(Tensor x, Tensor weight, Tensor scale, Tensor weight_sum, Tensor? bias, int n, "
      "Tensor? x_scale=None, Tensor? x_zero_point=None, bool x_symmetric=True) -> Tensor");
}

// For every device, so that a tensor on a wrong one is named by our own check.
STABLE_TORCH_LIBRARY_IMPL(vllm_plugin_tm, CompositeExplicitAutograd, m) {
  m.impl("w4a16_pack", TORCH_BOX(&w4a16_pack));
  m.impl("w8a16_pack", TORCH_BOX(&w8a16_pack));
  m.impl("w8a8_pack", TORCH_BOX(&w8a8_pack));
  m.impl("w4a16_linear", TORCH_BOX(&w4a16_linear));
  m.impl("w8a16_linear", TORCH_BOX(&w8a16_linear));
  m.impl("w4a8_linear", TORCH_BOX(&w4a8_linear));
  m.impl("w8a8_linear", TORCH_BOX(&w8a8_linear));
}
