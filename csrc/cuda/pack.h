// SPDX-License-Identifier: Apache-2.0
// Packing quantized weights for a device, on the host: a checkpoint's row-major order in, layout.h's out.
#pragma once

#include "../cpu/pack.h"
#include "layout.h"

namespace turbo::cuda {

/// The sizes of a packed matrix in this layout.
inline Layout device_layout(const cpu::Layout& l) { return {l.n, l.k, l.groups, l.bits}; }

/// What cpu::pack does with the same arguments, in the layout of a device: writes every element of weight_out, scale_out
/// and, where there are zero points (4 bits) or sums (8 bits), zero_out or sums_out, whose sizes are those of
/// device_layout. Scales have 2 or 4 bytes. Host memory. Rows of `gate_up` come 16 gates and 16 ups in turn.
void pack(const cpu::Pack& args, const cpu::Parallel& parallel);

}  // namespace turbo::cuda
