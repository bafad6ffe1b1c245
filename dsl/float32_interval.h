// Where a float32 evaluation of an expression can end: a running error analysis beside the exact value.
//
// Knows the tree and its types, and nothing of how the interpreter evaluates them: it also checks its values.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "dsl/expr.h"
#include "dsl/interpreter.h"

namespace attnjit::dsl {

// The unit roundoff of float32.
inline constexpr double kUnit = 0x1p-24;

struct Interval {
  double value = 0.0;         // floats: the exact (double) result
  double lo = 0.0, hi = 0.0;  // floats: every float32 evaluation lies between; all NaN: every one is NaN
  std::int64_t integer = 0;   // ints and bools: the exact result
  bool unsure = false;        // a float32 evaluation may give anything of the type
  double slack = 0.0;  // floats: what evaluating sums and products in log2 units, term by term, may add to the error
};

// Evaluates one bound expression, which must outlive it; not safe for concurrent use of one object.
class Float32Interval {
 public:
  Float32Interval(const Expr& bound, std::span<const CaptureView> captures);
  // `score_error`: how far the kernel's score may be from `point.score`.
  Interval evaluate(const Point& point, double score_error);

 private:
  Interval node(const Node& node) const;
  double slack(const Node& node, const Interval& result) const;
  const Interval& arg(const Node& node, int number) const;

  const Expr& expr_;
  std::vector<CaptureView> captures_;
  std::vector<Interval> values_;
  Point point_;
  double score_error_ = 0.0;
};

}  // namespace attnjit::dsl
