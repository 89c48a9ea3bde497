// SPDX-License-Identifier: Apache-2.0
// The grouped 4-bit kernels, once for every instruction set: `I` names the instructions.
//
// Two ways through the same arithmetic (gemm_u4g.h states its order):
//   direct  few rows: a line of weights is decoded in registers and used by all rows at once;
//           nothing is written back. Bound by memory for one row.
//   panel   many rows: weights of kPanelK8 steps are decoded once into the first-level cache and
//           multiplied with all rows of the share, a register tile at a time. Bound by the dot unit.
//
// `I` provides  Vec, Raw           accumulator; a register of packed weights
//               kLanes             channels in a Vec
//               kDots, kPlanes     dots per dword of 8 weights; units of x per dot
//               kDirectTiles/Rows, kPanelTiles/Rows   register tiles: accumulators + operands must fit
//               kPanelK8           dwords of a channel in a panel
//               load, load_raw, store_raw, decode<j>, broadcast, dot, dot_broadcast,
//               zero, set1, add, fma, fnma, load_f32, store_f32,
//               scale_vec, zero_vec, bias_vec, store_y, prepare_row, sum_units
// Everything here has internal linkage: code of one instruction set must never be merged by the
// linker with that of another.
#pragma once

#include "gemm_u4g_isa.h"

namespace turbo::cpu {
namespace {

/// Weights are read once per call: fetched this far ahead of their use, in bytes. Long enough to
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

  // ---- direct -----------------------------------------------------------------------------------

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

  template <int T, int R>
  static void direct(const GemmU4g& a, const PreparedX& px, int64_t tile, int64_t row) {
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

#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const Vec scale = I::scale_vec(s.scale, v);
        const Vec zero = s.zero ? I::zero_vec(s.zero, v) : I::zero();
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          if (s.zero)
            acc[v][r] = I::fnma(zero, I::set1(px.sums[(row + r) * l.groups + g]), acc[v][r]);
          total[v][r] = I::fma(acc[v][r], scale, total[v][r]);
        }
      }
      s.scale += s.scale_step;
      if (s.zero) s.zero += s.zero_step;
    }
    for (int v = 0; v < V; ++v)
      for (int r = 0; r < R; ++r)
        finish(a, row + r, tile * kTileN + v * I::kLanes, total[v][r]);
  }

  // ---- panel ------------------------------------------------------------------------------------

  /// The part of the weights that is decoded at a time: whole groups, or a piece of one.
  struct Panel {
    int64_t step, steps;    // dwords of k: first and count
    int64_t group, groups;  // groups touched: first and count
    bool starts, ends;      // does it hold the beginning, the end of its groups
  };

  static Panel panel_at(const LayoutU4g& l, int64_t step) {
    const int64_t size = l.group_k8();
    const int64_t group = step / size;
    if (size <= I::kPanelK8) {
      int64_t groups = I::kPanelK8 / size;
      if (group + groups > l.groups) groups = l.groups - group;
      return {step, groups * size, group, groups, true, true};
    }
    const int64_t left = (group + 1) * size - step;
    const int64_t steps = left < I::kPanelK8 ? left : I::kPanelK8;
    return {step, steps, group, 1, step == group * size, steps == left};
  }

  template <int J>
  static inline __attribute__((always_inline)) void decode_all(float* out, int64_t stride, Raw raw) {
    I::store_raw(out + J * stride, I::template decode<J>(raw));
    if constexpr (J + 1 < I::kDots) decode_all<J + 1>(out, stride, raw);
  }

  /// Panel order: [step][dot][channel], so that a register tile reads it in one direction.
  template <int T>
  static void decode(const Stream& s, const Panel& p, Work& work) {
    constexpr int V = T * kTileVecs;
    constexpr int64_t kStride = T * kTileN;
    const uint32_t* weight = s.weight + p.step * s.weight_step;
    float* out = work.panel;
    for (int64_t i = 0; i < p.steps; ++i, weight += s.weight_step, out += I::kDots * kStride) {
      for (int t = 0; t < T; ++t) __builtin_prefetch(weight + t * kTileN + kPrefetchBytes / 4);
      for (int v = 0; v < V; ++v)
        decode_all<0>(out + v * I::kLanes, kStride, I::load(weight + v * I::kLanes));
    }
    for (int64_t g = 0; g < p.groups; ++g)
      for (int v = 0; v < V; ++v) {
        const int64_t at = g * kStride + v * I::kLanes;
        I::store_f32(work.scale + at, I::scale_vec(s.scale + (p.group + g) * s.scale_step, v));
        if (s.zero)
          I::store_f32(work.zero + at, I::zero_vec(s.zero + (p.group + g) * s.zero_step, v));
      }
  }

  /// One register tile: R rows of the share from `first`, T tiles, all groups of the panel.
  template <int T, int R>
  static void multiply(const GemmU4g& a, const PreparedX& px, const Panel& p, int64_t row,
                       int64_t first, Work& work) {
    constexpr int V = T * kTileVecs;
    constexpr int64_t kStride = T * kTileN;
    const int64_t groups = a.layout.groups;
    const uint32_t* x[R];
    for (int r = 0; r < R; ++r) x[r] = row_units(px, row + r) + p.step * kUnits;
    const float* weight = work.panel;
    const int64_t dots = p.steps / p.groups * I::kDots;
    float* const total = work.total + first * kStride;
    float* const partial = work.group + first * kStride;

    for (int64_t g = 0; g < p.groups; ++g) {
      Vec acc[V][R];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
          acc[v][r] = p.starts ? I::zero() : I::load_f32(partial + r * kStride + v * I::kLanes);

      for (int64_t d = 0; d < dots; ++d, weight += kStride) {
        Raw w[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) w[v] = I::load_raw(weight + v * I::kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
          for (int q = 0; q < I::kPlanes; ++q) {
            const Raw unit = I::broadcast(x[r] + q);
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) I::dot(acc[v][r], w[v], unit);
          }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) x[r] += I::kPlanes;
      }

#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const Vec scale = I::load_f32(work.scale + g * kStride + v * I::kLanes);
        const Vec zero = px.sums ? I::load_f32(work.zero + g * kStride + v * I::kLanes) : I::zero();
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const int64_t at = r * kStride + v * I::kLanes;
          if (!p.ends) {
            I::store_f32(partial + at, acc[v][r]);
            continue;
          }
          if (px.sums) {
            const Vec sum = I::set1(px.sums[(row + r) * groups + p.group + g]);
            acc[v][r] = I::fnma(zero, sum, acc[v][r]);
          }
          // As in `direct`, the first group adds to 0.
          const Vec before = p.group + g == 0 ? I::zero() : I::load_f32(total + at);
          I::store_f32(total + at, I::fma(acc[v][r], scale, before));
        }
      }
    }
  }

  using Multiply = void (*)(const GemmU4g&, const PreparedX&, const Panel&, int64_t, int64_t, Work&);

  template <int T, int R>
  static Multiply multiply_of(int rows) {
    if constexpr (R == 1)
      return multiply<T, 1>;
    else
      return rows == R ? multiply<T, R> : multiply_of<T, R - 1>(rows);
  }

  template <int T>
  static void panel(const GemmU4g& a, const PreparedX& px, int64_t tile, const Share& share,
                    Work& work) {
    constexpr int64_t kStride = T * kTileN;
    static_assert(I::kPanelK8 * I::kDots * kStride <= kPanelFloats);
    static_assert(I::kPanelK8 * kDwordK <= kPanelK);
    const LayoutU4g& l = a.layout;
    const Stream s = stream(a, tile);
    const int64_t rows = share.row1 - share.row0;
    const int64_t parts = ceil_div(rows, I::kPanelRows);
    Panel p{};
    for (int64_t step = 0; step < l.k8(); step += p.steps) {
      p = panel_at(l, step);
      decode<T>(s, p, work);
      for (int64_t i = 0; i < parts; ++i) {
        const Range range = part(rows, parts, i);
        multiply_of<T, I::kPanelRows>(static_cast<int>(range.end - range.begin))(
            a, px, p, share.row0 + range.begin, range.begin, work);
      }
    }
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t n = 0; n < kStride; n += I::kLanes)
        finish(a, share.row0 + r, tile * kTileN + n, I::load_f32(work.total + r * kStride + n));
  }

  // ---- a share of the output --------------------------------------------------------------------

  template <int T, int R>
  static void direct_of(int rows, const GemmU4g& a, const PreparedX& x, int64_t tile, int64_t row) {
    if constexpr (R > 1) {
      if (rows < R) return direct_of<T, R - 1>(rows, a, x, tile, row);
    }
    direct<T, R>(a, x, tile, row);
  }

  template <int T>
  static void direct_tiles(int64_t tiles, int64_t rows, const GemmU4g& a, const PreparedX& x,
                           int64_t tile, int64_t row) {
    if constexpr (T > 1) {
      if (tiles < T) return direct_tiles<T - 1>(tiles, rows, a, x, tile, row);
    }
    direct_of<T, I::kDirectRows>(static_cast<int>(rows), a, x, tile, row);
  }

  template <int T>
  static void panel_tiles(int64_t tiles, const GemmU4g& a, const PreparedX& x, int64_t tile,
                          const Share& share, Work& work) {
    if constexpr (T > 1) {
      if (tiles < T) return panel_tiles<T - 1>(tiles, a, x, tile, share, work);
    }
    panel<T>(a, x, tile, share, work);
  }

  static void run(const GemmU4g& a, const PreparedX& x, const Share& share, Work& work) {
    const int64_t rows = share.row1 - share.row0;
    const bool few = rows <= I::kDirectRows;
    const int64_t most = few ? I::kDirectTiles : I::kPanelTiles;
    for (int64_t tile = share.tile0; tile < share.tile1;) {
      const int64_t block_end = (tile / kBlockTiles + 1) * kBlockTiles;
      int64_t tiles = (block_end < share.tile1 ? block_end : share.tile1) - tile;
      if (tiles > most) tiles = most;
      if (few)
        direct_tiles<I::kDirectTiles>(tiles, rows, a, x, tile, share.row0);
      else
        panel_tiles<I::kPanelTiles>(tiles, a, x, tile, share, work);
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

  static constexpr GemmU4gIsa kTable{kUnits, I::kReadsInPlace, prepare, sum, run};
};

}  // namespace
}  // namespace turbo::cpu
