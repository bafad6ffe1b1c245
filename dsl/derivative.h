// The oracle of the backward: the derivative of a bound expression in double precision, element by element.
// Shares with the compiler what interpreter.h shares: the parser and the types.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "dsl/expr.h"
#include "dsl/interpreter.h"

namespace attnjit::dsl {

// What one element adds to the gradient of a captured tensor.
struct Contribution {
  std::int32_t capture = 0;           // its number
  std::int64_t index[kMaxRank] = {};  // clamped to the extents, as the read's
  double value = 0.0;
};

struct ElementGradient {
  double dscore = 0.0;  // of the score that the expression was given
  // Of reads of floating captured tensors, one per read node to which a gradient comes that is not 0. Valid until the
  // next call.
  std::span<const Contribution> contributions;
};

// Reusable reverse-mode derivative of one bound score_mod, which must outlive it; not safe for concurrent use of one
// object. Kinks and select-safety: docs/backward.md.
class Derivative {
 public:
  Derivative(const Expr& bound, std::span<const CaptureView> captures);
  // `grad`: of the modified score. Where it is 0, or the element is dropped, everything is exactly 0.
  ElementGradient at(const Point& point, double grad);

 private:
  const Expr& expr_;
  std::vector<CaptureView> captures_;
  Interpreter interpreter_;
  std::vector<double> adjoints_;
  std::vector<Contribution> contributions_;
};

}  // namespace attnjit::dsl
