// SPDX-License-Identifier: Apache-2.0
// What the simulator has of sm_90a's own: products of four warps, barriers with phases, bulk copies, and the faults that
// it must report of them, each beside the right way.
#include <cstring>

#include "sim_checks.h"
#include "wgmma_pipeline.h"

namespace {

using namespace test;

constexpr uint32_t kBarrier = 4096, kSecond = kBarrier + 8;  // beyond the data
const Shape kGroup{1, 128, 4096 + 16};                       // four warps

/// Thread 0 makes the barriers, and all know it.
void make_barriers(int count) {
  if (thread_index() == 0) {
    barrier_init(kBarrier, count);
    barrier_init(kSecond, count);
    async_proxy_fence();
  }
  sync_threads();
}

/// Row n of B [rows x `row_bytes`] begins n * row_bytes on; its chunks of 16 bytes change places by the number of the row,
/// or of the pair of rows, in eight: the PTX manual's swizzles of 128 and 64 bytes.
uint32_t swizzled(int n, int byte, int row_bytes) {
  const int chunk = byte / 16 ^ (row_bytes == 128 ? n % 8 : n / 2 % 4);
  return static_cast<uint32_t>(n * row_bytes + chunk * 16 + byte % 16);
}

/// The value of element (row, k) of an operand: small, and all different enough.
int value_of(int row, int k, int salt) { return (row * 31 + k * 17 + salt * 7) % 23 - 11; }

template <class Type>
void put(Type type, int n, int k, int row_bytes) {
  store_shared_16(swizzled(n, 2 * k, row_bytes), from_float(type, static_cast<float>(value_of(n, k, 1))));
}

/// A fragment of 16-bit elements as the PTX manual numbers them: element i of a lane.
template <class Type>
void fragment(Type type, int first_k, uint32_t (&a)[4]) {
  uint16_t elements[8];
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  for (int i = 0; i < 8; ++i) {
    const int row = 16 * warp + lane / 4 + (i / 2 % 2 ? 8 : 0), k = lane % 4 * 2 + (i & 1) + (i >= 4 ? 8 : 0);
    elements[i] = from_float(type, static_cast<float>(value_of(row, first_k + k, 2)));
  }
  std::memcpy(a, elements, sizeof a);
}

int d_row(int i) { return 16 * (thread_index() / 32) + thread_index() % 32 / 4 + (i % 4 >= 2 ? 8 : 0); }
int d_column(int i) { return 8 * (i / 4) + thread_index() % 4 * 2 + (i & 1); }

template <int Columns, class Type>
void test_half_wgmma(Type type) {
  constexpr int kFirstK = 32;  // of 64 in a row: two steps of 16 k on
  std::vector<float> got(64 * 8 * Columns);
  run({1, 128, 8 * Columns * 128}, [&] {
    for (int i = thread_index(); i < 8 * Columns * 64; i += 128) put(type, i / 64, i % 64, 128);
    sync_threads();
    async_proxy_fence();
    uint32_t a[4];
    float d[Columns][4];
    fragment(type, kFirstK, a);
    for (int i = 0; i < 4 * Columns; ++i) d[i / 4][i % 4] = static_cast<float>(d_row(i) - d_column(i));
    wgmma_fence();
    wgmma(type, d, a, shared_matrix<128>(2 * kFirstK));
    wgmma_commit();
    check(!(d[0][0] == d[0][0]), "d has no value before the wait");
    wgmma_wait<0>();
    for (int i = 0; i < 4 * Columns; ++i)
      got[static_cast<size_t>(d_row(i) * 8 * Columns + d_column(i))] = d[i / 4][i % 4];
  });
  for (int m = 0; m < 64; ++m)
    for (int n = 0; n < 8 * Columns; ++n) {
      int want = m - n;
      for (int k = kFirstK; k < kFirstK + 16; ++k) want += value_of(m, k, 2) * value_of(n, k, 1);
      check(got[static_cast<size_t>(m * 8 * Columns + n)] == static_cast<float>(want),
            "wgmma at " + std::to_string(m) + ", " + std::to_string(n));
    }
}

SIM_TEST(wgmma_of_f16_is_a_product) { test_half_wgmma<4>(F16{}); }
SIM_TEST(wgmma_of_bf16_is_a_product) { test_half_wgmma<1>(BF16{}); }

SIM_TEST(wgmma_of_bytes_is_a_product) {
  constexpr int kFirstK = 32;
  std::vector<int32_t> got(64 * 16);
  run({1, 128, 16 * 64}, [&] {
    for (int i = thread_index(); i < 16 * 32; i += 128) {
      const int n = i / 32, k = i % 32 * 2;
      const auto low = static_cast<uint8_t>(value_of(n, k, 1)), high = static_cast<uint8_t>(value_of(n, k + 1, 1));
      store_shared_16(swizzled(n, k, 64), static_cast<uint16_t>(low | high << 8));
    }
    sync_threads();
    async_proxy_fence();
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    int8_t elements[16];
    for (int i = 0; i < 16; ++i) {
      const int row = 16 * warp + lane / 4 + (i / 4 % 2 ? 8 : 0), k = lane % 4 * 4 + (i & 3) + (i >= 8 ? 16 : 0);
      elements[i] = static_cast<int8_t>(value_of(row, kFirstK + k, 2));
    }
    uint32_t a[4];
    std::memcpy(a, elements, sizeof a);
    int32_t d[2][4];
    for (int i = 0; i < 8; ++i) d[i / 4][i % 4] = 1000 * d_row(i) + d_column(i);
    wgmma_fence();
    wgmma(S8{}, d, a, shared_matrix<64>(kFirstK));
    wgmma_commit();
    wgmma_wait<0>();
    for (int i = 0; i < 8; ++i) got[static_cast<size_t>(d_row(i) * 16 + d_column(i))] = d[i / 4][i % 4];
  });
  for (int m = 0; m < 64; ++m)
    for (int n = 0; n < 16; ++n) {
      int32_t want = 1000 * m + n;
      for (int k = kFirstK; k < kFirstK + 32; ++k) want += value_of(m, k, 2) * value_of(n, k, 1);
      check(got[static_cast<size_t>(m * 16 + n)] == want, "s8 wgmma at " + std::to_string(m) + ", " + std::to_string(n));
    }
}

/// Eight rows of 128 bytes of zeros, by ordinary stores of the first warps.
void zero_rows() {
  if (thread_index() < 64) store_shared_128(16 * static_cast<uint32_t>(thread_index()), {});
  sync_threads();
}

/// What a thread multiplies. It outlives the thread: what is under way when a fault ends the launch points at it.
struct Registers {
  uint32_t a[4] = {};
  float d[1][4] = {};
};

SIM_TEST(products_need_their_fences_and_waits) {
  std::vector<Registers> all(128);
  const auto product = [&](auto proxy, auto fence, auto meanwhile) {
    return [&, proxy, fence, meanwhile] {
      Registers& r = all[static_cast<size_t>(thread_index())] = {};
      zero_rows();
      proxy();
      fence();
      wgmma(F16{}, r.d, r.a, shared_matrix<128>(0));
      wgmma_commit();
      meanwhile(r);
      wgmma_wait<0>();
      check(r.d[0][0] == 0, "zeros");
    };
  };
  const auto proxy = [] { async_proxy_fence(); };
  const auto fence = [] { wgmma_fence(); };
  const auto without = [] {};
  const auto nothing = [](Registers&) {};
  expect_clean(kGroup, product(proxy, fence, nothing));
  expect_fault({"wgmma: reads what thread", "without a proxy fence"}, kGroup, product(without, fence, nothing));
  expect_fault({"without a wgmma.fence since the last commit"}, kGroup, product(proxy, without, nothing));
  expect_fault({"registers of A were changed"}, kGroup, product(proxy, fence, [](Registers& r) { r.a[2] = 1; }));
  expect_fault({"was overwritten while wgmma reads it"}, kGroup, product(proxy, fence, [](Registers&) {
                 sync_threads();
                 if (thread_index() == 5) store_shared_16(2, 1);
                 sync_threads();
               }));
  expect_fault({"ends while its products are under way"}, kGroup, [&] {
    Registers& r = all[static_cast<size_t>(thread_index())] = {};
    zero_rows();
    async_proxy_fence();
    wgmma_fence();
    wgmma(F16{}, r.d, r.a, shared_matrix<128>(0));
    wgmma_commit();
  });
}

SIM_TEST(products_of_four_warps_are_the_same) {
  std::vector<Registers> all(128);
  const auto with = [&](auto descriptor) {
    return [&, descriptor] {
      Registers& r = all[static_cast<size_t>(thread_index())] = {};
      zero_rows();
      async_proxy_fence();
      wgmma_fence();
      wgmma(F16{}, r.d, r.a, descriptor());
      wgmma_commit();
      wgmma_wait<0>();
    };
  };
  expect_clean(kGroup, with([] { return shared_matrix<128>(64); }));
  expect_fault({"lanes have different descriptors"}, kGroup,
               with([] { return shared_matrix<128>(thread_index() == 40 ? 64 : 0); }));
  expect_fault({"thread 32", "did not start the same products"}, kGroup,
               with([] { return shared_matrix<128>(thread_index() / 32 == 1 ? 64 : 0); }));
  expect_fault({"did not start the same products"}, {1, 64, 4096}, with([] { return shared_matrix<128>(0); }));
  expect_fault({"rows that begin at 128, expected multiples of 1024"}, kGroup,
               with([] { return shared_matrix<128>(128); }));
}

SIM_TEST(lanes_that_waited_meet_before_they_multiply) {
  std::vector<Registers> all(128);
  const auto after_a_wait = [&](auto meet) {
    return [&, meet] {
      Registers& r = all[static_cast<size_t>(thread_index())] = {};
      make_barriers(128);
      zero_rows();
      async_proxy_fence();
      barrier_arrive(kBarrier);
      barrier_wait(kBarrier, 0);
      meet();
      wgmma_fence();
      wgmma(F16{}, r.d, r.a, shared_matrix<128>(0));
      wgmma_commit();
      wgmma_wait<0>();
    };
  };
  expect_clean(kGroup, after_a_wait([] { sync_warp(); }));
  expect_fault({"lanes may have parted there, and need a __syncwarp"}, kGroup, after_a_wait([] {}));
}

SIM_TEST(phases_hand_over) {
  const Shape two_warps{1, 64, 4096 + 16};
  // The second warp writes what the first one reads, and writes it again.
  const auto exchange = [](auto full, auto empty) {
    return [=] {
      make_barriers(32);
      const uint32_t own = 4 * static_cast<uint32_t>(thread_index() % 32);
      for (uint32_t round = 0; round < 2; ++round) {
        if (thread_index() >= 32) {
          empty(round ^ 1);
          store_shared_32(own, round);
          barrier_arrive(kBarrier);
        } else {
          full(round);
          check(load_shared_32(own ^ 4) == round, "what was handed over");
          barrier_arrive(kSecond);
        }
      }
    };
  };
  const auto full = [](uint32_t parity) { barrier_wait(kBarrier, parity); };
  const auto empty = [](uint32_t parity) { barrier_wait(kSecond, parity); };
  const auto without = [](uint32_t) {};
  for (const auto order : {hostsim::Order::ascending, hostsim::Order::descending}) {
    hostsim::set_order(order, 0);
    expect_clean(two_warps, exchange(full, empty));
    expect_fault({"shared memory"}, two_warps, exchange(without, empty));
    // The writer is two phases ahead, and the reader waits for one that has begun again.
    expect_fault({"no thread can go on: threads 0 to 31 wait in mbarrier"}, two_warps, exchange(full, without));
  }
  hostsim::set_order(hostsim::Order::ascending, 0);
  expect_fault({"more arrivals than the count"}, two_warps, [] {
    make_barriers(1);
    if (thread_index() == 0) barrier_arrive_expect(kBarrier, 16);
    if (thread_index() == 0) barrier_arrive(kBarrier);
  });
  expect_fault({"threads 0 to 63 wait in mbarrier.try_wait"}, two_warps, [] {
    make_barriers(65);
    barrier_arrive(kBarrier);
    barrier_wait(kBarrier, 0);
  });
  expect_fault({"there is no mbarrier at 64"}, two_warps, [] { barrier_arrive(64); });
  expect_fault({"was made by thread 0: a barrier is missing"}, two_warps, [] {
    if (thread_index() == 0) barrier_init(kBarrier, 64);
    barrier_arrive(kBarrier);
  });
}

SIM_TEST(copies_arrive_at_phases) {
  std::vector<uint32_t> numbers(256);
  for (uint32_t i = 0; i < 256; ++i) numbers[i] = i;
  const Device<uint32_t> values(numbers, "values");
  const Shape two_warps{1, 64, 4096 + 16};
  // Bytes in bulk by one thread, 16 bytes by each; all are there after one wait.
  const auto bring = [&](auto wait) {
    return [&, wait] {
      make_barriers(65);
      if (thread_index() == 0) {
        barrier_arrive_expect(kBarrier, 512);
        bulk_copy(0, values.data(), 256, kBarrier);
        bulk_copy_once(256, values.data() + 64, 256, kBarrier);
      }
      cp_async_16(1024 + 16 * static_cast<uint32_t>(thread_index()), values.data() + 4 * thread_index(), 16);
      barrier_arrive_copies(kBarrier);
      sync_threads();
      wait();
      const int other = 63 - thread_index();
      check(load_shared_32(4 * static_cast<uint32_t>(64 + other)) == static_cast<uint32_t>(64 + other), "in bulk");
      check(load_shared_32(1024 + 16 * static_cast<uint32_t>(other)) == static_cast<uint32_t>(4 * other), "cp.async");
    };
  };
  expect_clean(two_warps, bring([] { barrier_wait(kBarrier, 0); }));
  expect_fault({"that the bulk copy of thread 0 is on its way to: a wait is missing"}, two_warps, bring([] {}));
  const auto copy = [&](uint32_t to, int from, int bytes) {
    return [&, to, from, bytes] {
      make_barriers(1);
      if (thread_index() == 0) {
        barrier_arrive_expect(kBarrier, bytes);
        bulk_copy(to, reinterpret_cast<const char*>(values.data()) + from, bytes, kBarrier);
      }
      barrier_wait(kBarrier, 0);
    };
  };
  expect_clean(two_warps, copy(16, 32, 48));
  expect_fault({"a bulk copy of 40 bytes", "multiples of 16"}, two_warps, copy(0, 0, 40));
  expect_fault({"a bulk copy", "multiples of 16"}, two_warps, copy(8, 0, 16));
  expect_fault({"a bulk copy", "multiples of 16"}, two_warps, copy(0, 8, 16));
  expect_fault({"a bulk copy", "'values' (1024 bytes)", "out of range"}, two_warps, copy(0, 1008, 32));
  expect_fault({"a bulk copy", "out of range"}, two_warps, copy(4096, 0, 32));
  expect_fault({"no proxy fence followed the init"}, two_warps, [&] {
    if (thread_index()) return;
    barrier_init(kBarrier, 1);
    bulk_copy(0, values.data(), 16, kBarrier);
  });
  expect_fault({"copies are on their way to the mbarrier", "at the block's end"}, two_warps, [&] {
    make_barriers(1);
    if (thread_index() == 0) bulk_copy(0, values.data(), 16, kBarrier);
  });
}

}  // namespace
