// SPDX-License-Identifier: Apache-2.0
// K in slices, whose sums are added in ascending order: ((s0 + s1) + s2) + ... Whoever adds, the bits are the same.
// Sums are floats, or integers of 32 bits, for which the order is no matter.
//
// Slices follow from the weights alone, never from the number of rows, so that a row's result does not depend on its
// batch. Few rows: each slice has a block of its own; whichever comes last adds all, in order, and sets the
// counter back to 0 for the next launch. No block ever waits. Many rows: one block goes through all slices.
#pragma once

#include "tile_shape.h"

namespace turbo::cuda {

/// The slices of K and where their sums meet.
struct Slices {
  int count;     // of K
  int slabs;     // of a slice; the last one has what is left
  bool apart;    // a block for each slice, instead of one for all
  Vec4* sums;    // [tile][apart ? count : 1][slab * column][thread]; nullptr when count is 1
  uint32_t* arrived;  // [tile], 0 between launches; nullptr unless apart
};

template <class Tile>
class SliceSums {
 public:
  static constexpr int kVectors = Tile::kSlabs * Tile::kColumns;

  TM_DEVICE SliceSums(const Slices& slices, int tile, int thread)
      : slices_(slices), tile_(tile), thread_(thread) {}

  /// Ends slice `slice`, whose sum this block has in `total`. True for the block that now has the sum of all slices
  /// there. `scratch` is a word of shared memory that no one uses.
  template <class T>
  TM_DEVICE bool end_slice(int slice, Accumulators<Tile, T>& total, uint32_t scratch) const {
    if (slices_.count == 1) return true;
    if (slices_.apart) return meet(slice, total, scratch);
    const bool last = slice == slices_.count - 1;
    if (slice > 0) add_before(total);
    if (!last) store(0, total);
    return last;
  }

 private:
  TM_DEVICE static uint32_t bits(float v) { return as_bits(v); }
  TM_DEVICE static uint32_t bits(int32_t v) { return static_cast<uint32_t>(v); }
  TM_DEVICE static float value(uint32_t bits, float) { return as_float(bits); }
  TM_DEVICE static int32_t value(uint32_t bits, int32_t) { return static_cast<int32_t>(bits); }

  TM_DEVICE Vec4* place(int slot, int vector) const {
    const int64_t slots = slices_.apart ? slices_.count : 1;
    return slices_.sums + ((tile_ * slots + slot) * kVectors + vector) * Tile::kThreads + thread_;
  }

  template <class T>
  TM_DEVICE void store(int slot, const Accumulators<Tile, T>& total) const {
    TM_UNROLL
    for (int s = 0; s < Tile::kSlabs; ++s)
      TM_UNROLL
      for (int c = 0; c < Tile::kColumns; ++c) {
        const T(&d)[4] = total[s][c];
        store_global(place(slot, s * Tile::kColumns + c),
                     Vec4{{bits(d[0]), bits(d[1]), bits(d[2]), bits(d[3])}});
      }
  }

  /// total = what is in the slot + total.
  template <class T>
  TM_DEVICE void add_before(Accumulators<Tile, T>& total) const {
    TM_UNROLL
    for (int s = 0; s < Tile::kSlabs; ++s)
      TM_UNROLL
      for (int c = 0; c < Tile::kColumns; ++c) {
        const Vec4 before = load_global_volatile(place(0, s * Tile::kColumns + c));
        TM_UNROLL
        for (int i = 0; i < 4; ++i) total[s][c][i] = add(value(before.v[i], T{}), total[s][c][i]);
      }
  }

  template <class T>
  TM_DEVICE bool meet(int slice, Accumulators<Tile, T>& total, uint32_t scratch) const {
    store(slice, total);
    thread_fence();
    sync_threads();
    if (thread_ == 0) {
      const bool last = atomic_add(slices_.arrived + tile_, 1) == static_cast<uint32_t>(slices_.count - 1);
      if (last) store_global(slices_.arrived + tile_, 0u);
      thread_fence();
      store_shared_32(scratch, last);
    }
    sync_threads();
    if (!load_shared_32(scratch)) return false;
    sum_in_order(total);
    return true;
  }

  template <class T>
  TM_DEVICE void sum_in_order(Accumulators<Tile, T>& total) const {
    TM_NO_UNROLL
    for (int slot = 0; slot < slices_.count; ++slot) {
      TM_UNROLL
      for (int s = 0; s < Tile::kSlabs; ++s)
        TM_UNROLL
        for (int c = 0; c < Tile::kColumns; ++c) {
          const Vec4 next = load_global_volatile(place(slot, s * Tile::kColumns + c));
          TM_UNROLL
          for (int i = 0; i < 4; ++i)
            total[s][c][i] = slot ? add(total[s][c][i], value(next.v[i], T{})) : value(next.v[i], T{});
        }
    }
  }

  const Slices& slices_;
  int64_t tile_;
  int thread_;
};

}  // namespace turbo::cuda
