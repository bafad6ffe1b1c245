// The double-precision oracle of a forward call, row by row, by interpreting the expressions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "attnjit/attnjit.h"
#include "runtime/forward.h"
#include "runtime/mods.h"
#include "runtime/thread_pool.h"

namespace attnjit::runtime {

// `mods` is bound. `o` (rows, Dv), `lse` and `row_max` (rows); any of them null. Rows lie inside the problem.
void reference_rows(const ForwardCall& call, const Mods& mods, std::span<const attnjit_row> rows, ThreadPool& pool,
                    double* o, double* lse, double* row_max);

// Likewise attnjit_reference_bounds: `o_bound` (rows, Dv), `lse_bound` and `decided` (rows); any of them null.
void reference_bounds(const ForwardCall& call, const Mods& mods, std::span<const attnjit_row> rows, ThreadPool& pool,
                      double* o_bound, double* lse_bound, unsigned char* decided);

}  // namespace attnjit::runtime
