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

// Likewise attnjit_reference_error_terms: `value_mass` and `score_mass` (rows, Dv), either null.
void reference_error_terms(const ForwardCall& call, const Mods& mods, std::span<const attnjit_row> rows,
                           ThreadPool& pool, double* value_mass, double* score_mass);

}  // namespace attnjit::runtime
