// SPDX-License-Identifier: Apache-2.0
#include "tuning.h"

#include <map>
#include <mutex>
#include <utility>

namespace turbo::cuda {
namespace {

struct Tuning {
  std::mutex mutex;
  std::map<decltype(Product{}.key()), std::vector<TileChoice>> choices;
  std::optional<TileChoice> forced;
};

Tuning& tuning() {
  static Tuning all;
  return all;
}

thread_local std::optional<Product> planned;

}  // namespace

Product product_of(const int64_t* numbers) {
  return {static_cast<Scheme>(numbers[0]), numbers[1], numbers[2], numbers[3], numbers[4]};
}

void write_product(const Product& product, int64_t* numbers) {
  numbers[0] = static_cast<int64_t>(product.scheme);
  numbers[1] = product.n;
  numbers[2] = product.k;
  numbers[3] = product.groups;
  numbers[4] = product.experts;
}

std::vector<TileChoice> choices_of(const int64_t* numbers, int64_t count) {
  std::vector<TileChoice> out;
  for (; count > 0; --count, numbers += 3) out.push_back({numbers[0], static_cast<int>(numbers[1]), numbers[2] != 0});
  return out;
}

void choose_tiles(const Product& product, std::vector<TileChoice> choices) {
  const std::lock_guard lock(tuning().mutex);
  tuning().choices[product.key()] = std::move(choices);
}

void force_tile(std::optional<TileChoice> choice) {
  const std::lock_guard lock(tuning().mutex);
  tuning().forced = choice;
}

std::optional<TileChoice> chosen_tile(const Product& product, int64_t rows) {
  planned = product;
  const std::lock_guard lock(tuning().mutex);
  if (tuning().forced) return tuning().forced;
  const auto found = tuning().choices.find(product.key());
  if (found == tuning().choices.end()) return {};
  for (const TileChoice& choice : found->second)
    if (rows <= choice.rows) return choice;
  return {};
}

std::optional<Product> take_product() { return std::exchange(planned, std::nullopt); }

}  // namespace turbo::cuda
