// SPDX-License-Identifier: Apache-2.0
// Driver of the routed experts: sorts tokens by expert, keeps the scratch memory, shares out the work.
//
//   route      (token, weight) pairs in the order of experts, within an expert in that of tokens
//   prepare    x once for each token (converted, or rounded to int8); for experts with many rows also as tiles
//   gate, up   [experts][blocks of channels]: one block of fp32 results, at once through the activation into h
//   prepare    h, once for each pair
//   down       a thread owns channels of y and goes through all experts, so the sum over a token's experts needs
//              no second buffer and has one order
#include "moe.h"

#include <algorithm>
#include <cstring>

#include "moe_isa.h"
#include "prepare.h"

namespace turbo::cpu {
namespace {

thread_local Scratch routing_scratch, result_scratch, row_scratch;

/// Row tiles of a block of fp32 results. Those of vectors are 8 KiB, so that the block stays in the first-level cache
/// while weights stream by; those of AMX 32 KiB, since each block decodes its panels of weights anew.
constexpr int64_t kBlockRowTiles = 4, kBlockFullTiles = 8;
constexpr int64_t kBlockRows = kBlockFullTiles * kMostTileRows;

/// Items of work for each thread, see gemm.cpp.
constexpr int64_t kItemsPerThread = 8;

/// What reading a line of weights costs, in rows: up to about four rows a product is bound by memory.
constexpr int64_t kReadRows = 4;

const MoeIsa& block_isa(Isa isa) {
  return vector_isa(isa) < Isa::avx512 ? moe_avx2() : moe_avx512();
}

/// One of the two products: what all experts share.
Gemm product(const Moe& a, const Experts& w, DType dtype, const void* x, int64_t x_stride) {
  Gemm g{};
  g.layout = w.layout;
  g.dtype = dtype;
  g.scale_dtype = a.scale_dtype;
  g.x = x;
  g.x_stride = x_stride;
  g.weight = w.weight;
  g.scale = w.scale;
  g.zero = w.zero;
  g.y_dtype = DType::f32;
  g.y_stride = kBlockChannels;
  g.activations = a.activations;
  g.x_scale = w.x_scale;
  g.x_group = a.x_group;
  return g;
}

/// The product with one expert's weights.
Gemm of_expert(const Gemm& all, const Experts& w, int64_t expert) {
  const Layout& l = w.layout;
  const int64_t channels = l.padded_n();
  const bool sums = all.as_integers() && l.bits == 8;
  Gemm g = all;
  g.weight += expert * channels * l.dwords();
  g.scale = static_cast<const char*>(g.scale) + expert * channels * l.groups * dtype_size(all.scale_dtype);
  if (g.zero) g.zero += expert * (sums ? channels : channels / l.dword_k() * l.groups);
  if (w.bias) g.bias = w.bias + expert * channels;
  if (w.channel_scale) g.channel_scale = w.channel_scale + expert * channels;
  return g;
}

/// The (token, weight) pairs of some tokens, sorted by expert.
struct Routing {
  int32_t* token;   // [pairs]
  float* weight;    // [pairs]
  int64_t* first;   // [experts + 1]: where an expert's pairs begin
  int32_t* active;  // experts that have pairs, ascending
  int32_t* order;   // [experts]: an expert's place among these
  int64_t active_count, pairs;

  Routing(const Moe& a, int64_t begin, int64_t end) {
    const int64_t slots = (end - begin) * a.top_k;
    Pieces pieces(routing_scratch);
    for (int pass = 0; pass < 2; ++pass) {
      token = pieces.take<int32_t>(true, slots);
      weight = pieces.take<float>(true, slots);
      first = pieces.take<int64_t>(true, a.experts + 1);
      active = pieces.take<int32_t>(true, a.experts);
      order = pieces.take<int32_t>(true, a.experts);
      if (pass == 0) pieces.begin();
    }
    sort(a.topk_ids + begin * a.top_k, a.topk_weights + begin * a.top_k, slots, a.top_k, a.experts);
  }

  int64_t count(int32_t expert) const { return first[expert + 1] - first[expert]; }

 private:
  /// A counting sort, stable.
  void sort(const int32_t* ids, const float* weights, int64_t slots, int64_t top_k, int64_t experts) {
    std::memset(first, 0, sizeof(int64_t) * static_cast<size_t>(experts + 1));
    for (int64_t i = 0; i < slots; ++i)
      if (ids[i] >= 0) ++first[ids[i] + 1];
    active_count = pairs = 0;
    // first[e + 1] becomes where expert e begins, and, as its pairs are put there, where it ends.
    for (int64_t e = 0; e < experts; ++e) {
      const int64_t count = first[e + 1];
      order[e] = static_cast<int32_t>(active_count);
      if (count) active[active_count++] = static_cast<int32_t>(e);
      first[e + 1] = pairs;
      pairs += count;
    }
    for (int64_t i = 0; i < slots; ++i) {
      if (ids[i] < 0) continue;
      const int64_t at = first[ids[i] + 1]++;
      token[at] = static_cast<int32_t>(i / top_k);
      weight[at] = weights[i];
    }
  }
};

/// Rows of one product in the order of the pairs: a PreparedX for each expert.
class ExpertRows {
 public:
  /// `gathered`: row p of the product is row token[p] of x, else row p.
  ExpertRows(const Gemm& args, const GemmIsa& isa, const Routing& routing, bool gathered)
      : rows_(args, isa), routing_(routing), gathered_(gathered) {
    for (int64_t i = 0; i < routing.active_count; ++i) tiles_count_ += tiled_row_tiles(routing.active[i]);
  }

  void take(Pieces& pieces, int64_t rows) {
    rows_.take(pieces, rows);
    beside_ = rows_.beside;
    if (gathered_) beside_.take(pieces, rows_.args, routing_.pairs);
    const int64_t spare = rows_.isa.full_tiles ? routing_.active_count * kMostTileRows : 0;
    tiles_ = pieces.take<uint32_t>(tiles_count_ > 0, (routing_.pairs + spare) * rows_.tile_units);
  }

  void prepare(int64_t rows, const Parallel& parallel) const {
    if (rows_.needed()) each(rows, parallel, [&](int64_t row) { rows_.prepare(row); });
    if (gathered_ && beside_.any())
      each(routing_.pairs, parallel, [&](int64_t pair) { gather_beside(routing_.token[pair], pair); });
    if (tiles_count_ > 0) {
      const int64_t tasks = std::min(tiles_count_, kItemsPerThread * parallel.threads);
      parallel(tasks, [&](int64_t task) { interleave(part(tiles_count_, tasks, task)); });
    }
  }

  PreparedX of(int32_t expert) const {
    const int64_t first = routing_.first[expert], count = routing_.count(expert);
    const bool tiled = is_tiled(count);
    const BesideRows beside = beside_.from(first, rows_.args.layout.groups);
    const void* units = tiled ? static_cast<const void*>(tiles_of(expert))
                              : rows_.units_of(gathered_ ? 0 : first);
    return {static_cast<const char*>(units),
            tiled ? rows_.tile_units * 4 : rows_.row_bytes(),
            tiled,
            count,
            row_tiles(count),
            tiled && rows_.isa.full_tiles,
            gathered_ && !tiled ? routing_.token + first : nullptr,
            beside.sums,
            beside.offsets,
            beside.group_scales,
            beside.scales};
  }

  int64_t row_tiles(int64_t count) const {
    return ceil_div(count, is_tiled(count) ? rows_.isa.many_rows : rows_.isa.few_rows);
  }

 private:
  bool is_tiled(int64_t count) const { return count >= rows_.isa.many_from; }
  int64_t tiled_row_tiles(int32_t expert) const {
    const int64_t count = routing_.count(expert);
    return is_tiled(count) ? row_tiles(count) : 0;
  }

  /// An expert's tiles come after those of the ones before it, each of which may have room for a tile more than it has.
  uint32_t* tiles_of(int32_t expert) const {
    const int64_t spare = rows_.isa.full_tiles ? routing_.order[expert] * kMostTileRows : 0;
    return tiles_ + (routing_.first[expert] + spare) * rows_.tile_units;
  }

  template <class Body>
  void each(int64_t count, const Parallel& parallel, const Body& body) const {
    const int64_t tasks = count * rows_.row_units < kParallelUnits ? 1 : std::min(count, kItemsPerThread * parallel.threads);
    const auto run = [&](int64_t task) {
      const Range mine = part(count, tasks, task);
      for (int64_t i = mine.begin; i < mine.end; ++i) body(i);
    };
    if (tasks == 1)
      run(0);
    else
      parallel(tasks, run);
  }

  void gather_beside(int64_t row, int64_t pair) const {
    const int64_t groups = rows_.args.layout.groups;
    const BesideRows from = rows_.beside.from(row, groups), to = beside_.from(pair, groups);
    if (to.sums) std::copy_n(from.sums, groups, to.sums);
    if (to.offsets) std::copy_n(from.offsets, groups, to.offsets);
    if (to.group_scales) std::copy_n(from.group_scales, groups, to.group_scales);
    if (to.scales) *to.scales = *from.scales;
  }

  /// Tiles of rows, numbered through all experts that have them.
  void interleave(Range mine) const {
    int64_t before = 0;
    for (int64_t i = 0; i < routing_.active_count && before < mine.end; ++i) {
      const int32_t expert = routing_.active[i];
      const int64_t tiles = tiled_row_tiles(expert), first = routing_.first[expert], count = routing_.count(expert);
      for (int64_t t = std::max<int64_t>(0, mine.begin - before); t < std::min(tiles, mine.end - before); ++t) {
        const Range rows = row_tile(count, tiles, rows_.isa.full_tiles, t);
        const Unit* units[kMostTileRows];
        for (int64_t row = rows.begin; row < rows.end; ++row)
          units[row - rows.begin] = rows_.units_of(gathered_ ? routing_.token[first + row] : first + row);
        rows_.isa.interleave(rows_.args, units, rows.end - rows.begin, rows_.room(tiles, rows.end - rows.begin),
                             tiles_of(expert) + rows.begin * rows_.tile_units);
      }
      before += tiles;
    }
  }

  PreparedRows rows_;
  const Routing& routing_;
  BesideRows beside_;  // in the order of the pairs
  bool gathered_;
  int64_t tiles_count_ = 0;
  uint32_t* tiles_ = nullptr;
};

/// Row tiles of one expert, at most kBlockRowTiles at a time, times one block or less of channels: calls
/// use(block, first row, rows) with fp32 results [rows, kBlockChannels].
template <class Use>
void block_results(Gemm g, const GemmIsa& isa, const PreparedX& x, Range tiles, Range row_tiles, const Use& use) {
  alignas(64) float block[kBlockRows * kBlockChannels];
  g.y = block;
  g.y_channel = tiles.begin * kTileN;
  const int64_t most = x.full_tiles ? kBlockFullTiles : kBlockRowTiles;
  for (int64_t t = row_tiles.begin; t < row_tiles.end; t += most) {
    const int64_t end = std::min(t + most, row_tiles.end);
    g.y_row = row_tile(x.rows, x.row_tiles, x.full_tiles, t).begin;
    run_share(isa, g, x, {tiles, {t, end}});
    use(block, g.y_row, row_tile(x.rows, x.row_tiles, x.full_tiles, end - 1).end - g.y_row);
  }
}

/// h [pairs, intermediate] = activation of the first product. Shared out by cost, in the order of the weights, so that
/// a thread reads few long runs.
void run_gate_up(const Moe& a, const Gemm& all, const GemmIsa& isa, const ExpertRows& x, const Routing& routing,
                 const MoeIsa& blocks, DType h_dtype, char* h, const Parallel& parallel) {
  const int64_t tiles = all.layout.tiles(), n_blocks = ceil_div(tiles, kBlockTiles);
  const int64_t h_size = dtype_size(h_dtype), h_bytes = a.intermediate * h_size;
  const int64_t block_h = a.activation.gated() ? kBlockChannels / 2 : kBlockChannels;
  // Row cuts only where experts and blocks are too few for all threads.
  const int64_t wanted = ceil_div(kItemsPerThread * parallel.threads, n_blocks * routing.active_count);
  const auto cuts_of = [&](int32_t e) { return std::clamp<int64_t>(wanted, 1, x.row_tiles(routing.count(e))); };
  const auto cost_of = [&](int32_t e) { return ceil_div(routing.count(e), cuts_of(e)) + kReadRows; };
  int64_t total = 0;
  for (int64_t i = 0; i < routing.active_count; ++i) {
    const int32_t e = routing.active[i];
    total += n_blocks * cuts_of(e) * cost_of(e);
  }
  parallel(parallel.threads, [&](int64_t task) {
    const Range mine = part(total, parallel.threads, task);
    int64_t before = 0;
    for (int64_t i = 0; i < routing.active_count && before < mine.end; ++i) {
      const int32_t e = routing.active[i];
      const int64_t cuts = cuts_of(e), cost = cost_of(e), items = n_blocks * cuts;
      // An item belongs to the share in which it begins.
      const int64_t begin = before >= mine.begin ? 0 : std::min(items, ceil_div(mine.begin - before, cost));
      const int64_t end = std::min(items, ceil_div(mine.end - before, cost));
      before += items * cost;
      if (begin >= end) continue;
      const Gemm g = of_expert(all, a.w13, e);
      const PreparedX rows = x.of(e);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t b = item / cuts;
        const Range block{b * kBlockTiles, std::min((b + 1) * kBlockTiles, tiles)};
        const int64_t channel = b * block_h, count = std::min(block_h, a.intermediate - channel);
        block_results(g, isa, rows, block, part(rows.row_tiles, cuts, item % cuts),
                      [&](const float* results, int64_t row, int64_t n) {
                        char* to = h + (routing.first[e] + row) * h_bytes + channel * h_size;
                        blocks.activate(a.activation, results, n, block.end - block.begin, h_dtype, to, h_bytes, count);
                      });
      }
    }
  });
}

/// y = sum over a token's experts, ascending, of weight * second product. A thread owns channels.
void run_down(const Moe& a, const Gemm& all, const GemmIsa& isa, const ExpertRows& h, const Routing& routing,
              const MoeIsa& blocks, int64_t tokens, float* total, char* y, const Parallel& parallel) {
  const Layout& l = all.layout;
  const int64_t tiles = l.tiles(), stride = l.padded_n(), size = dtype_size(a.dtype);
  const int64_t tasks = std::min(tiles, parallel.threads);
  parallel(tasks, [&](int64_t task) {
    const Range mine = part(tiles, tasks, task);
    const int64_t first = mine.begin * kTileN, count = std::min(mine.end * kTileN, l.n) - first;
    const int64_t width = (mine.end - mine.begin) * kTileN;
    for (int64_t t = 0; t < tokens; ++t) std::fill_n(total + t * stride + first, width, 0.0f);
    for (int64_t i = 0; i < routing.active_count; ++i) {
      const int32_t e = routing.active[i];
      const Gemm g = of_expert(all, a.w2, e);
      const PreparedX rows = h.of(e);
      for (int64_t tile = mine.begin; tile < mine.end;) {
        const int64_t end = std::min((tile / kBlockTiles + 1) * kBlockTiles, mine.end);
        const int64_t channels = (end - tile) * kTileN;
        block_results(g, isa, rows, {tile, end}, {0, rows.row_tiles}, [&](const float* results, int64_t row, int64_t n) {
          const int64_t pair = routing.first[e] + row;
          blocks.accumulate(results, n, routing.token + pair, routing.weight + pair, total + tile * kTileN, stride,
                            channels);
        });
        tile = end;
      }
    }
    for (int64_t t = 0; t < tokens; ++t)
      blocks.store(total + t * stride + first, a.dtype, y + (t * l.n + first) * size, count);
  });
}

/// What h is until it is rounded for the second product.
DType h_dtype_of(const Moe& a) { return a.activations == Activations::kept ? a.dtype : DType::f32; }

void run_chunk(const Moe& a, Isa isa, int64_t begin, int64_t end, const Parallel& parallel) {
  const int64_t tokens = end - begin, size = dtype_size(a.dtype);
  const Routing routing(a, begin, end);
  const DType h_dtype = h_dtype_of(a);
  Pieces results(result_scratch);
  char* h = nullptr;
  float* total = nullptr;
  for (int pass = 0; pass < 2; ++pass) {
    h = results.take<char>(true, routing.pairs * a.intermediate * dtype_size(h_dtype));
    total = results.take<float>(true, tokens * a.w2.layout.padded_n());
    if (pass == 0) results.begin();
  }
  const Gemm gate_up = product(a, a.w13, a.dtype, static_cast<const char*>(a.x) + begin * a.x_stride * size, a.x_stride);
  const Gemm down = product(a, a.w2, h_dtype, h, a.intermediate);
  const GemmIsa &gate_up_isa = kernels(gate_up, isa), &down_isa = kernels(down, isa);
  const MoeIsa& blocks = block_isa(isa);
  ExpertRows x(gate_up, gate_up_isa, routing, true), rows_of_h(down, down_isa, routing, false);
  Pieces rows(row_scratch);
  for (int pass = 0; pass < 2; ++pass) {
    x.take(rows, tokens);
    rows_of_h.take(rows, routing.pairs);
    if (pass == 0) rows.begin();
  }
  if (routing.pairs > 0) {
    x.prepare(tokens, parallel);
    run_gate_up(a, gate_up, gate_up_isa, x, routing, blocks, h_dtype, h, parallel);
    rows_of_h.prepare(routing.pairs, parallel);
  }
  run_down(a, down, down_isa, rows_of_h, routing, blocks, tokens, total,
           static_cast<char*>(a.y) + begin * a.w2.layout.n * size, parallel);
}

/// Scratch memory for one token, at most: as much as Routing, ExpertRows and run_chunk take where all experts' rows are
/// in tiles. Fewer tokens at a time would read the weights more often.
int64_t token_bytes(const Moe& a, Isa isa) {
  const DType h_dtype = h_dtype_of(a);
  const Gemm gate_up = product(a, a.w13, a.dtype, a.x, a.x_stride), down = product(a, a.w2, h_dtype, nullptr, 0);
  const PreparedRows x(gate_up, kernels(gate_up, isa)), h(down, kernels(down, isa));
  const auto rows = [](const PreparedRows& p) { return p.convert ? p.row_units * 4 : 0; };
  const auto beside = [](const Layout& l) { return 12 * l.groups + 4; };
  const int64_t pair = x.tile_units * 4 + beside(a.w13.layout) + rows(h) + h.tile_units * 4 + beside(a.w2.layout) +
                       a.intermediate * dtype_size(h_dtype) + 8;
  return rows(x) + beside(a.w13.layout) + a.top_k * pair + a.w2.layout.padded_n() * 4;
}

}  // namespace

void moe(const Moe& args, Isa isa, const Parallel& parallel) {
  const int64_t most = std::max<int64_t>(1, kMoeScratchBytes / token_bytes(args, isa));
  const int64_t chunks = ceil_div(args.tokens, most);
  for (int64_t c = 0; c < chunks; ++c) {
    const Range tokens = part(args.tokens, chunks, c);
    run_chunk(args, isa, tokens.begin, tokens.end, parallel);
  }
}

}  // namespace turbo::cpu
