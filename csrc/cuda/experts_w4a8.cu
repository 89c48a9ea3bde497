// SPDX-License-Identifier: Apache-2.0
// The products of experts of W4A8.
#include "experts_launch.h"

namespace turbo::cuda {

Error launch_experts_w4a8(const ExpertsProduct& product, Stream stream) {
  const GemmParams<A8Experts<4>> p = a8_experts_params<4>(product);
  const Layout& l = product.linear.layout;
  if (l.groups == 1) return launch_gemm<A8Experts<4>, Groups::one>(p, product.plan(), stream);
  if (l.small_groups()) return launch_gemm<A8Experts<4>, Groups::small>(p, product.plan(), stream);
  return launch_gemm<A8Experts<4>, Groups::large>(p, product.plan(), stream);
}

}  // namespace turbo::cuda
