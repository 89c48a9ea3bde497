// SPDX-License-Identifier: Apache-2.0
// Packing grouped 4-bit weights: the canonical row-major order in, the kernel layout out.
#pragma once

#include "layout_u4g.h"
#include "parallel.h"

namespace turbo::cpu {

/// What to pack. Shapes: codes [n, ceil(k/8)] dwords, weight i of a dword at bits 4i, unsigned code;
/// scale [n, groups] of `scale_size` bytes each; zero_point [ceil(n/8), groups] dwords packed along n,
/// unsigned, or nullptr when symmetric. Row strides in elements. Outputs as layout_u4g.h says.
struct PackU4g {
  LayoutU4g layout;
  const uint32_t* codes;
  int64_t codes_stride;
  const void* scale;
  int64_t scale_stride;
  int64_t scale_size;
  const uint32_t* zero_point;
  int64_t zero_point_stride;
  uint32_t* weight_out;
  void* scale_out;
  uint32_t* zero_out;
};

/// Writes every element of the outputs, padding included, in one pass; no scratch memory.
void pack_u4g(const PackU4g& args, const Parallel& parallel);

}  // namespace turbo::cpu
