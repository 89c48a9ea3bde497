// SPDX-License-Identifier: Apache-2.0
// A layer of routed experts: rows by expert, two products, the sum over experts.
#include "moe.h"

#include <climits>

#include "experts_launch.h"
#include "quantize.h"
#include "routing.h"
#include "tuning.h"

namespace turbo::cuda {
namespace {

constexpr int64_t kMostTiles = 65535;  // of a grid's second axis

int64_t choices_of(const Moe& a) { return a.tokens * a.top_k; }
bool has_codes(const Moe& a) { return a.scheme != Scheme::w4a16; }
int64_t bits_of(const Moe& a) { return a.scheme == Scheme::w8a8 ? 8 : 4; }
int64_t slabs_of(int64_t k) { return Layout{1, k, 1}.slabs(); }

/// Tiles of rows that there can be: each expert with rows has at most one that is not full.
int64_t most_tiles(const Moe& a, int tile) {
  const int64_t choices = choices_of(a);
  return choices / tile_rows(tile) + (choices < a.experts ? choices : a.experts);
}

/// Rows of codes and their scales.
struct CodePieces {
  int8_t* codes;
  float* scale;
};

/// Where what kernels hand to each other lies in Moe::memory.
struct Pieces {
  int32_t *offsets, *sorted, *place;
  TileRows* tiles;
  uint16_t* h16 = nullptr;  // [rows, h_stride]; with codes h32
  float* h32 = nullptr;
  CodePieces x = {}, h = {};
  float* products;
  int64_t h_stride, bytes;

  Pieces(const Moe& a, int tile) : h_stride(slabs_of(a.intermediate) * kSlabK), bytes(0) {
    const int64_t choices = choices_of(a);
    take(a, offsets, a.experts + 1);
    take(a, sorted, choices);
    take(a, place, choices);
    take(a, tiles, most_tiles(a, tile));
    take(a, products, choices * a.hidden);
    if (!has_codes(a)) {
      take(a, h16, choices * h_stride);
      return;
    }
    take(a, h32, choices * h_stride);
    take(a, x, a.tokens, a.hidden);
    take(a, h, choices, a.intermediate);
  }

 private:
  template <class T>
  void take(const Moe& a, T*& piece, int64_t count) {
    piece = a.memory ? reinterpret_cast<T*>(static_cast<char*>(a.memory) + bytes) : nullptr;
    bytes += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
  }

  void take(const Moe& a, CodePieces& piece, int64_t rows, int64_t k) {
    take(a, piece.codes, code_bytes(rows, k));
    take(a, piece.scale, rows);
  }
};

std::string refusal(const Moe& a, const ExpertWeights& w, const char* name, int64_t n, int64_t k) {
  const int64_t bits = bits_of(a);
  std::string reason = w.layout.refusal();
  if (reason.empty() && has_codes(a)) reason = a8_refusal(w.layout, a.scale_type, false);
  if (!reason.empty()) return std::string(name) + ": " + reason;
  if (w.layout.bits != bits || w.layout.n != n || w.layout.k != k)
    return std::string(name) + ": " + std::to_string(w.layout.bits) + " bits [" + std::to_string(w.layout.n) + ", " +
           std::to_string(w.layout.k) + "]: expected " + std::to_string(bits) + " bits [" + std::to_string(n) + ", " +
           std::to_string(k) + "]";
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
  std::string reason = refusal(a, a.w13, "w13", a.activation.gated() ? 2 * half : a.intermediate, a.hidden);
  if (reason.empty()) reason = refusal(a, a.w2, "w2", a.hidden, a.intermediate);
  if (reason.empty() && a.w13.layout.padded_n() / kBlockChannels * a.experts > kMost) reason = "w13: too large";
  if (reason.empty() && reinterpret_cast<uintptr_t>(a.memory) % 256) reason = "memory: expected a multiple of 256 bytes";
  return reason;
}

auto launch_of(const Moe& a) {
  switch (a.scheme) {
    case Scheme::w4a8: return &launch_experts_w4a8;
    case Scheme::w8a8: return &launch_experts_w8a8;
    case Scheme::w4a16: break;
  }
  return a.dtype == DType::f16 ? &launch_experts_f16 : &launch_experts_bf16;
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
  out.scale_type = a.scale_type;
  return out;
}

Error sort_rows(const Moe& a, int tile, const Pieces& pieces, Stream stream) {
  const RoutingParams routing{a.topk_ids, a.wide_ids, a.expert_map, static_cast<int>(choices_of(a)),
                              static_cast<int>(a.experts), static_cast<int>(a.known), tile_rows(tile), pieces.offsets,
                              pieces.sorted, pieces.place, pieces.tiles, static_cast<int>(most_tiles(a, tile))};
  Error error = launch<SortChoices>({static_cast<unsigned>(a.experts), 1}, routing, stream);
  if (error.empty()) error = launch<CutTiles>({1, 1}, routing, stream);
  return error;
}

Error round_x(const Moe& a, const Pieces& pieces, Stream stream) {
  QuantizeX args{};
  args.dtype = a.dtype;
  args.rows = a.tokens;
  args.k = a.hidden;
  args.x = a.x;
  args.x_stride = a.x_stride;
  args.symmetric = true;
  args.codes = pieces.x.codes;
  args.scale = pieces.x.scale;
  return quantize_x(args, stream);
}

Error round_h(const Moe& a, const Pieces& pieces, Stream stream) {
  QuantizeParams<Values32> p{};
  p.slabs = static_cast<int>(slabs_of(a.intermediate));
  p.x = {pieces.h32, p.slabs, static_cast<int>(a.intermediate)};
  p.rows = pieces.offsets + a.experts;
  p.symmetric = true;
  p.codes = reinterpret_cast<Vec4*>(pieces.h.codes);
  p.scale = pieces.h.scale;
  return launch<Quantize<Values32>>({static_cast<unsigned>(choices_of(a)), 1}, p, stream);
}

/// h, of rows that are sorted by expert.
Error first_product(const Moe& a, int tile, const Pieces& pieces, Stream stream) {
  ExpertsProduct p = product(a, a.w13, tile, pieces);
  p.sorted = pieces.sorted;
  p.top_k = static_cast<int>(a.top_k);
  p.channels = static_cast<int>(a.intermediate);
  p.linear.x = has_codes(a) ? pieces.x.codes : a.x;
  p.linear.x_stride = a.x_stride;
  p.x_scale = pieces.x.scale;
  p.linear.y = pieces.h16;
  p.linear.y_stride = pieces.h_stride;
  p.h32 = {pieces.h32, pieces.h_stride};
  return launch_of(a)(p, stream);
}

Error second_product(const Moe& a, int tile, const Pieces& pieces, Stream stream) {
  ExpertsProduct p = product(a, a.w2, tile, pieces);
  p.linear.x = has_codes(a) ? static_cast<const void*>(pieces.h.codes) : pieces.h16;
  p.linear.x_stride = pieces.h_stride;
  p.x_scale = pieces.h.scale;
  p.finish.products = pieces.products;
  p.finish.n = static_cast<int>(a.hidden);
  return launch_of(a)(p, stream);
}

Error combine(const Moe& a, const Pieces& pieces, Stream stream) {
  const CombineParams params{pieces.products, a.topk_weights, pieces.place, static_cast<int>(a.top_k),
                             static_cast<int>(a.hidden), {a.dtype == DType::bf16}, static_cast<uint16_t*>(a.y)};
  return launch<Combine>({static_cast<unsigned>(a.tokens), 1}, params, stream);
}

}  // namespace

int plan_moe_tile(const Moe& args, bool wgmma) {
  const TileRange tiles = tiles_of(wgmma);
  const Layout& w13 = args.w13.layout;
  const int64_t rows = args.tokens * args.top_k;
  const auto chosen = chosen_tile({args.scheme, w13.n, w13.k, w13.groups, args.experts}, rows);
  if (chosen && tiles.has(chosen->tile)) return chosen->tile;
  int tile = tiles.first;
  while (tiles.has(tile + 1) && tile_rows(tile) * args.experts < rows) ++tile;
  return tile;
}

int64_t moe_bytes(const Moe& args, int tile) { return Pieces(args, tile).bytes; }

std::string moe(const Moe& args, int tile, void* on) {
  if (args.tokens == 0) return {};
  if (const std::string reason = refusal(args, tile); !reason.empty()) return "moe: " + reason;
  const auto stream = static_cast<Stream>(on);
  const Pieces pieces(args, tile);
  const bool codes = has_codes(args);
  Error error = sort_rows(args, tile, pieces, stream);
  if (error.empty() && codes) error = round_x(args, pieces, stream);
  if (error.empty()) error = first_product(args, tile, pieces, stream);
  if (error.empty() && codes) error = round_h(args, pieces, stream);
  if (error.empty()) error = second_product(args, tile, pieces, stream);
  if (error.empty()) error = combine(args, pieces, stream);
  return error;
}

}  // namespace turbo::cuda
