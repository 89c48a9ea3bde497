// SPDX-License-Identifier: Apache-2.0
// A layer of routed experts: y[t] = sum over t's experts e of w(t, e) * down_e(act(gate_e(x[t]), up_e(x[t]))).
#pragma once

#include "activation_kind.h"
#include "gemm.h"

namespace turbo::cpu {

/// Weights of one product for all experts, one expert after another, each as layout.h says. `bias` fp32
/// [experts, padded n], nullptr for none. The tiles of a gated w13 alternate: 16 gate channels, 16 up channels.
struct Experts {
  Layout layout;
  const uint32_t* weight;
  const void* scale;
  const uint32_t* zero;
  const float* bias;
  const float* channel_scale = nullptr;  // [experts, padded n], floats only
  float x_scale = 0;                      // activations fixed: of this product's
};

/// One call. x [tokens, hidden] with unit inner stride and y [tokens, hidden] contiguous, of `dtype`; topk_weights
/// and topk_ids [tokens, top_k], an id is an expert's index in the weights or -1 for none of them.
///
/// Per token and expert the products are those of gemm.h. Their results, and the activation, stay fp32; the
/// activation's result h is rounded once: to `dtype`, or to what the weights are, with a scale of its row, its groups
/// or its product. Experts are added in
/// ascending order, t = fma(w, down, t) from 0 on, then rounded to `dtype`: so a token's result is the same bits in
/// every batch.
struct Moe {
  int64_t tokens, top_k, experts, intermediate;
  DType dtype, scale_dtype;
  Activations activations;  // for both products; fixed: floats only
  const void* x;
  int64_t x_stride;
  Experts w13, w2;
  Activation activation;
  const float* topk_weights;
  const int32_t* topk_ids;
  void* y;
  int64_t x_group = 0;  // as in gemm.h
};

/// Runs on `isa`, which the processor must support. Re-entrant. Scratch memory is that of the calling thread, kept
/// for its next call: at most kMoeScratchBytes, or what one token takes where that is more.
void moe(const Moe& args, Isa isa, const Parallel& parallel);

inline constexpr int64_t kMoeScratchBytes = int64_t{64} << 20;

}  // namespace turbo::cpu
