// SPDX-License-Identifier: Apache-2.0
// The kernel, once for every instruction set, width and kind of activations: `I` names the instructions.
//
// A line of weights is decoded in registers and used at once by all rows of a register tile; nothing is
// written back, but for what panel_kernel.h does. One row is bound by memory. For many rows the weights of a
// block come from the second-level cache once per row tile, and decoding them again costs no more than storing
// them: it runs on the shuffle and shift units while the dot units, the bound, are busy (gemm.h states the
// arithmetic). Where those are the same units, `kPanels` says so.
// A dot's result is needed by the same accumulator's next dot: at two dots a cycle, each 6 cycles late
// (Zen 5), a register tile needs 16 accumulators, and dots on one of them lie as far apart as possible.
//
// `I` provides  Vec, Acc, Raw      fp32 totals; accumulators; a register of packed or decoded weights
//               kLanes             channels in a Vec
//               kDots, kPlanes     dots per dword of weights; units of x per dot
//               Few, Many          register tiles {kTiles, kRows} for x by rows, x by tiles
//               kManyFrom          rows from which on the latter costs less than it gains
//               kPanels            whether kPanelRows rows and more take panels of decoded weights
//               kParts             whether sums are exact, so that K may be cut into parts
//               load, decode<j>, broadcast, dot, add, mul, set1, zero, bias_vec, store_y
//               start, end         a group's accumulators before the dots, and into the totals after them
//               kFoldDwords, fold  after so many dwords of a group, and at its end, fold sums up; 0: never
//               prepare_row, Environment
// Everything here has internal linkage, as all that it includes: code of one instruction set must never
// be merged by the linker with that of another.
#pragma once

#include "channels.h"
#include "gemm_isa.h"
#include "interleave.h"
#include "panel_kernel.h"
#include "parts_kernel.h"
#include "shares.h"

namespace turbo::cpu {
namespace {

/// Weights are fetched this far ahead of their use, in bytes: what one thread reads, at 35 GB/s, during a
/// memory latency under load of more than 200 ns. On Zen 5 and one row 8 KiB was a quarter faster than 2 KiB.
constexpr int64_t kPrefetchBytes = 8192;

template <class I>
struct Kernel : Channels<I> {
  using typename Channels<I>::Stream;
  using Channels<I>::stream;
  using Output = typename Channels<I>::Output;
  using Vec = typename I::Vec;
  using Acc = typename I::Acc;
  using Raw = typename I::Raw;
  static constexpr int kTileVecs = kTileN / I::kLanes;
  static constexpr int64_t kUnits = I::kDots * I::kPlanes;  // units of x per dword of weights
  static constexpr int64_t kPrefetch = kPrefetchBytes / 4;

  static const Unit* row_units(const PreparedX& x, int64_t row) {
    return reinterpret_cast<const Unit*>(x.units + row * x.row_bytes);
  }
  static const Unit* gathered_units(const PreparedX& x, int64_t row) {
    return row_units(x, x.source_rows ? x.source_rows[row] : row);
  }

  /// Where a register tile finds its units of x; `next` moves on by one dword of weights. `kMany`: row tiles are many,
  /// and what they fetch ahead is told by Ahead.
  template <int R>
  struct Rows {
    static constexpr bool kMany = false;
    const Unit* row[R];
    int64_t unit = 0;
    Rows(const PreparedX& x, int64_t first) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) row[r] = gathered_units(x, first + r);
    }
    const Unit* at(int r, int u) const { return row[r] + unit + u; }
    void next() { unit += kUnits; }
  };
  template <int R>
  struct Tiled {
    static constexpr bool kMany = true;
    const Unit* units;
    Tiled(const PreparedX& x, int64_t first) : units(row_units(x, first)) {}
    const Unit* at(int r, int u) const { return units + u * R + r; }
    void next() { units += R * kUnits; }
  };

  /// What one of many row tiles fetches, a few lines every kAheadDwords dwords: the first one its own weights, a little further
  /// on; the others, each a part, those of the next channels, which then come from the second-level cache when their turn
  /// is, instead of from memory while no dot is computed.
  struct Ahead {
    const uint32_t* at;
    int64_t dwords;  // how many each time

    /// For row tile `index` of `count` and `groups` runs of `length` dwords: its own weights are at `own`, the next ones
    /// at `next`, `step` from dword to dword.
    Ahead(int64_t index, int64_t count, int64_t groups, int64_t length, const uint32_t* own, const uint32_t* next,
          int64_t step)
        : at(own + kPrefetch), dwords(length < kAheadDwords ? length : kAheadDwords) {
      if (index == 0) return;
      const int64_t times = groups * ceil_div(length, dwords);
      if (count > 1) dwords = ceil_div(dwords, count - 1);
      const int64_t begin = (index - 1) * times * dwords;
      at = next + begin * step;
      if (begin >= groups * length) dwords = 0;
    }

    template <int T>
    void fetch(int64_t step) {
      for (int64_t i = 0; i < dwords; ++i, at += step)
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) __builtin_prefetch(at + t * kTileN);
    }
  };

  /// All dots of one dword of weights of V vectors with R rows, k ascending.
  template <int J, int V, int R, class X>
  static inline __attribute__((always_inline)) void dots(Acc (&acc)[V][R], const Raw (&raw)[V],
                                                         const X& x) {
    Raw weights[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) weights[v] = I::template decode<J>(raw[v]);
#pragma GCC unroll 2
    for (int p = 0; p < I::kPlanes; ++p)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Raw unit = I::broadcast(x.at(r, J * I::kPlanes + p));
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) I::dot(acc[v][r], weights[v], unit);
      }
    if constexpr (J + 1 < I::kDots) dots<J + 1>(acc, raw, x);
  }

  /// One register tile: R rows from `row`, T tiles from `tile`, all of K.
  template <template <int> class X, int T, int R>
  static void register_tile(const Gemm& a, const PreparedX& px, int64_t tile, int64_t row, int64_t index) {
    constexpr int V = T * kTileVecs;
    const Layout& l = a.layout;
    const int64_t steps = l.group_dwords();
    Stream s = stream(a, tile);
    X<R> x(px, row);
    [[maybe_unused]] Ahead ahead(index, px.row_tiles, l.groups, steps, s.weight, stream(a, tile + T).weight, s.weight_step);
    Vec total[V][R];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) total[v][r] = I::zero();

    for (int64_t g = 0; g < l.groups; ++g) {
      Acc acc[V][R];
      I::start(acc, px, row * l.groups + g, l.groups, s.zero);
      for (int64_t i = 0, stop; i < steps; i = stop) {
        constexpr int64_t kRun = X<R>::kMany ? kAheadDwords : I::kFoldDwords;
        stop = kRun > 0 && steps - i > kRun ? i + kRun : steps;
        [[maybe_unused]] const bool whole = stop - i == kRun;
        if constexpr (X<R>::kMany) ahead.template fetch<T>(s.weight_step);
        for (; i < stop; ++i, x.next(), s.weight += s.weight_step) {
          Raw raw[V];
#pragma GCC unroll 8
          for (int v = 0; v < V; ++v) raw[v] = I::load(s.weight + v * I::kLanes);
          if constexpr (!X<R>::kMany) {
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) __builtin_prefetch(s.weight + t * kTileN + kPrefetch);
          }
          dots<0>(acc, raw, x);
        }
        if constexpr (I::kFoldDwords > 0) I::fold(acc, whole);
      }
      I::end(total, acc, px, row * l.groups + g, l.groups, s.zero, s.scale);
      s.scale += s.scale_step;
      if (s.zero) s.zero += s.zero_step;
    }
    // Unrolled: an index that is not a constant would keep all totals in memory, in the loop above too.
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const Output y(a, px, tile * kTileN + v * I::kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) y.store(row + r, total[v][r]);
    }
  }

  /// Channel tiles outside, so that a register tile's weights stay near for all its row tiles.
  template <template <int> class X, class Shape>
  static void run_shape(const Gemm& a, const PreparedX& x, const Share& share) {
    each_run_of_tiles(share.tiles, Shape::kTiles, [&](int64_t tile, int64_t tiles) {
      for (int64_t i = share.row_tiles.begin; i < share.row_tiles.end; ++i) {
        const Range r = part(x.rows, x.row_tiles, i);
        with_shape<Shape::kTiles, Shape::kRows>(tiles, r.end - r.begin, [&]<int T, int Rows>() {
          register_tile<X, T, Rows>(a, x, tile, r.begin, i);
        });
      }
    });
  }

  static void run(const Gemm& a, const PreparedX& x, const Share& share) {
    [[maybe_unused]] const typename I::Environment environment{};
    if constexpr (I::kPanels)
      if (x.tiled && x.rows >= kPanelRows) return PanelKernel<I, Kernel>::run(a, x, share);
    if constexpr (I::kParts)
      if (x.tiled && PartsKernel<I, Kernel>::parts_of(a.layout) > 1) return PartsKernel<I, Kernel>::run(a, x, share);
    if (x.tiled)
      run_shape<Tiled, typename I::Many>(a, x, share);
    else
      run_shape<Rows, typename I::Few>(a, x, share);
  }

  static void prepare(const Gemm& a, int64_t row, const RowOut& out) {
    I::prepare_row(a, static_cast<const char*>(a.x) + row * a.x_stride * dtype_size(a.dtype), out);
  }

  static int64_t tile_units(const Layout& l) { return l.dwords() * kUnits; }
  static void interleave_tile(const Gemm& a, const Unit* const* row_units, int64_t rows, int64_t, uint32_t* out) {
    interleave(row_units, rows, tile_units(a.layout), out);
  }

  static int64_t workspace(const Gemm&, const PreparedX&, const Share&) { return 0; }

  static_assert(I::Many::kRows <= kInterleaveRows);
  static constexpr GemmIsa kTable{kUnits,           I::Few::kRows, I::Many::kRows, I::kManyFrom, false,
                                  I::kReadsInPlace, prepare,       tile_units,     interleave_tile, workspace, run};
};

}  // namespace
}  // namespace turbo::cpu
