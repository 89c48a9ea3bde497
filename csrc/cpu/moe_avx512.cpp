// SPDX-License-Identifier: Apache-2.0
// Activations and the weighted sum over experts on AVX-512.
#include "avx512.h"
#include "moe_block.h"

namespace turbo::cpu {

const MoeIsa& moe_avx512() { return MoeBlock<Avx512>::kTable; }

}  // namespace turbo::cpu
