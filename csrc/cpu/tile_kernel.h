// SPDX-License-Identifier: Apache-2.0
// The product on AMX tiles, once for every format: `I` names the instructions (gemm.h states the arithmetic).
//
// A set is what fits into the tiles: two row tiles times two channel tiles, or, of a row tile alone, one times four. A
// panel is kSteps B tiles for each channel tile of a set: its weights are decoded once, in tile order, into the
// first-level cache, and used by up to kPassSets sets. While the tile unit multiplies a set, the vector units decode a
// share of the next panel, and scale the sums of the set before and add them to its totals. So per set of two by two
//
//   multiply   4 products of 16 cycles and 4 loads of 8 cycles for each step
//   decode     one store of 64 bytes for each row of a B tile, shared by the sets of a pass
//   add        64 loads of sums, 64 loads and 64 stores of totals
//
// run side by side, and the first is the longest from 32 rows on. A row has the same bits in every batch, since a tile
// sums each of its rows alone, and vectors sum as tiles do (tile_order_avx512.h).
//
// Activations in tiles: [group][step][plane][row][16 units], a group padded with zeros to whole steps.
//
// `I` provides  Vec, Acc, ...      as in gemm_kernel.h, start and end of groups.h included
//               kLineRows          rows of B that a line of weights becomes
//               kPlanes            units of x for each of them
//               kDirect            whether a line is a row of B as it lies in memory
//               kIntegers          whether sums are int32
//               decode_line        writes those rows, 64 bytes apart
//               tile_dot<C, A, B>  the instruction
#pragma once

#include "tile_panels.h"

namespace turbo::cpu {
namespace {

template <class I>
struct TileKernel : TilePanels<I> {
  using Base = TilePanels<I>;
  using Vec = typename I::Vec;
  using Acc = typename I::Acc;
  using Base::finish, Base::tile_units, Base::pack_rows;
  using Base::kLines, Base::kUnits, Base::kSteps, Base::kTileFloats, Base::kSetBytes, Base::kPanelBytes;
  using Base::kStageBytes, Base::kPassSets, Base::kPartBytes;
  using typename Base::Decoder, typename Base::Depth, typename Base::Panel, typename Base::Panels,
      typename Base::Weights;

  static constexpr int kVecs = kTileN / I::kLanes;  // of a row of C

  /// The sums of a set over the groups of a panel, in `stage`, [piece][C tile], on their way to the totals.
  struct Sums {
    const Panel* panel = nullptr;
    const char* stage = nullptr;
    float* totals = nullptr;
    const float* scales = nullptr;  // of the panel, [piece][channel tile][lane], if all groups end in it
    int64_t row = 0;                // first one
    int64_t tiles = 0, count = 0;   // channel tiles; C tiles
    bool plain = false;             // nothing but scales has a part in it, and totals are there already
  };

  /// N rows of one C tile: their groups are scaled and added to the totals, which are done after the last group.
  template <int N>
  static void add_rows(const Gemm& a, const PreparedX& x, const Sums& sums, int64_t row, int64_t tile,
                       const char* stage, float* totals) {
    const Panel& p = *sums.panel;
    const int64_t groups = a.layout.groups;
    const char* scale = p.scale + tile * kTileN * dtype_size(a.scale_dtype);
    const uint32_t* zero = p.zero ? p.zero + tile * I::zero_dwords(a.layout) : nullptr;
    Vec total[kVecs][N];
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v)
#pragma GCC unroll 8
      for (int r = 0; r < N; ++r)
        total[v][r] = p.group ? I::load_floats(totals + r * kTileN + v * I::kLanes) : I::zero();
    int64_t index = row * groups + p.group;
    for (int64_t piece = 0; piece < p.pieces; ++piece, ++index, stage += kSetBytes) {
      Acc acc[kVecs][N];
      if constexpr (I::kIntegers) I::start(acc, x, index, groups, zero);
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v)
#pragma GCC unroll 8
        for (int r = 0; r < N; ++r) {
          const auto* from = stage + r * kTileRowBytes + v * I::kLanes * 4;
          if constexpr (I::kIntegers)
            acc[v][r] = I::int_add(acc[v][r], I::load(reinterpret_cast<const uint32_t*>(from)));
          else
            acc[v][r] = I::load_floats(reinterpret_cast<const float*>(from));
        }
      I::end(total, acc, x, index, groups, zero, scale);
      scale += p.scale_step;
      if (zero) zero += p.zero_step;
    }
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v)
#pragma GCC unroll 8
      for (int r = 0; r < N; ++r) {
        if (p.last)
          finish(a, x, row + r, (p.tile + tile) * kTileN + v * I::kLanes, total[v][r]);
        else
          I::store_floats(totals + r * kTileN + v * I::kLanes, total[v][r]);
      }
  }

  /// C tile `index` of a set.
  [[gnu::noinline]] static void add_tile(const Gemm& a, const PreparedX& x, const Sums& sums, int64_t index) {
    constexpr int64_t kRows = 8;
    const int64_t second = index / sums.tiles, tile = index % sums.tiles;
    // A line of y belongs to two channel tiles: written one after the other, it is fetched once.
    const int64_t tiles = sums.panel->last && sums.tiles == 2 ? 2 : 1;
    if (tiles == 2 && tile == 1) return;
    const char* stage = sums.stage + index * kTileBytes;
    float* total = sums.totals + index * kTileFloats;
    int64_t row = sums.row + second * kTileRows, left = x.rows - row < kTileRows ? x.rows - row : kTileRows;
    for (; left > 0; left -= kRows, row += kRows, stage += kRows * kTileRowBytes, total += kRows * kTileN)
      for (int64_t t = 0; t < tiles; ++t)
        with_shape<1, kRows>(1, left, [&]<int, int N>() {
          add_rows<N>(a, x, sums, row, tile + t, stage + t * kTileBytes, total + t * kTileFloats);
        });
  }

  /// The scales of a panel as fp32, [piece][channel tile][lane].
  static void load_scales(const Panel& p, int64_t size, float* out) {
    for (int64_t piece = 0; piece < p.pieces; ++piece)
      for (int64_t t = 0; t < p.tiles; ++t, out += kTileN)
        for (int v = 0; v < kVecs; ++v)
          I::store_floats(out + v * I::kLanes, I::scale_vec(p.scale + piece * p.scale_step + t * kTileN * size, v));
  }

  /// Eight rows where nothing but scales and totals have a part in it, rows of no meaning too.
  [[gnu::always_inline]] static inline void add_plain(const char* stage, float* totals, const float* scale,
                                                      int64_t pieces, int64_t scale_step) {
    constexpr int kRows = kTileRows / 2;
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v, stage += I::kLanes * 4, totals += I::kLanes, scale += I::kLanes) {
      Vec total[kRows];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) total[r] = I::load_floats(totals + r * kTileN);
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const Vec by = I::load_floats(scale + piece * scale_step);
        const char* const from = stage + piece * kSetBytes;
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          if constexpr (I::kIntegers)
            total[r] =
                I::fma(I::to_float(I::load(reinterpret_cast<const uint32_t*>(from + r * kTileRowBytes))), by, total[r]);
          else
            total[r] = I::fma(I::load_floats(reinterpret_cast<const float*>(from + r * kTileRowBytes)), by, total[r]);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) I::store_floats(totals + r * kTileN, total[r]);
    }
  }

  /// A C tile at the beginning of its sum: what it held goes to `before`, if that is anywhere, and it begins with what
  /// is at `from`, or with 0. Between two products this costs next to nothing; of all C tiles in a row, it would cost
  /// the latency of the last product and 16 cycles each.
  template <int C>
  [[gnu::always_inline]] static inline void turn_over(char* before, const char* from) {
    if (before) tile_store<C>(before + C * kTileBytes, kTileRowBytes);
    if (from)
      tile_load<C>(from + C * kTileBytes, kTileRowBytes);
    else
      tile_zero<C>();
  }

  /// Two row tiles and T channel tiles, one or two: C tiles [row tile][channel tile] = tmm0 and on, A = tmm4 and tmm5,
  /// B = tmm6 and tmm7. One step, with what the vector units do meanwhile in two halves.
  template <int T>
  struct Pairs {
    static constexpr int kRowTiles = 2, kTiles = T;
    static constexpr int64_t kPanelSteps = kSteps;

    template <bool First, class Beside>
    [[gnu::always_inline]] static inline void step(const char* a0, const char* a1, int64_t, const char* b,
                                                   int64_t b_row, int64_t b_tile, char* before, const char* from,
                                                   const Beside& beside) {
      if (First) turn_over<0>(before, from);
      tile_stream<4>(a0, kTileRowBytes);
      tile_load<6>(b, b_row);
      I::template tile_dot<0, 4, 6>();
      if constexpr (T == 2) {
        if (First) turn_over<1>(before, from);
        tile_load<7>(b + b_tile, b_row);
        I::template tile_dot<1, 4, 7>();
      }
      beside(0, First);
      if (First) turn_over<T>(before, from);
      tile_stream<5>(a1, kTileRowBytes);
      I::template tile_dot<T, 5, 6>();
      if constexpr (T == 2) {
        if (First) turn_over<3>(before, from);
        I::template tile_dot<3, 5, 7>();
      }
      if constexpr (I::kPlanes == 2) {
        tile_stream<4>(a0 + kTileBytes, kTileRowBytes);
        I::template tile_dot<0, 4, 6>();
        if constexpr (T == 2) I::template tile_dot<1, 4, 7>();
        tile_stream<5>(a1 + kTileBytes, kTileRowBytes);
        I::template tile_dot<T, 5, 6>();
        if constexpr (T == 2) I::template tile_dot<3, 5, 7>();
      }
      beside(1, First);
      tile_fence();
    }
  };

  /// The only row tile and T channel tiles: C = tmm0 to tmm3, A = tmm4 and, of the second plane, tmm5, B = tmm6 and
  /// tmm7.
  template <int T>
  struct Single {
    static constexpr int kRowTiles = 1, kTiles = T;
    /// Few: nobody else waits for the panel, and two of them leave the first-level cache room.
    static constexpr int64_t kPanelSteps = 2;

    template <bool First, class Beside>
    [[gnu::always_inline]] static inline void step(const char* a0, const char*, int64_t plane, const char* b,
                                                   int64_t b_row, int64_t b_tile, char* before, const char* from,
                                                   const Beside& beside) {
      tile_load<4>(a0, kTileRowBytes);
      if constexpr (I::kPlanes == 2) tile_load<5>(a0 + plane, kTileRowBytes);
      tile<0, First>(b, b_row, b_tile, before, from);
      beside(0, First);
      beside(1, First);
      tile_fence();
    }

    template <int C, bool First>
    [[gnu::always_inline]] static inline void tile(const char* b, int64_t b_row, int64_t b_tile, char* before,
                                                   const char* from) {
      if (First) turn_over<C>(before, from);
      tile_load<6 + C % 2>(b + C * b_tile, b_row);
      I::template tile_dot<C, 4, 6 + C % 2>();
      if constexpr (I::kPlanes == 2) I::template tile_dot<C, 5, 6 + C % 2>();
      if constexpr (C + 1 < T) tile<C + 1, First>(b, b_row, b_tile, before, from);
    }
  };

  template <int Count, int C = 0>
  static void store_tiles(char* to) {
    tile_store<C>(to + C * kTileBytes, kTileRowBytes);
    if constexpr (C + 1 < Count) store_tiles<Count, C + 1>(to);
  }

  /// One thread's work on a part of K of at most kRowChunk rows.
  struct Chunk {
    const Gemm& a;
    const PreparedX& x;
    Range row_tiles;
    Depth depth;
    char* memory;   // two panels, two stages, and the unfinished sums of a group that several panels share
    float* totals;  // [run of channel tiles][set] C tiles; the same for all runs where `whole`
    bool whole;     // the part is all of K

    template <class S>
    [[gnu::noinline]] void run(const Range& tiles) {
      constexpr int T = S::kTiles, kCount = S::kRowTiles * T;
      char* const stages = memory + 2 * kPanelBytes;
      char* const unfinished = stages + 2 * kStageBytes;
      const int64_t sets = ceil_div(row_tiles.end - row_tiles.begin, S::kRowTiles), passes = ceil_div(sets, kPassSets);
      const int64_t plane = (S::kRowTiles == 1 ? x.rows : kTileRows) * kTileRowBytes, step_bytes = plane * I::kPlanes;
      const char* const units = x.units + row_tiles.begin * kTileRows * x.row_bytes;
      const int64_t tile_bytes = kTileRows * x.row_bytes;
      const bool many_groups = a.layout.groups > 1, plain = !a.zero && !x.group_scales && many_groups;
      alignas(64) float scales[2][kSteps * T * kTileN];

      Panels panels(a, tiles, T, S::kPanelSteps, passes, depth);
      Panel panel_of[3];
      panels.next(panel_of[0]);
      Decoder next(panel_of[0], memory);
      next.template run<T>(next.left);
      Sums sums;
      int64_t added = 0, turn = 0;
      char* before = nullptr;  // where the C tiles of the set before go
      for (int64_t i = 0;; ++i) {
        const Panel& p = panel_of[i % 3];
        Panel& after = panel_of[(i + 1) % 3];
        const bool more = panels.next(after);
        next = more ? Decoder(after, memory + (i + 1) % 2 * kPanelBytes) : Decoder();
        const Weights w(p, memory + i % 2 * kPanelBytes);
        const Range mine = part(sets, passes, p.pass);
        const int64_t first = whole ? 0 : (p.tile - tiles.begin) / T * sets + mine.begin;
        float* total = totals + first * kSetBytes / 4;
        float* const scale = scales[i % 2];
        if (plain) load_scales(p, dtype_size(a.scale_dtype), scale);
        const int64_t steps = p.pieces * p.steps, lines = ceil_div(next.left, (mine.end - mine.begin) * steps);
        for (int64_t set = mine.begin; set < mine.end; ++set, total += kSetBytes / 4) {
          const char* a0 = units + set * S::kRowTiles * tile_bytes + p.first_step * step_bytes;
          // Where a pair's second tile is missing, its C tiles are multiplied and not used.
          const bool second = S::kRowTiles == 2 && row_tiles.begin + set * 2 + 1 < row_tiles.end;
          const int64_t a1 = second ? tile_bytes : 0;
          const char* b = w.at;
          char* const rest = many_groups ? unfinished + (set - mine.begin) * kSetBytes : reinterpret_cast<char*>(total);
          const int64_t adds = ceil_div(sums.count, steps);
          // The sums of the last piece stay in the tiles until those of the set before are added; earlier ones are
          // stored while these are, and need a stage of their own.
          if (p.pieces > 1) turn ^= 1;
          char* const stage = stages + turn * kStageBytes;
          // In a first step, the second row tile's C tiles are stored after the first half.
          const auto beside = [&](int64_t half, bool first_step) __attribute__((always_inline)) {
            if (half == 0) next.template run<T>(lines);
            if (half == 1 && first_step) tile_fence();
            if (sums.plain) {
              for (int64_t h = first_step ? 0 : half; h <= half && (half || !first_step); ++h)
                for (int64_t j = added; j < added + adds && j < sums.count; ++j)
                  add_plain(sums.stage + j * kTileBytes + h * (kTileBytes / 2),
                            sums.totals + j * kTileFloats + h * (kTileFloats / 2), sums.scales + j % T * kTileN,
                            sums.panel->pieces, T * kTileN);
            } else if (half == 1) {
              for (int64_t j = added; j < added + adds && j < sums.count; ++j) add_tile(a, x, sums, j);
            }
            if (half == 1) added += adds;
          };
          for (int64_t piece = 0; piece < p.pieces; ++piece) {
            // The only set goes on with the C tiles that it has.
            if (before == rest && !p.begins)
              S::template step<false>(a0, a0 + a1, plane, b, w.row, w.tile, before, nullptr, beside);
            else
              S::template step<true>(a0, a0 + a1, plane, b, w.row, w.tile, before, p.begins ? nullptr : rest, beside);
            a0 += step_bytes;
            b += w.step;
            for (int64_t s = 1; s < p.steps; ++s, a0 += step_bytes, b += w.step)
              S::template step<false>(a0, a0 + a1, plane, b, w.row, w.tile, before, nullptr, beside);
            before = p.ends ? stage + piece * kSetBytes : rest;
          }
          added = 0;
          sums = {&p,
                  stage,
                  total,
                  scale,
                  (row_tiles.begin + set * S::kRowTiles) * kTileRows,
                  T,
                  !p.ends                       ? 0
                  : S::kRowTiles == 1 || second ? kCount
                                                : T,
                  plain && p.ends && p.group > 0 && !p.last};
        }
        if (next.left) next.template run<T>(next.left);
        if (!more) break;
      }
      store_tiles<kCount>(before);
      tile_fence();
      for (int64_t j = 0; j < sums.count; ++j) add_tile(a, x, sums, j);
    }
  };

  /// Parts of K: their activations, of all rows that a thread goes through, stay in the second-level cache beside the
  /// panels.
  static int64_t parts(const Layout& l, int64_t rows) {
    const int64_t bytes = rows * tile_units(l) * 4, wanted = ceil_div(bytes, kPartBytes);
    const int64_t most = l.groups > 1 ? l.groups : ceil_div(l.dwords(), kSteps * kLines);
    return wanted < most ? wanted : most;
  }
  static Depth depth(const Layout& l, int64_t parts, int64_t index) {
    if (l.groups > 1) {
      const Range groups = part(l.groups, parts, index);
      return {groups.begin * l.group_dwords(), groups.end * l.group_dwords()};
    }
    const int64_t lines = kSteps * kLines, dwords = l.dwords();
    const Range panels = part(ceil_div(dwords, lines), parts, index);
    return {panels.begin * lines, panels.end * lines < dwords ? panels.end * lines : dwords};
  }

  static constexpr int64_t kMostRowTiles = kRowChunk / kTileRows;

  static int64_t workspace(const Gemm& a, const PreparedX& x, const Share& share) {
    const int64_t row_tiles = share.row_tiles.end - share.row_tiles.begin;
    const int64_t count = row_tiles < kMostRowTiles ? row_tiles : kMostRowTiles, sets = ceil_div(count, 2);
    const int64_t runs = (share.tiles.end - share.tiles.begin) / 2 + 2;
    const int64_t totals = x.row_tiles > 1 && parts(a.layout, count * kTileRows) > 1 ? runs * sets : sets;
    return 2 * kPanelBytes + 2 * kStageBytes + (kPassSets + totals) * kSetBytes;
  }

  static void run(const Gemm& a, const PreparedX& x, const Share& share) {
    TileConfig config;
    const int64_t rows = x.row_tiles == 1 ? x.rows : kTileRows;
    for (int t = 0; t < 8; ++t) {
      config.row_bytes[t] = kTileRowBytes;
      config.rows[t] = static_cast<uint8_t>(t < 6 ? rows : kTileRows);
    }
    tile_configure(config);
    char* const memory = static_cast<char*>(share.workspace);
    float* const totals = reinterpret_cast<float*>(memory + 2 * kPanelBytes + 2 * kStageBytes + kPassSets * kSetBytes);
    if (x.row_tiles == 1) {
      Chunk chunk{a, x, {0, 1}, depth(a.layout, 1, 0), memory, totals, true};
      each_run_of_tiles(share.tiles, kBlockTiles, [&](int64_t tile, int64_t tiles) {
        if (tiles == kBlockTiles)
          chunk.template run<Single<kBlockTiles>>({tile, tile + tiles});
        else
          chunk.template run<Single<1>>({tile, tile + tiles});
      });
    } else {
      for (int64_t begin = share.row_tiles.begin, end; begin < share.row_tiles.end; begin = end) {
        end = begin + kMostRowTiles < share.row_tiles.end ? begin + kMostRowTiles : share.row_tiles.end;
        const int64_t count = parts(a.layout, (end - begin) * kTileRows);
        const auto chunk = [&](int64_t i) {
          return Chunk{a, x, {begin, end}, depth(a.layout, count, i), memory, totals, count == 1};
        };
        // Pairs of channel tiles begin with an even one, as blocks do.
        const int64_t first = share.tiles.begin + share.tiles.begin % 2, last = share.tiles.end - share.tiles.end % 2;
        for (int64_t i = 0; first > share.tiles.begin && i < count; ++i)
          chunk(i).template run<Pairs<1>>({share.tiles.begin, first});
        for (int64_t i = 0; last > first && i < count; ++i) chunk(i).template run<Pairs<2>>({first, last});
        for (int64_t i = 0; share.tiles.end > (last > first ? last : first) && i < count; ++i)
          chunk(i).template run<Pairs<1>>({last > first ? last : first, share.tiles.end});
      }
    }
    tile_release();
  }

  static void prepare(const Gemm& a, int64_t row, const RowOut& out) {
    I::prepare_row(a, static_cast<const char*>(a.x) + row * a.x_stride * dtype_size(a.dtype), out);
  }

  static constexpr GemmIsa kTable{kUnits,  kTileRows,  kTileRows, 1,         true, I::kReadsInPlace,
                                  prepare, tile_units, pack_rows, workspace, run};
};

/// `Vectors`, a Kernel of gemm_kernel.h, for less than `From` rows, where decoding a line for a tile costs more than
/// multiplying it on vectors; else `Tiles`. Both take the same units and give the same bits.
template <class Vectors, class Tiles, int64_t From>
struct FewOnVectors {
  static int64_t workspace(const Gemm& a, const PreparedX& x, const Share& share) {
    return x.tiled ? Tiles::workspace(a, x, share) : 0;
  }
  static void run(const Gemm& a, const PreparedX& x, const Share& share) {
    x.tiled ? Tiles::run(a, x, share) : Vectors::run(a, x, share);
  }

  static_assert(Vectors::kTable.units_per_dword == Tiles::kTable.units_per_dword);
  static constexpr GemmIsa kTable{Vectors::kTable.units_per_dword,
                                  Vectors::kTable.few_rows,
                                  kTileRows,
                                  From,
                                  true,
                                  Vectors::kTable.reads_in_place,
                                  Vectors::prepare,
                                  Tiles::tile_units,
                                  Tiles::pack_rows,
                                  workspace,
                                  run};
};

}  // namespace
}  // namespace turbo::cpu
