// SPDX-License-Identifier: Apache-2.0
// The products of routed experts: W4A16 with rows of several experts, and what comes after each of the two products.
#pragma once

#include <string>

#include "activation.h"
#include "w4a16.h"

namespace turbo::cuda {

/// The first product ends in h = activation(gates, ups), rounded once, in y; the second in fp32, in products.
struct ExpertsFinish {
  const TileRows* tiles;  // of each row of blocks
  const float* bias;      // [experts, channels], or nullptr
  Activation activation;
  bool gated;
  float* products;        // [rows, n] of the second product; nullptr: this is the first
  int n;                  // of the second product
};

/// Sums of the first product on their way to the activation, which would be too much code for each register apart.
template <class Tile>
struct FloatTile {
  // The stores of a warp, four pairs of rows by eight channels, meet in no bank.
  static constexpr int kPitch = (Tile::kChannels + 4) * 4;
  static constexpr int kSharedBytes = kPitch * Tile::kRows;

  TM_DEVICE static uint32_t at(int row, int channel) {
    return shared_base() + static_cast<uint32_t>(row * kPitch + channel * 4);
  }
};

template <class Type>
struct W4A16Experts : W4A16<Type> {
  using X = RoutedRows16;
  using Finish = ExpertsFinish;
  using Params = GemmParams<W4A16Experts>;
  template <class Tile>
  using Output = FloatTile<Tile>;

  static std::string name() { return std::string("w4a16_experts<") + type_name(Type{}); }

  TM_DEVICE static Type scale_type(const Finish&) { return {}; }
  TM_DEVICE static TileRows rows(const Params& p, int tile, int) { return load_global(p.finish.tiles + tile); }

  template <class Tile>
  TM_DEVICE static void finish(const Params& p, const TileRows& rows, int first_channel, const Place<Tile>& place,
                               Accumulators<Tile, float>& total) {
    if (p.finish.bias) add_bias(p, rows.expert, first_channel, place, total);
    if (p.finish.products) return store(p.finish, rows, first_channel, place, total);
    TM_UNROLL
    for (int s = 0; s < Tile::kSlabs; ++s)
      TM_UNROLL
      for (int c = 0; c < Tile::kColumns; ++c)
        TM_UNROLL
        for (int i = 0; i < 4; ++i)
          store_shared_32(FloatTile<Tile>::at(row_of(place, c, i), channel_of(place, 0, s, i / 2)), as_bits(total[s][c][i]));
    sync_threads();
    activate<Tile>(p, rows, first_channel, place.thread);
  }

  /// h of the tile's sums in shared memory, two channels of a thread at a time. Rows of h have whole slabs, and what is
  /// written beyond its last channel no one reads.
  template <class Tile>
  TM_DEVICE static void activate(const Params& p, const TileRows& rows, int first_channel, int thread) {
    const bool gated = p.finish.gated;
    const int channels = gated ? Tile::kChannels / 2 : Tile::kChannels, first = gated ? first_channel / 2 : first_channel;
    TM_NO_UNROLL
    for (int i = thread; i < Tile::kRows * channels / 2; i += Tile::kThreads) {
      const int row = i / (channels / 2), channel = i % (channels / 2) * 2;
      if (rows.first + row >= rows.end || first + channel >= p.y.n) continue;
      uint32_t pair = 0;
      TM_NO_UNROLL
      for (int e = 0; e < 2; ++e) {
        const int at = channel + e, gate = gated ? at / kSlabChannels * 2 * kSlabChannels + at % kSlabChannels : at;
        const float g = as_float(load_shared_32(FloatTile<Tile>::at(row, gate)));
        const float u = gated ? as_float(load_shared_32(FloatTile<Tile>::at(row, gate + kSlabChannels))) : 0.0f;
        pair |= uint32_t{from_float(Type{}, activated(p.finish.activation, g, u))} << (16 * e);
      }
      uint16_t* to = p.y.y + (rows.first + row) * p.y.stride + first + channel;
      store_global(reinterpret_cast<uint32_t*>(to), pair);
    }
  }

  /// The thread's channel of slab `s`, h = 0 or 1.
  template <class Tile>
  TM_DEVICE static int channel_of(const Place<Tile>& place, int first_channel, int s, int h) {
    return first_channel + (place.first_slab() + s) * kSlabChannels + 8 * h + place.g;
  }

  /// The thread's row, in the tile, of register i of column c.
  template <class Tile>
  TM_DEVICE static int row_of(const Place<Tile>& place, int c, int i) {
    return place.first_row() + 8 * c + 2 * place.t + i % 2;
  }

  template <class Tile>
  TM_DEVICE static void add_bias(const Params& p, int expert, int first_channel, const Place<Tile>& place,
                                 Accumulators<Tile, float>& total) {
    const int channels = p.blocks * kBlockChannels;
    TM_UNROLL
    for (int s = 0; s < Tile::kSlabs; ++s)
      TM_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int channel = channel_of(place, first_channel, s, h);
        const float bias =
            channel < channels ? load_global(p.finish.bias + int64_t{expert} * channels + channel) : 0.0f;
        TM_UNROLL
        for (int c = 0; c < Tile::kColumns; ++c)
          TM_UNROLL
          for (int i = 0; i < 2; ++i) total[s][c][2 * h + i] = add(total[s][c][2 * h + i], bias);
      }
  }

  /// Eight lanes write 32 neighbouring bytes.
  template <class Tile>
  TM_DEVICE static void store(const Finish& f, const TileRows& rows, int first_channel, const Place<Tile>& place,
                              const Accumulators<Tile, float>& total) {
    TM_UNROLL
    for (int s = 0; s < Tile::kSlabs; ++s)
      TM_UNROLL
      for (int c = 0; c < Tile::kColumns; ++c)
        TM_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int channel = channel_of(place, first_channel, s, i / 2);
          const int64_t row = rows.first + row_of(place, c, i);
          if (row < rows.end && channel < f.n) store_global(f.products + row * f.n + channel, total[s][c][i]);
        }
  }
};

}  // namespace turbo::cuda
