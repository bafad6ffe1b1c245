// Whether sampled rows of a result are right: the per-element, pattern and LSE rules of docs/numerics.md.
#pragma once

#include <span>
#include <string>

#include "bench/tensor.h"

namespace attnjit::tool {

// One row from the oracle, in double precision: attnjit_reference and attnjit_reference_bounds.
struct RowTruth {
  std::span<const double> o, o_bound;  // (Dv)
  double lse = 0.0, lse_bound = 0.0;
  bool decided = true;
};

struct Verdict {
  bool ok = true;
  double max_error = 0.0;   // largest |o - gold|
  double o_of_bound = 0.0;  // largest |o - gold| / bound; infinite where the pattern of NaN, infinity or zero is broken
  double lse_of_bound = 0.0;  // likewise for the LSE
  std::size_t rows = 0;       // looked at
  std::size_t left_out = 0;   // of these: not judged, as float32 does not decide them
  std::size_t unbounded = 0;  // of these: judged, but for elements that anything may stand in
  std::string why{};          // the first failure: which row's element, what it is, what it should be

  void merge(const Verdict& other);
};

// Values that were computed against those of the oracle and their bounds, one by one; `type` is their element type,
// `name` and `where` say in `why` what they are. As one row of judge_row, without an LSE.
Verdict judge_values(std::span<const double> values, std::span<const double> gold, std::span<const double> bound,
                     ElementType type, const std::string& name, const std::string& where);

// `o` (Dv) is the row that was computed, widened; `type` its element type. `where` names the row in `why`.
// A row that float32 does not decide is left out. Else |o - gold| is at most its bound for every element; NaN and
// infinity stand where the oracle has them; a fully masked row is exactly zero, its LSE -inf; the LSE is within its
// bound. The LSE of a NaN row may be +infinity.
Verdict judge_row(std::span<const double> o, double lse, const RowTruth& truth, ElementType type,
                  const std::string& where);

// How many of `rows` rows may be left out: fewer than one in a hundred, and one where there are few rows.
std::size_t allowed_left_out(std::size_t rows);

}  // namespace attnjit::tool
