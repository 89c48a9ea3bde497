// SPDX-License-Identifier: Apache-2.0
// Calls of linear layers: what can be checked without looking at memory, then the kernel.
#include "linear.h"

#include <climits>

#include "gemm_launch.h"
#include "quantize.h"

namespace turbo::cuda {
namespace {

constexpr int64_t kMostBlockRows = 65535;  // of a grid's second axis
constexpr int64_t kMost = INT_MAX - 65536;  // with room for a tile's padding

std::string refusal(const Linear& a, const LinearPlan& plan) {
  if (std::string reason = a.layout.refusal(); !reason.empty()) return reason;
  if (a.layout.n > kMost || a.layout.k > kMost || a.rows > kMost)
    return "n, k and rows: expected at most " + std::to_string(kMost);
  if (plan.tile < 0 || plan.tile >= tile_count())
    return "tile " + std::to_string(plan.tile) + ": expected 0 to " + std::to_string(tile_count() - 1);
  if (a.rows > kMostBlockRows * tile_rows(plan.tile))
    return std::to_string(a.rows) + " rows: a tile of " + std::to_string(tile_rows(plan.tile)) + " takes at most " +
           std::to_string(kMostBlockRows * tile_rows(plan.tile));
  const SlicePlan& s = plan.slices;
  if (s.count < 1 || s.slabs < 1 || s.count * int64_t{s.slabs} < a.layout.slabs() ||
      (s.count - 1) * int64_t{s.slabs} >= a.layout.slabs())
    return std::to_string(s.count) + " slices of " + std::to_string(s.slabs) + " slabs: they must cover " +
           std::to_string(a.layout.slabs()) + " slabs, none being empty";
  if (sums_bytes(plan, a.layout, a.rows) && !a.sums) return "sums: expected memory, given none";
  if (arrived_words(plan, a.layout, a.rows) && !a.arrived) return "arrived: expected memory, given none";
  for (const void* pointer : {a.weight, a.scale, a.zero, static_cast<const void*>(a.sums)})
    if (reinterpret_cast<uintptr_t>(pointer) % 16) return "weight, scale, zero and sums: expected multiples of 16 bytes";
  return {};
}

}  // namespace

std::string w4a16_linear(const Linear& args, const LinearPlan& plan, void* stream) {
  if (args.rows == 0) return {};
  if (const std::string reason = refusal(args, plan); !reason.empty()) return "w4a16_linear: " + reason;
  if (args.layout.bits != 4) return "w4a16_linear: weights of " + std::to_string(args.layout.bits) + " bits: expected 4";
  const auto launch = args.dtype == DType::f16 ? &launch_w4a16_f16 : &launch_w4a16_bf16;
  return launch(args, plan, static_cast<Stream>(stream));
}

std::string quantize_x(const QuantizeX& args, void* stream) {
  if (args.rows == 0) return {};
  if (args.rows > kMost || args.k <= 0 || args.k > kMost)
    return "quantize: rows: expected at most " + std::to_string(kMost) + ", k: 1 to " + std::to_string(kMost);
  if (reinterpret_cast<uintptr_t>(args.codes) % 16) return "quantize: codes: expected a multiple of 16 bytes";
  if (!args.given_scale && !args.symmetric && !args.zero) return "quantize: zero: expected memory, given none";
  QuantizeParams<Values16> p{};
  p.x = {rows16(args.x, args.x_stride, args.k), {args.dtype == DType::bf16}};
  p.given_scale = args.given_scale;
  p.given_zero = args.given_zero;
  p.symmetric = args.symmetric;
  p.slabs = static_cast<int>(Layout{1, args.k, 1}.slabs());
  p.codes = static_cast<Vec4*>(args.codes);
  p.scale = args.scale;
  p.zero = args.zero;
  return launch<Quantize<Values16>>({static_cast<unsigned>(args.rows), 1}, p, static_cast<Stream>(stream));
}

std::string a8_refusal(const Layout& l, ScaleType scale_type, bool x_zeros) {
  if (l.groups > 1 && scale_type == ScaleType::f32) return "scale: expected 16 bits with groups, given float32";
  if (l.groups > 1 && l.k / l.groups > kMostA8Group)
    return "group size " + std::to_string(l.k / l.groups) + ": expected at most " + std::to_string(kMostA8Group) +
           ", or all of k";
  // What an int32 can hold of sums of (c - zx) * q: 255 or 128, times 128 or 15, times k.
  const int64_t most_k = INT_MAX / ((x_zeros ? 255 : 128) * (l.bits == 8 ? 128 : 15));
  if (l.groups == 1 && l.k > most_k)
    return "k = " + std::to_string(l.k) + ": expected at most " + std::to_string(most_k);
  return {};
}

std::string a8_linear(const LinearA8& args, const LinearPlan& plan, void* stream) {
  const Layout& l = args.linear.layout;
  const std::string op = "w" + std::to_string(l.bits) + "a8_linear: ";
  if (args.linear.rows == 0) return {};
  std::string reason = refusal(args.linear, plan);
  if (reason.empty()) reason = a8_refusal(l, args.scale_type, args.x_zero);
  if (reason.empty() && args.x_zero && (l.bits != 8 || !args.weight_sum))
    reason = "x_zero: expected weights of 8 bits and their sums";
  if (!reason.empty()) return op + reason;
  return (l.bits == 8 ? &launch_w8a8 : &launch_w4a8)(args, plan, static_cast<Stream>(stream));
}

}  // namespace turbo::cuda
