// SPDX-License-Identifier: Apache-2.0
// The parameters of the kernels with int8 activations.
#pragma once

#include "a8.h"
#include "gemm_launch.h"

namespace turbo::cuda {

template <int Bits>
GemmParams<A8<Bits>> a8_params(const LinearA8& args, const LinearPlan& plan) {
  const Linear& a = args.linear;
  GemmParams<A8<Bits>> p = gemm_params<A8<Bits>>(a, plan);
  p.x = {static_cast<const Vec4*>(a.x), p.slabs};
  p.finish = {args.x_scale, args.x_zero, a.scale, args.weight_sum, args.scale_type, {a.dtype == DType::bf16}};
  return p;
}

}  // namespace turbo::cuda
