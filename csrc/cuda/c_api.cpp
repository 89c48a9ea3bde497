// SPDX-License-Identifier: Apache-2.0
#include "c_api.h"

#include <cstring>

#include "pack.h"
#include "tuning.h"

namespace {

using namespace turbo;

int report(const std::string& what, char* error, size_t error_bytes) {
  if (what.empty()) return 0;
  if (error_bytes) {
    const size_t length = what.size() < error_bytes - 1 ? what.size() : error_bytes - 1;
    std::memcpy(error, what.data(), length);
    error[length] = 0;
  }
  return 1;
}

/// One task after the other, on the caller's thread.
constexpr cpu::Parallel kAlone{[](int64_t tasks, cpu::Parallel::Body body, void* context) {
                                 for (int64_t task = 0; task < tasks; ++task) body(task, context);
                               },
                               1};

}  // namespace

int tm_cuda_pack_sizes(const cuda::Layout* layout, int64_t* weight_dwords, int64_t* scales, int64_t* zero_dwords,
                       char* error, size_t error_bytes) {
  const std::string reason = layout->refusal();
  if (!reason.empty()) return report("pack: " + reason, error, error_bytes);
  *weight_dwords = layout->weight_dwords();
  *scales = layout->scales();
  *zero_dwords = layout->zero_dwords();
  return 0;
}

int tm_cuda_pack_weights(const tm_cuda_pack* args, char* error, size_t error_bytes) {
  const cuda::Layout& l = args->layout;
  std::string reason = l.refusal();
  if (reason.empty() && args->bits != 0 && (l.bits == 8 || args->bits < 2 || args->bits > 4))
    reason = std::to_string(args->bits) + " bits: expected " + (l.bits == 8 ? "" : "2 to 4, or ") + "0 for bytes";
  if (reason.empty() && args->bits == 0 && args->zero_point) reason = "codes of bytes have no zero points";
  if (reason.empty() && args->scale_bytes != 2 && args->scale_bytes != 4)
    reason = "scales of " + std::to_string(args->scale_bytes) + " bytes: expected 2 or 4";
  if (!reason.empty()) return report("pack: " + reason, error, error_bytes);
  cpu::Pack pack{};
  pack.layout = {l.n, l.k, l.groups, l.bits};
  pack.code_bits = args->bits ? args->bits : l.bits;
  pack.packed = args->bits ? static_cast<const uint32_t*>(args->codes) : nullptr;
  pack.bytes = args->bits ? nullptr : static_cast<const int8_t*>(args->codes);
  pack.codes_stride = args->bits ? (l.k * args->bits + 31) / 32 : l.k;
  pack.scale = args->scale;
  pack.scale_stride = l.groups;
  pack.scale_size = args->scale_bytes;
  pack.gate_up = args->gate_up;
  pack.zero_point = static_cast<const uint32_t*>(args->zero_point);
  pack.zero_point_stride = l.groups;
  pack.weight_out = static_cast<uint32_t*>(args->weight_out);
  pack.scale_out = args->scale_out;
  pack.zero_out = static_cast<uint32_t*>(args->zero_out);
  pack.sums_out = static_cast<int32_t*>(args->sums_out);
  cuda::pack(pack, kAlone);
  return 0;
}

int tm_cuda_has_wgmma(int major, int minor) { return cuda::device_traits(1, major, minor).wgmma; }
int tm_cuda_tile_count() { return cuda::tile_count(); }
void tm_cuda_tiles_of(int wgmma, int* first, int* count) {
  const cuda::TileRange tiles = cuda::tiles_of(wgmma);
  *first = tiles.first;
  *count = tiles.count;
}
int tm_cuda_tile_rows(int tile) { return cuda::tile_rows(tile); }

int tm_cuda_tile_channels(int tile) { return cuda::tile_channels(tile); }

void tm_cuda_plan_linear(cuda::Scheme scheme, const cuda::Layout* layout, int64_t rows, int multiprocessors, int wgmma,
                         cuda::LinearPlan* plan) {
  *plan = cuda::plan_linear(scheme, *layout, rows, {multiprocessors, wgmma != 0});
}
int64_t tm_cuda_sums_bytes(const cuda::LinearPlan* plan, const cuda::Layout* layout, int64_t rows) {
  return cuda::sums_bytes(*plan, *layout, rows);
}
int64_t tm_cuda_arrived_words(const cuda::LinearPlan* plan, const cuda::Layout* layout, int64_t rows) {
  return cuda::arrived_words(*plan, *layout, rows);
}

int tm_cuda_w4a16_linear(const cuda::Linear* args, const cuda::LinearPlan* plan, void* stream, char* error,
                         size_t error_bytes) {
  return report(cuda::w4a16_linear(*args, *plan, stream), error, error_bytes);
}

int64_t tm_cuda_code_bytes(int64_t rows, int64_t k) { return cuda::code_bytes(rows, k); }
int tm_cuda_quantize_x(const cuda::QuantizeX* args, void* stream, char* error, size_t error_bytes) {
  return report(cuda::quantize_x(*args, stream), error, error_bytes);
}
int tm_cuda_a8_linear(const cuda::LinearA8* args, const cuda::LinearPlan* plan, void* stream, char* error,
                      size_t error_bytes) {
  return report(cuda::a8_linear(*args, *plan, stream), error, error_bytes);
}

int tm_cuda_plan_moe_tile(const cuda::Moe* args, int wgmma) {
  return cuda::plan_moe_tile(*args, wgmma != 0);
}
int64_t tm_cuda_moe_bytes(const cuda::Moe* args, int tile) { return cuda::moe_bytes(*args, tile); }
int tm_cuda_moe(const cuda::Moe* args, int tile, void* stream, char* error, size_t error_bytes) {
  return report(cuda::moe(*args, tile, stream), error, error_bytes);
}

void tm_cuda_choose_tiles(const int64_t* product, const int64_t* choices, int64_t count) {
  cuda::choose_tiles(cuda::product_of(product), cuda::choices_of(choices, count));
}
void tm_cuda_force_tile(int tile, int apart) {
  cuda::force_tile(tile < 0 ? std::optional<cuda::TileChoice>() : cuda::TileChoice{0, tile, apart != 0});
}
int tm_cuda_take_product(int64_t* product) {
  const auto last = cuda::take_product();
  if (last) cuda::write_product(*last, product);
  return last.has_value();
}
