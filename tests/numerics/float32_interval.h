// Where a float32 evaluation of an expression can end: a running error analysis beside the exact value.
//
// Knows the tree and its types, and nothing of the interpreter, whose values it therefore also checks.
#pragma once

#include <cstdint>
#include <vector>

#include "dsl/expr.h"
#include "dsl/interpreter.h"
#include "tests/numerics/tensor.h"

namespace attnjit::numerics {

// The unit roundoff of float32.
inline constexpr double kUnit = 0x1p-24;

struct Interval {
  double value = 0.0;         // floats: the exact (double) result
  double lo = 0.0, hi = 0.0;  // floats: every float32 evaluation lies between; all NaN: every one is NaN
  std::int64_t integer = 0;   // ints and bools: the exact result
  bool unsure = false;        // a float32 evaluation may give anything of the type
  double slack = 0.0;  // floats: what evaluating sums and products in log2 units, term by term, may add to the error
};

// Evaluates one bound expression; not safe for concurrent use of one object.
class Float32Interval {
 public:
  Float32Interval(const dsl::Expr& bound, const std::vector<Tensor>& captures);
  // `score_error`: how far the kernel's score may be from `point.score`.
  Interval evaluate(const dsl::Point& point, double score_error);

 private:
  Interval node(const dsl::Node& node) const;
  double slack(const dsl::Node& node, const Interval& result) const;
  const Interval& arg(const dsl::Node& node, int number) const;

  const dsl::Expr& expr_;
  std::vector<Tensor> captures_;
  std::vector<Interval> values_;
  dsl::Point point_;
  double score_error_ = 0.0;
};

}  // namespace attnjit::numerics
