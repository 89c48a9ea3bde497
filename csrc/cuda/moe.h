// SPDX-License-Identifier: Apache-2.0
// A layer of routed experts on a device, as a host calls it: the layer of csrc/cpu/moe.h. Plain structs.
#pragma once

#include <cstdint>
#include <string>

#include "../cpu/activation_kind.h"
#include "linear.h"

namespace turbo::cuda {

/// Weights of one product for all experts, one expert after another, each as layout.h says; bias fp32 [experts, padded
/// n] in the order of the packed channels, or nullptr. The tiles of a gated w13 alternate: 16 gate channels, 16 up
/// channels, so its layout has n = 2 * (intermediate up to a multiple of 16).
struct ExpertWeights {
  Layout layout;
  const void* weight;
  const void* scale;
  const void* zero;
  const float* bias;
};

/// y[t] = sum over t's experts of weight * down(h), as csrc/cpu/moe.h has it: products and activation in fp32, h rounded
/// once to dtype or to codes (linear.h's quantize_x, with a scale per row), experts added in ascending order. Device pointers; x [tokens, hidden] with unit inner
/// stride, y contiguous. Scales of weights are of dtype in w4a16, of scale_type in the others (16 bits where there are
/// several groups). ids [tokens, top_k] of int32 or int64 and expert_map [known] as in routing.h: an id that names no expert
/// here adds nothing, whatever it is, because no host looks at it. memory: moe_bytes at a multiple of 256.
struct Moe {
  Scheme scheme;
  DType dtype;
  ScaleType scale_type;
  int64_t tokens, top_k, experts, known, hidden, intermediate;
  const void* x;
  int64_t x_stride;
  ExpertWeights w13, w2;
  Activation activation;
  const float* topk_weights;
  const void* topk_ids;
  bool wide_ids;
  const int32_t* expert_map;
  void* y;
  void* memory;
};

/// A tile that was chosen by measuring (tuning.h); else the smallest of the device's that covers as many rows as an expert
/// has on average, else the largest. It changes no bit.
int plan_moe_tile(const Moe& args, bool wgmma);
int64_t moe_bytes(const Moe& args, int tile);
/// Starts five kernels on `stream`, seven where there are codes. Does not wait, allocates nothing, and can be captured into a graph. Empty, or why
/// it did not start.
std::string moe(const Moe& args, int tile, void* stream);

}  // namespace turbo::cuda
