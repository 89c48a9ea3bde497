// SPDX-License-Identifier: Apache-2.0
// The products of experts for bf16.
#include "experts_launch.h"

namespace turbo::cuda {

Error launch_experts_bf16(const ExpertsProduct& product, Stream stream) { return launch_experts<BF16>(product, stream); }

}  // namespace turbo::cuda
