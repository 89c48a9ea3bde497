// SPDX-License-Identifier: Apache-2.0
// Rounding weights to integers of 4 or 8 bits: one read of a float matrix, codes in the order of a checkpoint.
#pragma once

#include "gemm.h"
#include "parallel.h"

namespace turbo::cpu {

/// Where a group's scale comes from, with `low` and `high` its extremes:
///   centred     max(-low, high) / ((2^bits - 1) / 2)
///   signed_     the extreme of larger magnitude (low of equals) / -2^(bits - 1)
///   asymmetric  (high - low) / (2^bits - 1) of the range widened to hold 0; the zero point is
///               round(-2^(bits - 1) - low / scale)
enum class WeightRange : int { centred, signed_, asymmetric };

/// What to quantize. All arithmetic is fp32 with single roundings, halves to even; a scale is rounded to its dtype
/// before it is used. A group of one value has its magnitude for scale, one without a scale has 1.
///   weight  [n, k] of dtype, contiguous; group divides k and both are multiples of 8
///   codes   bits 4 and packed: [n, k / 8] dwords, code + 8 of ascending k from the lowest bits
///           bits 8 and packed: [n, k] bytes, code + 128;  else [n, k] signed bytes
///   scale   [n, k / group] of scale_dtype
///   zero    [n, k / group] signed bytes; asymmetric only
struct QuantizeWeights {
  const void* weight;
  DType dtype;
  int64_t n, k, group;
  int bits;
  WeightRange range;
  bool packed;
  DType scale_dtype;
  void* codes;
  void* scale;
  int8_t* zero;
};

/// Returns the first row with a weight that is infinite or not a number, whose outputs are unspecified; -1 if none.
/// AVX2, FMA and F16C.
int64_t quantize_weights_avx2(const QuantizeWeights& args, const Parallel& parallel);

}  // namespace turbo::cpu
