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

// The derivative of a result by one read of a floating captured tensor.
struct ReadDerivative {
  std::int32_t capture = 0;   // its number
  std::int64_t place = 0;     // of the element, in a packed tensor of the captured one's extents
  bool place_unsure = false;  // a float32 evaluation may read any element
  Interval derivative;
};

// Evaluates one bound expression, which must outlive it; not safe for concurrent use of one object.
class Float32Interval {
 public:
  // `tanh_error`: of the kernel's tanh, relative, beside what a polynomial may have.
  Float32Interval(const Expr& bound, std::span<const CaptureView> captures, double tanh_error = 0.0);
  // `score_error`: how far the kernel's score may be from `point.score`.
  Interval evaluate(const Point& point, double score_error);

  // The derivative of the last evaluation's result by the score, in float32: the gradient that a kernel computes from
  // one of the result, divided by that. Exactly 0 where the result does not depend on the score.
  Interval differentiate();
  // Of the same: by the reads that the result may depend on. Valid until the next call.
  std::span<const ReadDerivative> read_derivatives() const { return reads_; }

 private:
  Interval node(const Node& node) const;
  double slack(const Node& node, const Interval& result) const;
  const Interval& arg(const Node& node, int number) const;
  bool wants(const Node& node, std::size_t number) const {
    return differentiable_[static_cast<std::size_t>(node.args[number])];
  }
  void add(NodeId arg, const Interval& contribution);
  void propagate(const Node& node, const Interval& result, const Interval& adjoint);
  void propagate_call(const Node& node, const Interval& result, const Interval& adjoint);
  void propagate_read(const Node& node, const Interval& adjoint);
  Interval call_float(const Node& node, const Interval& a, const Interval& b, const Interval& c) const;

  const Expr& expr_;
  std::vector<CaptureView> captures_;
  double tanh_error_;
  std::vector<Interval> values_;
  std::vector<bool> differentiable_;  // depends on the score or on a floating captured tensor
  std::vector<Interval> adjoints_;
  std::vector<bool> reached_;  // the adjoint is not nothing
  std::vector<ReadDerivative> reads_;
  Point point_;
  double score_error_ = 0.0;
};

}  // namespace attnjit::dsl
