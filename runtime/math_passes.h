// The vectorised loops of the eager backend: one table of functions per instruction set.
#pragma once

#include <cstdint>

#include "dsl/expr.h"

namespace attnjit::runtime {

// One run of an elementwise operation. Booleans are bytes of 0 or 1, ints 64 bits, floats f32.
// in[i] advances by step[i] (0 or 1) elements per element of out; out may be one of the inputs with step 1.
struct ElementwiseArgs {
  void* out = nullptr;
  const void* in[4] = {};
  int step[4] = {};
  std::int64_t n = 0;
};
using ElementwiseFn = void (*)(const ElementwiseArgs&);

// One run of a captured read. Indices are clamped to [0, extent).
struct GatherArgs {
  void* out = nullptr;
  const void* data = nullptr;
  int rank = 0;
  const std::int64_t* index[dsl::kMaxRank] = {};
  int step[dsl::kMaxRank] = {};
  std::int64_t extent[dsl::kMaxRank] = {};
  std::int64_t stride[dsl::kMaxRank] = {};
  std::int64_t n = 0;
};
using GatherFn = void (*)(const GatherArgs&);

// Row-major C (m, n) = alpha * A (m, k) * B (k, n), or C plus that. A transposed operand lies there as (k, m) or (n,
// k).
struct GemmArgs {
  bool transpose_a = false, transpose_b = false;
  bool accumulate = false;
  std::int64_t m = 0, n = 0, k = 0;
  float alpha = 1.0f;
  const float* a = nullptr;
  std::int64_t lda = 0;
  const float* b = nullptr;
  std::int64_t ldb = 0;
  float* c = nullptr;
  std::int64_t ldc = 0;
};

// Passes of the backward. Each is given the gradient `g` of an operation's result first, then what is named here of its
// arguments x, y, z and its result r, all floats. Where g is 0 the gradient of the argument is 0, whatever the rest
// holds.
enum class GradientPass : std::uint8_t {
  kTimes,       // g, x: g * x
  kOver,        // g, x: g / x
  kDivisor,     // g, x, y: of x / y to y
  kModulus,     // g, x, y: of x % y to y
  kBase,        // g, x, y: of x ** y to x
  kExponent,    // g, x, y: of x ** y to y
  kMin,         // g, x, y: to x; a tie gives half to each
  kMax,         // g, x, y
  kClampValue,  // g, x, y, z: of clamp(x, y, z) to x
  kClampLow,    // g, x, y, z: to y
  kClampHigh,   // g, x, y, z: to z
  kAbs,         // g, x
  kRelu,        // g, x
  kExp2,        // g, r
  kLog2,        // g, x
  kLog1p,       // g, x
  kSqrt,        // g, r
  kRsqrt,       // g, r
  kTanh,        // g, r
  kSigmoid,     // g, r
  kSilu,        // g, x
  kGelu,        // g, x
  kErf,         // g, x
  kSin,         // g, x
  kCos,         // g, x
  // Not of an operation: of a row, and of softmax.
  kRowFactor,    // g, x: g * x, 0 where x is 0: what a choice made nothing of
  kProbability,  // modified score m, lse, and `keep` (bytes) where there is one: exp(m - lse), 0 for a dropped element
  kScore,        // p, dp, delta: p * (dp - delta), 0 where p is 0
};

struct Passes {
  const char* isa;
  // The operation's loop for operands of type `operand` (a select's: of its values), or null for what the type rules
  // exclude.
  ElementwiseFn (*elementwise)(dsl::Op op, dsl::Function function, dsl::Type operand);
  // Copies elements of a type; step 0 broadcasts.
  ElementwiseFn (*copy)(dsl::Type type);
  ElementwiseFn (*gradient)(GradientPass pass);
  GatherFn (*gather)(dsl::DType dtype);
  void (*iota)(std::int64_t* out, std::int64_t first, std::int64_t n);
  // Softmax of one row in place. `keep` may be null; where it is 0 the element counts as -inf. A row without a kept
  // element, or with nothing but -inf, becomes zeros. lse and row_max as in RowView; a NaN or +inf makes the row NaN.
  void (*softmax_row)(float* x, std::int64_t n, const std::uint8_t* keep, int keep_step, float* lse, float* row_max);
  float (*sum_row)(const float* x, std::int64_t n);
  // out[i] = sum of x[r * stride + i] over r < rows, for i < n.
  void (*sum_rows)(const float* x, std::int64_t stride, std::int64_t rows, std::int64_t n, float* out);
  // f16, bf16 or f32 to f32 and back, round to nearest even.
  void (*widen)(dsl::DType dtype, const void* in, float* out, std::int64_t n);
  void (*narrow)(dsl::DType dtype, const float* in, void* out, std::int64_t n);
  // For use without a BLAS.
  void (*gemm)(const GemmArgs& args);
};

const Passes& sse2_passes();
const Passes& avx2_passes();
const Passes& avx512_passes();
// The best that this machine runs.
const Passes& host_passes();

}  // namespace attnjit::runtime
