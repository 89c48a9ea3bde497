// SPDX-License-Identifier: Apache-2.0
#include "memory.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace turbo::hostsim {
namespace {

constexpr size_t kAlignment = 256;
constexpr Address kGap = Address{1} << 24;  // farther than any wrong index of a small test

}  // namespace

GlobalMemory& global_memory() {
  static GlobalMemory memory;
  return memory;
}

Address GlobalMemory::allocate(size_t bytes, const std::string& name, size_t shift) {
  const Address address = next_ + shift;
  next_ = (address + bytes + kGap) / kAlignment * kAlignment;
  auto made = std::make_unique<Allocation>();
  made->address = address;
  made->name = name;
  made->bytes.assign(bytes, kUnwritten);
  made->written.assign(bytes, false);
  made->writers.resize((bytes + 3) / 4);
  allocations_.emplace(address, std::move(made));
  return address;
}

void GlobalMemory::release(Address address) {
  if (!allocations_.erase(address)) throw Fault("hostsim: release of memory that is not allocated");
  last_ = nullptr;
}

void GlobalMemory::copy_in(Address to, const void* from, size_t bytes) {
  if (bytes == 0) return;
  Allocation* a = find(to, bytes);
  if (!a) throw Fault("hostsim: copy to " + describe(to) + " of " + std::to_string(bytes) + " bytes");
  std::memcpy(a->bytes.data() + (to - a->address), from, bytes);
  std::fill_n(a->written.begin() + static_cast<ptrdiff_t>(to - a->address), bytes, true);
}

void GlobalMemory::copy_out(void* to, Address from, size_t bytes) const {
  if (bytes == 0) return;
  const Allocation* a = const_cast<GlobalMemory*>(this)->find(from, bytes);
  if (!a) throw Fault("hostsim: copy from " + describe(from) + " of " + std::to_string(bytes) + " bytes");
  std::memcpy(to, a->bytes.data() + (from - a->address), bytes);
}

void GlobalMemory::forget(Address address) {
  Allocation* a = find(address, 1);
  if (!a) throw Fault("hostsim: forget " + describe(address));
  std::fill(a->bytes.begin(), a->bytes.end(), kUnwritten);
  std::fill(a->written.begin(), a->written.end(), false);
}

const Allocation* GlobalMemory::nearest(Address address) const {
  auto after = allocations_.upper_bound(address);
  return after == allocations_.begin() ? nullptr : std::prev(after)->second.get();
}

Allocation* GlobalMemory::find(Address address, size_t bytes) {
  const auto holds = [&](const Allocation* a) {
    return a && address >= a->address && address - a->address + bytes <= a->bytes.size();
  };
  if (!holds(last_)) last_ = const_cast<Allocation*>(nearest(address));
  return holds(last_) ? last_ : nullptr;
}

std::string GlobalMemory::describe(Address address) const {
  char number[32];
  std::snprintf(number, sizeof number, "0x%llx", static_cast<unsigned long long>(address));
  const Allocation* a = nearest(address);
  if (!a) return std::string("global address ") + number + ", before all memory";
  const Address offset = address - a->address;
  return std::string("global address ") + number + ", byte " + std::to_string(offset) + " of '" + a->name + "' (" +
         std::to_string(a->bytes.size()) + " bytes)";
}

}  // namespace turbo::hostsim
