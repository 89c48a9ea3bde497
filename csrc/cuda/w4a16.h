// SPDX-License-Identifier: Apache-2.0
// W4A16: activations keep their bits, weights become exact integers of the same dtype, and a group's sum is fp32, 16 k
// at a time. y = round((s0 + s1) + ... + bias).
#pragma once

#include <string>

#include "dequantize.h"
#include "gemm.h"

namespace turbo::cuda {

template <class Type>
struct W4A16 {
  using X = Rows16;
  using Sum = float;
  struct Finish {};
  template <class Tile>
  using Output = OutputTile<Tile>;

  static constexpr int kWeightBits = 4, kRowBytes = 128, kSteps = kSlabK / 16;

  static std::string name() { return std::string("w4a16<") + type_name(Type{}); }

  TM_DEVICE static float start(Groups) { return 0; }
  TM_DEVICE static float group_sum(float sum) { return sum; }
  TM_DEVICE static ZeroPoints zero_points(uint32_t z, uint32_t z8) { return cuda::zero_points(Type{}, z, z8); }
  TM_DEVICE static void fragment(const Vec4 (&codes)[1], int step, const ZeroPoints& zero, uint32_t (&a)[4]) {
    dequantize(Type{}, codes[0].v[step], zero, a);
  }
  TM_DEVICE static void multiply(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_m16n8k16(Type{}, sum, a, b);
  }
  template <int Columns>
  TM_DEVICE static void multiply(float (&sums)[Columns][4], const uint32_t (&a)[4], uint64_t b) {
    wgmma(Type{}, sums, a, b);
  }
  TM_DEVICE static Type scale_type(const Finish&) { return {}; }
  TM_DEVICE static TileRows rows(const GemmParams<W4A16>& p, int tile, int tile_rows) {
    return plain_rows(p.rows, tile, tile_rows);
  }

  template <class Tile>
  TM_DEVICE static void finish(const GemmParams<W4A16>& p, const TileRows& rows, int first_channel,
                               const Place<Tile>& place, const Accumulators<Tile, float>& total) {
    write_output<Tile>(Type{}, p.y, rows, first_channel, place,
                       [&](int s, int c, int i) { return total[s][c][i]; });
  }
};

}  // namespace turbo::cuda
