// SPDX-License-Identifier: Apache-2.0
// Packing quantized weights: a checkpoint's row-major order in, the kernel layout out.
#pragma once

#include "layout.h"
#include "parallel.h"

namespace turbo::cpu {

/// What to pack. `layout.bits` is the kernel's width, 4 or 8; `code_bits` <= layout.bits that of the checkpoint.
///   codes       packed [n, ceil(k * code_bits / 32)] dwords: weight i at bits i * code_bits of its row, lowest
///               first and across dwords where the width does not divide 32; unsigned code = q + 2^(code_bits - 1).
///               Or bytes [n, k]: signed q.
///   scale       [n, groups] of `scale_size` bytes each
///   zero_point  [ceil(n * code_bits / 32), groups] dwords packed along n in the same way; nullptr when symmetric
///   gate_up     0, or I: the rows are I gates and then I ups of a gated expert, layout.n = 2 * (I up to whole tiles),
///               and tiles come from the two in turn
/// Row strides in elements. Outputs as layout.h says; sums_out, if given, [padded n]: each channel's sum of q.
struct Pack {
  Layout layout;
  int64_t code_bits;
  const uint32_t* packed;
  const int8_t* bytes;
  int64_t codes_stride;
  const void* scale;
  int64_t scale_stride;
  int64_t scale_size;
  const uint32_t* zero_point;
  int64_t zero_point_stride;
  uint32_t* weight_out;
  void* scale_out;
  uint32_t* zero_out;
  int32_t* sums_out;
  int64_t gate_up = 0;
};

/// Writes every element of the outputs, padding included, in one pass; no scratch memory.
void pack(const Pack& args, const Parallel& parallel);

}  // namespace turbo::cpu
