// SPDX-License-Identifier: Apache-2.0
// Bindings of the linear CUDA kernels: argument checks, memory for the launch, then calls into csrc/cuda. Nothing
// here waits for the device.
#include "cuda_binding.h"

namespace {

using namespace turbo::binding;
namespace cuda = turbo::cuda;

/// One call: its arguments as they are known so far, and the tensors behind them.
struct Call {
  const char* op;
  int32_t device;
  cuda::Linear args{};
  Tensor x, y, sums, arrived;

  /// Checks x and n.
  Call(const char* name, Tensor input, int64_t n) : op(name), device(0), x(input) {
    STD_TORCH_CHECK(x.is_cuda(), op, ": argument 'x': expected a tensor on a CUDA device");
    STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) > 0, op,
                    ": argument 'x': expected shape [..., K] with K > 0, given ", text(x.sizes()));
    STD_TORCH_CHECK(n > 0 && n <= kMost, op, ": argument 'n': expected 1 to ", kMost, ", given ", n);
    device = x.get_device_index();
    args.dtype = half_dtype(op, "x", x.scalar_type());
    args.rows = x.numel() / k();
  }

  int64_t k() const { return x.size(x.dim() - 1); }

  int64_t groups(int64_t group_size) const {
    const bool channel = group_size == -1 || group_size == k();
    STD_TORCH_CHECK(channel || (group_size > 0 && k() % group_size == 0), op,
                    ": argument 'group_size': expected -1 or a divisor of K = ", k(), ", given ", group_size);
    return channel ? 1 : k() / group_size;
  }

  void set_weights(const cuda::Layout& layout, const Tensor& weight, const Tensor& scale, ScalarType scale_type,
                   const MaybeTensor& zero_point, const MaybeTensor& bias) {
    args.layout = layout;
    check_cuda(op, "weight", weight, device, ScalarType::Int, {layout.padded_n(), row_dwords(layout)});
    check_cuda(op, "scale", scale, device, scale_type, {layout.padded_n(), layout.scale_rows()});
    if (zero_point)
      check_cuda(op, "zero_point", *zero_point, device, ScalarType::Int, {layout.padded_n() / 8, layout.scale_rows()});
    if (bias) check_cuda(op, "bias", *bias, device, x.scalar_type(), {layout.n});
    args.weight = weight.const_data_ptr();
    args.scale = scale.const_data_ptr();
    args.zero = zero_point ? zero_point->const_data_ptr() : nullptr;
    args.bias = bias ? bias->const_data_ptr() : nullptr;
  }

  /// y, and x in rows with unit inner stride: read where they lie, or copied once. False where there are no rows.
  bool begin() {
    std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
    sizes.back() = args.layout.n;
    y = torch::stable::new_empty(x, sizes);
    if (args.rows == 0) return false;
    if (!(x.is_contiguous() || (x.dim() == 2 && x.stride(1) == 1))) x = torch::stable::contiguous(x);
    args.x = x.const_data_ptr();
    args.x_stride = x.is_contiguous() ? k() : x.stride(0);
    args.y = y.data_ptr();
    args.y_stride = args.layout.n;
    return true;
  }

  cuda::LinearPlan plan(cuda::Scheme scheme, void* stream) {
    const cuda::LinearPlan plan = cuda::plan_linear(scheme, args.layout, args.rows, device_traits(op, device));
    const int64_t bytes = cuda::sums_bytes(plan, args.layout, args.rows);
    const int64_t words = cuda::arrived_words(plan, args.layout, args.rows);
    if (bytes) sums = torch::stable::new_empty(x, std::vector<int64_t>{bytes / 4}, ScalarType::Float);
    if (words) arrived = arrived_counters(x, device, stream, words);
    args.sums = bytes ? sums.data_ptr() : nullptr;
    args.arrived = words ? arrived.data_ptr() : nullptr;
    return plan;
  }
};

void check_error(const std::string& error) { STD_TORCH_CHECK(error.empty(), error); }

Tensor w4a16_linear(Tensor x, Tensor weight, Tensor scale, MaybeTensor zero_point, MaybeTensor bias, int64_t n,
                    int64_t group_size) {
  Call call("w4a16_linear", x, n);
  const cuda::Layout layout = cuda_layout(call.op, n, call.k(), call.groups(group_size), 4);
  call.set_weights(layout, weight, scale, x.scalar_type(), zero_point, bias);
  if (!call.begin()) return call.y;
  const accelerator::DeviceGuard guard(call.device);
  void* stream = accelerator::getCurrentStream(call.device).nativeHandle();
  const cuda::LinearPlan plan = call.plan(cuda::Scheme::w4a16, stream);
  check_error(cuda::w4a16_linear(call.args, plan, stream));
  return call.y;
}

/// How x becomes codes: from each row, with a zero point unless symmetric, or as given.
struct Rounding {
  bool symmetric;
  const MaybeTensor& scale;
  const MaybeTensor& zero_point;
  bool has_zeros() const { return zero_point || (!scale && !symmetric); }
};

/// Codes of x, then their product with the weights.
Tensor multiply_codes(Call& call, cuda::ScaleType scale_type, const Rounding& rounding, const int32_t* weight_sum) {
  if (!call.begin()) return call.y;
  const accelerator::DeviceGuard guard(call.device);
  void* stream = accelerator::getCurrentStream(call.device).nativeHandle();
  const int64_t rows = call.args.rows;
  const auto made = [&](int64_t count, ScalarType type) {
    return torch::stable::new_empty(call.x, std::vector<int64_t>{count}, type);
  };
  Tensor codes = made(cuda::code_bytes(rows, call.k()), ScalarType::Char), x_scale = made(rows, ScalarType::Float);
  Tensor x_zero = made(rounding.has_zeros() ? rows : 0, ScalarType::Int);
  cuda::QuantizeX quantize{};
  quantize.dtype = call.args.dtype;
  quantize.rows = rows;
  quantize.k = call.k();
  quantize.x = call.args.x;
  quantize.x_stride = call.args.x_stride;
  quantize.given_scale = rounding.scale ? static_cast<const float*>(rounding.scale->const_data_ptr()) : nullptr;
  quantize.given_zero =
      rounding.zero_point ? static_cast<const int32_t*>(rounding.zero_point->const_data_ptr()) : nullptr;
  quantize.symmetric = rounding.symmetric;
  quantize.codes = codes.data_ptr();
  quantize.scale = static_cast<float*>(x_scale.data_ptr());
  quantize.zero = rounding.has_zeros() ? static_cast<int32_t*>(x_zero.data_ptr()) : nullptr;

  const cuda::LinearPlan plan = call.plan(call.args.layout.bits == 8 ? cuda::Scheme::w8a8 : cuda::Scheme::w4a8, stream);
  call.args.x = codes.const_data_ptr();
  const cuda::LinearA8 args{call.args, scale_type, quantize.scale, quantize.zero,
                            rounding.has_zeros() ? weight_sum : nullptr};
  check_error(cuda::quantize_x(quantize, stream));
  check_error(cuda::a8_linear(args, plan, stream));
  return call.y;
}

Tensor w4a8_linear(Tensor x, Tensor weight, Tensor scale, MaybeTensor zero_point, MaybeTensor bias, int64_t n,
                   int64_t group_size, bool x_groups) {
  Call call("w4a8_linear", x, n);
  check_no_x_groups(call.op, x_groups);
  const cuda::Layout layout = cuda_layout(call.op, n, call.k(), call.groups(group_size), 4);
  call.set_weights(layout, weight, scale, scale.scalar_type(), zero_point, bias);
  const cuda::ScaleType type = scale_type_of(call.op, "scale", scale.scalar_type());
  const MaybeTensor none;
  return multiply_codes(call, type, {true, none, none}, nullptr);
}

Tensor w8a8_linear(Tensor x, Tensor weight, Tensor scale, Tensor weight_sum, MaybeTensor bias, int64_t n,
                   MaybeTensor x_scale, MaybeTensor x_zero_point, bool x_symmetric) {
  Call call("w8a8_linear", x, n);
  const cuda::Layout layout = cuda_layout(call.op, n, call.k(), 1, 8);
  call.set_weights(layout, weight, scale, ScalarType::Float, {}, bias);
  check_cuda(call.op, "weight_sum", weight_sum, call.device, ScalarType::Int, {layout.padded_n()});
  STD_TORCH_CHECK(x_scale || !x_zero_point, call.op,
                  ": argument 'x_zero_point': expected none without x_scale, given one");
  // Their values are read on the device: the host would have to wait for them.
  if (x_scale) check_cuda(call.op, "x_scale", *x_scale, call.device, ScalarType::Float, {1});
  if (x_zero_point) check_cuda(call.op, "x_zero_point", *x_zero_point, call.device, ScalarType::Int, {1});
  return multiply_codes(call, cuda::ScaleType::f32, {x_symmetric, x_scale, x_zero_point},
                        static_cast<const int32_t*>(weight_sum.const_data_ptr()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vllm_plugin_tm, CUDA, m) {
  m.impl("w4a16_linear", TORCH_BOX(&w4a16_linear));
  m.impl("w4a8_linear", TORCH_BOX(&w4a8_linear));
  m.impl("w8a8_linear", TORCH_BOX(&w8a8_linear));
}
