// SPDX-License-Identifier: Apache-2.0
// Starting a kernel in both worlds. A kernel K is a struct: Params (trivially copyable), kThreads, kMinBlocks (blocks
// that a multiprocessor shall hold), kSharedBytes, name(), and run(params), which every thread calls; kNeedsSm90a if it
// uses what only sm_90a has: elsewhere it is a trap.
#pragma once

#include <string>
#include <type_traits>

#include "device.h"

namespace turbo::cuda {

struct Grid {
  unsigned x, y;
};

/// Empty, or what went wrong.
using Error = std::string;

#if defined(__CUDACC__)

using Stream = cudaStream_t;

template <class K, class = void>
struct NeedsSm90a : std::false_type {};
template <class K>
struct NeedsSm90a<K, std::void_t<decltype(K::kNeedsSm90a)>> : std::bool_constant<K::kNeedsSm90a> {};

template <class K>
__global__ void __launch_bounds__(K::kThreads, K::kMinBlocks) kernel(const __grid_constant__ typename K::Params params) {
  if constexpr (NeedsSm90a<K>::value && !kHasWarpgroups)
    trap();
  else
    K::run(params);
}

template <class K>
Error launch(const Grid& grid, const typename K::Params& params, Stream stream) {
  constexpr int kWithoutAsking = 48 * 1024;  // bytes of dynamic shared memory
  cudaError_t status = cudaSuccess;
  if constexpr (K::kSharedBytes > kWithoutAsking)
    status = cudaFuncSetAttribute(kernel<K>, cudaFuncAttributeMaxDynamicSharedMemorySize, K::kSharedBytes);
  if (status == cudaSuccess) {
    kernel<K><<<dim3(grid.x, grid.y), K::kThreads, K::kSharedBytes, stream>>>(params);
    status = cudaGetLastError();
  }
  if (status == cudaSuccess) return {};
  return K::name() + ": " + cudaGetErrorString(status);
}

#else

using Stream = void*;

template <class K>
Error launch(const Grid& grid, const typename K::Params& params, Stream) {
  try {
    hostsim::launch({K::name(), {grid.x, grid.y, 1}, K::kThreads, K::kSharedBytes}, [&] { K::run(params); });
  } catch (const hostsim::Fault& fault) {
    return fault.what();
  }
  return {};
}

#endif

}  // namespace turbo::cuda
