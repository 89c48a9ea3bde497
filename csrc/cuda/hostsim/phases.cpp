// SPDX-License-Identifier: Apache-2.0
// Barriers with phases (mbarrier), the copies that arrive at them, and the fence between the two ways to shared memory.
//
// Copies come as late as can be: when no thread can go on. What a thread knows of others' accesses it has from
// __syncthreads, from __syncwarp, and from phases that it waited for, whose arrivals brought along what they knew.
// Beside races the following is reported: a barrier that is used before its init is known, arrivals beyond its
// count, a bulk copy to a barrier whose init no proxy fence followed, its alignment, copies that no one waited for.
#include <algorithm>
#include <cstdio>

#include "block.h"

namespace turbo::hostsim {
namespace {

std::string barrier_at(uint32_t address) {
  char text[48];
  std::snprintf(text, sizeof text, "the mbarrier at 0x%x", address);
  return text;
}

void join(Known& into, const Known& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

}  // namespace

/// From the first use on of what is sm_90's. Who read what before is not known: all of it, by all, just now.
void Block::start_tracking() {
  if (!seen_.empty()) return;
  seen_.assign(threads_.size() * threads_.size(), 0);
  warp_reads_.assign((shared_.size() + 15) / 16 * warps_.size(), now_);
  proxy_fences_.assign(threads_.size(), {0, 0, 0, Known(threads_.size())});
}

PhaseBarrier& Block::phase_barrier(uint32_t address, const char* what) {
  const auto found = barriers_.find(address);
  if (found == barriers_.end()) fault(std::string(what) + ": there is no mbarrier at " + std::to_string(address));
  PhaseBarrier& barrier = found->second;
  if (!ordered(barrier.made_by, barrier.made_at, current_->index))
    fault(std::string(what) + ": " + barrier_at(address) + " was made by thread " + std::to_string(barrier.made_by) +
          ": a barrier is missing between the two");
  return barrier;
}

void Block::barrier_init(uint32_t address, unsigned count) {
  const uint64_t zero = 0;
  store_shared(address, &zero, 8);
  if (count == 0) fault("mbarrier.init with a count of 0");
  start_tracking();
  barriers_[address] = {count, count, 0, 0, current_->index, ++now_, {}, {}, {}};
}

/// What the running thread knows, and did, is known to those who wait for the phase.
void Block::announce(PhaseBarrier& barrier) {
  const unsigned own = current_->index, first = own / kWarp * kWarp;
  const auto row = seen_.begin() + static_cast<ptrdiff_t>(own * threads_.size());
  Known known(row, row + static_cast<ptrdiff_t>(threads_.size()));
  for (unsigned lane = first; lane < first + kWarp; ++lane)
    known[lane] = std::max(known[lane], lane == own ? now_ : warps_[own / kWarp].sync_time - 1);
  join(barrier.arriving, known);
  ++now_;
}

void Block::end_phase(uint32_t address, PhaseBarrier& barrier) {
  if (barrier.left || barrier.bytes) return;
  ++barrier.phases;
  barrier.left = barrier.count;
  join(barrier.known, barrier.arriving);
  for (Thread& thread : threads_)
    if (thread.wait == Wait::phase && thread.waiting_for == address) thread.wait = Wait::runnable;
}

void Block::arrive(uint32_t address, PhaseBarrier& barrier) {
  if (barrier.left == 0) fault("more arrivals than the count of " + barrier_at(address));
  --barrier.left;
  end_phase(address, barrier);
}

void Block::barrier_arrive(uint32_t address) {
  PhaseBarrier& barrier = phase_barrier(address, "mbarrier.arrive");
  announce(barrier);
  arrive(address, barrier);
}

void Block::barrier_arrive_expect(uint32_t address, uint32_t bytes) {
  PhaseBarrier& barrier = phase_barrier(address, "mbarrier.arrive.expect_tx");
  barrier.bytes += bytes;
  announce(barrier);
  arrive(address, barrier);
}

void Block::barrier_arrive_copies(uint32_t address) {
  PhaseBarrier& barrier = phase_barrier(address, "cp.async.mbarrier.arrive");
  if (!current_->copy_groups.empty()) fault("cp.async.mbarrier.arrive after a commit is not simulated");
  barrier.coming.push_back({false, current_->index, now_++, std::move(current_->open_copies)});
  current_->open_copies.clear();
}

void Block::bulk_copy(uint32_t to, Address from, uint32_t bytes, uint32_t address) {
  PhaseBarrier& barrier = phase_barrier(address, "a bulk copy");
  if (bytes == 0 || bytes % 16 || to % 16 || from % 16)
    fault("a bulk copy of " + std::to_string(bytes) + " bytes from " + global_memory().describe(from) +
          ": it and both places must be multiples of 16");
  if (proxy_fences_[barrier.made_by].own <= barrier.made_at)
    fault("a bulk copy: no proxy fence followed the init of " + barrier_at(address));
  std::vector<AsyncCopy> pieces;
  for (uint32_t at = 0; at < bytes; at += 16) {
    pieces.push_back({to + at, from + at, 16, 16});
    start_copy(pieces.back(), "a bulk copy");
    for (uint32_t byte = to + at; byte < to + at + 16; ++byte) shadow_[byte].by_bulk = true;
  }
  barrier.coming.push_back({true, current_->index, now_++, std::move(pieces)});
}

/// Lets the oldest copies come of each barrier that a thread waits for; false if there are none.
bool Block::finish_coming() {
  bool any = false;
  for (auto& [address, barrier] : barriers_) {
    const bool awaited = std::any_of(threads_.begin(), threads_.end(), [&, at = address](const Thread& thread) {
      return thread.wait == Wait::phase && thread.waiting_for == at;
    });
    if (!awaited || barrier.coming.empty()) continue;
    const PhaseBarrier::Coming coming = std::move(barrier.coming.front());
    barrier.coming.pop_front();
    current_ = &threads_[coming.thread];
    for (const AsyncCopy& copy : coming.copies) {
      finish_copy(copy, coming.time);
      if (coming.bulk) barrier.bytes -= copy.bytes;
    }
    Known known(threads_.size());
    known[coming.thread] = coming.time;
    join(barrier.arriving, known);
    if (coming.bulk)
      end_phase(address, barrier);
    else
      arrive(address, barrier);
    any = true;
  }
  return any;
}

void Block::barrier_wait(uint32_t address, uint32_t parity) {
  PhaseBarrier& barrier = phase_barrier(address, "mbarrier.try_wait");
  current_->parted = true;
  while (barrier.phases % 2 == parity) {
    current_->waiting_for = address;
    suspend(Wait::phase, "mbarrier.try_wait");
  }
  for (size_t other = 0; other < barrier.known.size(); ++other) {
    uint32_t& seen = seen_of(current_->index, static_cast<unsigned>(other));
    seen = std::max(seen, barrier.known[other]);
  }
}

void Block::share_known(unsigned warp) {
  if (seen_.empty()) return;
  const auto row = [&](unsigned lane) {
    return seen_.begin() + static_cast<ptrdiff_t>((warp * kWarp + lane) * threads_.size());
  };
  Known all(threads_.size());
  for (unsigned lane = 0; lane < kWarp; ++lane)
    join(all, Known(row(lane), row(lane) + static_cast<ptrdiff_t>(threads_.size())));
  for (unsigned lane = 0; lane < kWarp; ++lane) std::copy(all.begin(), all.end(), row(lane));
}

void Block::async_proxy_fence() {
  start_tracking();
  const unsigned own = current_->index;
  const auto row = seen_.begin() + static_cast<ptrdiff_t>(own * threads_.size());
  proxy_fences_[own] = {++now_, barrier_time_, warps_[own / kWarp].sync_time,
                        Known(row, row + static_cast<ptrdiff_t>(threads_.size()))};
}

bool Block::fenced(unsigned other, uint32_t time, unsigned thread) const {
  const Fence& fence = proxy_fences_[thread];
  if (other == thread) return time < fence.own;
  if (time < fence.barrier || time <= fence.seen[other]) return true;
  return other / kWarp == thread / kWarp && time < fence.warp;
}

/// At the end of a block.
void Block::check_end() const {
  for (const auto& [address, barrier] : barriers_)
    if (!barrier.coming.empty()) fault("copies are on their way to " + barrier_at(address) + " at the block's end", 0);
  for (unsigned warp = 0; warp < warps_.size(); ++warp)
    if (warps_[warp].products != warps_[std::min<size_t>(warp / 4 * 4, warps_.size() - 1)].products ||
        (warps_[warp].products && warp / 4 * 4 + 4 > warps_.size()))
      fault("wgmma: the four warps of its group did not start the same products", warp * kWarp);
}

}  // namespace turbo::hostsim
