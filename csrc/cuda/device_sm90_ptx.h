// SPDX-License-Identifier: Apache-2.0
// device_ptx.h's part that sm_90a alone has: four warps' products with an operand in shared memory, barriers that count
// arrivals and bytes, and copies of whole runs. hostsim/device_sm90.h has the same functions.
#pragma once

#include <cstdint>

#include "elements.h"

namespace turbo::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
inline constexpr bool kHasWarpgroups = true;
#else
inline constexpr bool kHasWarpgroups = false;
#endif
TM_DEVICE void trap() { __trap(); }

/// What this thread's ordinary accesses to shared memory did, and what it knows of others', is seen by what the products
/// and bulk copies that it starts do there.
TM_DEVICE void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/// A barrier, 8 bytes in shared memory at a multiple of 8: a phase ends when `count` arrivals, and all bytes that
/// were announced, have come.
TM_DEVICE void barrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
TM_DEVICE void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
/// Arrives, and announces bytes to this phase.
TM_DEVICE void barrier_arrive_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
/// Arrives when all copies that this thread started by cp_async_16 have come.
TM_DEVICE void barrier_arrive_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
/// Waits until the phase of this parity (0 for the first, 1 for the second, 0, ...) has ended. No one may wait for a phase when
/// the one after the next may have begun.
TM_DEVICE void barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}
/// `bytes` from global to shared memory in the background, both at multiples of 16, and so many; the barrier gets them. For
/// what is read once by the whole grid: it asks L2 to drop it first.
TM_DEVICE void bulk_copy_once(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  asm volatile(
      "{\n"
      ".reg .b64 policy;\n"
      "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], policy;\n"
      "}\n" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}
TM_DEVICE void bulk_copy(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

/// Registers that were written are seen by the products that follow.
TM_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
/// All products since the last commit become a group.
TM_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/// Waits until at most Pending of the newest groups are under way. Before that neither their registers of A nor D
/// may be touched.
template <int Pending>
TM_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}
/// The register has its value here: a compiler, which knows nothing of fences and waits, would read it before a wait, or
/// write it after a fence.
TM_DEVICE void pin(float& v) { asm volatile("" : "+f"(v)::"memory"); }
TM_DEVICE void pin(int32_t& v) { asm volatile("" : "+r"(v)::"memory"); }
TM_DEVICE void pin(uint32_t& v) { asm volatile("" : "+r"(v)::"memory"); }

// d [64 x 8 * Columns] += A [64 x 32 bytes of k] * B, the rows of A being the sixteens of four warps side by side.
// Each warp has its fragment of A, and of d, as in mma.sync; B lies in shared memory as `b` says (wgmma_pipeline.h).
#define TM_D4 "%0, %1, %2, %3"
#define TM_D8 TM_D4 ", %4, %5, %6, %7"
#define TM_D16 TM_D8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define TM_D32                                                                                                          \
  TM_D16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TM_D64                                                                                                          \
  TM_D32                                                                                                                \
      ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
      "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TM_R1(c, i) c(d[i][0]), c(d[i][1]), c(d[i][2]), c(d[i][3])
#define TM_R2(c, i) TM_R1(c, i), TM_R1(c, i + 1)
#define TM_R4(c, i) TM_R2(c, i), TM_R2(c, i + 2)
#define TM_R8(c, i) TM_R4(c, i), TM_R4(c, i + 4)
#define TM_R16(c, i) TM_R8(c, i), TM_R8(c, i + 8)

#define TM_WGMMA(Type, Acc, constraint, shape_and_types, tail, columns, rows, registers, a0, a1, a2, a3, at)        \
  TM_DEVICE void wgmma(Type, Acc(&d)[columns][4], const uint32_t (&a)[4], uint64_t b) {                                \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #rows shape_and_types " {" TM_D##registers "}, {%" #a0 ", %" #a1   \
                 ", %" #a2 ", %" #a3 "}, %" #at ", 1" tail ";"                                                         \
                 : TM_R##columns(constraint, 0)                                                                        \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)                                                  \
                 : "memory");                                                                                          \
  }
#define TM_WGMMAS(...)                                       \
  TM_WGMMA(__VA_ARGS__, 1, 8, 4, 4, 5, 6, 7, 8)              \
  TM_WGMMA(__VA_ARGS__, 2, 16, 8, 8, 9, 10, 11, 12)          \
  TM_WGMMA(__VA_ARGS__, 4, 32, 16, 16, 17, 18, 19, 20)       \
  TM_WGMMA(__VA_ARGS__, 8, 64, 32, 32, 33, 34, 35, 36)       \
  TM_WGMMA(__VA_ARGS__, 16, 128, 64, 64, 65, 66, 67, 68)
TM_WGMMAS(F16, float, "+f", "k16.f32.f16.f16", ", 1, 1, 0")
TM_WGMMAS(BF16, float, "+f", "k16.f32.bf16.bf16", ", 1, 1, 0")
TM_WGMMAS(S8, int32_t, "+r", "k32.s32.s8.s8", "")
#undef TM_WGMMAS
#undef TM_WGMMA
#undef TM_R16
#undef TM_R8
#undef TM_R4
#undef TM_R2
#undef TM_R1
#undef TM_D64
#undef TM_D32
#undef TM_D16
#undef TM_D8
#undef TM_D4

}  // namespace turbo::cuda
