// SPDX-License-Identifier: Apache-2.0
// y = x @ dequantized(weight).T + bias for grouped 4-bit weights and 16- or 32-bit activations.
#pragma once

#include "isa.h"
#include "layout_u4g.h"
#include "parallel.h"

namespace turbo::cpu {

/// One call. x [rows, k] with unit inner stride; weight, scale, zero as layout_u4g.h says; bias [n];
/// y [rows, n] contiguous. x, scale, bias and y share `dtype`. zero and bias may be nullptr.
///
/// Per output element, in this order whatever rows, tile or number of threads:
///   for each group g ascending:  a = sum over pairs of k ascending of x[k] * q[n][k]  (fp32)
///                                a = a - z[n][g] * (sum of x over the group)       (asymmetric only)
///                                t = t + a * scale[n][g]                           (one rounding)
///   y = round(t + bias)
/// so a row's result is the same bits in every batch. Within a pair the order is the instruction's own, and
/// differs between instruction sets. Products of bf16 are exact; fp16 is split into two bf16 without loss;
/// fp32 runs on fp32 multiply-adds. Asymmetric weights see an infinite x as NaN: the sum over the group
/// meets it too.
struct GemmU4g {
  LayoutU4g layout;
  DType dtype;
  int64_t rows;
  const void* x;
  int64_t x_stride;
  const uint32_t* weight;
  const void* scale;
  const uint32_t* zero;
  const void* bias;
  void* y;
};

/// Runs on `isa`, which the processor must support. Re-entrant. Scratch memory is that of the calling
/// thread, kept for its next call: the prepared x and its group sums of at most kRowChunk rows.
void gemm_u4g(const GemmU4g& args, Isa isa, const Parallel& parallel);

/// Rows handled at a time: their x stays in cache while the weights stream by.
inline constexpr int64_t kRowChunk = 256;

}  // namespace turbo::cpu
