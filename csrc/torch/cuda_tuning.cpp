// SPDX-License-Identifier: Apache-2.0
// Bindings of measured choices of tiles, which exist where the CUDA kernels do. Their tensors are int64 on the CPU.
#include "cuda_binding.h"

#include "../cuda/tuning.h"

namespace {

using namespace turbo::binding;
namespace cuda = turbo::cuda;

constexpr int64_t kProductNumbers = 5, kChoiceNumbers = 3, kTileNumbers = 4;

void check_numbers(const char* op, const char* name, const Tensor& t, int64_t columns, int64_t dimensions) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Long && t.is_contiguous() && t.dim() == dimensions &&
                      t.size(dimensions - 1) == columns,
                  op, ": argument '", name, "': expected int64 on the CPU with ", columns, " columns, given ",
                  text(t.sizes()));
}

/// Writes index, family (0: mma.sync, 1: wgmma), channels and rows of each tile of a device; how many there are.
int64_t cuda_tiles(int64_t device, Tensor out) {
  constexpr const char* kOp = "cuda_tiles";
  check_numbers(kOp, "out", out, kTileNumbers, 2);
  const bool wgmma = device_traits(kOp, static_cast<int32_t>(device)).wgmma;
  const cuda::TileRange tiles = cuda::tiles_of(wgmma);
  STD_TORCH_CHECK(out.size(0) >= tiles.count, kOp, ": argument 'out': expected at least ", tiles.count, " rows, given ",
                  out.size(0));
  auto* numbers = static_cast<int64_t*>(out.data_ptr());
  for (int tile = tiles.first; tiles.has(tile); ++tile, numbers += kTileNumbers) {
    numbers[0] = tile;
    numbers[1] = wgmma;
    numbers[2] = cuda::tile_channels(tile);
    numbers[3] = cuda::tile_rows(tile);
  }
  return tiles.count;
}

void cuda_choose_tiles(Tensor product, Tensor choices) {
  constexpr const char* kOp = "cuda_choose_tiles";
  check_numbers(kOp, "product", product, kProductNumbers, 1);
  check_numbers(kOp, "choices", choices, kChoiceNumbers, 2);
  const auto* numbers = static_cast<const int64_t*>(choices.const_data_ptr());
  for (int64_t i = 0; i < choices.size(0); ++i)
    STD_TORCH_CHECK(numbers[kChoiceNumbers * i + 1] >= 0 && numbers[kChoiceNumbers * i + 1] < cuda::tile_count(), kOp,
                    ": tile ", numbers[kChoiceNumbers * i + 1], ": expected 0 to ", cuda::tile_count() - 1);
  cuda::choose_tiles(cuda::product_of(static_cast<const int64_t*>(product.const_data_ptr())),
                     cuda::choices_of(numbers, choices.size(0)));
}

void cuda_force_tile(int64_t tile, bool apart) {
  STD_TORCH_CHECK(tile < cuda::tile_count(), "cuda_force_tile: tile ", tile, ": expected at most ",
                  cuda::tile_count() - 1, ", or less than 0 for none");
  if (tile < 0)
    cuda::force_tile({});
  else
    cuda::force_tile(cuda::TileChoice{0, static_cast<int>(tile), apart});
}

bool cuda_take_product(Tensor out) {
  check_numbers("cuda_take_product", "out", out, kProductNumbers, 1);
  const auto last = cuda::take_product();
  if (last) cuda::write_product(*last, static_cast<int64_t*>(out.data_ptr()));
  return last.has_value();
}

void cuda_pass_counters(bool pass) { pass_arrived_counters(pass); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_plugin_tm, m) {
  m.def("cuda_tiles(int device, Tensor(a!) out) -> int");
  m.def("cuda_choose_tiles(Tensor product, Tensor choices) -> ()");
  m.def("cuda_force_tile(int tile, bool apart) -> ()");
  m.def("cuda_take_product(Tensor(a!) out) -> bool");
  m.def("cuda_pass_counters(bool pass) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_plugin_tm, CompositeExplicitAutograd, m) {
  m.impl("cuda_tiles", TORCH_BOX(&cuda_tiles));
  m.impl("cuda_choose_tiles", TORCH_BOX(&cuda_choose_tiles));
  m.impl("cuda_force_tile", TORCH_BOX(&cuda_force_tile));
  m.impl("cuda_take_product", TORCH_BOX(&cuda_take_product));
  m.impl("cuda_pass_counters", TORCH_BOX(&cuda_pass_counters));
}
