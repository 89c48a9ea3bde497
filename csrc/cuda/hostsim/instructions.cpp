// SPDX-License-Identifier: Apache-2.0
#include "instructions.h"

#include <algorithm>
#include <cstring>

#include "block.h"
#include "floats.h"

namespace turbo::hostsim {
namespace {

constexpr unsigned kGroup = 4;  // lanes that share a row of an accumulator

float to_float(Half type, uint16_t bits) { return type == Half::f16 ? f16_to_float(bits) : bf16_to_float(bits); }
uint16_t from_double(Half type, double v) { return type == Half::f16 ? to_f16(v) : to_bf16(v); }

template <class Acc>
struct Mma {
  Acc* d;
  const uint32_t* a;
  const uint32_t* b;
  Half type;
};

/// Element `index` of a register that holds 4 / sizeof(element) of them.
uint16_t half_of(uint32_t reg, unsigned index) { return static_cast<uint16_t>(reg >> (16 * index)); }
int8_t byte_of(uint32_t reg, unsigned index) { return static_cast<int8_t>(reg >> (8 * index)); }

/// Visits the fragments of a 16 x K by K x 8 product whose registers hold `Per` elements along K: A(m, k), B(k, n).
template <unsigned Per, class Acc, class ToA, class ToB>
void gather(void* (&lanes)[kWarp], const ToA& to_a, const ToB& to_b) {
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    const auto& own = *static_cast<Mma<Acc>*>(lanes[lane]);
    const unsigned group = lane / kGroup, member = lane % kGroup;
    for (unsigned i = 0; i < 4; ++i)
      for (unsigned e = 0; e < Per; ++e)
        to_a(group + 8 * (i % 2), kGroup * Per * (i / 2) + Per * member + e, own.a[i], e);
    for (unsigned i = 0; i < 2; ++i)
      for (unsigned e = 0; e < Per; ++e) to_b(kGroup * Per * i + Per * member + e, group, own.b[i], e);
  }
}

/// Calls update(accumulator, m, n) for all of D.
template <class Acc, class Update>
void scatter(void* (&lanes)[kWarp], const Update& update) {
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    auto& own = *static_cast<Mma<Acc>*>(lanes[lane]);
    for (unsigned i = 0; i < 4; ++i) update(own.d[i], lane / kGroup + 8 * (i / 2), 2 * (lane % kGroup) + i % 2);
  }
}

void apply_half_mma(Block&, void* (&lanes)[kWarp]) {
  float a[16][16], b[8][16];
  const Half type = static_cast<Mma<float>*>(lanes[0])->type;
  gather<2, float>(
      lanes, [&](unsigned m, unsigned k, uint32_t reg, unsigned e) { a[m][k] = to_float(type, half_of(reg, e)); },
      [&](unsigned k, unsigned n, uint32_t reg, unsigned e) { b[n][k] = to_float(type, half_of(reg, e)); });
  scatter<float>(lanes, [&](float& d, unsigned m, unsigned n) {
    for (unsigned k0 = 0; k0 < 16; k0 += 8) {
      double sum = d;
      for (unsigned k = k0; k < k0 + 8; ++k) sum += static_cast<double>(a[m][k]) * b[n][k];
      d = toward_zero(sum);
    }
  });
  ++total_counts().mma;
}

void apply_byte_mma(Block&, void* (&lanes)[kWarp]) {
  int32_t a[16][32], b[8][32];
  gather<4, int32_t>(
      lanes, [&](unsigned m, unsigned k, uint32_t reg, unsigned e) { a[m][k] = byte_of(reg, e); },
      [&](unsigned k, unsigned n, uint32_t reg, unsigned e) { b[n][k] = byte_of(reg, e); });
  scatter<int32_t>(lanes, [&](int32_t& d, unsigned m, unsigned n) {
    int64_t sum = d;
    for (unsigned k = 0; k < 32; ++k) sum += a[m][k] * b[n][k];
    d = static_cast<int32_t>(sum);
  });
  ++total_counts().mma;
}

struct Ldmatrix {
  uint32_t* d;
  uint32_t address;
};

/// Cycles beyond the first in which 32 banks of 4 bytes give eight rows of 16 bytes.
uint64_t bank_conflicts(const uint32_t (&rows)[8]) {
  unsigned users[8] = {};
  for (unsigned r = 0; r < 8; ++r)
    if (std::find(rows, rows + r, rows[r]) == rows + r) ++users[rows[r] / 16 % 8];
  return *std::max_element(users, users + 8) - 1;
}

void apply_ldmatrix(Block& block, void* (&lanes)[kWarp]) {
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    uint32_t rows[8];
    for (unsigned r = 0; r < 8; ++r) {
      const unsigned lane = 8 * matrix + r;
      rows[r] = static_cast<Ldmatrix*>(lanes[lane])->address;
      uint32_t row[4];
      block.load_shared(rows[r], row, 16, block.lane_thread(lane), "ldmatrix");
      for (unsigned i = 0; i < 4; ++i) static_cast<Ldmatrix*>(lanes[kGroup * r + i])->d[matrix] = row[i];
    }
    total_counts().ldmatrix_conflicts += bank_conflicts(rows);
  }
  ++total_counts().ldmatrix;
}

struct Shuffle {
  uint32_t value, result;
  unsigned source;
};

void apply_shuffle(Block& block, void* (&lanes)[kWarp]) {
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    auto& own = *static_cast<Shuffle*>(lanes[lane]);
    if (own.source >= kWarp) block.fault("shfl from lane " + std::to_string(own.source), block.lane_thread(lane));
    own.result = static_cast<Shuffle*>(lanes[own.source])->value;
  }
}

}  // namespace

void mma_m16n8k16(Half type, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Mma<float> own{d, a, b, type};
  block().collective(type == Half::f16 ? "mma.m16n8k16.f16" : "mma.m16n8k16.bf16", &own, &apply_half_mma);
}

void mma_m16n8k32(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Mma<int32_t> own{d, a, b, Half::f16};
  block().collective("mma.m16n8k32.s8", &own, &apply_byte_mma);
}

void ldmatrix_x4(uint32_t (&d)[4], uint32_t row_address) {
  Ldmatrix own{d, row_address};
  block().collective("ldmatrix", &own, &apply_ldmatrix);
}

uint32_t shuffle_xor(uint32_t value, unsigned mask) {
  Shuffle own{value, 0, (block().thread_index() % kWarp) ^ mask};
  block().collective("shfl", &own, &apply_shuffle);
  return own.result;
}

uint32_t shuffle(uint32_t value, unsigned source) {
  Shuffle own{value, 0, source};
  block().collective("shfl", &own, &apply_shuffle);
  return own.result;
}

uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, unsigned table) {
  uint32_t out = 0;
  for (unsigned i = 0; i < 8; ++i)
    if (table >> i & 1) out |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return out;
}

uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t out = 0;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned pick = selector >> (4 * i) & 15;
    uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (pick & 7))) & 255;
    if (pick & 8) byte = byte & 128 ? 255 : 0;
    out |= byte << (8 * i);
  }
  return out;
}

uint32_t fma2(Half type, uint32_t a, uint32_t b, uint32_t c) {
  uint32_t out = 0;
  for (unsigned i = 0; i < 2; ++i) {
    const double product = static_cast<double>(to_float(type, half_of(a, i))) * to_float(type, half_of(b, i));
    out |= static_cast<uint32_t>(from_double(type, product + to_float(type, half_of(c, i)))) << (16 * i);
  }
  return out;
}

}  // namespace turbo::hostsim
