// SPDX-License-Identifier: Apache-2.0
// The W4A16 kernels of one dtype.
#pragma once

#include "gemm_launch.h"
#include "w4a16.h"

namespace turbo::cuda {

template <class Type>
Error launch_w4a16(const Linear& args, const LinearPlan& plan, Stream stream) {
  using Op = W4A16<Type>;
  GemmParams<Op> p = gemm_params<Op>(args, plan);
  p.x = rows16(args.x, args.x_stride, args.layout.k);
  if (args.layout.small_groups()) return launch_gemm<Op, Groups::small>(p, plan, stream);
  return launch_gemm<Op, Groups::large>(p, plan, stream);
}

}  // namespace turbo::cuda
