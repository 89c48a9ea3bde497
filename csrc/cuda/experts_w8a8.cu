// SPDX-License-Identifier: Apache-2.0
// The products of experts of W8A8.
#include "experts_launch.h"

namespace turbo::cuda {

Error launch_experts_w8a8(const ExpertsProduct& product, Stream stream) {
  return launch_gemm<A8Experts<8>, Groups::one>(a8_experts_params<8>(product), product.plan(), stream);
}

}  // namespace turbo::cuda
