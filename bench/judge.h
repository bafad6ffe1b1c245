// Whether sampled rows of a result are right: the per-element, pattern and LSE rules of docs/numerics.md.
#pragma once

#include <span>
#include <string>

#include "bench/tensor.h"

namespace attnjit::tool {

// One row from the oracle, in double precision: attnjit_reference and attnjit_reference_error_terms.
struct RowTruth {
  std::span<const double> o, value_mass, score_mass;  // (Dv)
  double lse = 0.0;
};

struct Verdict {
  bool ok = true;
  double max_error = 0.0;   // largest |o - gold|
  double o_of_bound = 0.0;  // largest |o - gold| / bound; infinite where the pattern of NaN, infinity or zero is broken
  double lse_of_bound = 0.0;  // likewise for the LSE
  std::string why{};          // the first failure: which row's element, what it is, what it should be

  void merge(const Verdict& other);
};

// What element `d` of the row may be off: 2 (u_P + u_O) value_mass + 8 * 2^-24 score_mass, u the unit roundoffs of P
// and O, both of `type`, and the type's smallest step, where relative precision ends. 0 in a fully masked row.
double error_bound(const RowTruth& truth, std::size_t d, ElementType type);

// What the LSE may be off, `lse` being right.
double lse_bound(double lse);

// `o` (Dv) is the row that was computed, widened; `type` its element type. `where` names the row in `why`.
// |o - gold| <= error_bound for every element; NaN and infinity stand where the oracle has them; a fully masked row is
// exactly zero, its LSE -inf; the LSE is within 1e-4 + 1e-5 |lse|. The rule's allowance for approximate functions is
// left out: no CPU backend uses them.
Verdict judge_row(std::span<const double> o, double lse, const RowTruth& truth, ElementType type,
                  const std::string& where);

}  // namespace attnjit::tool
