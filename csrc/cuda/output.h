// SPDX-License-Identifier: Apache-2.0
// A tile's sums to y: bias, one rounding, and through shared memory, because a lane's sums belong to different rows.
#pragma once

#include "activations.h"
#include "tile_shape.h"

namespace turbo::cuda {

/// y [., n] of 16-bit elements, `stride` elements from row to row. `vectors`: every row starts at a multiple of 16
/// bytes. bias [n] or nullptr, in y's dtype.
struct Output16 {
  uint16_t* y;
  const uint16_t* bias;
  int64_t stride;
  int n;
  bool vectors;
};

template <class Tile>
struct OutputTile {
  // Rows lie 16 bytes more than a multiple of 128 apart: the stores of a warp meet in no bank.
  static constexpr int kPitch = (Tile::kChannels + 8) * 2;
  static constexpr int kSharedBytes = kPitch * Tile::kRows;
  static constexpr int kChunks = Tile::kChannels / 8;
};

/// Writes what lies within y of the tile that has `rows` and begins at first_channel: value(s, c, i), a float, is what the
/// thread has for the register i of slab s and column c. Every thread of the block has been through a barrier since
/// shared memory was last used.
template <class Tile, class Type, class Value>
TM_DEVICE void write_output(Type type, const Output16& out, const TileRows& rows, int first_channel,
                            const Place<Tile>& place, const Value& value) {
  using Shared = OutputTile<Tile>;
  TM_UNROLL
  for (int s = 0; s < Tile::kSlabs; ++s)
    TM_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int channel = (place.first_slab() + s) * kSlabChannels + 8 * h + place.g;
      const bool biased = out.bias && first_channel + channel < out.n;
      const float bias = biased ? to_float(type, load_global(out.bias + first_channel + channel)) : 0.0f;
      TM_UNROLL
      for (int c = 0; c < Tile::kColumns; ++c)
        TM_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int row = place.first_row() + 8 * c + 2 * place.t + i;
          const float sum = value(s, c, 2 * h + i);
          store_shared_16(shared_base() + static_cast<uint32_t>(row * Shared::kPitch + channel * 2),
                          from_float(type, out.bias ? add(sum, bias) : sum));
        }
    }
  sync_threads();
  share<Tile::kRows * Shared::kChunks, Tile::kThreads>(place.thread, [&](int i, int) {
    const int row = i / Shared::kChunks, channel = i % Shared::kChunks * 8;
    const int left = out.n - first_channel - channel;
    if (rows.first + row >= rows.end || left <= 0) return;
    const Vec4 chunk = load_shared_128(shared_base() + static_cast<uint32_t>(row * Shared::kPitch + channel * 2));
    uint16_t* to = out.y + (rows.first + row) * out.stride + first_channel + channel;
    if (out.vectors && left >= 8) {
      store_global(reinterpret_cast<Vec4*>(to), chunk);
      return;
    }
    TM_UNROLL
    for (int j = 0; j < 8; ++j)
      if (j < left) store_global(to + j, static_cast<uint16_t>(chunk.v[j / 2] >> (16 * (j % 2))));
  });
}

}  // namespace turbo::cuda
