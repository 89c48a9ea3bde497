// SPDX-License-Identifier: Apache-2.0
// What a launch looks like, from sizes alone.
#include <algorithm>

#include "linear.h"
#include "tiles.h"
#include "tuning.h"

namespace turbo::cuda {
namespace {

// Slices shorter than this would spend their time on filling and draining the ring of stages.
constexpr int64_t kLeastSliceSlabs = 8;
constexpr int64_t kMostSlices = 16;
// Blocks of the smallest tiles that keep a multiprocessor busy: four warps each.
constexpr int64_t kBlocksPerMultiprocessor = 2;

// The cost model: rough cycles of a multiprocessor. Only their ratios count, and only between tiles of one device: products
// of a cycle, by the data sheets of A100 and H100, and bytes that L2 brings in one, how much of the shorter of the two
// the longer one hides (all but one in kHidden), what a block costs before its first product and after its last, and bytes
// that each sum of a slice goes to memory and back.
struct Rates {
  int64_t products, bytes;
};
constexpr Rates kMmaRates{1024, 48}, kWgmmaRates{2048, 40};
constexpr int64_t kHidden = 8, kBlockCycles = 1000, kSliceBytes = 8;

struct Shape {
  Family family;
  int channels, rows, threads, vectors;
};
template <class Tile>
constexpr Shape shape() {
  return {Tile::kFamily, Tile::kChannels, Tile::kRows, Tile::kThreads, Tile::kSlabs * Tile::kColumns};
}
#define TM_SHAPE(...) shape<TileShape<__VA_ARGS__>>(),
#define TM_SMALL_GROUP_SHAPE(...) shape<SmallGroupTile<TileShape<__VA_ARGS__>>::Shape>(),
constexpr Shape kShapes[2][kTileCount] = {{TM_TILES(TM_SHAPE)}, {TM_TILES(TM_SMALL_GROUP_SHAPE)}};
#undef TM_SHAPE
#undef TM_SMALL_GROUP_SHAPE

const Shape& shape_of(int tile, const Layout& layout) { return kShapes[layout.small_groups()][tile]; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t blocks_of(const Shape& shape, const Layout& layout, int64_t rows) {
  return ceil_div(layout.padded_n(), shape.channels) * ceil_div(rows, shape.rows);
}

bool runs_apart(const Shape& shape, const Layout& layout, int64_t rows, const SlicePlan& slices, int multiprocessors) {
  return slices.count > 1 && blocks_of(shape, layout, rows) < multiprocessors;
}

/// Of all products in tiles of one shape. Bytes are multiplied twice as fast as halves.
int64_t cycles(const Shape& shape, Scheme scheme, const Layout& layout, int64_t rows, const SlicePlan& slices,
               int multiprocessors) {
  const int x_bytes = scheme == Scheme::w4a16 ? 2 : 1;
  const bool apart = runs_apart(shape, layout, rows, slices, multiprocessors);
  const int64_t blocks = blocks_of(shape, layout, rows) * (apart ? slices.count : 1);
  const int64_t area = int64_t{shape.channels} * shape.rows;
  const Rates& rates = shape.family == Family::wgmma ? kWgmmaRates : kMmaRates;
  const int64_t multiply = area * kSlabK * x_bytes / 2 / rates.products;
  const int64_t bring = (shape.channels * layout.bits / 8 + shape.rows * x_bytes) * kSlabK / rates.bytes;
  const int64_t slab = std::max(multiply, bring) + std::min(multiply, bring) / kHidden;
  const int64_t block = (apart ? slices.slabs : layout.slabs()) * slab + kBlockCycles +
                        (slices.count > 1 ? area * kSliceBytes / rates.bytes : 0);
  return ceil_div(blocks, multiprocessors) * block;
}

}  // namespace

SlicePlan plan_slices(const Layout& layout, int multiprocessors) {
  const int64_t slabs = layout.slabs(), tiles = ceil_div(layout.padded_n(), kShapes[0][0].channels);
  int64_t count = std::max<int64_t>(multiprocessors * kBlocksPerMultiprocessor / tiles, 1);
  count = std::min({count, std::max<int64_t>(slabs / kLeastSliceSlabs, 1), kMostSlices});
  const int64_t whole = layout.groups > 1 && !layout.small_groups() ? layout.group_slabs() : 1;
  const int64_t length = ceil_div(ceil_div(slabs, count), whole) * whole;
  // Whole slices may be fewer: none is empty.
  return {static_cast<int>(ceil_div(slabs, length)), static_cast<int>(length)};
}

LinearPlan plan_linear(Scheme scheme, const Layout& layout, int64_t rows, const DeviceTraits& device) {
  const TileRange tiles = tiles_of(device.wgmma);
  const auto chosen = chosen_tile({scheme, layout.n, layout.k, layout.groups, 0}, rows);
  if (chosen && tiles.has(chosen->tile)) {
    const SlicePlan slices = plan_slices(layout, device.multiprocessors);
    const Shape& shape = shape_of(chosen->tile, layout);
    return {chosen->tile, slices, chosen->apart && runs_apart(shape, layout, rows, slices, device.multiprocessors)};
  }
  const int last = tiles.first + tiles.count - 1;
  LinearPlan plan{tiles.first, plan_slices(layout, device.multiprocessors), false};
  while (plan.tile < last && tile_rows(plan.tile) < rows) ++plan.tile;
  const auto cost = [&](int tile) {
    return cycles(shape_of(tile, layout), scheme, layout, rows, plan.slices, device.multiprocessors);
  };
  if (tile_rows(plan.tile) < rows)
    for (int tile = last - 1; tile >= tiles.first; --tile)
      if (cost(tile) < cost(plan.tile)) plan.tile = tile;
  plan.apart = runs_apart(shape_of(plan.tile, layout), layout, rows, plan.slices, device.multiprocessors);
  return plan;
}

int64_t code_bytes(int64_t rows, int64_t k) { return rows * Layout{1, k, 1}.slabs() * kSlabK; }

DeviceTraits device_traits(int multiprocessors, [[maybe_unused]] int major, [[maybe_unused]] int minor) {
#if defined(TM_CUDA_SM90A)
  return {multiprocessors, major == 9 && minor == 0};
#else
  return {multiprocessors, false};
#endif
}

int tile_count() { return kTileCount; }
TileRange tiles_of(bool wgmma) { return wgmma ? TileRange{kMmaTiles, kTileCount - kMmaTiles} : TileRange{0, kMmaTiles}; }
int tile_rows(int tile) { return kShapes[0][tile].rows; }
int tile_channels(int tile) { return kShapes[0][tile].channels; }

int64_t sums_bytes(const LinearPlan& plan, const Layout& layout, int64_t rows) {
  if (plan.slices.count == 1) return 0;
  const Shape& shape = shape_of(plan.tile, layout);
  return blocks_of(shape, layout, rows) * (plan.apart ? plan.slices.count : 1) * shape.vectors * shape.threads * 16;
}

int64_t arrived_words(const LinearPlan& plan, const Layout& layout, int64_t rows) {
  return plan.apart ? blocks_of(shape_of(plan.tile, layout), layout, rows) : 0;
}

}  // namespace turbo::cuda
