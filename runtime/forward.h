// What a backend is given: validated tensors and captures of one forward call.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "dsl/expr.h"
#include "dsl/interpreter.h"

namespace attnjit::runtime {

// A validated 4-D tensor (batch, heads, sequence, feature); strides in elements, the innermost is 1 where extent > 1.
struct TensorView {
  void* data = nullptr;
  dsl::DType dtype = dsl::DType::kF32;
  std::int64_t shape[4] = {};
  std::int64_t stride[4] = {};
};

// (batch, heads, seqlen_q), f32. data is null when the output is not wanted.
struct RowView {
  float* data = nullptr;
  std::int64_t stride[3] = {};
};

struct ForwardCall {
  TensorView q, k, v, o;  // q (B, Hq, Sq, D), k (B, Hkv, Skv, D), v (B, Hkv, Skv, Dv), o (B, Hq, Sq, Dv)
  RowView lse;            // natural logarithm; -inf for a row without a kept element
  RowView row_max;        // maximum of the modified scores; -inf likewise
  float scale = 1.0f;     // applied to q . k before the score_mod
  // By capture number of the plan's joint table.
  const dsl::CaptureView* captures = nullptr;
  std::size_t num_captures = 0;
  std::uint32_t host_scalars = 0;  // CUDA only, a bit by capture number: rank 0 and data in CPU memory
};

// What is on the scores: the scale times what a compiled mod expects, as a product of two floats. `rest` is 1 unless
// that leaves the range in which floats are finite and have all their digits, which the scores themselves need not do;
// then a power of two.
struct ScoreScale {
  float main = 1.0f, rest = 1.0f;
};

inline ScoreScale score_scale(float scale, double score_factor) {
  using Limits = std::numeric_limits<float>;
  const double factor = static_cast<double>(scale) * score_factor;
  int exponent = 0;
  std::frexp(factor, &exponent);
  // Below the largest exponent, which rounding could leave.
  const int rest = exponent - std::clamp(exponent, Limits::min_exponent, Limits::max_exponent - 1);
  return {static_cast<float>(std::ldexp(factor, -rest)), std::ldexp(1.0f, rest)};
}

}  // namespace attnjit::runtime
