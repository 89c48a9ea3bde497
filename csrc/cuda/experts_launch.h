// SPDX-License-Identifier: Apache-2.0
// The products of experts, for one translation unit each.
#pragma once

#include "a8_launch.h"
#include "experts.h"

namespace turbo::cuda {

/// A product of experts: rows of `x`, picked by `sorted` unless nullptr, tiles of `tile_rows` rows of which there is
/// room for `tiles`. With codes x are those, x_scale [rows of x] their scales, and h goes to h32 instead of y.
struct ExpertsProduct {
  Linear linear;  // x, weights and y; no bias, rows and slices
  const int32_t* sorted;
  int top_k, tile, tiles, tile_rows;
  int channels;  // of h
  ExpertsFinish finish;
  const float* x_scale;
  ScaleType scale_type;
  Rows32OfH h32;

  LinearPlan plan() const { return {tile, {1, static_cast<int>(linear.layout.slabs())}, false}; }
};

template <class Op>
GemmParams<Op> experts_params(const ExpertsProduct& product) {
  GemmParams<Op> p = gemm_params<Op>(product.linear, product.plan());
  p.rows = product.tiles * product.tile_rows;
  p.y.n = product.channels;
  return p;
}

template <class Type>
Error launch_experts(const ExpertsProduct& product, Stream stream) {
  using Op = W4A16Experts<Type>;
  const Linear& a = product.linear;
  GemmParams<Op> p = experts_params<Op>(product);
  p.x = {rows16(a.x, a.x_stride, a.layout.k), product.sorted, product.top_k};
  p.finish = product.finish;
  if (a.layout.small_groups()) return launch_gemm<Op, Groups::small>(p, product.plan(), stream);
  return launch_gemm<Op, Groups::large>(p, product.plan(), stream);
}

template <int Bits>
GemmParams<A8Experts<Bits>> a8_experts_params(const ExpertsProduct& product) {
  GemmParams<A8Experts<Bits>> p = experts_params<A8Experts<Bits>>(product);
  p.x = {{static_cast<const Vec4*>(product.linear.x), p.slabs}, product.sorted, product.top_k};
  p.finish.a8 = {product.x_scale, nullptr, product.linear.scale, nullptr, product.scale_type, {}};
  p.finish.experts = product.finish;
  p.finish.h = product.h32;
  return p;
}

Error launch_experts_f16(const ExpertsProduct& product, Stream stream);
Error launch_experts_bf16(const ExpertsProduct& product, Stream stream);
Error launch_experts_w4a8(const ExpertsProduct& product, Stream stream);
Error launch_experts_w8a8(const ExpertsProduct& product, Stream stream);

}  // namespace turbo::cuda
