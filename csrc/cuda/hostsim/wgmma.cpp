// SPDX-License-Identifier: Apache-2.0
// Reported beside races: registers that change, and operands that are overwritten, while a product reads them; products
// without a fence of registers before them, or of the proxies after ordinary stores and cp.async; lanes that may have
// parted; descriptors that the layout does not allow.
#include "wgmma.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "block.h"
#include "floats.h"

namespace turbo::hostsim {
namespace {

constexpr uint32_t kNoValue = 0x7FC0DEAD;  // of d while a product is under way: NaN
constexpr unsigned kRowBytes = 32;         // of k, in one product

struct Wgmma {
  bool bytes;
  Half type;
  uint32_t* d;
  unsigned columns;
  const uint32_t* a;
  uint64_t b;
};

/// B's place, decoded.
struct Matrix {
  uint32_t start, stride, row_bytes;

  uint32_t chunk(unsigned row, unsigned index) const {
    const uint32_t plain = start + row / 8 * stride + row % 8 * row_bytes + 16 * index;
    return plain ^ ((plain >> 3) & (row_bytes - 16));
  }
};

Matrix decode(Block& block, uint64_t b) {
  const auto layout = static_cast<unsigned>(b >> 62);
  if (layout != 1 && layout != 2) block.fault("wgmma: a swizzle of 128 or 64 bytes is what is simulated");
  const Matrix m{static_cast<uint32_t>(b & 0x3FFF) << 4, static_cast<uint32_t>(b >> 32 & 0x3FFF) << 4,
                 layout == 1 ? 128u : 64u};
  if (b >> 49 & 7) block.fault("wgmma: a base offset is not simulated");
  if (m.start / m.row_bytes % 8)
    block.fault("wgmma: rows that begin at " + std::to_string(m.start) + ", expected multiples of " +
                std::to_string(8 * m.row_bytes));
  return m;
}

template <class Element>
Element element(const uint32_t* words, unsigned index) {
  Element value;
  std::memcpy(&value, reinterpret_cast<const unsigned char*>(words) + index * sizeof value, sizeof value);
  return value;
}

/// Where elements of A lie in a lane's registers: A(m, k) for all m and k of it.
template <unsigned Per, class To>
void gather_a(void* (&lanes)[kWarp], const To& to) {
  for (unsigned lane = 0; lane < kWarp; ++lane)
    for (unsigned i = 0; i < 4; ++i)
      for (unsigned e = 0; e < Per; ++e)
        to(lane / 4 + 8 * (i % 2), 4 * Per * (i / 2) + Per * (lane % 4) + e,
           static_cast<Wgmma*>(lanes[lane])->a[i], e);
}

void apply(Block& block, void* (&lanes)[kWarp]) {
  const Wgmma& first = *static_cast<Wgmma*>(lanes[0]);
  for (unsigned lane = 1; lane < kWarp; ++lane)
    if (static_cast<Wgmma*>(lanes[lane])->b != first.b)
      block.fault("wgmma: lanes have different descriptors", block.lane_thread(lane));
  const Matrix matrix = decode(block, first.b);
  const unsigned rows = 8 * first.columns;
  std::vector<uint32_t> b(rows * kRowBytes / 4);
  std::vector<uint32_t> chunks[kWarp];
  for (unsigned row = 0; row < rows; ++row)
    for (unsigned i = 0; i < 2; ++i) {
      const unsigned lane = row % kWarp;
      const uint32_t at = matrix.chunk(row, i);
      block.load_async_proxy(at, b.data() + row * 8 + 4 * i, block.lane_thread(lane));
      chunks[lane].push_back(at);
    }
  float a[16][16];
  std::vector<float> halves(first.bytes ? 0 : rows * 16);
  for (unsigned i = 0; i < halves.size(); ++i) {
    const auto half = element<uint16_t>(b.data(), i);
    halves[i] = first.type == Half::f16 ? f16_to_float(half) : bf16_to_float(half);
  }
  int8_t bytes[16][32];
  if (first.bytes)
    gather_a<4>(lanes, [&](unsigned m, unsigned k, uint32_t reg, unsigned e) { bytes[m][k] = element<int8_t>(&reg, e); });
  else
    gather_a<2>(lanes, [&](unsigned m, unsigned k, uint32_t reg, unsigned e) {
      const auto half = element<uint16_t>(&reg, e);
      a[m][k] = first.type == Half::f16 ? f16_to_float(half) : bf16_to_float(half);
    });
  const uint32_t time = block.tick();
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    const Wgmma& own = *static_cast<Wgmma*>(lanes[lane]);
    Product product{own.d, std::vector<uint32_t>(4 * own.columns), own.a, {}, std::move(chunks[lane]), time};
    std::copy_n(own.a, 4, product.a_before.begin());
    for (unsigned i = 0; i < 4 * own.columns; ++i) {
      const unsigned m = lane / 4 + 8 * (i % 4 / 2), n = i / 4 * 8 + 2 * (lane % 4) + i % 2;
      const uint32_t before = block.product_register(lane, own.d, i);
      if (own.bytes) {
        auto sum = static_cast<int64_t>(static_cast<int32_t>(before));
        for (unsigned k = 0; k < 32; ++k) sum += bytes[m][k] * element<int8_t>(b.data() + n * 8, k);
        product.result[i] = static_cast<uint32_t>(sum);
        continue;
      }
      auto d = std::bit_cast<float>(before);
      for (unsigned k0 = 0; k0 < 16; k0 += 8) {
        double sum = d;
        for (unsigned k = k0; k < k0 + 8; ++k) sum += static_cast<double>(a[m][k]) * halves[n * 16 + k];
        d = toward_zero(sum);
      }
      product.result[i] = std::bit_cast<uint32_t>(d);
    }
    std::fill_n(own.d, 4 * own.columns, kNoValue);
    block.start_product(lane, std::move(product));
  }
  block.note_product(first.b * 31 + first.columns);
  ++total_counts().wgmma;
}

}  // namespace

void wgmma(Half type, float* d, unsigned columns, const uint32_t (&a)[4], uint64_t b) {
  Wgmma own{false, type, reinterpret_cast<uint32_t*>(d), columns, a, b};
  block().collective(type == Half::f16 ? "wgmma.f16" : "wgmma.bf16", &own, &apply);
}

void wgmma(int32_t* d, unsigned columns, const uint32_t (&a)[4], uint64_t b) {
  Wgmma own{true, Half::f16, reinterpret_cast<uint32_t*>(d), columns, a, b};
  block().collective("wgmma.s8", &own, &apply);
}

void Block::load_async_proxy(uint32_t address, void* to, unsigned thread) {
  start_tracking();
  load_shared(address, to, 16, thread, "wgmma");
  for (uint32_t at = address; at < address + 16; ++at)
    if (!shadow_[at].by_bulk && !fenced(shadow_[at].writer, shadow_[at].write_time, thread))
      fault("wgmma: reads what thread " + std::to_string(shadow_[at].writer) +
                " wrote to shared memory, without a proxy fence between the two",
            thread);
}

void Block::start_product(unsigned lane, Product product) {
  Thread& thread = threads_[lane_thread(lane)];
  if (thread.parted)
    fault("wgmma after a wait for a phase: lanes may have parted there, and need a __syncwarp", thread.index);
  if (!thread.products_fenced) fault("wgmma without a wgmma.fence since the last commit", thread.index);
  thread.open_products.push_back(std::move(product));
}

uint32_t Block::product_register(unsigned lane, const uint32_t* d, unsigned index) const {
  const Thread& thread = threads_[lane_thread(lane)];
  const auto find = [&](const std::vector<Product>& products) -> const Product* {
    const auto found = std::find_if(products.rbegin(), products.rend(), [&](const Product& p) { return p.d == d; });
    return found == products.rend() ? nullptr : &*found;
  };
  const Product* last = find(thread.open_products);
  for (auto group = thread.product_groups.rbegin(); !last && group != thread.product_groups.rend(); ++group)
    last = find(*group);
  return last ? last->result[index] : d[index];
}

void Block::note_product(uint64_t what) {
  uint64_t& products = warps_[current_->index / kWarp].products;
  products = (products ^ what) * 0x9E3779B97F4A7C15u + 1;
}

void Block::wgmma_commit() {
  current_->product_groups.push_back(std::move(current_->open_products));
  current_->open_products.clear();
  current_->products_fenced = false;
}

void Block::wgmma_wait(unsigned pending) {
  while (current_->product_groups.size() > pending) {
    const std::vector<Product> done = std::move(current_->product_groups.front());
    current_->product_groups.pop_front();
    for (size_t i = 0; i < done.size(); ++i) finish_product(*current_, done[i]);
  }
}

void Block::finish_product(Thread& thread, const Product& product) {
  if (!std::equal(product.a_before.begin(), product.a_before.end(), product.a))
    fault("registers of A were changed while wgmma reads them: a wait is missing");
  for (const uint32_t chunk : product.chunks)
    for (uint32_t at = chunk; at < chunk + 16; ++at) {
      SharedByte& byte = shadow_[at];
      if (byte.state != SharedByte::written || byte.write_time > product.time)
        fault("shared memory at " + std::to_string(at) + " was overwritten while wgmma reads it");
      byte.read_time = now_;
      if (byte.reader / kWarp != thread.index / kWarp) byte.reader = SharedByte::kSeveral;
      warp_reads_[at / 16 * warps_.size() + thread.index / kWarp] = now_;
    }
  const auto same = [&](const Product& other) { return other.d == product.d; };
  for (const auto& group : thread.product_groups)
    if (std::any_of(group.begin(), group.end(), same)) return;
  if (std::any_of(thread.open_products.begin(), thread.open_products.end(), same)) return;
  std::copy(product.result.begin(), product.result.end(), product.d);
}

}  // namespace turbo::hostsim
