// SPDX-License-Identifier: Apache-2.0
// Bindings of the packer: argument checks, then one call into csrc/cpu.
#include "../cpu/pack.h"

#include <tuple>
#include <vector>

#include "../cpu/pages.h"
#include "binding.h"

namespace {

using namespace turbo::binding;
using namespace turbo::cpu;

/// Channels of the kernel layout for `n` rows on disk: gates and ups are filled up to whole tiles apart.
int64_t layout_rows(const char* op, const char* name, int64_t n, bool gate_up) {
  if (!gate_up) return n;
  STD_TORCH_CHECK(n % 2 == 0, op, ": argument '", name, "': expected as many gate as up rows, given ", n, " rows");
  return 2 * ceil_div(n / 2, kTileN) * kTileN;
}

/// The disk tensors of one layer in the kernel layout for `bits`-bit weights: (weight, scale, zero point).
std::tuple<Tensor, Tensor, Tensor> pack_grouped(const char* op, const Tensor& codes, const Tensor& scale,
                                                const MaybeTensor& zero_point, int64_t k, int64_t bits,
                                                int64_t code_bits, bool gate_up) {
  STD_TORCH_CHECK(code_bits >= (bits == 8 ? 5 : 2) && code_bits <= bits, op,
                  ": argument 'bits': expected ", bits == 8 ? 5 : 2, " to ", bits, ", given ", code_bits);
  STD_TORCH_CHECK(k > 0 && k <= kMost, op, ": argument 'k': expected 1 to ", kMost, ", given ", k);
  STD_TORCH_CHECK(codes.dim() == 2 && codes.size(0) > 0, op,
                  ": argument 'weight_packed': expected shape [N, ceil(k*", code_bits,
                  "/32)], or int8 [N, k], with N > 0, given ", text(codes.sizes()));
  STD_TORCH_CHECK(scale.dim() == 2 && scale.size(1) > 0, op,
                  ": argument 'scale': expected shape [N, groups], given ", text(scale.sizes()));
  const int64_t n = codes.size(0);
  const Layout layout{layout_rows(op, "weight_packed", n, gate_up), k, scale.size(1), bits};
  const int64_t groups = layout.groups, dword_k = layout.dword_k();
  const bool bytes = codes.scalar_type() == ScalarType::Char;
  const int64_t row = bytes ? k : ceil_div(k * code_bits, 32);
  check(op, "weight_packed", codes, bytes ? ScalarType::Char : ScalarType::Int, {n, row});
  if (scale.scalar_type() != ScalarType::Byte) float_dtype(op, "scale", scale.scalar_type());
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
        zero_point ? static_cast<uint32_t*>(zero_out.data_ptr()) : nullptr, nullptr, gate_up ? n / 2 : 0},
       torch_pool());
  return {weight_out, scale_out, zero_out};
}

std::tuple<Tensor, Tensor, Tensor> w4a16_pack(Tensor codes, Tensor scale, MaybeTensor zero_point,
                                              int64_t k, int64_t bits, bool gate_up) {
  return pack_grouped("w4a16_pack", codes, scale, zero_point, k, 4, bits, gate_up);
}

std::tuple<Tensor, Tensor, Tensor> w8a16_pack(Tensor codes, Tensor scale, MaybeTensor zero_point,
                                              int64_t k, int64_t bits, bool gate_up) {
  return pack_grouped("w8a16_pack", codes, scale, zero_point, k, 8, bits, gate_up);
}

/// (weight, scale, sum of each channel's weights).
std::tuple<Tensor, Tensor, Tensor> w8a8_pack(Tensor weight, Tensor scale, bool gate_up) {
  constexpr const char* kOp = "w8a8_pack";
  STD_TORCH_CHECK(weight.dim() == 2 && weight.numel() > 0, kOp,
                  ": argument 'weight': expected shape [N, K], neither 0, given ", text(weight.sizes()));
  const int64_t n = weight.size(0);
  const Layout layout{layout_rows(kOp, "weight", n, gate_up), weight.size(1), 1, 8};
  check(kOp, "weight", weight, ScalarType::Char, {n, layout.k});
  check(kOp, "scale", scale, ScalarType::Float, {n, 1});
  Tensor weight_out =
      torch::stable::new_empty(weight, {layout.padded_n(), layout.dwords()}, ScalarType::Int);
  Tensor scale_out = torch::stable::new_empty(scale, {layout.padded_n(), 1});
  Tensor sums_out = torch::stable::new_empty(weight, {layout.padded_n()}, ScalarType::Int);
  pack({layout, 8, nullptr, static_cast<const int8_t*>(weight.const_data_ptr()), layout.k,
        scale.const_data_ptr(), 1, 4, nullptr, 0, static_cast<uint32_t*>(weight_out.data_ptr()),
        scale_out.data_ptr(), nullptr, static_cast<int32_t*>(sums_out.data_ptr()), gate_up ? n / 2 : 0},
       torch_pool());
  return {weight_out, scale_out, sums_out};
}

void advise_huge_pages_op(Tensor memory) {
  check_cpu("advise_huge_pages", "memory", memory);
  advise_huge_pages(memory.data_ptr(), memory.numel() * static_cast<int64_t>(memory.element_size()));
}

void release_pages_op(Tensor memory) {
  constexpr const char* kOp = "release_pages";
  check_cpu(kOp, "memory", memory);
  STD_TORCH_CHECK(memory.is_contiguous(), kOp, ": argument 'memory': expected a contiguous tensor");
  release_pages(memory.data_ptr(), memory.numel() * static_cast<int64_t>(memory.element_size()));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_plugin_tm, m) {
  const std::string disk = "Tensor weight_packed, Tensor scale, Tensor? zero_point, int k, ";
  const std::string rest = ", bool gate_up=False) -> (Tensor, Tensor, Tensor)";
  const auto def = [&](const std::string& schema) { m.def(schema.c_str()); };
  def("w4a16_pack(" + disk + "int bits=4" + rest);
  def("w8a16_pack(" + disk + "int bits=8" + rest);
  def("w8a8_pack(Tensor weight, Tensor scale" + rest);
  def("advise_huge_pages(Tensor memory) -> ()");
  def("release_pages(Tensor(a!) memory) -> ()");
}

// For every device, so that a tensor on a wrong one is named by our own check.
STABLE_TORCH_LIBRARY_IMPL(vllm_plugin_tm, CompositeExplicitAutograd, m) {
  m.impl("w4a16_pack", TORCH_BOX(&w4a16_pack));
  m.impl("w8a16_pack", TORCH_BOX(&w8a16_pack));
  m.impl("w8a8_pack", TORCH_BOX(&w8a8_pack));
  m.impl("advise_huge_pages", TORCH_BOX(&advise_huge_pages_op));
  m.impl("release_pages", TORCH_BOX(&release_pages_op));
}
