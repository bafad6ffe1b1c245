// The vectorised loops of the eager backend: one table of functions per instruction set.
#pragma once

#include <cstdint>

#include "dsl/expr.h"

namespace attnjit::runtime {

// One run of an elementwise operation. Booleans are bytes of 0 or 1, ints 64 bits, floats f32.
// in[i] advances by step[i] (0 or 1) elements per element of out; out may be one of the inputs with step 1.
struct ElementwiseArgs {
  void* out = nullptr;
  const void* in[3] = {};
  int step[3] = {};
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

struct Passes {
  const char* isa;
  // The operation's loop for operands of type `operand` (a select's: of its values), or null for what the type rules
  // exclude.
  ElementwiseFn (*elementwise)(dsl::Op op, dsl::Function function, dsl::Type operand);
  // Copies elements of a type; step 0 broadcasts.
  ElementwiseFn (*copy)(dsl::Type type);
  GatherFn (*gather)(dsl::DType dtype);
  void (*iota)(std::int64_t* out, std::int64_t first, std::int64_t n);
  // Softmax of one row in place. `keep` may be null; where it is 0 the element counts as -inf. A row without a kept
  // element, or with nothing but -inf, becomes zeros. lse and row_max as in RowView; a NaN or +inf makes the row NaN.
  void (*softmax_row)(float* x, std::int64_t n, const std::uint8_t* keep, int keep_step, float* lse, float* row_max);
  // f16, bf16 or f32 to f32 and back, round to nearest even.
  void (*widen)(dsl::DType dtype, const void* in, float* out, std::int64_t n);
  void (*narrow)(dsl::DType dtype, const float* in, void* out, std::int64_t n);
  // Row-major C (m, n) = alpha * A (m, k) * B, with B (k, n), or (n, k) when transpose_b. For use without a BLAS.
  void (*gemm)(bool transpose_b, std::int64_t m, std::int64_t n, std::int64_t k, float alpha, const float* a,
               std::int64_t lda, const float* b, std::int64_t ldb, float* c, std::int64_t ldc);
};

const Passes& sse2_passes();
const Passes& avx2_passes();
const Passes& avx512_passes();
// The best that this machine runs.
const Passes& host_passes();

}  // namespace attnjit::runtime
