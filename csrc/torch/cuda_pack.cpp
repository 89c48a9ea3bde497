// SPDX-License-Identifier: Apache-2.0
// Bindings of the packer for tensors on a device.
//
// It packs on the host, and the device's tensors travel there and back: once for each load of a layer, and so that
// there is one packer, which the tests on the simulator hold to the oracle.
#include "cuda_binding.h"

#include "../cuda/pack.h"

namespace {

using namespace turbo::binding;
namespace cuda = turbo::cuda;

struct Outputs {
  Tensor weight, scale, third;
};

Tensor to_host(const Tensor& t) {
  return torch::stable::to(t, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

/// Channels of gates and ups, which are filled up to whole tiles apart.
int64_t gate_up_channels(int64_t n) {
  constexpr int64_t kTile = cuda::kSlabChannels;
  return 2 * ((n / 2 + kTile - 1) / kTile * kTile);
}

void check_gate_up(const char* op, const char* name, bool gate_up, int64_t n) {
  STD_TORCH_CHECK(!gate_up || n % 2 == 0, op, ": argument '", name, "': expected as many gate as up rows, given ", n,
                  " rows");
}

/// Packs tensors of the host; `third` are the sums of 8-bit weights, else zero points or nothing. `gates`: how many
/// rows are gates, 0 for none.
Outputs pack(const cuda::Layout& layout, int64_t code_bits, const Tensor& codes, const Tensor& scale,
             const MaybeTensor& zero_point, int64_t gates) {
  const auto made = [](const Tensor& like, std::vector<int64_t> sizes, ScalarType type) {
    return torch::stable::new_empty(like, sizes, type);
  };
  const int64_t n = layout.padded_n(), rows = layout.scale_rows();
  const bool bytes = codes.scalar_type() == ScalarType::Char, sums = layout.bits == 8;
  Outputs out{made(codes, {n, row_dwords(layout)}, ScalarType::Int), made(scale, {n, rows}, scale.scalar_type()), {}};
  const std::vector<int64_t> zeros{n / 8, rows}, channels{n}, none{0};
  out.third = made(codes, sums ? channels : zero_point ? zeros : none, ScalarType::Int);
  const void* data = codes.const_data_ptr();
  turbo::cpu::Pack pack{};
  pack.layout = {layout.n, layout.k, layout.groups, layout.bits};
  pack.code_bits = code_bits;
  pack.packed = bytes ? nullptr : static_cast<const uint32_t*>(data);
  pack.bytes = bytes ? static_cast<const int8_t*>(data) : nullptr;
  pack.codes_stride = codes.size(1);
  pack.scale = scale.const_data_ptr();
  pack.scale_stride = layout.groups;
  pack.scale_size = static_cast<int64_t>(scale.element_size());
  pack.zero_point = zero_point ? static_cast<const uint32_t*>(zero_point->const_data_ptr()) : nullptr;
  pack.zero_point_stride = layout.groups;
  pack.weight_out = static_cast<uint32_t*>(out.weight.data_ptr());
  pack.scale_out = out.scale.data_ptr();
  pack.zero_out = zero_point ? static_cast<uint32_t*>(out.third.data_ptr()) : nullptr;
  pack.sums_out = sums ? static_cast<int32_t*>(out.third.data_ptr()) : nullptr;
  pack.gate_up = gates;
  cuda::pack(pack, torch_pool());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> on_device_of(const Tensor& t, const Outputs& out) {
  const auto moved = [&](const Tensor& host) { return torch::stable::to(host, t.device()); };
  return {moved(out.weight), moved(out.scale), moved(out.third)};
}

std::tuple<Tensor, Tensor, Tensor> w4a16_pack(Tensor codes, Tensor scale, MaybeTensor zero_point, int64_t k,
                                              int64_t bits, bool gate_up) {
  constexpr const char* kOp = "w4a16_pack";
  STD_TORCH_CHECK(bits >= 2 && bits <= 4, kOp, ": argument 'bits': expected 2 to 4, given ", bits);
  STD_TORCH_CHECK(codes.is_cuda() && codes.dim() == 2 && codes.size(0) > 0, kOp,
                  ": argument 'weight_packed': expected [N, ceil(k*", bits,
                  "/32)], or int8 [N, k], on a CUDA device, given ", text(codes.sizes()));
  STD_TORCH_CHECK(scale.dim() == 2 && scale.size(1) > 0, kOp, ": argument 'scale': expected shape [N, groups], given ",
                  text(scale.sizes()));
  const int32_t device = codes.get_device_index();
  const int64_t n = codes.size(0), groups = scale.size(1);
  check_gate_up(kOp, "weight_packed", gate_up, n);
  const cuda::Layout layout = cuda_layout(kOp, gate_up ? gate_up_channels(n) : n, k, groups, 4);
  const bool bytes = codes.scalar_type() == ScalarType::Char;
  check_cuda(kOp, "weight_packed", codes, device, bytes ? ScalarType::Char : ScalarType::Int,
             {n, bytes ? k : (k * bits + 31) / 32});
  float_dtype(kOp, "scale", scale.scalar_type());
  check_cuda(kOp, "scale", scale, device, scale.scalar_type(), {n, groups});
  STD_TORCH_CHECK(!(bytes && zero_point), kOp, ": argument 'zero_point': expected none with codes of bytes");
  if (zero_point) check_cuda(kOp, "zero_point", *zero_point, device, ScalarType::Int, {(n * bits + 31) / 32, groups});
  const MaybeTensor host_zero = zero_point ? MaybeTensor(to_host(*zero_point)) : MaybeTensor();
  const int64_t gates = gate_up ? n / 2 : 0;
  return on_device_of(codes, pack(layout, bits, to_host(codes), to_host(scale), host_zero, gates));
}

std::tuple<Tensor, Tensor, Tensor> w8a8_pack(Tensor weight, Tensor scale, bool gate_up) {
  constexpr const char* kOp = "w8a8_pack";
  STD_TORCH_CHECK(weight.is_cuda() && weight.dim() == 2 && weight.numel() > 0, kOp,
                  ": argument 'weight': expected shape [N, K], neither 0, on a CUDA device, given ",
                  text(weight.sizes()));
  const int32_t device = weight.get_device_index();
  const int64_t n = weight.size(0), k = weight.size(1);
  check_gate_up(kOp, "weight", gate_up, n);
  const cuda::Layout layout = cuda_layout(kOp, gate_up ? gate_up_channels(n) : n, k, 1, 8);
  check_cuda(kOp, "weight", weight, device, ScalarType::Char, {n, k});
  check_cuda(kOp, "scale", scale, device, ScalarType::Float, {n, 1});
  return on_device_of(weight, pack(layout, 8, to_host(weight), to_host(scale), {}, gate_up ? n / 2 : 0));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vllm_plugin_tm, CUDA, m) {
  m.impl("w4a16_pack", TORCH_BOX(&w4a16_pack));
  m.impl("w8a8_pack", TORCH_BOX(&w8a8_pack));
}
