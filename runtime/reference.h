// The double-precision oracle of a call, row by row, or of a backward by heads, by interpreting the expressions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "attnjit/attnjit.h"
#include "dsl/interpreter.h"
#include "runtime/backward.h"
#include "runtime/forward.h"
#include "runtime/mods.h"
#include "runtime/status.h"
#include "runtime/thread_pool.h"

namespace attnjit::runtime {

// `mods` is bound. `o` (rows, Dv), `lse` and `row_max` (rows); any of them null. Rows lie inside the problem.
void reference_rows(const ForwardCall& call, const Mods& mods, std::span<const attnjit_row> rows, ThreadPool& pool,
                    double* o, double* lse, double* row_max);

// Likewise attnjit_reference_bounds: `o_bound` (rows, Dv), `lse_bound` and `decided` (rows); any of them null.
void reference_bounds(const ForwardCall& call, const Mods& mods, std::span<const attnjit_row> rows, ThreadPool& pool,
                      double* o_bound, double* lse_bound, unsigned char* decided);

// A gradient and its bounds, packed. Either may be null.
struct ReferenceGradient {
  double* value = nullptr;
  double* bound = nullptr;
};

struct ReferenceGradients {
  ReferenceGradient dq, dk, dv;
  ReferenceGradient captures[dsl::kMaxCaptures];  // by number
};

// Likewise attnjit_reference_backward, for a batch and a key/value head inside the problem. Of `gradients` only what
// flows in is looked at. Where the call has an lse, it and o are of more keys. Fails where there is not enough memory.
Check reference_backward(const ForwardCall& call, const Gradients& gradients, const Mods& mods, std::int64_t b,
                         std::int64_t h_kv, ThreadPool& pool, const ReferenceGradients& out);

// The indices of one dimension of a captured tensor that were clamped.
struct ClampedReads {
  std::size_t capture = 0;  // its number
  int dimension = 0;
  std::int64_t count = 0;
  dsl::Point first;        // where it happened first, in the order of the rows and of the keys
  std::int64_t index = 0;  // what the index was there
};

// Likewise attnjit_clamped_reads, by capture and dimension; only those with a count.
std::vector<ClampedReads> clamped_reads(const ForwardCall& call, const Mods& mods, std::span<const attnjit_row> rows,
                                        ThreadPool& pool);

}  // namespace attnjit::runtime
