// SPDX-License-Identifier: Apache-2.0
// The products of experts of one dtype.
#pragma once

#include "experts.h"
#include "gemm_launch.h"

namespace turbo::cuda {

/// A product of experts: rows of `x`, picked by `sorted` unless nullptr, tiles of `tile_rows` rows of which there is
/// room for `tiles`.
struct ExpertsProduct {
  Linear linear;  // x, weights and y; no bias, rows and slices
  const int32_t* sorted;
  int top_k, tile, tiles, tile_rows;
  int channels;  // of y
  ExpertsFinish finish;
};

template <class Type>
Error launch_experts(const ExpertsProduct& product, Stream stream) {
  using Op = W4A16Experts<Type>;
  const Linear& a = product.linear;
  const LinearPlan plan{product.tile, {1, static_cast<int>(a.layout.slabs())}, false};
  GemmParams<Op> p = gemm_params<Op>(a, plan);
  p.rows = product.tiles * product.tile_rows;
  p.x = {rows16(a.x, a.x_stride, a.layout.k), product.sorted, product.top_k};
  p.y.n = product.channels;
  p.finish = product.finish;
  if (a.layout.small_groups()) return launch_gemm<Op, Groups::small>(p, plan, stream);
  return launch_gemm<Op, Groups::large>(p, plan, stream);
}

Error launch_experts_f16(const ExpertsProduct& product, Stream stream);
Error launch_experts_bf16(const ExpertsProduct& product, Stream stream);

}  // namespace turbo::cuda
