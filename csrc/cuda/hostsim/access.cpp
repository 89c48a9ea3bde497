// SPDX-License-Identifier: Apache-2.0
// What a block's threads do to memory, and what is wrong with it.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "block.h"

namespace turbo::hostsim {
namespace {

std::string shared_place(uint32_t address, uint32_t bytes) {
  char text[64];
  std::snprintf(text, sizeof text, "%u bytes of shared memory at 0x%x", bytes, address);
  return text;
}

}  // namespace

bool Block::ordered(unsigned other, uint32_t time, unsigned thread) const {
  if (other == thread || time < barrier_time_) return true;
  if (!seen_.empty() && time <= seen_[thread * threads_.size() + other]) return true;
  return other / kWarp == thread / kWarp && time < warps_[thread / kWarp].sync_time;
}

void Block::check_shared_range(uint32_t address, uint32_t bytes, const char* what) const {
  if (address % bytes) fault(std::string(what) + " of " + shared_place(address, bytes) + " is not aligned to its size");
  if (uint64_t{address} + bytes > shared_.size())
    fault(std::string(what) + " of " + shared_place(address, bytes) + " is out of range, the block has " +
          std::to_string(shared_.size()));
}

void Block::load_shared(uint32_t address, void* to, uint32_t bytes, unsigned thread, const char* instruction) {
  check_shared_range(address, bytes, instruction);
  for (uint32_t at = address; at < address + bytes; ++at) {
    SharedByte& byte = shadow_[at];
    const auto say = [&](const std::string& what) {
      fault(std::string(instruction) + " of " + shared_place(address, bytes) + what, thread);
    };
    if (byte.state == SharedByte::unwritten) say(" that nothing has written");
    if (byte.state == SharedByte::in_flight)
      say(" that the " + std::string(byte.by_bulk ? "bulk copy" : "cp.async") + " of thread " +
          std::to_string(byte.writer) + " is on its way to: a wait is missing");
    if (!ordered(byte.writer, byte.write_time, thread))
      say(" that thread " + std::to_string(byte.writer) + " wrote: a barrier is missing between the two");
    const bool other_warp = byte.reader != SharedByte::kNobody && byte.read_time >= barrier_time_ &&
                            (byte.reader == SharedByte::kSeveral || byte.reader / kWarp != thread / kWarp);
    byte.reader = other_warp ? SharedByte::kSeveral : static_cast<uint16_t>(thread);
    byte.read_time = now_;
    if (!seen_.empty()) warp_reads_[at / 16 * warps_.size() + thread / kWarp] = now_;
  }
  std::memcpy(to, shared_.data() + address, bytes);
}

/// True if what the lanes of `warp` read near `address` since the last barrier is ordered before what `thread` does now:
/// the one that told of it spoke for all of them.
bool Block::reads_known(uint32_t address, unsigned warp, unsigned thread) const {
  if (seen_.empty()) return false;
  const uint32_t time = warp_reads_[address / 16 * warps_.size() + warp];
  for (unsigned lane = 0; lane < kWarp; ++lane)
    if (ordered(warp * kWarp + lane, time, thread)) return true;
  return false;
}

void Block::check_write(uint32_t address, uint32_t bytes, const char* what) {
  check_shared_range(address, bytes, what);
  const unsigned thread = current_->index;
  for (uint32_t at = address; at < address + bytes; ++at) {
    const SharedByte& byte = shadow_[at];
    const auto say = [&](const std::string& other) {
      fault(std::string(what) + " of " + shared_place(address, bytes) + " that " + other);
    };
    if (byte.state == SharedByte::in_flight)
      say("the " + std::string(byte.by_bulk ? "bulk copy" : "cp.async") + " of thread " + std::to_string(byte.writer) +
          " is on its way to");
    if (byte.writer != SharedByte::kNobody && !ordered(byte.writer, byte.write_time, thread))
      say("thread " + std::to_string(byte.writer) + " wrote: a barrier is missing between the two");
    if (byte.reader == SharedByte::kNobody || byte.read_time < barrier_time_) continue;
    if (byte.reader == SharedByte::kSeveral) {
      for (unsigned warp = 0; warp < warps_.size(); ++warp)
        if (!reads_known(at, warp, thread)) say("several warps read: a barrier is missing between the two");
      continue;
    }
    if (!ordered(byte.reader, byte.read_time, thread))
      say("thread " + std::to_string(byte.reader) + " read: a barrier is missing between the two");
  }
}

void Block::store_shared(uint32_t address, const void* from, uint32_t bytes) {
  check_write(address, bytes, "a store");
  std::memcpy(shared_.data() + address, from, bytes);
  for (uint32_t at = address; at < address + bytes; ++at) {
    shadow_[at].state = SharedByte::written;
    shadow_[at].writer = static_cast<uint16_t>(current_->index);
    shadow_[at].write_time = now_;
    shadow_[at].by_bulk = false;
  }
}

void Block::copy_async(const AsyncCopy& copy) {
  if (copy.bytes != 4 && copy.bytes != 8 && copy.bytes != 16)
    fault("cp.async of " + std::to_string(copy.bytes) + " bytes, there are those of 4, 8 and 16");
  if (copy.read_bytes > copy.bytes) fault("cp.async reads more than it writes");
  if (copy.from % copy.bytes)
    fault("cp.async of " + std::to_string(copy.bytes) + " bytes from " + global_memory().describe(copy.from) +
          " is not aligned to its size");
  start_copy(copy, "cp.async");
  current_->open_copies.push_back(copy);
}

/// Marks where a copy of the running thread goes as being on its way.
void Block::start_copy(const AsyncCopy& copy, const char* what) {
  if (copy.read_bytes) global(copy.from, copy.read_bytes, what);
  check_write(copy.to, copy.bytes, what);
  std::memset(shared_.data() + copy.to, GlobalMemory::kUnwritten, copy.bytes);
  for (uint32_t at = copy.to; at < copy.to + copy.bytes; ++at) {
    shadow_[at].state = SharedByte::in_flight;
    shadow_[at].writer = static_cast<uint16_t>(current_->index);
    shadow_[at].write_time = now_;
    shadow_[at].by_bulk = false;
  }
}

void Block::commit_copies() {
  current_->copy_groups.push_back(std::move(current_->open_copies));
  current_->open_copies.clear();
}

void Block::wait_copies(unsigned pending) {
  while (current_->copy_groups.size() > pending) {
    for (const AsyncCopy& copy : current_->copy_groups.front()) finish_copy(copy, now_);
    current_->copy_groups.pop_front();
  }
}

void Block::finish_copy(const AsyncCopy& copy, uint32_t time) {
  unsigned char data[16] = {};
  if (copy.read_bytes) read_global(copy.from, data, copy.read_bytes);
  std::memcpy(shared_.data() + copy.to, data, copy.bytes);
  for (uint32_t at = copy.to; at < copy.to + copy.bytes; ++at) {
    shadow_[at].state = SharedByte::written;
    shadow_[at].write_time = time;
  }
}

Allocation& Block::global(Address address, uint32_t bytes, const char* what) const {
  Allocation* a = global_memory().find(address, bytes);
  if (!a)
    fault(std::string(what) + " of " + std::to_string(bytes) + " bytes at " + global_memory().describe(address) +
          " is out of range");
  return *a;
}

void Block::load_global(Address address, void* to, uint32_t bytes) {
  if (address % bytes)
    fault("a load of " + std::to_string(bytes) + " bytes at " + global_memory().describe(address) +
          " is not aligned to its size");
  read_global(address, to, bytes);
}

void Block::read_global(Address address, void* to, uint32_t bytes, bool atomic) {
  Allocation& a = global(address, bytes, "a load");
  const Address offset = address - a.address;
  for (Address at = offset; at < offset + bytes; ++at)
    if (!a.written[at])
      fault("a load of " + std::to_string(bytes) + " bytes at " + global_memory().describe(address) +
            " that nothing has written");
  for (Address word = offset / 4; word <= (offset + bytes - 1) / 4; ++word) {
    const Writer& w = a.writers[word];
    if (w.launch != launch_number_) continue;
    if (w.block != block_number_) check_published(w, address);
    if (w.block != block_number_ && !atomic && !fenced_)
      fault("a load at " + global_memory().describe(address) + " that block number " + std::to_string(w.block) +
            " wrote, without a __threadfence since this block's last atomic");
  }
  std::memcpy(to, a.bytes.data() + offset, bytes);
}

void Block::check_published(const Writer& w, Address address) {
  const size_t thread = grid_thread(w.block, w.thread);
  if (published_[thread] != w.fences) return;
  fault("a load at " + global_memory().describe(address) + " that thread " + std::to_string(w.thread) +
        " of block number " + std::to_string(w.block) + " wrote without a __threadfence after it" +
        (fences_[thread] == w.fences ? "" : " before a barrier and the block's next atomic"));
}

/// The running thread does an atomic: whoever sees it sees what it fenced itself, and what others fenced before the
/// last barrier.
void Block::publish() {
  const auto first = static_cast<ptrdiff_t>(grid_thread(block_number_, 0));
  std::copy_n(fences_at_barrier_.begin() + first, launch_.threads, published_.begin() + first);
  const size_t own = grid_thread(block_number_, current_->index);
  published_[own] = fences_[own];
}

void Block::store_global(Address address, const void* from, uint32_t bytes) {
  if (address % bytes)
    fault("a store of " + std::to_string(bytes) + " bytes at " + global_memory().describe(address) +
          " is not aligned to its size");
  Allocation& a = global(address, bytes, "a store");
  const Address offset = address - a.address;
  std::memcpy(a.bytes.data() + offset, from, bytes);
  std::fill_n(a.written.begin() + static_cast<ptrdiff_t>(offset), bytes, true);
  for (Address word = offset / 4; word <= (offset + bytes - 1) / 4; ++word)
    a.writers[word] = {launch_number_, block_number_, current_->index, fences_of(block_number_, current_->index)};
}

uint32_t Block::atomic_global(Address address, const std::function<uint32_t(uint32_t)>& change) {
  if (address % 4) fault("an atomic at " + global_memory().describe(address) + " is not aligned to its size");
  uint32_t before = 0;
  read_global(address, &before, 4, true);
  fenced_ = false;
  publish();
  const uint32_t after = change(before);
  Allocation& a = global(address, 4, "an atomic");
  std::memcpy(a.bytes.data() + (address - a.address), &after, 4);
  return before;
}

}  // namespace turbo::hostsim
