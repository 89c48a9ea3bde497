// SPDX-License-Identifier: Apache-2.0
// Linear layers on a device, as a host calls them. Plain structs: the same under nvcc and on the simulator.
#pragma once

#include <cstdint>
#include <string>

#include "layout.h"

namespace turbo::cuda {

enum class DType : int { f16, bf16 };
enum class ScaleType : int { f16, bf16, f32 };
/// Weights and activations: with a8 x, and what experts have between their products, become int8 codes.
enum class Scheme : int { w4a16, w4a8, w8a8 };

/// How K is cut into slices whose sums are added in order (split_k.h); of several groups, where one ends. It decides a
/// result's last bits, so it follows from the weights and the device only.
struct SlicePlan {
  int count, slabs;
};
SlicePlan plan_slices(const Layout& layout, int multiprocessors);

/// What plans ask of a device. wgmma: it is of compute capability 9.0, and so runs the tiles of that family and no
/// others (tiles.h).
struct DeviceTraits {
  int multiprocessors;
  bool wgmma;
};
/// Those of a device of compute capability major.minor, as far as this library was compiled for it.
DeviceTraits device_traits(int multiprocessors, int major, int minor);

/// What a launch takes beside its operands.
struct LinearPlan {
  int tile;         // index into the registry of tile shapes
  SlicePlan slices;
  bool apart;       // a block for each slice: for few rows
};
/// A tile that was chosen by measuring (tuning.h); else the smallest that covers `rows`; else the one whose blocks take the
/// least time by the cost model of plan.cu. Slices apart where the device has blocks to spare, unless chosen
/// otherwise.
LinearPlan plan_linear(Scheme scheme, const Layout& layout, int64_t rows, const DeviceTraits& device);

/// Tile shapes, and the ones of a device: `count` from `first` on, smallest first.
struct TileRange {
  int first, count;
  bool has(int tile) const { return tile >= first && tile < first + count; }
};
int tile_count();
TileRange tiles_of(bool wgmma);
int tile_rows(int tile);
int tile_channels(int tile);

/// Bytes of `sums`, and words of `arrived`, that a launch of a plan needs; either may be 0.
int64_t sums_bytes(const LinearPlan& plan, const Layout& layout, int64_t rows);
int64_t arrived_words(const LinearPlan& plan, const Layout& layout, int64_t rows);

/// y = x @ dequantized(weight).T + bias. Device pointers; x [rows, k] and y [rows, n] with unit inner stride and
/// x_stride and y_stride elements from row to row, at any 2-byte address; x, y, scale and bias [n] in one dtype.
/// weight, scale, zero as layout.h says, at multiples of 16 bytes; zero and bias may be nullptr. sums: at a
/// multiple of 16 bytes, written before it is read. arrived: 0 at the first launch; every launch leaves 0s.
struct Linear {
  Layout layout;
  DType dtype;
  int64_t rows;
  const void* x;
  int64_t x_stride;
  const void* weight;
  const void* scale;
  const void* zero;
  const void* bias;
  void* y;
  int64_t y_stride;
  void* sums;
  void* arrived;
};

/// Starts the W4A16 kernel on `stream` (a cudaStream_t). Does not wait, allocates nothing, and can be captured into a
/// graph. Empty, or why it did not start.
std::string w4a16_linear(const Linear& args, const LinearPlan& plan, void* stream);

/// Rounds x [rows, k] to int8 codes in layout.h's order: codes [rows, k up to whole slabs] at a multiple of 16 bytes, and
/// for each row its scale and, unless zero is nullptr, its zero point. given_scale [1]: of all rows, with given_zero [1]
/// or nullptr for 0; nullptr: from each row, with a zero point unless symmetric. They are read on the device and must be
/// what the CPU's op checks: a positive finite scale, a zero point of -128 to 127.
struct QuantizeX {
  DType dtype;
  int64_t rows, k;
  const void* x;
  int64_t x_stride;
  const float* given_scale;
  const int32_t* given_zero;
  bool symmetric;
  void* codes;
  float* scale;
  int32_t* zero;
};
int64_t code_bytes(int64_t rows, int64_t k);
std::string quantize_x(const QuantizeX& args, void* stream);

/// y = dequantized codes of x @ dequantized(weight).T + bias, as a8.h has it: W4A8, or with a layout of 8 bits W8A8.
/// linear.x are the codes that quantize_x wrote for `k`, linear.scale is of scale_type (16 bits where there are several
/// groups), y and bias of linear.dtype. x_zero: W8A8 only, and then weight_sum too; else nullptr.
struct LinearA8 {
  Linear linear;
  ScaleType scale_type;
  const float* x_scale;
  const int32_t* x_zero;
  const int32_t* weight_sum;
};
std::string a8_linear(const LinearA8& args, const LinearPlan& plan, void* stream);
/// Why weights have no kernel with codes of x, `x_zeros` saying whether those have zero points; or empty.
std::string a8_refusal(const Layout& layout, ScaleType scale_type, bool x_zeros);

}  // namespace turbo::cuda
