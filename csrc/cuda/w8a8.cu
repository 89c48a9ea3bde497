// SPDX-License-Identifier: Apache-2.0
// The W8A8 kernels.
#include "a8_launch.h"

namespace turbo::cuda {

Error launch_w8a8(const LinearA8& args, const LinearPlan& plan, Stream stream) {
  return launch_gemm<A8<8>, Groups::one>(a8_params<8>(args, plan), plan, stream);
}

}  // namespace turbo::cuda
