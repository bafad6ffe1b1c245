// Reverse mode over the nodes of an expression, users before what they use: no recursion, whatever the tree's shape.
#include "dsl/derivative.h"

#include <algorithm>
#include <cmath>

#include "dsl/functions.h"

namespace attnjit::dsl {
namespace {

// Gradients of the two operands of an operator on floats.
Adjoints operator_adjoints(Op op, double a, double b, double grad) {
  switch (op) {
    case Op::kNeg:
      return {-grad};
    case Op::kAdd:
      return {grad, grad};
    case Op::kSub:
      return {grad, -grad};
    case Op::kMul:
      return {grad * b, grad * a};
    case Op::kDiv:
      return {grad / b, -grad * (a / b / b)};
    case Op::kMod:
      return {grad, -grad * std::floor(a / b)};
    case Op::kPow:
      return {b == 0 ? 0.0 : grad * (b * std::pow(a, b - 1)),
              a == 0 && b >= 0 ? 0.0 : grad * (std::pow(a, b) * std::log(a))};
    default:
      return {};  // floored division
  }
}

}  // namespace

Derivative::Derivative(const Expr& bound, std::span<const CaptureView> captures)
    : expr_(bound),
      captures_(captures.begin(), captures.end()),
      interpreter_(bound, captures),
      adjoints_(bound.nodes.size()) {}

ElementGradient Derivative::at(const Point& point, double grad) {
  ElementGradient result;
  contributions_.clear();
  if (grad == 0 || !interpreter_.score_mod(point).keep) return result;
  const std::span<const Scalar> values = interpreter_.values();
  std::fill(adjoints_.begin(), adjoints_.end(), 0.0);
  adjoints_[static_cast<std::size_t>(expr_.root)] = grad;
  for (std::size_t n = expr_.nodes.size(); n-- > 0;) {
    const Node& node = expr_.nodes[n];
    const double adjoint = adjoints_[n];
    // What is multiplied by nothing contributes nothing, whatever it is.
    if (node.type != Type::kFloat || adjoint == 0) continue;
    const auto add = [&](std::size_t arg, double contribution) {
      adjoints_[static_cast<std::size_t>(node.args[arg])] += contribution;
    };
    const auto value = [&](std::size_t arg) { return values[static_cast<std::size_t>(node.args[arg])]; };
    switch (node.op) {
      case Op::kScore:
        result.dscore += adjoint;
        break;
      case Op::kFloat:
        break;
      case Op::kRead: {
        const CaptureView& view = captures_[static_cast<std::size_t>(node.capture)];
        Contribution& contribution = contributions_.emplace_back();
        contribution.capture = node.capture;
        for (std::size_t i = 0; i < node.args.size(); ++i) {
          contribution.index[i] = std::clamp<std::int64_t>(value(i).i, 0, view.extent[i] - 1);
        }
        contribution.value = adjoint;
        break;
      }
      case Op::kSelect:
        add(value(0).i ? 1 : 2, adjoint);
        break;
      case Op::kCall: {
        const auto adjoints = function_info(node.function).adjoints;
        if (!adjoints) break;
        Scalar args[3];
        for (std::size_t i = 0; i < node.args.size(); ++i) args[i] = value(i);
        const Adjoints contributions = adjoints(args, adjoint);
        for (std::size_t i = 0; i < node.args.size(); ++i) add(i, contributions[i]);
        break;
      }
      default: {
        const Adjoints contributions =
            operator_adjoints(node.op, value(0).f, node.args.size() > 1 ? value(1).f : 0.0, adjoint);
        for (std::size_t i = 0; i < node.args.size(); ++i) add(i, contributions[i]);
        break;
      }
    }
  }
  result.contributions = contributions_;
  return result;
}

}  // namespace attnjit::dsl
