// SPDX-License-Identifier: Apache-2.0
// Calls of linear layers: what can be checked without looking at memory, then the kernel of the dtype.
#include "linear.h"

#include <climits>

#include "w4a16_launch.h"

namespace turbo::cuda {
namespace {

constexpr int64_t kMostBlockRows = 65535;  // of a grid's second axis

std::string refusal(const Linear& a, const LinearPlan& plan) {
  if (std::string reason = a.layout.refusal(); !reason.empty()) return reason;
  // With room for a tile's padding.
  constexpr int64_t kMost = INT_MAX - 65536;
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
  const auto launch = args.dtype == DType::f16 ? &launch_w4a16_f16 : &launch_w4a16_bf16;
  return launch(args, plan, static_cast<Stream>(stream));
}

}  // namespace turbo::cuda
