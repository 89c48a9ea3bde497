// SPDX-License-Identifier: Apache-2.0
// Rows of 4-byte units become one stream in which the units of a tile of rows lie side by side.
#pragma once

#include <immintrin.h>

#include "gemm_isa.h"

namespace turbo::cpu {
namespace {

inline constexpr int kInterleaveRows = 8;

/// Transposes 8 x 8 units: row[r] + u becomes out[u * stride + r]. Writes 8 units per u.
inline void interleave_8x8(const Unit* const (&row)[8], int64_t unit, int64_t stride, uint32_t* out) {
  __m256 a[8], b[8];
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) a[r] = _mm256_loadu_ps(reinterpret_cast<const float*>(row[r] + unit));
#pragma GCC unroll 4
  for (int r = 0; r < 8; r += 2) {
    b[r] = _mm256_unpacklo_ps(a[r], a[r + 1]);
    b[r + 1] = _mm256_unpackhi_ps(a[r], a[r + 1]);
  }
#pragma GCC unroll 2
  for (int r = 0; r < 8; r += 4) {
    a[r] = _mm256_shuffle_ps(b[r], b[r + 2], 0x44);
    a[r + 1] = _mm256_shuffle_ps(b[r], b[r + 2], 0xEE);
    a[r + 2] = _mm256_shuffle_ps(b[r + 1], b[r + 3], 0x44);
    a[r + 3] = _mm256_shuffle_ps(b[r + 1], b[r + 3], 0xEE);
  }
#pragma GCC unroll 4
  for (int u = 0; u < 4; ++u)
    _mm256_storeu_ps(reinterpret_cast<float*>(out + u * stride), _mm256_permute2f128_ps(a[u], a[u + 4], 0x20));
#pragma GCC unroll 4
  for (int u = 0; u < 4; ++u)
    _mm256_storeu_ps(reinterpret_cast<float*>(out + (u + 4) * stride),
                     _mm256_permute2f128_ps(a[u], a[u + 4], 0x31));
}

/// out[unit][row] for 1 to kInterleaveRows rows of `count` units. Fewer rows than 8 are stored as 8, each
/// store mending what the one before wrote too much; the last units go one by one.
inline void interleave(const Unit* const* row_units, int64_t rows, int64_t count, uint32_t* out) {
  const Unit* row[kInterleaveRows];
  for (int r = 0; r < kInterleaveRows; ++r) row[r] = row_units[r < rows ? r : rows - 1];
  int64_t unit = 0;
  const int64_t spare = kInterleaveRows - rows;  // units that the last store of a step writes too much
  for (; unit + 8 + spare <= count; unit += 8) interleave_8x8(row, unit, rows, out + unit * rows);
  for (; unit < count; ++unit)
    for (int64_t r = 0; r < rows; ++r) out[unit * rows + r] = row[r][unit];
}

}  // namespace
}  // namespace turbo::cpu
