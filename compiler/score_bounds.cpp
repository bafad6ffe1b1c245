// Interval arithmetic over the operations, rounded outwards to float32. Of a value an interval says: it is NaN, or
// between the ends. Lengths are not looked at, so that one text goes on to serve many of them.
#include "compiler/score_bounds.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "compiler/dialect/dialect.h"
#include "llvm/ADT/DenseMap.h"
#include "llvm/ADT/TypeSwitch.h"
#include "mlir/Dialect/Arith/IR/Arith.h"
#include "mlir/Dialect/Math/IR/Math.h"
#include "mlir/IR/Matchers.h"

namespace attnjit::compiler {
namespace {

namespace arith = mlir::arith;
namespace math = mlir::math;
using mlir::Value;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
// Up to here integers are exact, and nothing made of two of them wraps.
constexpr double kLargestInteger = 1 << 30;

struct Interval {
  double low = -kInfinity, high = kInfinity;
};

Interval hull(Interval a, Interval b) { return {std::min(a.low, b.low), std::max(a.high, b.high)}; }

// The float next to `x` on the side of `towards`, or x itself. Whatever rounds to nearest is not beyond it.
double rounded(double x, double towards) {
  const auto nearest = static_cast<float>(x);
  const auto as_double = static_cast<double>(nearest);
  if (as_double == x || (as_double < x) == (towards < x)) return as_double;
  return static_cast<double>(std::nextafter(nearest, static_cast<float>(towards)));
}

class Intervals {
 public:
  Interval of(mlir::func::FuncOp function) {
    for (mlir::Operation& op : function.front().without_terminator()) {
      if (op.getNumResults() != 1) continue;
      const Value result = op.getResult(0);
      if (!llvm::isa<mlir::FloatType, mlir::IntegerType>(result.getType())) continue;
      const Interval made = interval(op);
      known_[result] = llvm::isa<mlir::FloatType>(result.getType()) ? of_float(made) : of_integer(made, result);
    }
    return at(function.front().getTerminator()->getOperand(0));
  }

 private:
  Interval at(Value v) const { return known_.lookup_or(v, Interval{}); }

  static Interval of_float(Interval x) {
    if (std::isnan(x.low) || std::isnan(x.high)) return {};
    return {rounded(x.low, -kInfinity), rounded(x.high, kInfinity)};
  }
  static Interval of_integer(Interval x, Value v) {
    if (v.getType().isInteger(1)) return {0, 1};
    return {x.low < -kLargestInteger ? -kInfinity : x.low, x.high > kLargestInteger ? kInfinity : x.high};
  }

  static bool bounded(Interval a, Interval b) {
    return std::isfinite(a.low) && std::isfinite(a.high) && std::isfinite(b.low) && std::isfinite(b.high);
  }

  // An end that double rounded, once more outwards; float32's rounding then swallows it where it was exact.
  static Interval widened(Interval x) { return {std::nextafter(x.low, -kInfinity), std::nextafter(x.high, kInfinity)}; }

  static Interval sum(Interval a, Interval b, double sign) {
    if (sign < 0) b = {-b.high, -b.low};
    const auto end = [](double x, double y, double outwards) {
      const double total = x + y;
      // What is lost of either part says whether the sum is exact.
      const bool exact = total - x == y && total - y == x;
      return std::isinf(total) || exact ? total : std::nextafter(total, outwards);
    };
    return {end(a.low, b.low, -kInfinity), end(a.high, b.high, kInfinity)};
  }
  // Products of floats are exact as doubles; 0 times what may be infinite is 0 or NaN.
  static Interval product(Interval a, Interval b) {
    Interval result{kInfinity, -kInfinity};
    for (const double x : {a.low, a.high}) {
      for (const double y : {b.low, b.high}) {
        const double corner = x == 0 || y == 0 ? 0 : x * y;
        result = hull(result, {corner, corner});
      }
    }
    return result;
  }
  static Interval quotient(Interval a, Interval b) {
    if (b.low <= 0 && b.high >= 0) return {};
    Interval result{kInfinity, -kInfinity};
    for (const double x : {a.low, a.high}) {
      for (const double y : {b.low, b.high}) {
        const double corner = x / y;
        if (std::isnan(corner)) return {};
        const bool exact =
            std::isinf(y) || (corner * y == x && static_cast<double>(static_cast<float>(corner)) == corner);
        result = hull(result, exact || std::isinf(corner) ? Interval{corner, corner} : widened({corner, corner}));
      }
    }
    return result;
  }

  // A rising function whose values lie in `range`. Its code may be off by units of float32's last place, and by
  // `absolute`, and flush what is subnormal, but does not go beyond the range.
  template <typename Function>
  Interval rising(Interval x, Function function, Interval range, double absolute = 0x1p-126) const {
    const Interval exact{function(x.low), function(x.high)};
    if (std::isnan(exact.low) || std::isnan(exact.high)) return range;
    constexpr double kUnits = 0x1p-19;
    const auto off = [&](double end) { return std::isinf(end) ? 0 : kUnits * std::abs(end) + absolute; };
    return {std::max(exact.low - off(exact.low), range.low), std::min(exact.high + off(exact.high), range.high)};
  }

  static std::optional<double> literal(Value v) {
    if (mlir::FloatAttr value; mlir::matchPattern(v, mlir::m_Constant(&value))) return value.getValueAsDouble();
    return std::nullopt;
  }

  // `x` in the arm of a choice by a comparison of it with a literal.
  Interval arm(arith::SelectOp op, bool yes) const {
    const Value v = yes ? op.getTrueValue() : op.getFalseValue();
    Interval x = at(v);
    using P = arith::CmpFPredicate;
    auto compared = op.getCondition().getDefiningOp<arith::CmpFOp>();
    if (!compared || compared.getLhs() != v) return x;
    const std::optional<double> bound = literal(compared.getRhs());
    if (!bound || std::isnan(*bound)) return x;
    bool below = false;
    switch (compared.getPredicate()) {
      case P::OLT:
      case P::OLE:
      case P::ULT:
      case P::ULE:
        below = yes;
        break;
      case P::OGT:
      case P::OGE:
      case P::UGT:
      case P::UGE:
        below = !yes;
        break;
      default:
        return x;
    }
    if (below) {
      x.high = std::min(x.high, *bound);
    } else {
      x.low = std::max(x.low, *bound);
    }
    // Where no value can be, the other arm's will do.
    return x.low <= x.high ? x : Interval{*bound, *bound};
  }

  Interval interval(mlir::Operation& op) const {
    const auto arg = [&](unsigned i) { return at(op.getOperand(i)); };
    constexpr Interval kUnit{-1, 1}, kPositive{0, kInfinity};
    return llvm::TypeSwitch<mlir::Operation*, Interval>(&op)
        .Case<arith::ConstantOp>([&](arith::ConstantOp constant) -> Interval {
          if (const std::optional<double> value = literal(constant.getResult())) {
            // A NaN is in no bounds.
            return std::isnan(*value) ? Interval{0, 0} : Interval{*value, *value};
          }
          if (const auto value = llvm::dyn_cast<mlir::IntegerAttr>(constant.getValue());
              value && !constant.getType().isInteger(1)) {
            const auto number = static_cast<double>(value.getValue().getSExtValue());
            return {number, number};
          }
          return {};
        })
        .Case<arith::SelectOp>([&](arith::SelectOp choice) { return hull(arm(choice, true), arm(choice, false)); })
        // Integers, exact as doubles; what of_integer() does not follow may wrap.
        .Case<arith::AddIOp>([&](auto) { return bounded(arg(0), arg(1)) ? sum(arg(0), arg(1), 1) : Interval{}; })
        .Case<arith::SubIOp>([&](auto) { return bounded(arg(0), arg(1)) ? sum(arg(0), arg(1), -1) : Interval{}; })
        .Case<arith::MulIOp>([&](auto) { return bounded(arg(0), arg(1)) ? product(arg(0), arg(1)) : Interval{}; })
        .Case<arith::AddFOp>([&](auto) { return sum(arg(0), arg(1), 1); })
        .Case<arith::SubFOp>([&](auto) { return sum(arg(0), arg(1), -1); })
        .Case<arith::MulFOp>([&](auto) {
          const Interval made = product(arg(0), arg(1));
          return op.getOperand(0) == op.getOperand(1) ? Interval{std::max(made.low, 0.0), made.high} : made;
        })
        .Case<arith::MaxSIOp, arith::MaximumFOp>(
            [&](auto) { return Interval{std::max(arg(0).low, arg(1).low), std::max(arg(0).high, arg(1).high)}; })
        .Case<arith::MinSIOp, arith::MinimumFOp>(
            [&](auto) { return Interval{std::min(arg(0).low, arg(1).low), std::min(arg(0).high, arg(1).high)}; })
        .Case<FloorModOp>([&](auto) -> Interval {
          const Interval by = arg(1);
          return by.low == by.high && by.low > 0 ? Interval{0, by.low - 1} : Interval{};
        })
        .Case<arith::ExtSIOp, arith::ExtUIOp, arith::TruncIOp, arith::SIToFPOp, arith::UIToFPOp>(
            [&](auto) { return arg(0); })
        .Case<ToIntOp>([&](auto) {  // of NaN it is 0
          return hull({std::trunc(arg(0).low), std::trunc(arg(0).high)}, {0, 0});
        })
        // Floats.
        .Case<arith::DivFOp>([&](auto) { return quotient(arg(0), arg(1)); })
        .Case<arith::RemFOp>([&](auto) {
          const double by = std::max(std::abs(arg(1).low), std::abs(arg(1).high));
          const double largest = std::min(by, std::max(std::abs(arg(0).low), std::abs(arg(0).high)));
          return Interval{arg(0).low >= 0 ? 0 : -largest, arg(0).high <= 0 ? 0 : largest};
        })
        .Case<arith::NegFOp>([&](auto) { return Interval{-arg(0).high, -arg(0).low}; })
        .Case<math::AbsFOp>([&](auto) {
          const Interval x = arg(0);
          const double largest = std::max(std::abs(x.low), std::abs(x.high));
          return Interval{x.low > 0 ? x.low : x.high < 0 ? -x.high : 0, largest};
        })
        .Case<math::FloorOp>([&](auto) { return Interval{std::floor(arg(0).low), std::floor(arg(0).high)}; })
        .Case<math::CeilOp>([&](auto) { return Interval{std::ceil(arg(0).low), std::ceil(arg(0).high)}; })
        .Case<math::RoundEvenOp>(
            [&](auto) { return Interval{std::nearbyint(arg(0).low), std::nearbyint(arg(0).high)}; })
        .Case<math::ExpOp>([&](auto) { return rising(arg(0), [](double x) { return std::exp(x); }, kPositive); })
        .Case<math::Exp2Op>([&](auto) { return rising(arg(0), [](double x) { return std::exp2(x); }, kPositive); })
        // Those of a GPU keep an absolute precision near one.
        .Case<math::LogOp>(
            [&](auto) { return rising(raised(arg(0), 0), [](double x) { return std::log(x); }, {}, 0x1p-20); })
        .Case<math::Log2Op>(
            [&](auto) { return rising(raised(arg(0), 0), [](double x) { return std::log2(x); }, {}, 0x1p-20); })
        .Case<math::Log1pOp>(
            [&](auto) { return rising(raised(arg(0), -1), [](double x) { return std::log1p(x); }, {}); })
        .Case<math::SqrtOp>(
            [&](auto) { return rising(raised(arg(0), 0), [](double x) { return std::sqrt(x); }, kPositive); })
        .Case<math::RsqrtOp>([&](auto) {
          const Interval x = raised(arg(0), 0);
          return rising({-x.high, -x.low}, [](double y) { return y == 0 ? kInfinity : 1 / std::sqrt(-y); }, kPositive);
        })
        .Case<math::TanhOp>([&](auto) { return rising(arg(0), [](double x) { return std::tanh(x); }, kUnit); })
        .Case<math::ErfOp>([&](auto) { return rising(arg(0), [](double x) { return std::erf(x); }, kUnit); })
        .Case<math::SinOp, math::CosOp>([&](auto) { return kUnit; })
        // From its smallest value on it rises.
        .Case<GeluOp>([&](auto) { return Interval{-0.17, std::max(arg(0).high, 0.0)}; })
        .Default([](mlir::Operation*) { return Interval{}; });
  }

  // Below `least` a function is NaN.
  static Interval raised(Interval x, double least) { return {std::max(x.low, least), std::max(x.high, least)}; }

  llvm::DenseMap<Value, Interval> known_;
};

}  // namespace

std::optional<ScoreBounds> score_bounds(mlir::func::FuncOp function) {
  const Interval of_value = Intervals().of(function);
  constexpr double kLargest = std::numeric_limits<float>::max();
  if (of_value.low < -kLargest || of_value.high > kLargest) return std::nullopt;
  return ScoreBounds{static_cast<float>(of_value.low), static_cast<float>(of_value.high)};
}

}  // namespace attnjit::compiler
