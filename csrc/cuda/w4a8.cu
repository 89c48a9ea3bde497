// SPDX-License-Identifier: Apache-2.0
// The W4A8 kernels.
#include "a8_launch.h"

namespace turbo::cuda {

Error launch_w4a8(const LinearA8& args, const LinearPlan& plan, Stream stream) {
  const GemmParams<A8<4>> p = a8_params<4>(args, plan);
  const Layout& l = args.linear.layout;
  if (l.groups == 1) return launch_gemm<A8<4>, Groups::one>(p, plan, stream);
  if (l.small_groups()) return launch_gemm<A8<4>, Groups::small>(p, plan, stream);
  return launch_gemm<A8<4>, Groups::large>(p, plan, stream);
}

}  // namespace turbo::cuda
