// SPDX-License-Identifier: Apache-2.0
#include "fibre.h"

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if !defined(__x86_64__)
#error "hostsim switches stacks with x86-64 instructions"
#endif

// Saves what a function must keep for its caller, then goes on where the other stack left off.
extern "C" void turbo_hostsim_switch(void** save, void* to);
asm(R"(
.text
.globl turbo_hostsim_switch
.hidden turbo_hostsim_switch
.type turbo_hostsim_switch, @function
turbo_hostsim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size turbo_hostsim_switch, .-turbo_hostsim_switch
)");

namespace turbo::hostsim {
namespace {

constexpr size_t kPage = 4096, kStack = 64 * 1024, kStride = kStack + kPage;
constexpr int kSavedRegisters = 6;

Fibre* starting = nullptr;

}  // namespace

void Fibre::prepare(void* stack_end, Body body, void* argument) {
  body_ = body;
  argument_ = argument;
  // As if enter() had just been called: the stack pointer is 8 below a multiple of 16.
  auto* slot = static_cast<uintptr_t*>(stack_end);
  *--slot = 0;
  *--slot = reinterpret_cast<uintptr_t>(&Fibre::enter);
  for (int i = 0; i < kSavedRegisters; ++i) *--slot = 0;
  own_ = slot;
}

void Fibre::enter() {
  Fibre* self = starting;
  self->body_(self->argument_);
  __builtin_trap();
}

void Fibre::resume() {
  starting = this;
  turbo_hostsim_switch(&caller_, own_);
}

void Fibre::suspend() { turbo_hostsim_switch(&own_, caller_); }

Stacks::~Stacks() {
  if (memory_) munmap(memory_, count_ * kStride);
}

void Stacks::reserve(unsigned count) {
  if (count <= count_) return;
  if (memory_) munmap(memory_, count_ * kStride);
  void* memory = mmap(nullptr, count * kStride, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<char*>(memory);
  count_ = count;
  for (unsigned i = 0; i < count; ++i) mprotect(memory_ + i * kStride, kPage, PROT_NONE);
}

void* Stacks::end(unsigned index) const { return memory_ + (index + 1) * kStride; }

}  // namespace turbo::hostsim
