// SPDX-License-Identifier: Apache-2.0
// W8A8 and W4A8: activations as int8 codes (quantize.h), tensor cores of bytes, and sums that are exact integers of 32
// bits. With c a code of x, zx and sx the zero point and scale of its row:
//   one group:   y = round((float(sum of (c - zx) * (q - z)) * scale[n]) * sx + bias)
//   groups:      y = round(((s0 + s1) + ...) * sx + bias),  zx = 0
// each product and sum of floats rounded by itself. Codes of zx are summed in the product and taken out at the end,
// through the sums of the channels' weights.
#pragma once

#include <string>

#include "dequantize.h"
#include "gemm.h"
#include "scale_type.h"

namespace turbo::cuda {

/// Per row of x: its scale, and its zero point unless nullptr. Per channel, in layout.h's order: scales of one group, and
/// where rows have zero points the sums of weights.
struct A8Finish {
  const float* x_scale;
  const int32_t* x_zero;
  const void* scale;
  const int32_t* weight_sum;
  ScaleType scale_type;
  Half16 y_type;
};

template <int Bits>
struct A8 {
  static_assert(Bits == 4 || Bits == 8);
  using X = Codes8;
  using Sum = int32_t;
  using Finish = A8Finish;
  template <class Tile>
  using Output = OutputTile<Tile>;

  static constexpr int kWeightBits = Bits, kRowBytes = 64, kSteps = kSlabK / 32;

  static std::string name() { return "w" + std::to_string(Bits) + "a8<s8"; }

  // An integer below 2^22 in size, added to the bits of 1.5 * 2^23, makes the float of their sum: groups begin there,
  // and one subtraction instead of a slow conversion ends them. layout.h bounds groups so that all are that small.
  static constexpr uint32_t kFloatBits = 0x4B400000;
  static constexpr float kFloatBase = 12582912.0f;
  static_assert(kMostA8Group * 15 * 128 < 1 << 22);

  TM_DEVICE static int32_t start(Groups groups) { return groups == Groups::one ? 0 : static_cast<int32_t>(kFloatBits); }
  TM_DEVICE static float group_sum(int32_t sum) { return add(as_float(static_cast<uint32_t>(sum)), -kFloatBase); }
  TM_DEVICE static ZeroPoints zero_points(uint32_t z, uint32_t z8) { return byte_zero_points(z, z8); }
  TM_DEVICE static void fragment(const Vec4 (&codes)[1], int step, const ZeroPoints& zero, uint32_t (&a)[4]) {
    dequantize_bytes(codes[0].v[2 * step], zero, a[0], a[1]);
    dequantize_bytes(codes[0].v[2 * step + 1], zero, a[2], a[3]);
  }
  TM_DEVICE static void fragment(const Vec4 (&codes)[2], int step, const ZeroPoints&, uint32_t (&a)[4]) {
    TM_UNROLL
    for (int i = 0; i < 4; ++i) a[i] = codes[step].v[i];
  }
  TM_DEVICE static void multiply(int32_t (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_m16n8k32(sum, a, b);
  }
  template <int Columns>
  TM_DEVICE static void multiply(int32_t (&sums)[Columns][4], const uint32_t (&a)[4], uint64_t b) {
    wgmma(S8{}, sums, a, b);
  }
  TM_DEVICE static TileRows rows(const GemmParams<A8>& p, int tile, int tile_rows) {
    return plain_rows(p.rows, tile, tile_rows);
  }
  TM_DEVICE static Half16 scale_type(const Finish& f) { return {f.scale_type == ScaleType::bf16}; }

  /// The scales and zero points of a thread's rows.
  template <class Tile>
  struct RowValues {
    float scale[Tile::kColumns][2];
    int32_t zero[Tile::kColumns][2];

    /// `x` says which row of codes each row is.
    template <class Codes>
    TM_DEVICE RowValues(const Codes& x, const A8Finish& f, const TileRows& tile, const Place<Tile>& place) {
      TM_UNROLL
      for (int c = 0; c < Tile::kColumns; ++c)
        TM_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int row = tile.first + place.first_row() + 8 * c + 2 * place.t + i;
          const bool inside = row < tile.end;
          const int source = inside ? x.source(row) : 0;
          scale[c][i] = inside ? load_global(f.x_scale + source) : 0.0f;
          zero[c][i] = inside && f.x_zero ? load_global(f.x_zero + source) : 0;
        }
    }
  };

  /// The scales of one group, and where rows have zero points the sums of weights, of a thread's channels.
  template <class Tile>
  struct ChannelValues {
    float scale[2 * Tile::kSlabs];
    int32_t sum[2 * Tile::kSlabs];

    TM_DEVICE ChannelValues(const A8Finish& f, int blocks, int expert, int first_channel, const Place<Tile>& place) {
      const int block = first_channel / kBlockChannels + place.first_slab() / kBlockSlabs;
      const bool inside = block < blocks;
      // A thread's channels of all its slabs lie side by side.
      const int64_t at = (int64_t{expert} * blocks + block) * kBlockChannels + place.g * (2 * kBlockSlabs) +
                         place.first_slab() % kBlockSlabs * 2;
      TM_UNROLL
      for (int i = 0; i < 2 * Tile::kSlabs; ++i) {
        scale[i] = inside ? load_scale(f.scale_type, f.scale, at + i) : 0.0f;
        sum[i] = inside && f.x_zero ? load_global(f.weight_sum + at + i) : 0;
      }
    }
  };

  /// One group's value of an integer sum: register i of slab s and column c.
  template <class Tile>
  TM_DEVICE static float value(int32_t sum, const RowValues<Tile>& rows, const ChannelValues<Tile>& channels, int s, int c,
                               int i) {
    const int channel = 2 * s + i / 2;
    const int32_t beyond = product(rows.zero[c][i % 2], channels.sum[channel]);
    return cuda::multiply(cuda::multiply(to_float(add(sum, product(beyond, -1))), channels.scale[channel]),
                          rows.scale[c][i % 2]);
  }

  template <class Tile>
  TM_DEVICE static void finish(const GemmParams<A8>& p, const TileRows& tile, int first_channel,
                               const Place<Tile>& place, const Accumulators<Tile, float>& total) {
    const RowValues<Tile> rows(p.x, p.finish, tile, place);
    write_output<Tile>(p.finish.y_type, p.y, tile, first_channel, place,
                       [&](int s, int c, int i) { return cuda::multiply(total[s][c][i], rows.scale[c][i % 2]); });
  }

  template <class Tile>
  TM_DEVICE static void finish(const GemmParams<A8>& p, const TileRows& tile, int first_channel,
                               const Place<Tile>& place, const Accumulators<Tile, int32_t>& sums) {
    const RowValues<Tile> rows(p.x, p.finish, tile, place);
    const ChannelValues<Tile> channels(p.finish, p.blocks, tile.expert, first_channel, place);
    write_output<Tile>(p.finish.y_type, p.y, tile, first_channel, place,
                       [&](int s, int c, int i) { return value<Tile>(sums[s][c][i], rows, channels, s, c, i); });
  }

  /// Wraps around: what it is a part of fits.
  TM_DEVICE static int32_t product(int32_t a, int32_t b) {
    return static_cast<int32_t>(static_cast<uint32_t>(a) * static_cast<uint32_t>(b));
  }
};

}  // namespace turbo::cuda
