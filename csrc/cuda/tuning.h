// SPDX-License-Identifier: Apache-2.0
// Measured choices of tiles, which plans take instead of what they would reckon. They change no bit of a result: tiles
// of a device have the same, and slices are no part of a choice. Any thread may call any of these.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "linear.h"

namespace turbo::cuda {

/// What a plan is for: a linear layer, or with experts > 0 those, by their first product.
struct Product {
  Scheme scheme;
  int64_t n, k, groups, experts;

  auto key() const { return std::tuple(static_cast<int>(scheme), n, k, groups, experts); }
};

/// For up to so many rows (of experts: tokens times choices): a tile, and whether slices may run apart where there are
/// several and the device has blocks to spare.
struct TileChoice {
  int64_t rows;
  int tile;
  bool apart;
};

/// In numbers, for callers without these structs: scheme, n, k, groups, experts; rows, tile, apart of each choice.
Product product_of(const int64_t* numbers);
void write_product(const Product& product, int64_t* numbers);
std::vector<TileChoice> choices_of(const int64_t* numbers, int64_t count);

/// Replaces the product's choices; their rows ascend, and beyond the last plans reckon.
void choose_tiles(const Product& product, std::vector<TileChoice> choices);

/// All plans take this tile until the next call; none: as chosen.
void force_tile(std::optional<TileChoice> choice);

/// What is forced, or chosen for a product; notes the product.
std::optional<TileChoice> chosen_tile(const Product& product, int64_t rows);

/// The product of this thread's last plan since the last call.
std::optional<Product> take_product();

}  // namespace turbo::cuda
