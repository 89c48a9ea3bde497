// SPDX-License-Identifier: Apache-2.0
// The products of routed experts: those of w4a16.h and a8.h with rows of several experts, and what comes after each of
// the two products.
#pragma once

#include <string>

#include "a8.h"
#include "activation.h"
#include "w4a16.h"

namespace turbo::cuda {

/// The first product ends in h = activation(gates, ups), the second in fp32, in products.
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

/// Rows of h that are rounded once, and rows that are rounded to codes when they are whole. Both have whole slabs, and
/// what is written beyond the last channel no one reads.
template <class Type>
struct Rows16OfH {
  uint16_t* h;
  int64_t stride;

  TM_DEVICE void store(int64_t row, int channel, float a, float b) const {
    const uint32_t pair = from_float(Type{}, a) | uint32_t{from_float(Type{}, b)} << 16;
    store_global(reinterpret_cast<uint32_t*>(h + row * stride + channel), pair);
  }
};
struct Rows32OfH {
  float* h;
  int64_t stride;

  TM_DEVICE void store(int64_t row, int channel, float a, float b) const {
    store_global(reinterpret_cast<Vec2*>(h + row * stride + channel), Vec2{{as_bits(a), as_bits(b)}});
  }
};

/// What follows a product of experts for a tile's sums `total`. `channels`: of the product, padded; h of the first one
/// has h_channels.
template <class Tile>
class ExpertsEnd {
 public:
  TM_DEVICE ExpertsEnd(const ExpertsFinish& f, int channels, int h_channels, const TileRows& rows, int first_channel,
                       const Place<Tile>& place)
      : f_(f), channels_(channels), h_channels_(h_channels), rows_(rows), first_channel_(first_channel), place_(place) {}

  template <class H>
  TM_DEVICE void run(Accumulators<Tile, float>& total, const H& h) const {
    if (f_.bias) add_bias(total);
    if (f_.products) return store(total);
    TM_UNROLL
    for (int s = 0; s < Tile::kSlabs; ++s)
      TM_UNROLL
      for (int c = 0; c < Tile::kColumns; ++c)
        TM_UNROLL
        for (int i = 0; i < 4; ++i)
          store_shared_32(FloatTile<Tile>::at(row_of(c, i), channel_of(s, i / 2)), as_bits(total[s][c][i]));
    sync_threads();
    activate(h);
  }

 private:
  /// h of the tile's sums in shared memory, two channels of a thread at a time.
  template <class H>
  TM_DEVICE void activate(const H& h) const {
    const bool gated = f_.gated;
    const int channels = gated ? Tile::kChannels / 2 : Tile::kChannels, first = gated ? first_channel_ / 2 : first_channel_;
    TM_NO_UNROLL
    for (int i = place_.thread; i < Tile::kRows * channels / 2; i += Tile::kThreads) {
      const int row = i / (channels / 2), channel = i % (channels / 2) * 2;
      if (rows_.first + row >= rows_.end || first + channel >= h_channels_) continue;
      float a = 0, b = 0;
      TM_NO_UNROLL
      for (int e = 0; e < 2; ++e) {
        const int at = channel + e, gate = gated ? at / kSlabChannels * 2 * kSlabChannels + at % kSlabChannels : at;
        const float g = as_float(load_shared_32(FloatTile<Tile>::at(row, gate)));
        const float u = gated ? as_float(load_shared_32(FloatTile<Tile>::at(row, gate + kSlabChannels))) : 0.0f;
        a = b;
        b = activated(f_.activation, g, u);
      }
      h.store(rows_.first + row, first + channel, a, b);
    }
  }

  /// The thread's channel, in the tile, of slab `s`, h = 0 or 1.
  TM_DEVICE int channel_of(int s, int h) const { return (place_.first_slab() + s) * kSlabChannels + 8 * h + place_.g; }

  /// The thread's row, in the tile, of register i of column c.
  TM_DEVICE int row_of(int c, int i) const { return place_.first_row() + 8 * c + 2 * place_.t + i % 2; }

  TM_DEVICE void add_bias(Accumulators<Tile, float>& total) const {
    TM_UNROLL
    for (int s = 0; s < Tile::kSlabs; ++s)
      TM_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int channel = first_channel_ + channel_of(s, h);
        const float bias =
            channel < channels_ ? load_global(f_.bias + int64_t{rows_.expert} * channels_ + channel) : 0.0f;
        TM_UNROLL
        for (int c = 0; c < Tile::kColumns; ++c)
          TM_UNROLL
          for (int i = 0; i < 2; ++i) total[s][c][2 * h + i] = add(total[s][c][2 * h + i], bias);
      }
  }

  /// Eight lanes write 32 neighbouring bytes.
  TM_DEVICE void store(const Accumulators<Tile, float>& total) const {
    TM_UNROLL
    for (int s = 0; s < Tile::kSlabs; ++s)
      TM_UNROLL
      for (int c = 0; c < Tile::kColumns; ++c)
        TM_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int channel = first_channel_ + channel_of(s, i / 2);
          const int64_t row = rows_.first + row_of(c, i);
          if (row < rows_.end && channel < f_.n) store_global(f_.products + row * f_.n + channel, total[s][c][i]);
        }
  }

  const ExpertsFinish& f_;
  int channels_, h_channels_;
  const TileRows& rows_;
  int first_channel_;
  const Place<Tile>& place_;
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
    const ExpertsEnd<Tile> end(p.finish, p.blocks * kBlockChannels, p.y.n, rows, first_channel, place);
    end.run(total, Rows16OfH<Type>{p.y.y, p.y.stride});
  }
};

struct A8ExpertsFinish {
  A8Finish a8;  // scales are those of the rows of codes
  ExpertsFinish experts;
  Rows32OfH h;
};

/// With codes of x and of h, which have no zero points.
template <int Bits>
struct A8Experts : A8<Bits> {
  using Base = A8<Bits>;
  using X = RoutedCodes8;
  using Finish = A8ExpertsFinish;
  using Params = GemmParams<A8Experts>;
  template <class Tile>
  using Output = FloatTile<Tile>;

  static std::string name() { return "w" + std::to_string(Bits) + "a8_experts<s8"; }

  TM_DEVICE static Half16 scale_type(const Finish& f) { return Base::scale_type(f.a8); }
  TM_DEVICE static TileRows rows(const Params& p, int tile, int) { return load_global(p.finish.experts.tiles + tile); }

  template <class Tile>
  TM_DEVICE static void finish(const Params& p, const TileRows& tile, int first_channel, const Place<Tile>& place,
                               const Accumulators<Tile, float>& sums) {
    const typename Base::template RowValues<Tile> rows(p.x, p.finish.a8, tile, place);
    end(p, tile, first_channel, place,
        [&](int s, int c, int i) { return cuda::multiply(sums[s][c][i], rows.scale[c][i % 2]); });
  }

  template <class Tile>
  TM_DEVICE static void finish(const Params& p, const TileRows& tile, int first_channel, const Place<Tile>& place,
                               const Accumulators<Tile, int32_t>& sums) {
    const typename Base::template RowValues<Tile> rows(p.x, p.finish.a8, tile, place);
    const typename Base::template ChannelValues<Tile> channels(p.finish.a8, p.blocks, tile.expert, first_channel, place);
    end(p, tile, first_channel, place,
        [&](int s, int c, int i) { return Base::template value<Tile>(sums[s][c][i], rows, channels, s, c, i); });
  }

  /// value(s, c, i): what the thread has for register i of slab s and column c.
  template <class Tile, class Value>
  TM_DEVICE static void end(const Params& p, const TileRows& rows, int first_channel, const Place<Tile>& place,
                            const Value& value) {
    Accumulators<Tile, float> total;
    TM_UNROLL
    for (int s = 0; s < Tile::kSlabs; ++s)
      TM_UNROLL
      for (int c = 0; c < Tile::kColumns; ++c)
        TM_UNROLL
        for (int i = 0; i < 4; ++i) total[s][c][i] = value(s, c, i);
    const ExpertsEnd<Tile> end(p.finish.experts, p.blocks * kBlockChannels, p.y.n, rows, first_channel, place);
    end.run(total, p.finish.h);
  }
};

}  // namespace turbo::cuda
