// SPDX-License-Identifier: Apache-2.0
// The product of tile_kernel.h for more than 16 rows: the tile unit bounds it, and whatever else is done must fit
// between its instructions.
//
// A set is what the C tiles hold, tmm0 to tmm3: two row tiles times two channel tiles. A panel is kSteps B tiles for
// each of these channel tiles: its weights are decoded once, in tile order, into the first-level cache, and used by up
// to kPassSets sets. While the tile unit multiplies a set, the vector units decode a share of the next panel, and scale
// the sums of the set before and add them to its totals. So per set
//
//   multiply   4 products of 16 cycles and 4 loads of 8 cycles for each step
//   decode     one store of 64 bytes for each row of a B tile, shared by the sets of a pass
//   add        64 loads of sums, 64 loads and 64 stores of totals for each group
//
// run side by side. While one product runs, six times 16 instructions can begin, its tile loads and stores among them:
// where panels hold whole groups, as groups of 32, 64 or 128 4-bit weights let them, or a part of the only group, all
// loops over steps and groups have constant bounds.
#pragma once

#include <type_traits>

#include "tile_sums.h"

namespace turbo::cpu {
namespace {

template <class I>
struct TileMany : TileSums<I> {
  using Base = TileSums<I>;
  using Base::add_tile, Base::finish_tile, Base::tile_units;
  using Base::kLines, Base::kSteps, Base::kTileFloats, Base::kSetBytes, Base::kPanelBytes, Base::kStageBytes,
      Base::kPassSets, Base::kPartBytes;
  using typename Base::Decoder, typename Base::Panel, typename Base::Stream, typename Base::Weights;

  template <int T>
  using Width = std::integral_constant<int, T>;

  static constexpr int64_t kMostRowTiles = kRowChunk / kTileRows;

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

  /// One step of two row tiles, A = tmm4 and tmm5, and T channel tiles, B = tmm6 and tmm7. C tiles [row tile][channel
  /// tile]. `work(0)` to `work(3)` are what the vector units do between the products: the processor looks ahead by
  /// about one step, so that what takes longer than its products in one piece leaves the tile unit idle.
  template <int T, class Work>
  [[gnu::always_inline]] static inline void multiply(const char* a0, const char* a1, const char* b, const Weights& w,
                                                     bool first, char* before, const char* from, const Work& work) {
    const int64_t row = I::kDirect ? w.row : kTileRowBytes, tile = I::kDirect ? w.tile : kSteps * kTileBytes;
    if (first) turn_over<0>(before, from);
    tile_stream<4>(a0, kTileRowBytes);
    tile_load<6>(b, row);
    I::template tile_dot<0, 4, 6>();
    work(0);
    if constexpr (T == 2) {
      if (first) turn_over<1>(before, from);
      tile_load<7>(b + tile, row);
      I::template tile_dot<1, 4, 7>();
    }
    work(1);
    if (first) turn_over<T>(before, from);
    tile_stream<5>(a1, kTileRowBytes);
    I::template tile_dot<T, 5, 6>();
    work(2);
    if constexpr (T == 2) {
      if (first) turn_over<3>(before, from);
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
    tile_fence();
    work(3);
  }

  /// The sums of a set over the groups of a panel, on their way to its totals.
  struct Sums {
    const Panel* panel = nullptr;
    const char* stage = nullptr;  // [piece][C tile]
    float* totals = nullptr;
    const float* scales = nullptr;  // where `plain`: of the panel, [piece][channel tile][lane]
    int64_t row = 0, tile = 0;      // first ones
    int64_t count = 0;              // C tiles
  };

  /// One thread's work on a part of K of at most kRowChunk rows.
  struct Chunk {
    const Gemm& a;
    const PreparedX& x;
    Range row_tiles;
    const Panel* panels;
    int64_t panel_count;
    char* memory;   // two panels, two stages, and the unfinished sums of a group that several panels share
    float* totals;  // [run of channel tiles][set] C tiles; the same for all runs where `whole`
    bool whole;     // the part is all of K
    bool plain = Base::plain(a, x);

    /// What goes from one panel to the next.
    struct State {
      Decoder next;
      Sums sums;
      char* before = nullptr;  // where the C tiles of the last set go
      int64_t turn = 0;        // the panel's memory
      int64_t stage = 0;       // the last set's
    };

    /// Some channel tiles, and the rows of a pass.
    struct Pass {
      Stream stream, after;  // of these channels, and of those of the next pass
      bool more;             // there is a next pass
      int64_t tile;
      Range sets;
      float* totals;
    };

    int64_t tile_bytes() const { return kTileRows * x.row_bytes; }
    int64_t rows_from(int64_t row) const { return x.rows - row < kTileRows ? x.rows - row : kTileRows; }

    /// C tile `j` of a set, where scales alone do not turn its sums into parts of totals.
    template <int T>
    [[gnu::noinline]] void add_groups(const Sums& s, int64_t j) const {
      const Panel& p = *s.panel;
      const int64_t row = s.row + j / T * kTileRows, tile = s.tile + j % T;
      const Stream stream = Base::stream(a, tile);
      float* const total = s.totals + j * kTileFloats;
      add_tile(a, x,
               {p.group, p.pieces, stream.scale + p.group * stream.scale_step,
                stream.zero ? stream.zero + p.group * stream.zero_step : nullptr, stream.scale_step, stream.zero_step},
               row, rows_from(row), s.stage + j * kTileBytes, kSetBytes, p.group ? total : kZeroTile, total);
    }

    template <int T>
    [[gnu::noinline]] void finish(const Sums& s, int64_t j) const {
      const int64_t row = s.row + j / T * kTileRows;
      finish_tile(a, x, row, rows_from(row), s.tile + j % T, s.totals + j * kTileFloats);
    }

    /// Half `h` of the C tiles of a set.
    template <int T>
    [[gnu::always_inline]] inline void add_half(const Sums& s, int64_t h) const {
      const int64_t j = h / 2;
      if (j >= s.count) return;
      if (plain) {
        constexpr int64_t kRows = kTileRows / 2;
        const int64_t row = h % 2 * kRows;
        float* const total = s.totals + j * kTileFloats + row * kTileN;
        Base::template add_plain<kRows>(s.stage + j * kTileBytes + row * kTileRowBytes, kSetBytes, s.panel->pieces,
                                        s.scales + j % T * kTileN, T * kTileN, s.panel->group ? total : kZeroTile,
                                        total);
      } else if (h % 2) {
        add_groups<T>(s, j);
      }
      if (h % 2 && s.panel->last) finish<T>(s, j);
    }

    /// C tile `j` of a set.
    template <int T>
    void add(const Sums& s, int64_t j) const {
      add_half<T>(s, 2 * j);
      add_half<T>(s, 2 * j + 1);
    }

    template <int T>
    [[gnu::noinline]] Decoder first_of_next(const Pass& pass, char* to) const {
      return pass.more ? Decoder(pass.after, panels[0], T, to) : Decoder();
    }

    /// The panels `which`, all of them full and of `Pieces` pieces, or, with 0, whatever they are. With one group,
    /// `Open`, C tiles wait in memory between them.
    template <int T, int Pieces, bool Open>
    [[gnu::noinline]] void run_panels(State& state, const Pass& pass, const Range& which, float* scales) const {
      constexpr int64_t kCount = 2 * T;
      // Storing C tiles fills a piece's first step: all else is done between the products of the others.
      constexpr int64_t kFree = Pieces == 0 || Pieces == kSteps ? kSteps : kSteps - Pieces;
      constexpr int64_t kSlots = 4 * kFree, kHalves = 2 * kCount, kDecodes = I::kDirect ? kSlots : 4;
      constexpr int64_t kStepBytes = kTileBytes * I::kPlanes;
      char* const stages = memory + 2 * kPanelBytes;
      Decoder next = state.next;
      Sums sums = state.sums;
      char* before = state.before;
      int64_t turn = state.turn, stage_turn = state.stage;
      const char* const units = x.units + (row_tiles.begin + pass.sets.begin * 2) * tile_bytes();
      const int64_t set_count = pass.sets.end - pass.sets.begin;
      // A pair's second tile may be missing in the last set: its C tiles are multiplied and not used.
      const bool odd = row_tiles.begin + pass.sets.end * 2 > row_tiles.end;
      for (int64_t i = which.begin; i < which.end; ++i, turn ^= 1) {
        const Panel& p = panels[i];
        char* const memory_of_next = memory + (turn ^ 1) * kPanelBytes;
        if (i + 1 < panel_count)
          next = Decoder(pass.stream, panels[i + 1], T, memory_of_next);
        else
          next = first_of_next<T>(pass, memory_of_next);
        const Weights w(pass.stream, p, memory + turn * kPanelBytes);
        float* const scale = scales + turn * kSteps * T * kTileN;
        if (plain && p.ends) Base::load_scales(pass.stream, p.group, p.pieces, T, scale);
        const int64_t pieces = Pieces ? Pieces : p.pieces, steps = Pieces ? kSteps / Pieces : p.steps;
        const int64_t lines = ceil_div(next.left, set_count * (Pieces ? kDecodes : pieces * steps));
        const char* a_panel = units + p.first_step * kStepBytes;
        float* total = pass.totals;
        for (int64_t set = 0; set < set_count; ++set, total += kSetBytes / 4, a_panel += 2 * tile_bytes()) {
          const char* a0 = a_panel;
          const bool second = !odd || set + 1 < set_count;
          const int64_t a1 = second ? tile_bytes() : 0;
          const char* b = w.at;
          char* const rest = Open && a.layout.groups == 1 ? reinterpret_cast<char*>(total)
                                                          : stages + 2 * kStageBytes + set * kSetBytes;
          // The sums of the last piece stay in the tiles until those of the set before are added; earlier ones are
          // stored while these are, and need a stage of their own.
          if (Pieces != 1) stage_turn ^= 1;
          char* const stage = stages + stage_turn * kStageBytes;
          const int64_t adds = ceil_div(sums.count, pieces * steps);
          int64_t added = 0;
#pragma GCC unroll 8
          for (int64_t piece = 0; piece < pieces; ++piece) {
            // The only set goes on with the C tiles that it has.
            const bool goes_on = Open && before == rest && !p.begins;
            const char* const from = Open && !p.begins ? rest : nullptr;
#pragma GCC unroll 8
            for (int64_t s = 0; s < steps; ++s, a0 += kStepBytes, b += I::kDirect ? w.step : kTileBytes) {
              const auto work = [&](int64_t q) __attribute__((always_inline)) {
                if constexpr (Pieces > 0) {
                  if (kFree < kSteps && s == 0) return;
                  const int64_t slot = 4 * (kFree < kSteps ? piece * (steps - 1) + s - 1 : piece) + q;
                  if (slot * kDecodes / kSlots < (slot + 1) * kDecodes / kSlots) next.template run<T, true>(lines);
                  if (slot * kHalves / kSlots < (slot + 1) * kHalves / kSlots)
                    add_half<T>(sums, slot * kHalves / kSlots);
                } else {
                  next.template run<T, false>((lines + 3 - q) / 4);
                  if (q < 3) return;
                  for (const int64_t end = added + adds; added < end && added < sums.count; ++added)
                    add<T>(sums, added);
                }
              };
              multiply<T>(a0, a0 + a1, b, w, s == 0 && !goes_on, before, from, work);
            }
            before = !Open || p.ends ? stage + piece * kSetBytes : rest;
          }
          sums = {&p,
                  stage,
                  total,
                  scale,
                  (row_tiles.begin + (pass.sets.begin + set) * 2) * kTileRows,
                  pass.tile,
                  Open && !p.ends ? 0
                  : second        ? kCount
                                  : T};
        }
        if (next.left) next.template run<T, false>(next.left);
      }
      state = {next, sums, before, turn, stage_turn};
    }

    template <int T>
    [[gnu::noinline]] void run(const Range& tiles) const {
      const int64_t sets = ceil_div(row_tiles.end - row_tiles.begin, 2), passes = ceil_div(sets, kPassSets);
      alignas(64) float scales[2 * kSteps * T * kTileN];
      int64_t full = 0;
      while (full < panel_count && panels[full].full() && panels[full].pieces == panels[0].pieces) ++full;
      const int64_t pieces = panels[0].pieces;
      const bool open = !(panels[0].begins && panels[0].ends) || a.layout.groups == 1;
      if (pieces != 1 && pieces != 2 && pieces != 4) full = 0;
      State state;
      Pass pass;
      pass.stream = pass.after = Base::stream(a, tiles.begin);
      state.next = Decoder(pass.stream, panels[0], T, memory);
      state.next.template run<T, false>(state.next.left);
      for (pass.tile = tiles.begin; pass.tile < tiles.end; pass.tile += T) {
        pass.stream = pass.after;
        for (int64_t i = 0; i < passes; ++i) {
          const bool last = i + 1 == passes;
          pass.more = !last || pass.tile + T < tiles.end;
          if (last && pass.more) pass.after = Base::stream(a, pass.tile + T);
          pass.sets = part(sets, passes, i);
          const int64_t first = whole ? 0 : (pass.tile - tiles.begin) / T * sets + pass.sets.begin;
          pass.totals = totals + first * kSetBytes / 4;
          const Range alike{0, full}, rest{full, panel_count};
          if (full && open) run_panels<T, 1, true>(state, pass, alike, scales);
          if (full && !open && pieces == 1) run_panels<T, 1, false>(state, pass, alike, scales);
          if (full && !open && pieces == 2) run_panels<T, 2, false>(state, pass, alike, scales);
          if (full && !open && pieces == 4) run_panels<T, 4, false>(state, pass, alike, scales);
          if (full < panel_count) run_panels<T, 0, true>(state, pass, rest, scales);
        }
      }
      Base::template store_tiles<2 * T>(state.before);
      tile_fence();
      for (int64_t j = 0; j < state.sums.count; ++j) add<T>(state.sums, j);
    }
  };

  /// Parts of K: their activations, of all rows that a thread goes through, stay in the second-level cache with the
  /// panels.
  static int64_t parts(const Layout& l, int64_t rows) {
    const int64_t bytes = rows * tile_units(l) * 4, wanted = ceil_div(bytes, kPartBytes);
    const int64_t most = l.groups > 1 ? l.groups : ceil_div(l.dwords(), kSteps * kLines);
    return wanted < most ? wanted : most;
  }
  static Range depth(const Layout& l, int64_t parts, int64_t index) {
    if (l.groups > 1) {
      const Range groups = part(l.groups, parts, index);
      return {groups.begin * l.group_dwords(), groups.end * l.group_dwords()};
    }
    const int64_t lines = kSteps * kLines, dwords = l.dwords();
    const Range panels = part(ceil_div(dwords, lines), parts, index);
    return {panels.begin * lines, panels.end * lines < dwords ? panels.end * lines : dwords};
  }

  static int64_t panels_bytes(const Layout& l) { return Base::most_panels(l) * static_cast<int64_t>(sizeof(Panel)); }

  static int64_t workspace(const Gemm& a, const Share& share) {
    const int64_t row_tiles = share.row_tiles.end - share.row_tiles.begin;
    const int64_t count = row_tiles < kMostRowTiles ? row_tiles : kMostRowTiles, sets = ceil_div(count, 2);
    const int64_t runs = (share.tiles.end - share.tiles.begin) / 2 + 2;
    const int64_t all = parts(a.layout, count * kTileRows) > 1 ? runs * sets : sets;
    return panels_bytes(a.layout) + 2 * kPanelBytes + 2 * kStageBytes + (kPassSets + all) * kSetBytes;
  }

  static void run(const Gemm& a, const PreparedX& x, const Share& share) {
    Panel* const panels = static_cast<Panel*>(share.workspace);
    char* const memory = static_cast<char*>(share.workspace) + panels_bytes(a.layout);
    float* const totals = reinterpret_cast<float*>(memory + 2 * kPanelBytes + 2 * kStageBytes + kPassSets * kSetBytes);
    // Pairs of channel tiles begin with an even one, as blocks do.
    const Range& tiles = share.tiles;
    const int64_t first = tiles.begin + tiles.begin % 2, last = tiles.end - tiles.end % 2;
    for (int64_t begin = share.row_tiles.begin, end; begin < share.row_tiles.end; begin = end) {
      end = begin + kMostRowTiles < share.row_tiles.end ? begin + kMostRowTiles : share.row_tiles.end;
      const int64_t count = parts(a.layout, (end - begin) * kTileRows);
      const auto each_part = [&](auto width, const Range& run) {
        if (run.begin < run.end)
          for (int64_t i = 0; i < count; ++i) {
            const int64_t panel_count = Base::cut(a.layout, depth(a.layout, count, i), panels);
            Chunk{a, x, {begin, end}, panels, panel_count, memory, totals, count == 1}.template run<width()>(run);
          }
      };
      each_part(Width<1>(), {tiles.begin, first});
      each_part(Width<2>(), {first, last});
      each_part(Width<1>(), {first > last ? first : last, tiles.end});
    }
  }
};

}  // namespace
}  // namespace turbo::cpu
