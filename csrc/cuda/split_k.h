// SPDX-License-Identifier: Apache-2.0
// K in slices, whose sums are added in ascending order: ((s0 + s1) + s2) + ... Whoever adds, the bits are the same.
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
  Float4* sums;  // [tile][apart ? count : 1][slab * column][thread]; nullptr when count is 1
  uint32_t* arrived;  // [tile], 0 between launches; nullptr unless apart
};

template <class Tile>
class SliceSums {
 public:
  static constexpr int kVectors = Tile::kSlabs * Tile::kColumns;
  using Sums = Accumulators<Tile, float>;

  TM_DEVICE SliceSums(const Slices& slices, int tile, int thread)
      : slices_(slices), tile_(tile), thread_(thread) {}

  /// Ends slice `slice`, whose sum this block has in `total`. True for the block that now has the sum of all slices
  /// there. `scratch` is a word of shared memory that no one uses.
  TM_DEVICE bool end_slice(int slice, Sums& total, uint32_t scratch) const {
    if (slices_.count == 1) return true;
    if (slices_.apart) return meet(slice, total, scratch);
    const bool last = slice == slices_.count - 1;
    if (slice > 0) add_before(total);
    if (!last) store(0, total);
    return last;
  }

 private:
  TM_DEVICE Float4* place(int slot, int vector) const {
    const int64_t slots = slices_.apart ? slices_.count : 1;
    return slices_.sums + ((tile_ * slots + slot) * kVectors + vector) * Tile::kThreads + thread_;
  }

  TM_DEVICE void store(int slot, const Sums& total) const {
    TM_UNROLL
    for (int s = 0; s < Tile::kSlabs; ++s)
      TM_UNROLL
      for (int c = 0; c < Tile::kColumns; ++c) {
        const float(&d)[4] = total[s][c];
        store_global(place(slot, s * Tile::kColumns + c), Float4{{d[0], d[1], d[2], d[3]}});
      }
  }

  /// total = what is in the slot + total.
  TM_DEVICE void add_before(Sums& total) const {
    TM_UNROLL
    for (int s = 0; s < Tile::kSlabs; ++s)
      TM_UNROLL
      for (int c = 0; c < Tile::kColumns; ++c) {
        const Float4 before = load_global_volatile(place(0, s * Tile::kColumns + c));
        TM_UNROLL
        for (int i = 0; i < 4; ++i) total[s][c][i] = add(before.v[i], total[s][c][i]);
      }
  }

  TM_DEVICE bool meet(int slice, Sums& total, uint32_t scratch) const {
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

  TM_DEVICE void sum_in_order(Sums& total) const {
    TM_NO_UNROLL
    for (int slot = 0; slot < slices_.count; ++slot) {
      TM_UNROLL
      for (int s = 0; s < Tile::kSlabs; ++s)
        TM_UNROLL
        for (int c = 0; c < Tile::kColumns; ++c) {
          const Float4 next = load_global_volatile(place(slot, s * Tile::kColumns + c));
          TM_UNROLL
          for (int i = 0; i < 4; ++i) total[s][c][i] = slot ? add(total[s][c][i], next.v[i]) : next.v[i];
        }
    }
  }

  const Slices& slices_;
  int64_t tile_;
  int thread_;
};

}  // namespace turbo::cuda
