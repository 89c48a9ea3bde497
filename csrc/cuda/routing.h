// SPDX-License-Identifier: Apache-2.0
// Which rows an expert has: tokens' choices sorted by expert, and the tiles of rows that follow, all on the device.
//
// A choice is a token and one of its top_k experts, number token * top_k + i. Choices of experts that are elsewhere have
// no row. Within an expert rows are in the order of choices, so that all of this is the same at every call.
#pragma once

#include <string>

#include "device.h"
#include "tile_shape.h"

namespace turbo::cuda {

struct RoutingParams {
  const void* ids;        // [choices] int32 or int64: index of an expert, -1 for none
  bool wide;              // int64
  const int32_t* map;     // [known]: from ids to experts that are here, -1 for others; nullptr: the same
  int choices, experts, known;
  int tile_rows;          // rows of a tile
  int32_t* offsets;       // [experts + 1]: an expert's first row
  int32_t* sorted;        // [choices]: the choice of a row
  int32_t* place;         // [choices]: the row of a choice, or -1
  TileRows* tiles;        // [most_tiles], as many as there can be; those beyond the last one have no rows
  int most_tiles;
};

/// Offsets and rows: a block for each expert, each thread with a run of neighbouring choices.
struct SortChoices {
  using Params = RoutingParams;
  static constexpr int kThreads = 256, kMinBlocks = 4, kWarps = kThreads / kWarpLanes, kSharedBytes = 2 * kWarps * 4;

  static std::string name() { return "sort_choices"; }

  /// The expert of a choice, or -1. Ids that name none are those of no expert here.
  TM_DEVICE static int expert_of(const Params& p, int choice) {
    const int64_t id = p.wide ? load_global(static_cast<const int64_t*>(p.ids) + choice)
                              : load_global(static_cast<const int32_t*>(p.ids) + choice);
    if (id < 0 || id >= p.known) return -1;
    const int expert = p.map ? load_global(p.map + id) : static_cast<int>(id);
    return expert < p.experts ? expert : -1;
  }

  /// Counts of choices: of experts before a block's, and of its own.
  struct Counts {
    uint32_t before, own;
  };

  /// Sums `mine` over threads below this one, and over all into `all`.
  TM_DEVICE static Counts sum_below(Counts mine, int thread, Counts& all) {
    const int lane = thread % kWarpLanes, warp = thread / kWarpLanes;
    Counts sum = mine;
    TM_UNROLL
    for (int step = 1; step < kWarpLanes; step *= 2) {
      const int from = lane < step ? lane : lane - step;
      const Counts other = {shuffle(sum.before, from), shuffle(sum.own, from)};
      sum.before += lane < step ? 0 : other.before;
      sum.own += lane < step ? 0 : other.own;
    }
    const auto place = [](int w, int word) { return shared_base() + static_cast<uint32_t>(4 * (2 * w + word)); };
    if (lane == kWarpLanes - 1) {
      store_shared_32(place(warp, 0), sum.before);
      store_shared_32(place(warp, 1), sum.own);
    }
    sync_threads();
    Counts below = {sum.before - mine.before, sum.own - mine.own};
    all = {0, 0};
    for (int w = 0; w < kWarps; ++w) {
      const Counts of_warp = {load_shared_32(place(w, 0)), load_shared_32(place(w, 1))};
      all.before += of_warp.before;
      all.own += of_warp.own;
      if (w >= warp) continue;
      below.before += of_warp.before;
      below.own += of_warp.own;
    }
    return below;
  }

  TM_DEVICE static void run(const Params& p) {
    const int thread = thread_index(), expert = block_index_x();
    const int run = (p.choices + kThreads - 1) / kThreads, first = thread * run;
    const int end = first + run < p.choices ? first + run : p.choices;
    Counts mine = {0, 0}, all;
    for (int choice = first; choice < end; ++choice) {
      const int other = expert_of(p, choice);
      mine.before += other >= 0 && other < expert;
      mine.own += other == expert;
      if (expert == 0 && other < 0) store_global(p.place + choice, -1);
    }
    const Counts below = sum_below(mine, thread, all);
    int row = static_cast<int>(all.before + below.own);
    if (thread == 0) {
      store_global(p.offsets + expert, static_cast<int32_t>(all.before));
      if (expert == p.experts - 1) store_global(p.offsets + p.experts, static_cast<int32_t>(all.before + all.own));
    }
    for (int choice = first; choice < end; ++choice) {
      if (expert_of(p, choice) != expert) continue;
      store_global(p.sorted + row, choice);
      store_global(p.place + choice, row++);
    }
  }
};

/// Tiles of rows, experts ascending: one block, a thread for every so many experts.
struct CutTiles {
  using Params = RoutingParams;
  static constexpr int kThreads = SortChoices::kThreads, kMinBlocks = 1, kSharedBytes = SortChoices::kSharedBytes;

  static std::string name() { return "cut_tiles"; }

  TM_DEVICE static void run(const Params& p) {
    const int thread = thread_index(), run = (p.experts + kThreads - 1) / kThreads, first = thread * run;
    const int last = first + run < p.experts ? first + run : p.experts;
    SortChoices::Counts mine = {0, 0}, all;
    for (int expert = first; expert < last; ++expert) mine.own += tiles_of(p, expert);
    int tile = static_cast<int>(SortChoices::sum_below(mine, thread, all).own);
    for (int expert = first; expert < last; ++expert) {
      const int end = load_global(p.offsets + expert + 1);
      for (int row = load_global(p.offsets + expert); row < end; row += p.tile_rows)
        store_global(p.tiles + tile++, TileRows{row, end, expert, 0});
    }
    for (int none = static_cast<int>(all.own) + thread; none < p.most_tiles; none += kThreads)
      store_global(p.tiles + none, TileRows{0, 0, 0, 0});
  }

  TM_DEVICE static uint32_t tiles_of(const Params& p, int expert) {
    const int rows = load_global(p.offsets + expert + 1) - load_global(p.offsets + expert);
    return static_cast<uint32_t>((rows + p.tile_rows - 1) / p.tile_rows);
  }
};

struct CombineParams {
  const float* products;  // [rows, hidden]
  const float* weights;   // [tokens, top_k]
  const int32_t* place;   // [tokens, top_k]
  int top_k, hidden;
  Half16 type;
  uint16_t* y;            // [tokens, hidden]
};

/// y[t] = the weighted sum of a token's rows, experts ascending: sum = fma(weight, row, sum) from 0 on, one rounding. A
/// block for each token.
struct Combine {
  using Params = CombineParams;
  static constexpr int kThreads = 256, kMinBlocks = 4;
  static constexpr int kMostChoices = 256;  // of a token
  static constexpr int kSharedBytes = 2 * kMostChoices * 4;

  static std::string name() { return "combine"; }

  TM_DEVICE static uint32_t at(int list, int i) {
    return shared_base() + static_cast<uint32_t>(4 * (list * kMostChoices + i));
  }

  TM_DEVICE static void run(const Params& p) {
    const int thread = thread_index();
    const int64_t token = block_index_x();
    const int32_t* places = p.place + token * p.top_k;
    // Rows of one token ascend as their experts do.
    int rows = 0;
    for (int i = 0; i < p.top_k; ++i) {
      const int row = load_global(places + i);
      rows += row >= 0;
      if (i != thread || row < 0) continue;
      int before = 0;
      for (int j = 0; j < p.top_k; ++j) {
        const int other = load_global(places + j);
        before += other >= 0 && other < row;
      }
      store_shared_32(at(0, before), static_cast<uint32_t>(row));
      store_shared_32(at(1, before), as_bits(load_global(p.weights + token * p.top_k + i)));
    }
    sync_threads();
    for (int channel = thread; channel < p.hidden; channel += kThreads) {
      float sum = 0;
      for (int i = 0; i < rows; ++i) {
        const int64_t row = load_shared_32(at(0, i));
        sum = multiply_add(as_float(load_shared_32(at(1, i))), load_global(p.products + row * p.hidden + channel), sum);
      }
      store_global(p.y + token * p.hidden + channel, from_float(p.type, sum));
    }
  }
};

}  // namespace turbo::cuda
