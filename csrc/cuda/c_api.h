// SPDX-License-Identifier: Apache-2.0
// The backend behind C functions, for callers without C++: the tests, scripts on a machine with a GPU and no torch.
// Functions that can fail write why, a terminated string, to `error` and return 1; 0 is success. Structs are those of
// linear.h and moe.h, whose members have C's layout.
#pragma once

#include <cstddef>
#include <cstdint>

#include "linear.h"
#include "moe.h"

extern "C" {

#define TM_EXPORT __attribute__((visibility("default")))

/// The tensors of tm_cuda_pack_weights and their sizes. codes: int32 words of `bits` bits [n, ceil(k * bits / 32)], or,
/// with bits 0, int8 [n, k], the only ones of a layout of 8 bits; scale [n, groups] of scale_bytes, 2 or 4, each;
/// zero_point int32 [ceil(n * bits / 32), groups] or nullptr. gate_up: 0, or I, the rows then being I gates and I ups of
/// a gated expert and layout.n = 2 * (I up to a multiple of 16). sums_out: of 8 bits, else nullptr. Host memory.
struct tm_cuda_pack {
  turbo::cuda::Layout layout;
  int64_t bits;
  int64_t scale_bytes;
  int64_t gate_up;
  const void* codes;
  const void* scale;
  const void* zero_point;
  void* weight_out;
  void* scale_out;
  void* zero_out;
  void* sums_out;
};

/// Sizes of what pack writes: dwords of weights, scales, dwords of zero points.
TM_EXPORT int tm_cuda_pack_sizes(const turbo::cuda::Layout* layout, int64_t* weight_dwords, int64_t* scales,
                                 int64_t* zero_dwords, char* error, size_t error_bytes);
TM_EXPORT int tm_cuda_pack_weights(const tm_cuda_pack* args, char* error, size_t error_bytes);

/// Whether a device of compute capability major.minor runs tiles with wgmma here.
TM_EXPORT int tm_cuda_has_wgmma(int major, int minor);
TM_EXPORT int tm_cuda_tile_count();
/// The first tile of a device with or without wgmma, and how many it has.
TM_EXPORT void tm_cuda_tiles_of(int wgmma, int* first, int* count);
TM_EXPORT int tm_cuda_tile_rows(int tile);
TM_EXPORT int tm_cuda_tile_channels(int tile);
TM_EXPORT void tm_cuda_plan_linear(turbo::cuda::Scheme scheme, const turbo::cuda::Layout* layout, int64_t rows,
                                   int multiprocessors, int wgmma, turbo::cuda::LinearPlan* plan);
TM_EXPORT int64_t tm_cuda_sums_bytes(const turbo::cuda::LinearPlan* plan, const turbo::cuda::Layout* layout,
                                     int64_t rows);
TM_EXPORT int64_t tm_cuda_arrived_words(const turbo::cuda::LinearPlan* plan, const turbo::cuda::Layout* layout,
                                        int64_t rows);
TM_EXPORT int tm_cuda_w4a16_linear(const turbo::cuda::Linear* args, const turbo::cuda::LinearPlan* plan, void* stream,
                                   char* error, size_t error_bytes);
/// Bytes of the codes of x [rows, k].
TM_EXPORT int64_t tm_cuda_code_bytes(int64_t rows, int64_t k);
TM_EXPORT int tm_cuda_quantize_x(const turbo::cuda::QuantizeX* args, void* stream, char* error, size_t error_bytes);
TM_EXPORT int tm_cuda_a8_linear(const turbo::cuda::LinearA8* args, const turbo::cuda::LinearPlan* plan, void* stream,
                                char* error, size_t error_bytes);
TM_EXPORT int tm_cuda_plan_moe_tile(const turbo::cuda::Moe* args, int wgmma);
TM_EXPORT int64_t tm_cuda_moe_bytes(const turbo::cuda::Moe* args, int tile);
TM_EXPORT int tm_cuda_moe(const turbo::cuda::Moe* args, int tile, void* stream, char* error, size_t error_bytes);


/// tuning.h, in numbers. product: scheme, n, k, groups, experts; choices [count][3]: rows, tile, apart.
TM_EXPORT void tm_cuda_choose_tiles(const int64_t* product, const int64_t* choices, int64_t count);
/// A negative tile ends it.
TM_EXPORT void tm_cuda_force_tile(int tile, int apart);
/// 1, and the product of this thread's last plan, if there was one since the last call.
TM_EXPORT int tm_cuda_take_product(int64_t* product);

}  // extern "C"
