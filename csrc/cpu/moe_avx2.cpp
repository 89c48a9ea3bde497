// SPDX-License-Identifier: Apache-2.0
// Activations and the weighted sum over experts on AVX2.
#include "avx2.h"
#include "moe_block.h"

namespace turbo::cpu {

const MoeIsa& moe_avx2() { return MoeBlock<Avx2>::kTable; }

}  // namespace turbo::cpu
