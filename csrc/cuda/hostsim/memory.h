// SPDX-License-Identifier: Apache-2.0
// Device memory of the simulator. Addresses are numbers that no processor maps: a kernel that follows a pointer by
// itself, not through device.h, ends the program at once, as a host pointer would on a device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace turbo::hostsim {

/// What a kernel did wrong: names kernel, block, thread and address.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

using Address = uint64_t;

/// Who wrote a word of global memory last, for the check that another block sees it only after a fence.
struct Writer {
  uint32_t launch = 0, block = 0, thread = 0, fences = 0;
};

struct Allocation {
  Address address;
  std::string name;
  std::vector<unsigned char> bytes;
  std::vector<bool> written;
  std::vector<Writer> writers;  // one for each 4 bytes
};

/// Global memory: every allocation has a name and lies far from every other.
class GlobalMemory {
 public:
  /// `bytes` of unwritten memory that starts `shift` bytes after a multiple of 256.
  Address allocate(size_t bytes, const std::string& name, size_t shift = 0);
  void release(Address address);
  void copy_in(Address to, const void* from, size_t bytes);
  /// Copies out what lies there, written or not; unwritten bytes are kUnwritten.
  void copy_out(void* to, Address from, size_t bytes) const;
  /// Marks everything of an allocation as never written, with kUnwritten in it.
  void forget(Address address);

  /// The allocation that `bytes` from `address` on lie in, or nullptr.
  Allocation* find(Address address, size_t bytes);
  /// The place of an address, in words: offset and allocation.
  std::string describe(Address address) const;

  /// NaN in fp16, bf16 and fp32.
  static constexpr unsigned char kUnwritten = 0xFF;

 private:
  const Allocation* nearest(Address address) const;

  std::map<Address, std::unique_ptr<Allocation>> allocations_;
  Address next_ = Address{1} << 56;  // not canonical on x86-64
  Allocation* last_ = nullptr;
};

GlobalMemory& global_memory();

/// What is known of one byte of shared memory. Times are those of Block::now.
struct SharedByte {
  enum State : uint8_t { unwritten, written, in_flight };
  static constexpr uint16_t kSeveral = 0xFFFF, kNobody = 0xFFFE;

  uint32_t write_time = 0, read_time = 0;
  uint16_t writer = kNobody, reader = kNobody;
  State state = unwritten;
  bool by_bulk = false;  // written by the asynchronous proxy
};

}  // namespace turbo::hostsim
