// SPDX-License-Identifier: Apache-2.0
// Many rows with weights that become fp32 where decoding and multiply-adds share execution ports: a panel of weights is
// decoded once for all rows into the first-level cache, and the loop over rows has nothing but multiply-adds in those
// ports. With AVX-512 that is so of 8-bit weights on Intel's two ports (4-bit ones, a shift and a permute each, gain
// nothing); with AVX2, where 5 rows share a decoded weight and not 8, of all. Fewer than 32 rows lose.
//
// Per k and register tile, which the multiply-adds bound: with AVX-512, of 32 channels x 8 rows, 2 loads, 8 broadcasts
// and 16 multiply-adds; with AVX2, of 16 x 5, 2, 5 and 10. The result has the same bits as that of the kernel that
// decodes in registers: the same sums in the same order.
#pragma once

#include "shares.h"

namespace turbo::cpu {
namespace {

/// Rows from which on panels are worth their stores.
inline constexpr int64_t kPanelRows = 32;

/// The share for many rows of `K`, a Kernel<I> of gemm_kernel.h.
template <class I, class K>
struct PanelKernel {
  using Vec = typename I::Vec;
  using Raw = typename I::Raw;
  using Stream = typename K::Stream;
  static constexpr int kLanes = I::kLanes, kTileVecs = kTileN / kLanes;
  static constexpr int kTiles = I::Many::kTiles, kWidth = kTiles * kTileN;
  static constexpr int64_t kSteps = 128 / I::kDots;  // most dwords of a panel: 16 KiB

  template <int J>
  static inline __attribute__((always_inline)) void decode(Raw raw, float* out, int64_t stride) {
    I::store_floats(out + J * stride, reinterpret_cast<Vec>(I::template decode<J>(raw)));
    if constexpr (J + 1 < I::kDots) decode<J + 1>(raw, out, stride);
  }

  /// What all row tiles of a panel share. It holds `pieces` whole groups, or a part of one, from group `group` on: `steps`
  /// dwords of each, from dword `at` of the row on.
  struct Panel {
    const float* weights;  // [k][channel]
    int64_t tile, group, pieces, steps, at;
    bool begins, ends;  // its groups
    Stream stream;
  };

  struct RowTile {
    int64_t row;
    float *sums, *totals;  // [v][r] vectors, between panels
    void (*run)(const Gemm&, const PreparedX&, const Panel&, const RowTile&);
  };

  template <int V, int R>
  static void run_tile(const Gemm& a, const PreparedX& x, const Panel& p, const RowTile& t) {
    const int64_t groups = a.layout.groups, index = t.row * groups;
    const Unit* units = K::row_units(x, t.row) + p.at * I::kDots * R;
    const float* weights = p.weights;
    const char* scale = p.stream.scale + p.group * p.stream.scale_step;
    const uint32_t* zero = p.stream.zero ? p.stream.zero + p.group * p.stream.zero_step : nullptr;
    Vec total[V][R], sum[V][R];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        total[v][r] = p.ends && p.group ? I::load_floats(t.totals + (v * R + r) * kLanes) : I::zero();
        sum[v][r] = p.begins ? I::zero() : I::load_floats(t.sums + (v * R + r) * kLanes);
      }
    for (int64_t piece = 0; piece < p.pieces; ++piece) {
      for (int64_t k = 0; k < p.steps * I::kDots; ++k, weights += V * kLanes, units += R) {
        Raw w[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) w[v] = I::load(reinterpret_cast<const uint32_t*>(weights + v * kLanes));
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const Raw unit = I::broadcast(units + r);
#pragma GCC unroll 8
          for (int v = 0; v < V; ++v) I::dot(sum[v][r], w[v], unit);
        }
      }
      if (!p.ends) break;
      I::end(total, sum, x, index + p.group + piece, groups, zero, scale);
      scale += p.stream.scale_step;
      if (zero) zero += p.stream.zero_step;
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sum[v][r] = I::zero();
    }
    const bool done = p.ends && p.group + p.pieces == groups;
    float* const kept = p.ends ? t.totals : t.sums;
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      if (done) {
        const typename K::Output y(a, x, p.tile * kTileN + v * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) y.store(t.row + r, total[v][r]);
      } else {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) I::store_floats(kept + (v * R + r) * kLanes, p.ends ? total[v][r] : sum[v][r]);
      }
    }
  }

  /// `count` row tiles with `tiles` channel tiles from `tile`.
  static void run_slab(const Gemm& a, const PreparedX& x, int64_t tile, int64_t tiles, const RowTile* row_tiles,
                       int64_t count, float* memory) {
    const int64_t group_steps = a.layout.group_dwords(), groups = a.layout.groups, width = tiles * kTileN;
    const Stream s = K::stream(a, tile);
    const uint32_t* weight = s.weight;
    const int64_t whole = kSteps / group_steps;  // groups of a panel, 0 where one takes several panels
    for (int64_t g = 0, in_group = 0, at = 0; g < groups;) {
      const int64_t pieces = whole ? (whole < groups - g ? whole : groups - g) : 1;
      const int64_t left = group_steps - in_group, steps = left < kSteps ? left : kSteps;
      for (int64_t i = 0; i < pieces * steps; ++i, weight += s.weight_step)
        for (int64_t v = 0; v < width; v += kLanes)
          decode<0>(I::load(weight + v), memory + i * I::kDots * width + v, width);
      // The next one arrives while the rows of this one are computed.
      for (int64_t i = 0; i < pieces * steps; ++i)
        for (int64_t v = 0; v < width; v += kTileN) __builtin_prefetch(weight + i * s.weight_step + v);

      const Panel panel{memory, tile, g, pieces, steps, at, in_group == 0, steps == left, s};
      for (const RowTile* t = row_tiles; t < row_tiles + count; ++t) t->run(a, x, panel, *t);
      at += pieces * steps;
      in_group = panel.ends ? 0 : in_group + steps;
      g += panel.ends ? pieces : 0;
    }
  }

  static void run(const Gemm& a, const PreparedX& x, const Share& share) {
    alignas(64) float panel[kSteps * I::kDots * kWidth], sums[kRowChunk * kWidth], totals[kRowChunk * kWidth];
    RowTile row_tiles[kRowChunk];
    each_row_chunk(x, share.row_tiles, [&](const Range& chunk, int64_t top) {
      each_run_of_tiles(share.tiles, kTiles, [&](int64_t tile, int64_t tiles) {
        for (int64_t i = chunk.begin; i < chunk.end; ++i) {
          const Range rows = part(x.rows, x.row_tiles, i);
          const int64_t at = (rows.begin - top) * kWidth;
          const auto run = with_shape<kTiles, I::Many::kRows>(
              tiles, rows.end - rows.begin, []<int T, int R>() { return &run_tile<T * kTileVecs, R>; });
          row_tiles[i - chunk.begin] = {rows.begin, sums + at, totals + at, run};
        }
        run_slab(a, x, tile, tiles, row_tiles, chunk.end - chunk.begin, panel);
      });
    });
  }
};

}  // namespace
}  // namespace turbo::cpu
