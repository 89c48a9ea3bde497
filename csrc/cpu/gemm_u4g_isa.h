// SPDX-License-Identifier: Apache-2.0
// What each instruction set's translation unit offers to the driver of gemm_u4g.
#pragma once

#include "gemm_u4g.h"

namespace turbo::cpu {

/// Activations in the form that a kernel reads: rows of 4-byte units, each a bf16 pair or an fp32.
struct PreparedX {
  const char* units;
  int64_t row_bytes;  // from row to row; any value where x is read in place, so units may be unaligned
  const float* sums;  // [rows, groups] sums of x over each group, nullptr when symmetric
};

/// The part of the output that one thread computes: tiles [tile0, tile1) of rows [row0, row1).
struct Share {
  int64_t tile0, tile1, row0, row1;
};

struct GemmU4gIsa {
  int64_t units_per_k8;  // units that hold 8 activations
  int64_t tile_rows;     // rows that share one decoding of the weights
  bool reads_in_place;   // x needs no conversion where k is a multiple of 8
  /// Converts rows [row0, row1) of x to units, zero padded to whole dwords of weights.
  void (*prepare)(const GemmU4g& args, int64_t row0, int64_t row1, const PreparedX& x);
  /// Sums rows [row0, row1) of x per group.
  void (*sum)(const GemmU4g& args, int64_t row0, int64_t row1, const PreparedX& x);
  /// Computes one share of y.
  void (*run)(const GemmU4g& args, const PreparedX& x, const Share& share);
};

const GemmU4gIsa& gemm_u4g_avx2(DType dtype);
const GemmU4gIsa& gemm_u4g_avx512(DType dtype);
/// bf16 and fp16 only: for fp32 the multiply-add kernels are exact and not slower.
const GemmU4gIsa& gemm_u4g_avx512bf16(DType dtype);

}  // namespace turbo::cpu
