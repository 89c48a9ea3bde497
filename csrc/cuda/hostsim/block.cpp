// SPDX-License-Identifier: Apache-2.0
// Scheduling: blocks, warps, lanes, barriers. Memory accesses are in access.cpp.
#include "block.h"

#include <algorithm>
#include <numeric>
#include <random>

namespace turbo::hostsim {
namespace {

constexpr uint32_t kMostShared = 227 * 1024;  // a block's, on sm_90; the largest of the targets
constexpr unsigned kMostThreads = 1024;

Block* running = nullptr;
Order order = Order::ascending;
std::mt19937 random_order;
uint32_t launches = 0;

Stacks& stacks() {
  static Stacks all;
  return all;
}

std::vector<unsigned> turns(unsigned count) {
  std::vector<unsigned> out(count);
  std::iota(out.begin(), out.end(), 0u);
  if (order == Order::descending) std::reverse(out.begin(), out.end());
  if (order == Order::shuffled) std::shuffle(out.begin(), out.end(), random_order);
  return out;
}

std::string where(const Launch& launch, const unsigned (&index)[3]) {
  return "hostsim: " + launch.kernel + ": block (" + std::to_string(index[0]) + ", " + std::to_string(index[1]) + ", " +
         std::to_string(index[2]) + ")";
}

}  // namespace

void set_order(Order chosen, uint32_t seed) {
  order = chosen;
  random_order.seed(seed);
}

Counts& total_counts() {
  static Counts counts;
  return counts;
}

Block& block() {
  if (!running) throw Fault("hostsim: a device function was called outside of a launch");
  return *running;
}

void launch(const Launch& what, const std::function<void()>& body) {
  if (running) throw Fault("hostsim: " + what.kernel + ": launched from inside a kernel");
  if (what.threads == 0 || what.threads > kMostThreads || what.threads % kWarp)
    throw Fault("hostsim: " + what.kernel + ": " + std::to_string(what.threads) + " threads of a block, expected a multiple of 32 up to 1024");
  if (what.shared_bytes > kMostShared)
    throw Fault("hostsim: " + what.kernel + ": " + std::to_string(what.shared_bytes) + " bytes of shared memory, a block has at most " +
                std::to_string(kMostShared));
  const unsigned blocks = what.grid[0] * what.grid[1] * what.grid[2];
  if (blocks == 0) throw Fault("hostsim: " + what.kernel + ": a grid without blocks");
  stacks().reserve(what.threads);
  Block block(what, body);
  struct Running {
    explicit Running(Block* b) { running = b; }
    ~Running() { running = nullptr; }
  } guard(&block);
  ++launches;
  for (const unsigned i : turns(blocks)) {
    const unsigned index[3] = {i % what.grid[0], i / what.grid[0] % what.grid[1], i / what.grid[0] / what.grid[1]};
    block.run(index, launches, i);
  }
}

Block::Block(const Launch& launch, const std::function<void()>& body)
    : launch_(launch), body_(body), threads_(launch.threads), warps_(launch.threads / kWarp),
      fences_(size_t{launch.grid[0]} * launch.grid[1] * launch.grid[2] * launch.threads), fences_at_barrier_(fences_),
      published_(fences_) {}

void Block::fault(const std::string& what, unsigned thread) const {
  throw Fault(where(launch_, index_) + " thread " + std::to_string(thread) + ": " + what);
}

void Block::thread_body(void* argument) {
  Block& self = *running;
  auto* thread = static_cast<Thread*>(argument);
  try {
    self.body_();
    if (!thread->open_copies.empty() || !thread->copy_groups.empty())
      self.fault("ends while its cp.async copies are on their way");
    if (!thread->open_products.empty() || !thread->product_groups.empty())
      self.fault("ends while its products are under way");
  } catch (const std::exception& error) {
    if (self.failure_.empty()) self.failure_ = error.what();
  }
  self.suspend(Wait::ended, "its end");
}

void Block::suspend(Wait wait, const char* instruction) {
  Thread* self = current_;
  self->wait = wait;
  self->waiting_in = instruction;
  self->fibre.suspend();
}

void Block::reset_threads() {
  for (unsigned t = 0; t < threads_.size(); ++t) {
    Thread& thread = threads_[t];
    thread.index = t;
    thread.wait = Wait::runnable;
    thread.waiting_in = "";
    thread.open_copies.clear();
    thread.copy_groups.clear();
    thread.products_fenced = thread.parted = false;
    thread.open_products.clear();
    thread.product_groups.clear();
    thread.fibre.prepare(stacks().end(t), &Block::thread_body, &thread);
  }
  for (Warp& warp : warps_) warp = {"", {}, 0, now_, 0};
  waiting_in_barrier_ = 0;
  barriers_.clear();
  seen_.clear();
}

void Block::run(const unsigned (&index)[3], uint32_t launch_number, uint32_t block_number) {
  std::copy(index, index + 3, index_);
  launch_number_ = launch_number;
  block_number_ = block_number;
  shared_.assign(launch_.shared_bytes, GlobalMemory::kUnwritten);
  shadow_.assign(launch_.shared_bytes, SharedByte{});
  barrier_time_ = ++now_;
  reset_threads();
  fenced_ = false;
  const std::vector<unsigned> warps = turns(static_cast<unsigned>(warps_.size()));
  for (bool moved = true; moved;) {
    moved = false;
    for (const unsigned warp : warps) {
      moved |= run_warp(warp);
      if (!failure_.empty()) throw Fault(failure_);
    }
    // As late as can be: what does not wait for it will see that it is missing.
    if (!moved) moved = finish_coming();
  }
  if (std::any_of(threads_.begin(), threads_.end(), [](const Thread& t) { return t.wait != Wait::ended; }))
    report_deadlock();
  check_end();
}

/// Runs the lanes of a warp until none can go on.
bool Block::run_warp(unsigned warp) {
  bool any = false;
  for (bool moved = true; moved;) {
    moved = false;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      Thread& thread = threads_[warp * kWarp + lane];
      if (thread.wait != Wait::runnable) continue;
      current_ = &thread;
      thread.fibre.resume();
      if (!failure_.empty()) return true;
      moved = any = true;
    }
  }
  return any;
}

void Block::report_deadlock() const {
  std::string text = where(launch_, index_) + ": no thread can go on:";
  for (unsigned t = 0; t < threads_.size();) {
    unsigned end = t + 1;
    const auto same = [&](unsigned other) {
      return std::string(threads_[other].waiting_in) == threads_[t].waiting_in;
    };
    while (end < threads_.size() && same(end)) ++end;
    text += " threads " + std::to_string(t) + " to " + std::to_string(end - 1) +
            (threads_[t].wait == Wait::ended ? " have ended;" : std::string(" wait in ") + threads_[t].waiting_in + ";");
    t = end;
  }
  throw Fault(text);
}

void Block::sync_threads() {
  if (++waiting_in_barrier_ < threads_.size()) return suspend(Wait::block, "__syncthreads");
  waiting_in_barrier_ = 0;
  barrier_time_ = ++now_;
  const auto first = static_cast<ptrdiff_t>(grid_thread(block_number_, 0));
  std::copy_n(fences_.begin() + first, launch_.threads, fences_at_barrier_.begin() + first);
  for (Thread& thread : threads_) {
    thread.parted = false;
    if (thread.wait == Wait::block) thread.wait = Wait::runnable;
  }
}

void Block::sync_warp() {
  collective("__syncwarp", nullptr, [](Block& block, void* (&)[kWarp]) {
    block.warps_[block.current_->index / kWarp].sync_time = ++block.now_;
    block.share_known(block.current_->index / kWarp);
    for (unsigned lane = 0; lane < kWarp; ++lane) block.threads_[block.lane_thread(lane)].parted = false;
  });
}

void Block::collective(const char* instruction, void* operands, Apply apply) {
  Warp& warp = warps_[current_->index / kWarp];
  if (warp.arrived == 0)
    warp.instruction = instruction;
  else if (std::string(warp.instruction) != instruction)
    fault(std::string("lanes of one warp meet in different instructions: this one in ") + instruction + ", others in " +
          warp.instruction);
  warp.operands[current_->index % kWarp] = operands;
  if (++warp.arrived < kWarp) return suspend(Wait::warp, instruction);
  warp.arrived = 0;
  apply(*this, warp.operands);
  const unsigned first = current_->index / kWarp * kWarp;
  for (unsigned lane = 0; lane < kWarp; ++lane)
    if (threads_[first + lane].wait == Wait::warp) threads_[first + lane].wait = Wait::runnable;
}

}  // namespace turbo::hostsim
