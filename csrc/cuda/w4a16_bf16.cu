// SPDX-License-Identifier: Apache-2.0
// The W4A16 kernels for bf16.
#include "w4a16_launch.h"

namespace turbo::cuda {

Error launch_w4a16_bf16(const Linear& args, const LinearPlan& plan, Stream stream) {
  return launch_w4a16<BF16>(args, plan, stream);
}

}  // namespace turbo::cuda
