// SPDX-License-Identifier: Apache-2.0
// Two passes over a row that the first brings into the cache: extremes of each group, then its codes. The second is
// bound by the division (one of 8 lanes in 5 to 8 cycles; a product with the reciprocal would round otherwise than
// the definition), the whole by memory where the machine yields less than some 6 bytes a cycle and core.
#include "quantize_weights.h"

#include <atomic>
#include <cstring>
#include <vector>

#include "avx2.h"

namespace turbo::cpu {
namespace {

constexpr int64_t kLanes = 8;
constexpr int64_t kNibbleStep = 32;  // codes that become 16 bytes of nibbles together

inline float lowest(__m256 v) {
  __m128 m = _mm_min_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  m = _mm_min_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_min_ss(m, _mm_movehdup_ps(m)));
}

inline float highest(__m256 v) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

/// v rounded to a scale's dtype, back as fp32.
float rounded(float v, DType dtype) {
  if (dtype == DType::f32) return v;
  if (dtype == DType::f16) return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtps_ph(_mm_set_ss(v), _MM_FROUND_TO_NEAREST_INT)));
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  bits += 0x7FFFu + (bits >> 16 & 1);  // finite, or infinity, which stays
  bits &= 0xFFFF0000u;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

void store_scale(void* out, int64_t at, float v, DType dtype) {
  if (dtype == DType::f32) {
    static_cast<float*>(out)[at] = v;
  } else if (dtype == DType::f16) {
    static_cast<uint16_t*>(out)[at] =
        static_cast<uint16_t>(_mm_extract_epi16(_mm_cvtps_ph(_mm_set_ss(v), _MM_FROUND_TO_NEAREST_INT), 0));
  } else {
    uint32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    static_cast<uint16_t*>(out)[at] = static_cast<uint16_t>(bits >> 16);
  }
}

inline float nearest(float v) {
  return _mm_cvtss_f32(_mm_round_ss(_mm_setzero_ps(), _mm_set_ss(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

struct Step {
  float scale, zero;
};

/// Scale and zero point of a group with these finite extremes.
Step step_of(float low, float high, const QuantizeWeights& a) {
  const float lowest_code = -static_cast<float>(1 << (a.bits - 1)), codes = static_cast<float>((1 << a.bits) - 1);
  float scale, zero = 0;
  if (a.range == WeightRange::asymmetric) {
    const float from = low < 0 ? low : 0.0f, to = high > 0 ? high : 0.0f;
    scale = rounded((to - from) / codes, a.scale_dtype);
    const float at = nearest(lowest_code - from / (scale == 0 ? 1.0f : scale));
    zero = at < lowest_code ? lowest_code : at > -lowest_code - 1 ? -lowest_code - 1 : at;
  } else if (a.range == WeightRange::signed_) {
    scale = rounded((-low >= high ? low : high) / lowest_code, a.scale_dtype);
  } else {
    scale = rounded((-low > high ? -low : high) / (codes / 2), a.scale_dtype);
  }
  if (low == high) {
    const float magnitude = rounded(low < 0 ? -low : low, a.scale_dtype);
    if (magnitude != 0) scale = magnitude;
    zero = 0;
  }
  return {scale == 0 ? 1.0f : scale, zero};
}

/// Codes of a group as signed bytes.
template <DType D>
void codes_of(const char* weight, int64_t count, Step step, int bits, int8_t* out) {
  const __m256 scale = _mm256_set1_ps(step.scale), zero = _mm256_set1_ps(step.zero);
  const __m256 least = _mm256_set1_ps(-static_cast<float>(1 << (bits - 1)));
  const __m256 most = _mm256_set1_ps(static_cast<float>((1 << (bits - 1)) - 1));
  for (int64_t i = 0; i < count; i += kLanes) {
    const __m256 v = Avx2::div(Avx2::load_full<D>(weight + i * dtype_size(D)), scale);
    const __m256 code = _mm256_min_ps(_mm256_max_ps(Avx2::add(Avx2::round(v), zero), least), most);
    const __m256i whole = _mm256_cvtps_epi32(code);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out + i), _mm_packs_epi16(words, words));
  }
}

/// Signed codes of 4 bits -> code + 8, two in a byte, the first in the low half.
void pack_nibbles(const int8_t* codes, int64_t count, uint8_t* out) {
  int64_t i = 0;
  const __m256i eight = _mm256_set1_epi8(8), weights = _mm256_set1_epi16(0x1001);
  for (; i + kNibbleStep <= count; i += kNibbleStep) {
    const __m256i v = _mm256_add_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i)), eight);
    const __m256i pairs = _mm256_maddubs_epi16(v, weights);
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i / 2), bytes);
  }
  for (; i < count; i += 2) out[i / 2] = static_cast<uint8_t>((codes[i] + 8) | (codes[i + 1] + 8) << 4);
}

void offset_bytes(int8_t* codes, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    uint64_t eight;
    std::memcpy(&eight, codes + i, sizeof eight);
    eight ^= 0x8080808080808080u;
    std::memcpy(codes + i, &eight, sizeof eight);
  }
}

/// What a thread needs for a row.
struct Scratch {
  std::vector<float> low, high, scale, zero;
  std::vector<int8_t> codes;

  explicit Scratch(const QuantizeWeights& a) : codes(a.packed && a.bits == 4 ? a.k : 0) {
    for (std::vector<float>* each : {&low, &high, &scale, &zero}) each->resize(a.k / a.group);
  }
};

/// Extremes of a row's groups. False where a weight is not finite.
template <DType D>
bool extremes(const char* weight, int64_t groups, int64_t group, Scratch& s) {
  __m256 bad = _mm256_setzero_ps();
  for (int64_t g = 0; g < groups; ++g, weight += group * dtype_size(D)) {
    __m256 low = Avx2::load_full<D>(weight), high = low;
    bad = _mm256_or_ps(bad, _mm256_sub_ps(low, low));  // not a number for infinities, too
    for (int64_t i = kLanes; i < group; i += kLanes) {
      const __m256 v = Avx2::load_full<D>(weight + i * dtype_size(D));
      low = _mm256_min_ps(low, v);
      high = _mm256_max_ps(high, v);
      bad = _mm256_or_ps(bad, _mm256_sub_ps(v, v));
    }
    s.low[g] = lowest(low);
    s.high[g] = highest(high);
  }
  return _mm256_movemask_ps(_mm256_cmp_ps(bad, bad, _CMP_UNORD_Q)) == 0;
}

/// One row. False where a weight is not finite.
template <DType D>
bool quantize_row(const QuantizeWeights& a, int64_t row, Scratch& s) {
  const char* weight = static_cast<const char*>(a.weight) + row * a.k * dtype_size(D);
  const int64_t groups = a.k / a.group;
  const bool halves = a.packed && a.bits == 4;
  int8_t* codes = halves ? s.codes.data() : static_cast<int8_t*>(a.codes) + row * a.k;
  // A loop of its own for each step: its groups do not wait for each other, and a step's latencies are hidden.
  if (!extremes<D>(weight, groups, a.group, s)) return false;
  for (int64_t g = 0; g < groups; ++g) {
    const Step step = step_of(s.low[g], s.high[g], a);
    s.scale[g] = step.scale;
    s.zero[g] = step.zero;
  }
  for (int64_t g = 0; g < groups; ++g) {
    store_scale(a.scale, row * groups + g, s.scale[g], a.scale_dtype);
    if (a.zero) a.zero[row * groups + g] = static_cast<int8_t>(s.zero[g]);
  }
  for (int64_t g = 0; g < groups; ++g)
    codes_of<D>(weight + g * a.group * dtype_size(D), a.group, {s.scale[g], s.zero[g]}, a.bits, codes + g * a.group);
  if (halves) pack_nibbles(codes, a.k, static_cast<uint8_t*>(a.codes) + row * a.k / 2);
  if (a.packed && a.bits == 8) offset_bytes(codes, a.k);
  return true;
}

template <DType D>
int64_t quantize(const QuantizeWeights& a, const Parallel& parallel) {
  std::atomic<int64_t> first{a.n};
  parallel(parallel.threads, [&](int64_t task) {
    Scratch scratch(a);
    const Range rows = part(a.n, parallel.threads, task);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      if (quantize_row<D>(a, row, scratch)) continue;
      int64_t seen = first.load();
      while (row < seen && !first.compare_exchange_weak(seen, row)) {
      }
      return;
    }
  });
  return first.load() == a.n ? -1 : first.load();
}

}  // namespace

int64_t quantize_weights_avx2(const QuantizeWeights& args, const Parallel& parallel) {
  if (args.dtype == DType::bf16) return quantize<DType::bf16>(args, parallel);
  if (args.dtype == DType::f16) return quantize<DType::f16>(args, parallel);
  return quantize<DType::f32>(args, parallel);
}

}  // namespace turbo::cpu
