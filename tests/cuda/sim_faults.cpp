// SPDX-License-Identifier: Apache-2.0
// Everything that the simulator must report, each beside the right way of doing it, which it must let pass.
#include "sim_checks.h"

namespace {

using namespace test;

uint32_t word(int index) { return 4 * static_cast<uint32_t>(index); }

/// A word of each thread is written, and all know it.
void fill() {
  store_shared_32(word(thread_index()), 0);
  sync_threads();
}

SIM_TEST(out_of_range_global) {
  const Device<uint32_t> values(std::vector<uint32_t>(32, 7), "values");
  expect_clean({}, [&] { load_global(values.data() + thread_index()); });
  expect_fault({"test: block (0, 0, 0) thread 31", "'values' (128 bytes)", "out of range"}, {},
               [&] { load_global(values.data() + thread_index() + 1); });
  expect_fault({"thread 0", "a store", "out of range"}, {}, [&] { store_global(values.data() - 1, 1u); });
  expect_fault({"16 bytes", "not aligned"}, {},
               [&] { load_global(reinterpret_cast<const Vec4*>(values.data() + 1)); });
  expect_fault({"block (2, 0, 0)"}, {3, 32, 0}, [&] {
    if (block_index_x() == 2) load_global(values.data() + 32);
  });
}

SIM_TEST(unwritten_global) {
  const Device<uint32_t> values(32, "values");
  expect_fault({"nothing has written", "'values'"}, {}, [&] { load_global(values.data() + thread_index()); });
  expect_clean({}, [&] { store_global(values.data() + thread_index(), 1u); });
  expect_clean({}, [&] { load_global(values.data() + thread_index()); });
}

SIM_TEST(out_of_range_shared) {
  expect_fault({"thread 5", "out of range, the block has 64"}, {1, 32, 64}, [] {
    if (thread_index() == 5) store_shared_32(64, 1);
  });
  expect_fault({"not aligned"}, {}, [] { store_shared_128(8, {}); });
  expect_fault({"ldmatrix", "not aligned"}, {}, [] {
    uint32_t d[4];
    ldmatrix_x4(d, 8);
  });
}

SIM_TEST(unwritten_shared) {
  expect_fault({"thread 0", "4 bytes of shared memory at 0x0", "nothing has written"}, {}, [] { load_shared_32(0); });
  expect_fault({"thread 31"}, {}, [] {
    if (thread_index() < 31) store_shared_32(word(thread_index()), 1);
    load_shared_32(word(thread_index()));
  });
  // Nothing is left from the block before.
  expect_fault({"block (1, 0, 0)", "nothing has written"}, {2, 32, 64}, [] {
    if (thread_index()) return;
    if (block_index_x() == 0) store_shared_32(0, 1);
    load_shared_32(0);
  });
}

SIM_TEST(races_in_shared_memory) {
  const Shape two_warps{1, 64, 4096};
  const auto exchange = [](auto barrier) {
    fill();
    store_shared_32(word(thread_index()), 1);
    barrier();
    load_shared_32(word(thread_index() ^ 33));
  };
  expect_fault({"a barrier is missing"}, two_warps, [&] { exchange([] {}); });
  expect_fault({"a barrier is missing"}, two_warps, [&] { exchange([] { sync_warp(); }); });
  expect_clean(two_warps, [&] { exchange([] { sync_threads(); }); });

  const auto neighbours = [](auto barrier) {
    fill();
    store_shared_32(word(thread_index()), 1);
    barrier();
    load_shared_32(word(thread_index() ^ 1));
  };
  expect_fault({"a barrier is missing"}, two_warps, [&] { neighbours([] {}); });
  expect_clean(two_warps, [&] { neighbours([] { sync_warp(); }); });

  // A store after the reads of others.
  const auto reuse = [](auto barrier) {
    fill();
    load_shared_32(0);
    barrier();
    if (thread_index() == 31) store_shared_32(0, 2);
  };
  expect_fault({"thread 31", "several warps read"}, two_warps, [&] { reuse([] {}); });
  expect_clean(two_warps, [&] { reuse([] { sync_threads(); }); });
  expect_fault({"a store", "wrote: a barrier is missing"}, two_warps, [] { store_shared_32(0, 1); });
}

SIM_TEST(async_copies) {
  std::vector<uint32_t> numbers(128);
  for (uint32_t i = 0; i < 128; ++i) numbers[i] = i;
  const Device<uint32_t> values(numbers, "values");
  const auto start = [&](int slot) {
    cp_async_16(16 * static_cast<uint32_t>(thread_index() + 32 * slot), values.data() + 4 * thread_index(), 16);
    cp_async_commit();
  };
  const auto own = [](int slot) { return load_shared_32(16 * static_cast<uint32_t>(thread_index() + 32 * slot)); };
  expect_clean({}, [&] {
    start(0);
    cp_async_wait<0>();
    check(own(0) == static_cast<uint32_t>(4 * thread_index()), "what cp.async copied");
  });
  expect_fault({"thread 0", "on its way to: a wait is missing"}, {}, [&] {
    start(0);
    own(0);
    cp_async_wait<0>();
  });
  // Of two groups, waiting for all but one leaves the newest under way.
  expect_clean({}, [&] {
    start(0);
    start(1);
    cp_async_wait<1>();
    own(0);
    cp_async_wait<0>();
    own(1);
  });
  expect_fault({"a wait is missing"}, {}, [&] {
    start(0);
    start(1);
    cp_async_wait<1>();
    own(1);
    cp_async_wait<0>();
  });
  // What was not committed is in no group.
  expect_fault({"a wait is missing"}, {}, [&] {
    cp_async_16(16 * static_cast<uint32_t>(thread_index()), values.data(), 16);
    cp_async_wait<0>();
    own(0);
  });
  // The wait is the issuing thread's alone; others need a barrier after it.
  expect_fault({"a load", "wrote: a barrier is missing"}, {}, [&] {
    start(0);
    cp_async_wait<0>();
    if (thread_index() == 31) load_shared_32(16 * static_cast<uint32_t>(thread_index() ^ 1));
  });
  expect_clean({}, [&] {
    start(0);
    cp_async_wait<0>();
    sync_threads();
    load_shared_32(16 * static_cast<uint32_t>(thread_index() ^ 1));
  });
  expect_fault({"ends while its cp.async"}, {}, [&] { start(0); });
}

SIM_TEST(async_copies_fill_with_zero) {
  const Device<uint16_t> values(std::vector<uint16_t>(13, 9), "values");
  expect_clean({}, [&] {
    if (thread_index()) return;
    cp_async_16(0, values.data() + 8, 10);  // 5 elements are left
    cp_async_16(16, values.data(), 0);
    cp_async_commit();
    cp_async_wait<0>();
    for (uint32_t i = 0; i < 16; ++i) check(load_shared_16(2 * i) == (i < 5 ? 9 : 0), "element " + std::to_string(i));
  });
  expect_fault({"cp.async", "'values' (26 bytes)", "out of range"}, {}, [&] { cp_async_16(0, values.data() + 8, 12); });
  expect_fault({"cp.async", "not aligned"}, {}, [&] { cp_async_16(0, values.data() + 1, 16); });
  expect_fault({"cp.async", "not aligned"}, {}, [&] { cp_async_16(8, values.data(), 16); });
}

SIM_TEST(barriers_that_not_all_reach) {
  const Shape two_warps{1, 64, 0};
  expect_fault({"no thread can go on", "threads 0 to 9 wait in __syncthreads", "threads 10 to 63 have ended"}, two_warps,
               [] {
                 if (thread_index() < 10) sync_threads();
               });
  expect_fault({"threads 0 to 30 wait in shfl", "threads 31 to 63 wait in __syncthreads"}, two_warps, [] {
    if (thread_index() >= 32 || thread_index() == 31) sync_threads();
    shuffle(0, 0);
  });
  expect_fault({"threads 0 to 15 wait in mma.m16n8k32.s8"}, {}, [] {
    int32_t d[4];
    if (thread_index() < 16) mma_m16n8k32(d, {}, {});
  });
  expect_fault({"meet in different instructions"}, {}, [] {
    if (thread_index() < 16)
      shuffle(0, 0);
    else
      sync_warp();
  });
}

SIM_TEST(other_blocks_see_what_was_fenced) {
  const Device<uint32_t> values(32, "values"), counter(std::vector<uint32_t>(1, 0), "counter");
  std::vector<uint32_t> seen;
  const auto pass_on = [&](auto fence, auto barrier, auto fence_after) {
    if (block_index_x() == 0) store_global(values.data() + thread_index(), 5u);
    fence();
    barrier();
    if (thread_index() == 0) {
      seen.push_back(atomic_add(counter.data(), 1));
      fence_after();
    }
    sync_threads();
    if (block_index_x() == 1) load_global(values.data() + thread_index());
  };
  const auto with = [] { thread_fence(); };
  const auto barrier = [] { sync_threads(); };
  const auto without = [] {};
  expect_clean({2, 32, 0}, [&] { pass_on(with, barrier, with); });
  check(seen == std::vector<uint32_t>({0, 1}), "atomic_add gives what was there before");
  expect_fault({"block (1, 0, 0)", "of block number 0 wrote without a __threadfence after it"}, {2, 32, 0},
               [&] { pass_on(without, barrier, with); });
  expect_fault({"block (1, 0, 0)", "without a __threadfence after it before a barrier and the block's next"},
               {2, 32, 0}, [&] { pass_on(with, without, with); });
  expect_fault({"block (1, 0, 0)", "that block number 0 wrote, without a __threadfence since this block's last atomic"},
               {2, 32, 0}, [&] { pass_on(with, barrier, without); });
}

SIM_TEST(a_place_is_left_out) {
  const auto barriers = [] {
    store_shared_32(word(thread_index()), 1);
    sync_threads();
    load_shared_32(word(thread_index() ^ 32));
  };
  const Shape two_warps{1, 64, 4096};
  hostsim::take_sites();
  expect_clean(two_warps, barriers);
  const std::string site = hostsim::take_sites();
  check(site.find("sync_threads sim_faults.cpp:") == 0 && site.find('\n') == site.size() - 1, "one place: " + site);
  hostsim::leave_out(site.substr(0, site.size() - 1));
  expect_fault({"nothing has written"}, two_warps, barriers);
  hostsim::leave_out("");
  expect_clean(two_warps, barriers);
}

SIM_TEST(orders) {
  std::vector<int> blocks;
  const auto note = [&] {
    if (thread_index() == 0) blocks.push_back(block_index_x());
  };
  hostsim::set_order(hostsim::Order::descending, 0);
  run({4, 32, 0}, note);
  hostsim::set_order(hostsim::Order::ascending, 0);
  run({4, 32, 0}, note);
  check(blocks == std::vector<int>({3, 2, 1, 0, 0, 1, 2, 3}), "the order of blocks");
}

SIM_TEST(launches_that_no_device_would_take) {
  expect_fault({"33 threads"}, {1, 33, 0}, [] {});
  expect_fault({"shared memory"}, {1, 32, 300 * 1024}, [] {});
  expect_fault({"grid without blocks"}, {0, 32, 0}, [] {});
}

}  // namespace

int main(int argc, char** argv) {
  for (const Named& one : all_tests()) {
    if (argc < 2) std::printf("%s\n", one.name);
    if (argc >= 2 && std::string(argv[1]) == one.name) {
      one.run();
      std::printf("%s: %d failures\n", one.name, failures);
      return failures ? 1 : 0;
    }
  }
  return argc < 2 ? 0 : 2;
}
