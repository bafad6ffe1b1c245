// The double-precision forward, the ideal and eager roundings of it, and the error bounds, row by row.
#pragma once

#include <cstdint>
#include <vector>

#include "tests/numerics/problem.h"

namespace attnjit::numerics {

struct RowIndex {
  std::int64_t b = 0, h = 0, q_idx = 0;
};

// What is known of one query row. Per feature where a vector (head_dim_v entries). docs/numerics.md derives the bounds.
struct GoldRow {
  RowIndex at;
  bool undecided = false;  // float32 does not decide the result (a jump, an overflow): the row is not judged
  bool poisoned = false;   // some kept element is NaN or +infinity: the row is NaN
  double lse = 0.0, row_max = 0.0;
  double row_max_lo = 0.0, row_max_hi = 0.0;  // where a float32 evaluation's maximum may lie
  double lse_bound = 0.0;                     // of |lse - gold|
  std::vector<double> o;
  std::vector<double> ideal;    // rounded where a fused kernel must round
  std::vector<double> eager;    // rounded to the input type after every step, as eager code does
  std::vector<double> bound;    // of |o - gold|; infinite where unspecified
  std::vector<double> scatter;  // the part of `bound` that comes from float32 scores
};

struct Gold {
  std::vector<RowIndex> rows() const;
  std::vector<GoldRow> row;
};

// Up to `spec.rows` rows, the edges of tiles first, the others spread at random.
std::vector<RowIndex> sample_rows(const Case& spec);

// Rows of `problem`. Throws std::logic_error where the interpreter and the test's own evaluation of the expression
// differ, which is a fault of one of them.
Gold compute_gold(const Problem& problem, const std::vector<RowIndex>& rows);

}  // namespace attnjit::numerics
