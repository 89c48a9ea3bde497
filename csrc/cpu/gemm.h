// SPDX-License-Identifier: Apache-2.0
// y = x @ dequantized(weight).T + bias, with x as it is or rounded to 8 bits first.
#pragma once

#include "isa.h"
#include "layout.h"
#include "parallel.h"

namespace turbo::cpu {

/// What becomes of the activations before the product. Rounded ones are what the weights are: int8, or e4m3, which
/// has no zero points.
enum class Activations : int {
  kept,     ///< their dtype's bits
  dynamic,  ///< scale and zero point from each row (compressed-tensors' per-token quantization)
  fixed,    ///< one scale and zero point given
  grouped,  ///< scale from each group of each row, symmetric
};

/// One call. x [rows, k] with unit inner stride, `dtype`; weight, scale, zero as layout.h says, scale of
/// `scale_dtype`; bias [n] and y with unit inner stride, `y_dtype`. zero, bias and channel_scale may be nullptr. `y` is
/// the element of row `y_row` and channel `y_channel`: a caller that computes a part needs no more memory.
///
/// Activations kept. scale_dtype is dtype for integer weights, f32 for e4m3, e8m0 or e4m3 for e2m1. Per output element, in this order whatever rows, tile or number
/// of threads:
///   for each group g ascending:  a = sum over pairs of k ascending of x[k] * q[n][k]  (fp32)
///                                a = a - z[n][g] * (sum of x over the group)       (asymmetric only)
///                                t = t + a * scale[n][g]                           (one rounding)
///   y = round(t * channel_scale[n] + bias)                                    (channel_scale: floats only)
/// so a row's result is the same bits in every batch. Within a pair the order is the instruction's own, and
/// differs between instruction sets. Products of bf16 are exact; fp16 is split into two bf16 without loss;
/// fp32 runs on fp32 multiply-adds. Asymmetric weights see an infinite x as NaN: the sum over the group
/// meets it too.
///
/// Activations as integers. With c = the code of x[k], zx its zero point, sx its scale (all per row, sx per row
/// and group when grouped):
///   for each group g ascending:  a = sum of (c - zx) * (q - z)      (exact, int32)
///                                t = t + float(a) [* sx] * scale[n][g]
///   y = round(t * sx + bias)
/// 8-bit weights have one group and, as `zero`, the sums of each channel's weights, int32 [padded n]; 4-bit
/// weights take symmetric activations only (zx = 0). The same bits on every instruction set but for the order
/// of the last roundings, which all share.
///
/// Activations as e4m3, e4m3 weights, scales f32: as kept ones, with the rounded x[k] / sx in place of x[k] (their
/// products are exact in fp32), t = t + a * sx * scale[n][g] when grouped, else y = round(t * sx + bias).
struct Gemm {
  Layout layout;
  DType dtype;
  DType scale_dtype;
  int64_t rows;
  const void* x;
  int64_t x_stride;
  const uint32_t* weight;
  const void* scale;
  const uint32_t* zero;
  const void* bias;
  DType y_dtype;
  void* y;
  int64_t y_stride;  // elements from row to row
  int64_t y_row = 0, y_channel = 0;
  const float* channel_scale = nullptr;  // [padded n]
  Activations activations = Activations::kept;
  bool symmetric = true;     // dynamic: no zero point
  float x_scale = 0;         // fixed
  int32_t x_zero_point = 0;  // fixed
  int64_t x_group = 0;       // grouped, e4m3: along k, a multiple of the weights' group size; 0: that size

  bool as_integers() const { return activations != Activations::kept && layout.code == Code::integer; }
};

/// Runs on `isa`, which the processor must support. Re-entrant. Scratch memory is that of the calling
/// thread, kept for its next call: the prepared x of at most kRowChunk rows.
void gemm(const Gemm& args, Isa isa, const Parallel& parallel);

/// Rows handled at a time: their x stays in cache while the weights stream by.
inline constexpr int64_t kRowChunk = 256;

}  // namespace turbo::cpu
