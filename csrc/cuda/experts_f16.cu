// SPDX-License-Identifier: Apache-2.0
// The products of experts for f16.
#include "experts_launch.h"

namespace turbo::cuda {

Error launch_experts_f16(const ExpertsProduct& product, Stream stream) { return launch_experts<F16>(product, stream); }

}  // namespace turbo::cuda
