// SPDX-License-Identifier: Apache-2.0
// What happens to a block of results between and after the two products of an expert: each instruction set's
// translation unit offers it to the driver.
#pragma once

#include "moe.h"

namespace turbo::cpu {

/// Channels of a block, the row stride of the fp32 results below.
inline constexpr int64_t kBlockChannels = kBlockTiles * kTileN;

struct MoeIsa {
  /// The activation of `rows` rows of a block of `tiles` tiles; writes `count` values of `dtype` a row.
  void (*activate)(const Activation& activation, const float* block, int64_t rows, int64_t tiles, DType dtype,
                   char* h, int64_t h_bytes, int64_t count);
  /// total[token[r] * stride + c] += weight[r] * block[r][c] for c below the multiple of 16 at or above `count`.
  void (*accumulate)(const float* block, int64_t rows, const int32_t* token, const float* weight, float* total,
                     int64_t stride, int64_t count);
  /// `count` fp32 values rounded to `dtype`.
  void (*store)(const float* total, DType dtype, char* y, int64_t count);
};

const MoeIsa& moe_avx2();
const MoeIsa& moe_avx512();

}  // namespace turbo::cpu
