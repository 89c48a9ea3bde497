// SPDX-License-Identifier: Apache-2.0
// What a kernel may do, in two worlds: under nvcc inline PTX (sm_80 and newer), under a C++ compiler the simulator in
// hostsim/. Kernels use memory, barriers and tensor cores through these functions only.
//
// Shared memory is addressed by its own 32-bit addresses from shared_base() on; all of it is dynamic.
//
// Where a fragment lies. A warp's 32 lanes hold a matrix together; lane = 4 * g + t, g = 0..7, t = 0..3.
//
//   mma m16n8k16, 16-bit operands: two neighbours along k in a register, the lower k in the low half.
//     A [16 x 16]     a0: row g    , k = 2t, 2t+1        B [16 x 8]     b0: k = 2t, 2t+1    , column g
//                     a1: row g + 8, k = 2t, 2t+1                       b1: k = 2t+8, 2t+9  , column g
//                     a2: row g    , k = 2t+8, 2t+9
//                     a3: row g + 8, k = 2t+8, 2t+9
//   mma m16n8k32, 8-bit operands: four neighbours along k in a register, the lowest k in the lowest byte.
//     A [16 x 32]     a0: row g    , k = 4t .. 4t+3      B [32 x 8]     b0: k = 4t .. 4t+3      , column g
//                     a1: row g + 8, k = 4t .. 4t+3                     b1: k = 4t+16 .. 4t+19  , column g
//                     a2: row g    , k = 4t+16 .. 4t+19
//                     a3: row g + 8, k = 4t+16 .. 4t+19
//   accumulators D [16 x 8] of both:  d0: row g, column 2t    d1: row g, column 2t+1
//                                     d2: row g + 8, column 2t    d3: row g + 8, column 2t+1
//   wgmma: A [64 x 32 bytes of k], 16 rows of each of four warps, and accumulators, eight columns after eight, as
//     above; B in shared memory (wgmma_pipeline.h). sm_90a only, as all of device_sm90_ptx.h.
//   ldmatrix: an 8 x 8 matrix of 16-bit elements. Eight lanes name its rows, 16 bytes each; lane (g, t) gets the
//     elements 2t and 2t+1 of row g: with rows = columns of B in memory, that is b0 of eight k.
#pragma once

#if defined(__CUDACC__)
#include "device_ptx.h"
#include "device_sm90_ptx.h"
#else
#include "hostsim/device.h"
#include "hostsim/device_sm90.h"
#endif

namespace turbo::cuda {

inline constexpr int kWarpLanes = 32;

TM_DEVICE float to_float(Half16 type, uint16_t bits) {
  return type.bf16 ? to_float(BF16{}, bits) : to_float(F16{}, bits);
}
TM_DEVICE uint16_t from_float(Half16 type, float v) {
  return type.bf16 ? from_float(BF16{}, v) : from_float(F16{}, v);
}

}  // namespace turbo::cuda
