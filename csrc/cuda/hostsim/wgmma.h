// SPDX-License-Identifier: Apache-2.0
// wgmma.mma_async with A in registers on fibres. Each of the four warps has 16 rows of A and of D of its own, as
// mma.sync has them, so that a warp can compute its part alone.
#pragma once

#include <cstdint>

#include "instructions.h"

namespace turbo::hostsim {

/// d [16 x 8 * columns] += A [16 x 16] * B, rounded as mma_m16n8k16 does it. B [8 * columns x 32 bytes of k] is what the
/// matrix descriptor names: rows of 128 or 64 bytes of k, in chunks of 16 bytes that change places as its swizzle says.
/// d gets its value when wgmma_wait has waited for it.
void wgmma(Half type, float* d, unsigned columns, const uint32_t (&a)[4], uint64_t b);
/// The same with A [16 x 32] and B of signed bytes.
void wgmma(int32_t* d, unsigned columns, const uint32_t (&a)[4], uint64_t b);

}  // namespace turbo::hostsim
