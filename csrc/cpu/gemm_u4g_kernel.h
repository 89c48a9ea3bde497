// SPDX-License-Identifier: Apache-2.0
// The grouped 4-bit kernel, once for every instruction set: `I` names the instructions.
//
// A line of weights is decoded in registers and used at once by all rows of a register tile; nothing is
// ever written back. One row is bound by memory. For many rows the weights of a block come from the
// second-level cache once per row tile, and decoding them again costs less than storing them: it runs on
// the shuffle and shift units while the dot unit, the bound, is busy (gemm_u4g.h states the arithmetic).
//
// `I` provides  Vec, Raw           accumulator; a register of packed or decoded weights
//               kLanes             channels in a Vec
//               kDots, kPlanes     dots per dword of 8 weights; units of x per dot
//               kTiles, kRows      largest register tile: accumulators + operands must fit
//               load, decode<j>, dot_broadcast, zero, set1, add, fma, fnma,
//               scale_vec, zero_vec, bias_vec, store_y, prepare_row, sum_units
// Everything here has internal linkage, as all that it includes: code of one instruction set must never
// be merged by the linker with that of another.
#pragma once

#include "gemm_u4g_isa.h"

namespace turbo::cpu {
namespace {

/// Weights are read once per tile of rows: fetched this far ahead of their use, in bytes. Long enough to
/// cover a memory latency of 100 ns at 20 GB/s for one thread.
constexpr int64_t kPrefetchBytes = 2048;

template <class I>
struct KernelU4g {
  using Vec = typename I::Vec;
  using Raw = typename I::Raw;
  static constexpr int kTileVecs = kTileN / I::kLanes;
  static constexpr int64_t kUnits = I::kDots * I::kPlanes;  // units of x per dword of weights

  /// One run of weights: where a group of tiles starts in each array, and the way to the next step.
  struct Stream {
    const uint32_t* weight;
    const char* scale;
    const uint32_t* zero;
    int64_t weight_step, scale_step, zero_step;  // elements (scale: bytes) per dword, per group
  };

  static Stream stream(const GemmU4g& a, int64_t tile) {
    const LayoutU4g& l = a.layout;
    const int64_t lanes = l.block_tiles(tile) * kTileN;
    const int64_t size = dtype_size(a.dtype), per_zero = kTileN / kZeroDwords;
    const int64_t group_offset = l.lane_offset(tile, 0, l.groups);
    return {a.weight + l.lane_offset(tile, 0, l.k8()),
            static_cast<const char*>(a.scale) + group_offset * size,
            a.zero ? a.zero + group_offset / per_zero : nullptr,
            lanes,
            lanes * size,
            lanes / per_zero};
  }

  static const uint32_t* row_units(const PreparedX& x, int64_t row) {
    return reinterpret_cast<const uint32_t*>(x.units + row * x.row_bytes);
  }

  static void finish(const GemmU4g& a, int64_t row, int64_t channel, Vec total) {
    const int64_t size = dtype_size(a.dtype);
    const int64_t left = a.layout.n - channel;
    if (left <= 0) return;
    const int count = static_cast<int>(left < I::kLanes ? left : I::kLanes);
    if (a.bias)
      total = I::add(total, I::bias_vec(static_cast<const char*>(a.bias) + channel * size, count));
    I::store_y(static_cast<char*>(a.y) + (row * a.layout.n + channel) * size, total, count);
  }

  template <int J, int V, int R>
  static inline __attribute__((always_inline)) void dot_rows(Vec (&acc)[V][R], int v, Raw raw,
                                                             const uint32_t* const (&x)[R],
                                                             int64_t unit) {
    const Raw weights = I::template decode<J>(raw);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int p = 0; p < I::kPlanes; ++p)
        I::dot_broadcast(acc[v][r], weights, x[r] + unit + J * I::kPlanes + p);
    if constexpr (J + 1 < I::kDots) dot_rows<J + 1>(acc, v, raw, x, unit);
  }

  /// One register tile: R rows from `row`, T tiles from `tile`, all of K.
  template <int T, int R>
  static void register_tile(const GemmU4g& a, const PreparedX& px, int64_t tile, int64_t row) {
    constexpr int V = T * kTileVecs;
    const LayoutU4g& l = a.layout;
    Stream s = stream(a, tile);
    const uint32_t* x[R];
    for (int r = 0; r < R; ++r) x[r] = row_units(px, row + r);
    Vec total[V][R];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) total[v][r] = I::zero();

    int64_t unit = 0;
    for (int64_t g = 0; g < l.groups; ++g) {
      Vec acc[V][R];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[v][r] = I::zero();

      for (int64_t i = 0; i < l.group_k8(); ++i, unit += kUnits, s.weight += s.weight_step) {
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t)
          __builtin_prefetch(s.weight + t * kTileN + kPrefetchBytes / 4);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v)
          dot_rows<0>(acc, v, I::load(s.weight + v * I::kLanes), x, unit);
      }

      if (s.zero) {
        const float* sums = px.sums + row * l.groups + g;
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
          const Vec zero = I::zero_vec(s.zero, v);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r)
            acc[v][r] = I::fnma(zero, I::set1(sums[r * l.groups]), acc[v][r]);
        }
        s.zero += s.zero_step;
      }
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const Vec scale = I::scale_vec(s.scale, v);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) total[v][r] = I::fma(acc[v][r], scale, total[v][r]);
      }
      s.scale += s.scale_step;
    }
    for (int v = 0; v < V; ++v)
      for (int r = 0; r < R; ++r)
        finish(a, row + r, tile * kTileN + v * I::kLanes, total[v][r]);
  }

  template <int T, int R>
  static void with_rows(int64_t rows, const GemmU4g& a, const PreparedX& x, int64_t tile, int64_t row) {
    if constexpr (R > 1) {
      if (rows < R) return with_rows<T, R - 1>(rows, a, x, tile, row);
    }
    register_tile<T, R>(a, x, tile, row);
  }

  template <int T>
  static void with_tiles(int64_t tiles, int64_t rows, const GemmU4g& a, const PreparedX& x,
                         int64_t tile, int64_t row) {
    if constexpr (T > 1) {
      if (tiles < T) return with_tiles<T - 1>(tiles, rows, a, x, tile, row);
    }
    with_rows<T, I::kRows>(rows, a, x, tile, row);
  }

  static void run(const GemmU4g& a, const PreparedX& x, const Share& share) {
    const int64_t rows = share.row1 - share.row0;
    const int64_t parts = ceil_div(rows, I::kRows);
    for (int64_t tile = share.tile0; tile < share.tile1;) {
      const int64_t block_end = (tile / kBlockTiles + 1) * kBlockTiles;
      int64_t tiles = (block_end < share.tile1 ? block_end : share.tile1) - tile;
      if (tiles > I::kTiles) tiles = I::kTiles;
      for (int64_t i = 0; i < parts; ++i) {
        const Range r = part(rows, parts, i);
        with_tiles<I::kTiles>(tiles, r.end - r.begin, a, x, tile, share.row0 + r.begin);
      }
      tile += tiles;
    }
  }

  static void prepare(const GemmU4g& a, int64_t row0, int64_t row1, const PreparedX& x) {
    const LayoutU4g& l = a.layout;
    for (int64_t row = row0; row < row1; ++row)
      I::prepare_row(static_cast<const char*>(a.x) + row * a.x_stride * dtype_size(a.dtype), l.k,
                     const_cast<uint32_t*>(row_units(x, row)), l.k8() * kUnits);
  }

  static void sum(const GemmU4g& a, int64_t row0, int64_t row1, const PreparedX& x) {
    const int64_t units = a.layout.group_k8() * kUnits;
    for (int64_t row = row0; row < row1; ++row)
      for (int64_t g = 0; g < a.layout.groups; ++g)
        const_cast<float*>(x.sums)[row * a.layout.groups + g] =
            I::sum_units(row_units(x, row) + g * units, units);
  }

  static constexpr GemmU4gIsa kTable{kUnits, I::kRows, I::kReadsInPlace, prepare, sum, run};
};

}  // namespace
}  // namespace turbo::cpu
