// SPDX-License-Identifier: Apache-2.0
// A layer of routed experts: rows by expert, two products, the sum over experts.
#include "moe.h"

#include <climits>

#include "experts_launch.h"
#include "routing.h"

namespace turbo::cuda {
namespace {

constexpr int64_t kMostTiles = 65535;  // of a grid's second axis

int64_t choices_of(const Moe& a) { return a.tokens * a.top_k; }

/// Tiles of rows that there can be: each expert with rows has at most one that is not full.
int64_t most_tiles(const Moe& a, int tile) {
  const int64_t choices = choices_of(a);
  return choices / tile_rows(tile) + (choices < a.experts ? choices : a.experts);
}

/// Where what kernels hand to each other lies in Moe::memory.
struct Pieces {
  int32_t *offsets, *sorted, *place;
  TileRows* tiles;
  uint16_t* h;  // [rows, h_stride]
  float* products;
  int64_t h_stride, bytes;

  Pieces(const Moe& a, int tile) : h_stride(Layout{1, a.intermediate, 1}.slabs() * kSlabK), bytes(0) {
    const int64_t choices = choices_of(a);
    take(a, offsets, a.experts + 1);
    take(a, sorted, choices);
    take(a, place, choices);
    take(a, tiles, most_tiles(a, tile));
    take(a, h, choices * h_stride);
    take(a, products, choices * a.hidden);
  }

 private:
  template <class T>
  void take(const Moe& a, T*& piece, int64_t count) {
    piece = a.memory ? reinterpret_cast<T*>(static_cast<char*>(a.memory) + bytes) : nullptr;
    bytes += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
  }
};

std::string refusal(const ExpertWeights& w, const char* name, int64_t n, int64_t k) {
  const std::string reason = w.layout.refusal();
  if (!reason.empty()) return std::string(name) + ": " + reason;
  if (w.layout.bits != 4 || w.layout.n != n || w.layout.k != k)
    return std::string(name) + ": " + std::to_string(w.layout.bits) + " bits [" + std::to_string(w.layout.n) + ", " +
           std::to_string(w.layout.k) + "]: expected 4 bits [" + std::to_string(n) + ", " + std::to_string(k) + "]";
  for (const void* pointer : {w.weight, w.scale, w.zero})
    if (reinterpret_cast<uintptr_t>(pointer) % 16) return std::string(name) + ": expected multiples of 16 bytes";
  return {};
}

std::string refusal(const Moe& a, int tile) {
  constexpr int64_t kMost = INT_MAX - 65536;  // with room for a tile's padding
  if (tile < 0 || tile >= tile_count())
    return "tile " + std::to_string(tile) + ": expected 0 to " + std::to_string(tile_count() - 1);
  if (a.top_k < 1 || a.top_k > Combine::kMostChoices)
    return "top_k " + std::to_string(a.top_k) + ": expected 1 to " + std::to_string(Combine::kMostChoices);
  if (a.experts < 1 || a.known < 1 || a.experts > kMost || a.known > kMost || choices_of(a) > kMost)
    return "experts and choices: expected 1 to " + std::to_string(kMost);
  if (most_tiles(a, tile) > kMostTiles)
    return std::to_string(choices_of(a)) + " choices: too many for tiles of " + std::to_string(tile_rows(tile)) + " rows";
  const int64_t half = (a.intermediate + kSlabChannels - 1) / kSlabChannels * kSlabChannels;
  std::string reason = refusal(a.w13, "w13", a.activation.gated() ? 2 * half : a.intermediate, a.hidden);
  if (reason.empty()) reason = refusal(a.w2, "w2", a.hidden, a.intermediate);
  if (reason.empty() && a.w13.layout.padded_n() / kBlockChannels * a.experts > kMost) reason = "w13: too large";
  if (reason.empty() && reinterpret_cast<uintptr_t>(a.memory) % 256) reason = "memory: expected a multiple of 256 bytes";
  return reason;
}

ExpertsProduct product(const Moe& a, const ExpertWeights& w, int tile, const Pieces& pieces) {
  ExpertsProduct out{};
  out.linear.layout = w.layout;
  out.linear.dtype = a.dtype;
  out.linear.weight = w.weight;
  out.linear.scale = w.scale;
  out.linear.zero = w.zero;
  out.tile = tile;
  out.tiles = static_cast<int>(most_tiles(a, tile));
  out.tile_rows = tile_rows(tile);
  out.finish.tiles = pieces.tiles;
  out.finish.bias = w.bias;
  out.finish.activation = a.activation;
  out.finish.gated = a.activation.gated();
  return out;
}

}  // namespace

int plan_moe_tile(int64_t tokens, int64_t top_k, int64_t experts) {
  int tile = 0;
  while (tile < tile_count() - 1 && tile_rows(tile) * experts < tokens * top_k) ++tile;
  return tile;
}

int64_t moe_bytes(const Moe& args, int tile) { return Pieces(args, tile).bytes; }

std::string w4a16_moe(const Moe& args, int tile, void* on) {
  if (args.tokens == 0) return {};
  if (const std::string reason = refusal(args, tile); !reason.empty()) return "w4a16_moe: " + reason;
  const auto stream = static_cast<Stream>(on);
  const Pieces pieces(args, tile);
  const auto experts = static_cast<unsigned>(args.experts);
  const RoutingParams routing{args.topk_ids, args.wide_ids, args.expert_map, static_cast<int>(choices_of(args)),
                              static_cast<int>(args.experts), static_cast<int>(args.known), tile_rows(tile),
                              pieces.offsets, pieces.sorted, pieces.place, pieces.tiles,
                              static_cast<int>(most_tiles(args, tile))};
  Error error = launch<SortChoices>({experts, 1}, routing, stream);
  if (error.empty()) error = launch<CutTiles>({1, 1}, routing, stream);

  const auto launch_product = args.dtype == DType::f16 ? &launch_experts_f16 : &launch_experts_bf16;
  ExpertsProduct first = product(args, args.w13, tile, pieces);
  first.linear.x = args.x;
  first.linear.x_stride = args.x_stride;
  first.sorted = pieces.sorted;
  first.top_k = static_cast<int>(args.top_k);
  first.channels = static_cast<int>(args.intermediate);
  first.linear.y = pieces.h;
  first.linear.y_stride = pieces.h_stride;
  if (error.empty()) error = launch_product(first, stream);

  ExpertsProduct second = product(args, args.w2, tile, pieces);
  second.linear.x = pieces.h;
  second.linear.x_stride = pieces.h_stride;
  second.finish.products = pieces.products;
  second.finish.n = static_cast<int>(args.hidden);
  if (error.empty()) error = launch_product(second, stream);

  const CombineParams combine{pieces.products, args.topk_weights, pieces.place, static_cast<int>(args.top_k),
                              static_cast<int>(args.hidden), {args.dtype == DType::bf16},
                              static_cast<uint16_t*>(args.y)};
  if (error.empty()) error = launch<Combine>({static_cast<unsigned>(args.tokens), 1}, combine, stream);
  return error;
}

}  // namespace turbo::cuda
