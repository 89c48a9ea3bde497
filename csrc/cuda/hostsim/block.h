// SPDX-License-Identifier: Apache-2.0
// One launch: blocks one after another, the threads of a block as fibres, warps that wait for their lanes.
//
// What is reported beside wrong addresses: shared memory read before it was written, or while an asynchronous copy is
// on its way there; two threads at the same byte without a barrier between them; waits that never end; lanes that meet
// in different instructions; global memory of another block that its writer did not fence, or
// not before a barrier and the atomic that told of it, or that is read without a fence after that atomic; and what
// phases.cpp and wgmma.cpp have of sm_90's own.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "fibre.h"
#include "memory.h"

namespace turbo::hostsim {

inline constexpr unsigned kWarp = 32;

struct Launch {
  std::string kernel;
  unsigned grid[3];
  unsigned threads;       // of a block, a multiple of 32
  uint32_t shared_bytes;  // dynamic shared memory; there is no other
};

/// The order in which blocks, and the warps of a block, get their turns. A right kernel gives the same bits in all.
enum class Order : int { ascending, descending, shuffled };
void set_order(Order order, uint32_t seed);

/// What a launch did, beside its results.
struct Counts {
  uint64_t mma = 0;
  uint64_t wgmma = 0;  // of one warp each
  uint64_t ldmatrix = 0;
  uint64_t ldmatrix_conflicts = 0;  // cycles beyond the first of the reads of eight rows at a time
};

/// Of all launches of this process; may be set to zero.
Counts& total_counts();

/// Runs body once for every thread of every block. Throws the first Fault.
void launch(const Launch& what, const std::function<void()>& body);

enum class Wait : uint8_t { runnable, warp, block, phase, ended };

/// One cp.async.
struct AsyncCopy {
  uint32_t to;
  Address from;
  uint32_t bytes, read_bytes;
};

/// A product of wgmma, as one lane has it, that is under way: d has no value meanwhile, and a must stay.
struct Product {
  uint32_t* d;
  std::vector<uint32_t> result;
  const uint32_t* a;
  std::array<uint32_t, 4> a_before;
  std::vector<uint32_t> chunks;  // addresses of 16 bytes of B that this lane answers for
  uint32_t time;
};

struct Thread {
  Fibre fibre;
  unsigned index;
  Wait wait;
  const char* waiting_in;
  uint32_t waiting_for;  // the barrier of Wait::phase
  std::vector<AsyncCopy> open_copies;
  std::deque<std::vector<AsyncCopy>> copy_groups;  // oldest first
  bool products_fenced;
  bool parted;  // from its warp's other lanes, maybe: it has waited for a phase
  std::vector<Product> open_products;
  std::deque<std::vector<Product>> product_groups;  // oldest first
};

struct Warp {
  const char* instruction;
  void* operands[kWarp];
  unsigned arrived;
  uint32_t sync_time;
  uint64_t products;  // which, and in what order: a hash
};

/// What a thread knows of others: what each did up to a time.
using Known = std::vector<uint32_t>;

/// An mbarrier, and the copies that will arrive at it, in the order in which they were started.
struct PhaseBarrier {
  struct Coming {
    bool bulk;
    unsigned thread;
    uint32_t time;
    std::vector<AsyncCopy> copies;
  };
  unsigned count, left;  // arrivals of a phase, and those that it still waits for
  int64_t bytes;
  uint32_t phases;  // that have ended
  unsigned made_by;
  uint32_t made_at;
  Known arriving, known;  // what those know who came in this phase, and in all before
  std::deque<Coming> coming;
};

/// The block that runs, as its threads see it. All functions but `run` are called from inside a fibre.
class Block {
 public:
  Block(const Launch& launch, const std::function<void()>& body);
  void run(const unsigned (&index)[3], uint32_t launch_number, uint32_t block_number);

  const Launch& launch() const { return launch_; }
  unsigned index(int axis) const { return index_[axis]; }
  unsigned thread_index() const { return current_->index; }

  void sync_threads();
  void sync_warp();
  void fence() {
    ++fences_of(block_number_, current_->index);
    fenced_ = true;
  }

  /// All 32 lanes bring their operands; the last one calls apply(operands), then all go on.
  using Apply = void (*)(Block& block, void* (&operands)[kWarp]);
  void collective(const char* instruction, void* operands, Apply apply);

  void load_shared(uint32_t address, void* to, uint32_t bytes, unsigned thread, const char* instruction = "a load");
  void store_shared(uint32_t address, const void* from, uint32_t bytes);
  void load_global(Address address, void* to, uint32_t bytes);
  void store_global(Address address, const void* from, uint32_t bytes);
  uint32_t atomic_global(Address address, const std::function<uint32_t(uint32_t)>& change);

  void copy_async(const AsyncCopy& copy);
  void commit_copies();
  void wait_copies(unsigned pending);

  // phases.cpp
  void barrier_init(uint32_t address, unsigned count);
  void barrier_arrive(uint32_t address);
  void barrier_arrive_expect(uint32_t address, uint32_t bytes);
  void barrier_arrive_copies(uint32_t address);
  void barrier_wait(uint32_t address, uint32_t parity);
  void bulk_copy(uint32_t to, Address from, uint32_t bytes, uint32_t barrier);
  void async_proxy_fence();

  // wgmma.cpp
  void wgmma_fence() { current_->products_fenced = true; }
  void wgmma_commit();
  void wgmma_wait(unsigned pending);
  /// A lane's part of a product that its warp has computed.
  void start_product(unsigned lane, Product product);
  /// The value that register `index` of d has, or will have when what is under way is done.
  uint32_t product_register(unsigned lane, const uint32_t* d, unsigned index) const;
  void note_product(uint64_t what);
  /// Reads 16 bytes of an operand as the asynchronous proxy does.
  void load_async_proxy(uint32_t address, void* to, unsigned thread);
  uint32_t tick() { return ++now_; }

  /// The thread of lane `lane` of the warp that runs.
  unsigned lane_thread(unsigned lane) const { return current_->index / kWarp * kWarp + lane; }
  [[noreturn]] void fault(const std::string& what) const { fault(what, current_->index); }
  [[noreturn]] void fault(const std::string& what, unsigned thread) const;

 private:
  static void thread_body(void* thread);
  void suspend(Wait wait, const char* instruction);
  bool run_warp(unsigned warp);
  [[noreturn]] void report_deadlock() const;
  void reset_threads();
  void check_shared_range(uint32_t address, uint32_t bytes, const char* what) const;
  /// True if what `other` did at `time` is ordered before what `thread` does now.
  bool ordered(unsigned other, uint32_t time, unsigned thread) const;
  void check_write(uint32_t address, uint32_t bytes, const char* what);
  void start_copy(const AsyncCopy& copy, const char* what);
  void finish_copy(const AsyncCopy& copy, uint32_t time);
  void start_tracking();
  PhaseBarrier& phase_barrier(uint32_t address, const char* what);
  void announce(PhaseBarrier& barrier);
  /// The lanes of a warp know what each of them does.
  void share_known(unsigned warp);
  void arrive(uint32_t address, PhaseBarrier& barrier);
  bool finish_coming();
  void end_phase(uint32_t address, PhaseBarrier& barrier);
  void check_end() const;
  uint32_t& seen_of(unsigned thread, unsigned other) { return seen_[thread * threads_.size() + other]; }
  bool reads_known(uint32_t address, unsigned warp, unsigned thread) const;
  /// True if what `other` did at `time` is ordered before a proxy fence of `thread`.
  bool fenced(unsigned other, uint32_t time, unsigned thread) const;
  void finish_product(Thread& thread, const Product& product);
  void read_global(Address address, void* to, uint32_t bytes, bool atomic = false);
  size_t grid_thread(uint32_t block, uint32_t thread) const { return size_t{block} * launch_.threads + thread; }
  uint32_t& fences_of(uint32_t block, uint32_t thread) { return fences_[grid_thread(block, thread)]; }
  void publish();
  void check_published(const Writer& w, Address address);
  Allocation& global(Address address, uint32_t bytes, const char* what) const;

  const Launch& launch_;
  const std::function<void()>& body_;
  unsigned index_[3] = {};
  uint32_t launch_number_ = 0, block_number_ = 0;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  // Of every thread of the grid: its fences, those before its block's last barrier, and those before the last atomic of
  // its block that everyone who sees the atomic sees too.
  std::vector<uint32_t> fences_, fences_at_barrier_, published_;
  std::vector<unsigned char> shared_;
  std::vector<SharedByte> shadow_;
  Thread* current_ = nullptr;
  unsigned waiting_in_barrier_ = 0;
  bool fenced_ = false;  // since the block's last atomic: what other blocks fenced before it is seen from here on
  uint32_t now_ = 1, barrier_time_ = 1;
  // Of threads that meet at phase barriers: what each knows of each, and knew, with the times of the last __syncthreads
  // and __syncwarp, at its last proxy fence; and when each warp last read each 16 bytes of shared memory.
  struct Fence {
    uint32_t own, barrier, warp;
    Known seen;
  };
  std::map<uint32_t, PhaseBarrier> barriers_;
  std::vector<uint32_t> seen_, warp_reads_;
  std::vector<Fence> proxy_fences_;
  std::string failure_;
};

/// The block that runs in this process; a Fault outside of a launch.
Block& block();

}  // namespace turbo::hostsim
