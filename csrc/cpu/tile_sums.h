// SPDX-License-Identifier: Apache-2.0
// What becomes of the C tiles of tile_kernel.h: sums of groups are scaled and added to totals, and totals become y.
#pragma once

#include "shares.h"
#include "tile_panels.h"

namespace turbo::cpu {
namespace {

/// What the totals of a first group begin with.
alignas(64) constexpr float kZeroTile[kTileBytes / 4] = {};

/// Consecutive groups of one channel tile.
struct TileGroups {
  int64_t first, count;
  const char* scale;     // of the first one
  const uint32_t* zero;  // nullptr: symmetric
  int64_t scale_step, zero_step;
};

/// For `I` of tile_kernel.h.
template <class I>
struct TileSums : TilePanels<I> {
  using Base = TilePanels<I>;
  using Stream = typename Base::Stream;
  using Vec = typename I::Vec;
  using Acc = typename I::Acc;

  static constexpr int kVecs = kTileN / I::kLanes;  // of a row of C

  /// Whether scales alone turn sums into parts of totals.
  static bool plain(const Gemm& a, const PreparedX& x) { return !I::kOffsets && !a.zero && !x.group_scales; }

  /// N rows, the first of which is `row` of the product: the sums of each group, a C tile at `sums` and `step` bytes
  /// further, are scaled and added to what is at `from`, and that goes to `to`.
  template <int N>
  static void add_rows(const Gemm& a, const PreparedX& x, const TileGroups& g, int64_t row, const char* sums,
                       int64_t step, const float* from, float* to) {
    const int64_t groups = a.layout.groups;
    const char* scale = g.scale;
    const uint32_t* zero = g.zero;
    Vec total[kVecs][N];
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v)
#pragma GCC unroll 8
      for (int r = 0; r < N; ++r) total[v][r] = I::load_floats(from + r * kTileN + v * I::kLanes);
    int64_t index = row * groups + g.first;
    for (int64_t i = 0; i < g.count; ++i, ++index, sums += step) {
      Acc acc[kVecs][N];
      if constexpr (I::kIntegers) I::start(acc, x, index, groups, zero);
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v)
#pragma GCC unroll 8
        for (int r = 0; r < N; ++r) {
          const auto* at = sums + r * kTileRowBytes + v * I::kLanes * 4;
          if constexpr (I::kIntegers)
            acc[v][r] = I::int_add(acc[v][r], I::load(reinterpret_cast<const uint32_t*>(at)));
          else
            acc[v][r] = I::load_floats(reinterpret_cast<const float*>(at));
        }
      I::end(total, acc, x, index, groups, zero, scale);
      scale += g.scale_step;
      if (zero) zero += g.zero_step;
    }
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v)
#pragma GCC unroll 8
      for (int r = 0; r < N; ++r) I::store_floats(to + r * kTileN + v * I::kLanes, total[v][r]);
  }

  /// Rows of a C tile.
  [[gnu::noinline]] static void add_tile(const Gemm& a, const PreparedX& x, const TileGroups& g, int64_t row,
                                         int64_t rows, const char* sums, int64_t step, const float* from, float* to) {
    constexpr int64_t kRows = 8;
    for (; rows > 0;
         rows -= kRows, row += kRows, sums += kRows * kTileRowBytes, from += kRows * kTileN, to += kRows * kTileN)
      with_shape<1, kRows>(1, rows, [&]<int, int N>() { add_rows<N>(a, x, g, row, sums, step, from, to); });
  }

  /// The same where `plain`, of N rows, with the scales as fp32, `scale_step` from one group to the next.
  template <int N>
  [[gnu::always_inline]] static inline void add_plain(const char* sums, int64_t step, int64_t count, const float* scale,
                                                      int64_t scale_step, const float* from, float* to) {
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v, sums += I::kLanes * 4, from += I::kLanes, to += I::kLanes, scale += I::kLanes) {
      Vec total[N];
#pragma GCC unroll 16
      for (int r = 0; r < N; ++r) total[r] = I::load_floats(from + r * kTileN);
      const char* at = sums;
      const float* by = scale;
      for (int64_t i = 0; i < count; ++i, at += step, by += scale_step) {
        const Vec factor = I::load_floats(by);
#pragma GCC unroll 16
        for (int r = 0; r < N; ++r) {
          if constexpr (I::kIntegers)
            total[r] = I::fma(I::to_float(I::load(reinterpret_cast<const uint32_t*>(at + r * kTileRowBytes))), factor,
                              total[r]);
          else
            total[r] = I::fma(I::load_floats(reinterpret_cast<const float*>(at + r * kTileRowBytes)), factor, total[r]);
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < N; ++r) I::store_floats(to + r * kTileN, total[r]);
    }
  }

  /// `rows` rows of the totals of a channel tile become y.
  [[gnu::noinline]] static void finish_tile(const Gemm& a, const PreparedX& x, int64_t row, int64_t rows, int64_t tile,
                                            const float* totals) {
    for (int v = 0; v < kVecs; ++v, totals += I::kLanes) {
      const typename Base::Output y(a, x, tile * kTileN + v * I::kLanes);
      for (int64_t r = 0; r < rows; ++r) y.store(row + r, I::load_floats(totals + r * kTileN));
    }
  }

  /// The scales of `count` groups as fp32, [group][channel tile][lane].
  static void load_scales(const Stream& s, int64_t group, int64_t count, int64_t tiles, float* out) {
    const char* scale = s.scale + group * s.scale_step;
    for (int64_t i = 0; i < count; ++i, scale += s.scale_step)
      for (int64_t v = 0; v < tiles * kVecs; ++v, out += I::kLanes)
        I::store_floats(out, I::scale_vec(scale, static_cast<int>(v)));
  }

  template <int Count, int C = 0>
  static void store_tiles(char* to) {
    tile_store<C>(to + C * kTileBytes, kTileRowBytes);
    if constexpr (C + 1 < Count) store_tiles<Count, C + 1>(to);
  }
};

}  // namespace
}  // namespace turbo::cpu
