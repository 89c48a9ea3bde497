// SPDX-License-Identifier: Apache-2.0
// The simulator's memory and settings behind C functions, for the tests in Python.
#include <cstring>

#include "hostsim/block.h"
#include "hostsim/sites.h"

namespace hostsim = turbo::hostsim;

extern "C" {

uint64_t sim_allocate(size_t bytes, const char* name, size_t shift) {
  return hostsim::global_memory().allocate(bytes, name, shift);
}
void sim_release(uint64_t address) { hostsim::global_memory().release(address); }
void sim_copy_in(uint64_t to, const void* from, size_t bytes) { hostsim::global_memory().copy_in(to, from, bytes); }
void sim_copy_out(void* to, uint64_t from, size_t bytes) { hostsim::global_memory().copy_out(to, from, bytes); }
void sim_set_order(int order, uint32_t seed) { hostsim::set_order(static_cast<hostsim::Order>(order), seed); }
/// mma, wgmma, ldmatrix, cycles lost to bank conflicts of ldmatrix since the last call.
void sim_counts(uint64_t* out) {
  const hostsim::Counts& counts = hostsim::total_counts();
  out[0] = counts.mma;
  out[1] = counts.wgmma;
  out[2] = counts.ldmatrix;
  out[3] = counts.ldmatrix_conflicts;
  hostsim::total_counts() = {};
}
/// Writes hostsim::take_sites(), terminated, if it fits; its length.
size_t sim_take_sites(char* out, size_t bytes) {
  const std::string sites = hostsim::take_sites();
  if (sites.size() < bytes) std::memcpy(out, sites.c_str(), sites.size() + 1);
  return sites.size();
}
void sim_leave_out(const char* site) { hostsim::leave_out(site); }
}
