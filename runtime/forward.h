// What a backend is given: validated tensors and captures of one forward call.
#pragma once

#include <algorithm>
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

// scale * factor, finite: beyond float's range, 0 times it would be NaN.
inline float finite_scale(float scale, double factor) {
  constexpr double kLargest = std::numeric_limits<float>::max();
  return static_cast<float>(std::clamp(scale * factor, -kLargest, kLargest));
}

}  // namespace attnjit::runtime
