// Interval evaluation of an expression under float32 rounding.
#include "dsl/float32_interval.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <numbers>

namespace attnjit::dsl {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kFloatMax = std::numeric_limits<float>::max();
constexpr double kFloatMin = std::numeric_limits<float>::min();
// Relative error of the functions that are computed by polynomials, in units of 2^-24 (4e-7 and some).
constexpr double kFunction = 8.0;

Interval anything(double value) { return {value, -kInfinity, kInfinity, 0, true}; }
Interval exactly(double value) { return {value, value, value, 0, false}; }
bool is_point(const Interval& x) { return !x.unsure && x.lo == x.hi; }
bool is_nan(const Interval& x) { return !x.unsure && std::isnan(x.lo); }
bool is_float32(double x) { return static_cast<double>(static_cast<float>(x)) == x; }

// The interval from a value and what the extreme arguments give. NaN in some and not in others: anything may happen.
Interval hull(double value, std::initializer_list<double> corners) {
  double lo = value, hi = value;
  for (const double corner : corners) {
    if (std::isnan(corner) != std::isnan(value)) return anything(value);
    lo = std::min(lo, corner);
    hi = std::max(hi, corner);
  }
  return {value, lo, hi, 0, false};
}

// Widens by one rounding: `relative` of the magnitude (the subnormals, which may be flushed, besides) and `absolute`.
Interval inflate(Interval x, double relative, double absolute = 0.0) {
  if (x.unsure || std::isnan(x.value)) return x;
  const auto widened = [&](double bound, double sign) {
    if (!std::isfinite(bound)) return bound;
    double result = bound + sign * (relative * std::fabs(bound) + absolute);
    if (std::fabs(bound) < kFloatMin && bound != 0.0) result += sign * kFloatMin;
    return result;
  };
  x.lo = widened(x.lo, -1.0);
  x.hi = widened(x.hi, 1.0);
  // Past float32's range a result is infinite, or just not yet.
  if (x.hi > kFloatMax) {
    x.hi = kInfinity;
    if (std::isfinite(x.lo)) x.lo = std::min(x.lo, kFloatMax);
  }
  if (x.lo < -kFloatMax) {
    x.lo = -kInfinity;
    if (std::isfinite(x.hi)) x.hi = std::max(x.hi, -kFloatMax);
  }
  return x;
}

// A correctly rounded operation (or a contracted one, which rounds less): exact where arguments and result are.
Interval rounded(Interval x, bool exact_arguments) {
  if (exact_arguments && is_point(x) && is_float32(x.value)) return x;
  return inflate(x, kUnit);
}

template <typename F>
Interval monotone(const Interval& a, F f, double relative, double absolute = 0.0) {
  if (a.unsure) return anything(f(a.value));
  return inflate(hull(f(a.value), {f(a.lo), f(a.hi)}), relative, absolute);
}

// A function without a rounding error (floor, sign, ...), which may jump.
template <typename F>
Interval exact_step(const Interval& a, F f) {
  if (a.unsure) return anything(f(a.value));
  return hull(f(a.value), {f(a.lo), f(a.hi)});
}

// From a bound of the derivative: `value` plus or minus `slope` times the argument's distance.
Interval lipschitz(const Interval& a, double value, double slope, double error) {
  if (a.unsure || !std::isfinite(a.value)) return is_nan(a) ? exactly(kNan) : anything(value);
  const double reach = slope * std::max(a.hi - a.value, a.value - a.lo) + error;
  if (!std::isfinite(reach)) return anything(value);
  return {value, value - reach, value + reach, 0, false};
}

template <typename F>
Interval corners(const Interval& a, const Interval& b, F f) {
  const double value = f(a.value, b.value);
  if (a.unsure || b.unsure) return anything(value);
  return hull(value, {f(a.lo, b.lo), f(a.lo, b.hi), f(a.hi, b.lo), f(a.hi, b.hi)});
}

Interval divide(const Interval& a, const Interval& b) {
  const double value = a.value / b.value;
  if (is_nan(a) || is_nan(b)) return exactly(kNan);
  // A zero's sign is not observable, so the sign of x / 0 is not, either.
  if (a.unsure || b.unsure) return anything(value);
  if (b.lo <= 0.0 && b.hi >= 0.0) {
    const bool zero_by_zero = is_point(a) && is_point(b) && a.value == 0.0;
    return zero_by_zero ? exactly(kNan) : anything(value);
  }
  return rounded(corners(a, b, [](double x, double y) { return x / y; }), is_point(a) && is_point(b));
}

Interval floor_divide(const Interval& a, const Interval& b) {
  return exact_step(divide(a, b), [](double x) { return std::floor(x); });
}

Interval modulus(const Interval& a, const Interval& b) {
  // Exact; the quotient's rounding would be multiplied by the divisor.
  double value = std::fmod(a.value, b.value);
  if (value != 0.0 && std::signbit(value) != std::signbit(b.value)) value += b.value;
  if (is_nan(a) || is_nan(b)) return exactly(kNan);
  if (a.unsure || b.unsure) return anything(value);
  if (is_point(b) && b.value == 0.0) return exactly(kNan);
  if (!std::isfinite(value) || !std::isfinite(b.value)) return anything(value);
  const Interval quotient = floor_divide(a, b);
  if (quotient.unsure || quotient.lo != quotient.hi) return anything(value);
  if (is_point(a) && is_point(b) && is_float32(quotient.lo * b.value) && is_float32(value)) return exactly(value);
  const double reach = std::max(a.hi - a.value, a.value - a.lo) +
                       std::fabs(quotient.lo) * std::max(b.hi - b.value, b.value - b.lo) +
                       2.0 * kUnit * (std::fabs(a.value) + std::fabs(quotient.lo * b.value));
  return {value, value - reach, value + reach, 0, false};
}

Interval power(const Interval& a, const Interval& b) {
  const double value = std::pow(a.value, b.value);
  if (is_point(b) && b.value == 0.0) return exactly(1.0);
  if (is_point(a) && a.value == 1.0) return exactly(1.0);
  if (is_nan(a) || is_nan(b)) return exactly(kNan);
  if (a.unsure || b.unsure || !std::isfinite(b.value)) return anything(value);
  const bool integral = is_point(b) && b.value == std::floor(b.value);
  if (a.lo < 0.0 && !integral) {
    return a.hi < 0.0 && std::isfinite(a.lo) && is_point(b) ? exactly(kNan) : anything(value);
  }
  if (a.lo <= 0.0 && a.hi >= 0.0 && b.lo < 0.0) return anything(value);
  Interval result = corners(a, b, [](double x, double y) { return std::pow(x, y); });
  if (a.lo < 0.0 && a.hi > 0.0 && !result.unsure) result.lo = std::min(result.lo, 0.0);
  if (result.unsure) return result;
  // exp(b log a): the error of the logarithm is multiplied by b.
  double exponent = 0.0;
  for (const double base : {a.lo, a.hi}) {
    if (base != 0.0 && std::isfinite(base)) {
      exponent = std::max(exponent, std::fabs(std::log(std::fabs(base))) * std::max(std::fabs(b.lo), std::fabs(b.hi)));
    }
  }
  return inflate(result, kFunction * kUnit * (1.0 + std::min(exponent, 200.0)));
}

Interval minimum(const Interval& a, const Interval& b, bool maximum) {
  const auto pick = [&](double x, double y) {
    if (std::isnan(x) || std::isnan(y)) return kNan;
    return maximum ? std::max(x, y) : std::min(x, y);
  };
  const double value = pick(a.value, b.value);
  if (is_nan(a) || is_nan(b)) return exactly(kNan);
  if (a.unsure || b.unsure) return anything(value);
  return {value, pick(a.lo, b.lo), pick(a.hi, b.hi), 0, false};
}

Interval truth(bool value, bool unsure = false) { return {0.0, 0.0, 0.0, value ? 1 : 0, unsure}; }
Interval whole(std::int64_t value, bool unsure = false) { return {0.0, 0.0, 0.0, value, unsure}; }

std::int64_t wrap(std::uint64_t bits) { return static_cast<std::int64_t>(bits); }

std::int64_t to_int(double x) {
  if (std::isnan(x)) return 0;
  if (x >= 0x1p63) return std::numeric_limits<std::int64_t>::max();
  if (x <= -0x1p63) return std::numeric_limits<std::int64_t>::min();
  return static_cast<std::int64_t>(x);
}

std::int64_t int_floor_divide(std::int64_t a, std::int64_t b) {
  if (b == 0) return 0;
  if (b == -1) return wrap(0 - static_cast<std::uint64_t>(a));
  const std::int64_t quotient = a / b;
  return quotient - ((a % b != 0 && (a < 0) != (b < 0)) ? 1 : 0);
}

std::int64_t int_modulus(std::int64_t a, std::int64_t b) {
  if (b == 0 || b == -1) return 0;
  const std::int64_t rest = a % b;
  return rest != 0 && (rest < 0) != (b < 0) ? rest + b : rest;
}

std::int64_t int_power(std::int64_t a, std::int64_t b) {
  std::uint64_t result = 1, base = static_cast<std::uint64_t>(a);
  for (std::uint64_t left = static_cast<std::uint64_t>(std::max<std::int64_t>(b, 0)); left != 0; left >>= 1) {
    if (left & 1) result *= base;
    base *= base;
  }
  return wrap(result);
}

Interval compare_floats(Op op, const Interval& a, const Interval& b) {
  const auto apply = [op](double x, double y) {
    switch (op) {
      case Op::kLt:
        return x < y;
      case Op::kLe:
        return x <= y;
      case Op::kGt:
        return x > y;
      case Op::kGe:
        return x >= y;
      case Op::kEq:
        return x == y;
      default:
        return x != y;
    }
  };
  const bool value = apply(a.value, b.value);
  if (is_nan(a) || is_nan(b)) return truth(op == Op::kNe);
  if (a.unsure || b.unsure) return truth(value, true);
  const bool apart = a.hi < b.lo || b.hi < a.lo;
  return truth(value, !apart && !(is_point(a) && is_point(b)));
}

bool compare_ints(Op op, std::int64_t a, std::int64_t b) {
  switch (op) {
    case Op::kLt:
      return a < b;
    case Op::kLe:
      return a <= b;
    case Op::kGt:
      return a > b;
    case Op::kGe:
      return a >= b;
    case Op::kEq:
      return a == b;
    default:
      return a != b;
  }
}

// `b` and `c` are `a` where the function has fewer arguments.
Interval call_int(const Node& node, const Interval& a, const Interval& b, const Interval& c) {
  const bool unsure = a.unsure || b.unsure || c.unsure;
  switch (node.function) {
    case Function::kMin:
      return whole(std::min(a.integer, b.integer), unsure);
    case Function::kMax:
      return whole(std::max(a.integer, b.integer), unsure);
    case Function::kClamp:
      return whole(std::min(std::max(a.integer, b.integer), c.integer), unsure);
    case Function::kAbs:
      return whole(a.integer < 0 ? wrap(0 - static_cast<std::uint64_t>(a.integer)) : a.integer, unsure);
    case Function::kSign:
      return whole((a.integer > 0) - (a.integer < 0), unsure);
    case Function::kRelu:
      return whole(std::max<std::int64_t>(a.integer, 0), unsure);
    default:
      return whole(a.integer, unsure);  // floor, ceil, round of an int
  }
}

double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }
double gelu(double x) { return x * 0.5 * (1.0 + std::erf(x * std::numbers::sqrt2 / 2.0)); }

// ---- Derivatives ----

bool is_nothing(const Interval& x) { return !x.unsure && x.lo == 0.0 && x.hi == 0.0; }

// A gradient times a derivative. Compilers group these products as they like: two roundings for each. Where a gradient
// is 0 and the derivative is not finite a kernel may do the product or leave it out.
Interval times(const Interval& gradient, const Interval& derivative, double roundings = 2.0) {
  const double value = gradient.value == 0.0 ? 0.0 : gradient.value * derivative.value;
  if (gradient.unsure || derivative.unsure) return anything(value);
  const Interval product = hull(value, {gradient.lo * derivative.lo, gradient.lo * derivative.hi,
                                        gradient.hi * derivative.lo, gradient.hi * derivative.hi});
  return is_nothing(product) ? product : inflate(product, roundings * kUnit);
}

Interval over(const Interval& gradient, const Interval& divisor) {
  Interval result = divide(gradient, divisor);
  if (gradient.value == 0.0 && result.value != 0.0) return anything(0.0);
  return result.unsure || is_nothing(result) ? result : inflate(result, kUnit);
}

Interval sum(const Interval& a, const Interval& b) {
  const Interval result = corners(a, b, [](double x, double y) { return x + y; });
  return is_nothing(result) ? result : inflate(result, kUnit);
}

// The image of x under a function with one extremum.
template <typename F>
Interval image(const Interval& x, F f, double extremum_at, double extremum, double error) {
  if (x.unsure) return anything(f(x.value));
  Interval result = hull(f(x.value), {f(x.lo), f(x.hi)});
  if (x.lo < extremum_at && x.hi > extremum_at) result = hull(result.value, {result.lo, result.hi, extremum});
  return inflate(result, 0.0, error);
}

Interval logarithm(const Interval& x) {
  return monotone(x, [](double y) { return std::log(y); }, kFunction * kUnit, kFunction * kUnit);
}

double sign(double x) { return std::isnan(x) ? x : static_cast<double>((x > 0) - (x < 0)); }

Interval negated(const Interval& x) { return {-x.value, -x.hi, -x.lo, 0, x.unsure}; }

// What the condition lets through.
Interval where(const Interval& condition, const Interval& x) {
  const bool chosen = condition.integer != 0;
  if (!condition.unsure) return chosen ? x : exactly(0.0);
  const double value = chosen ? x.value : 0.0;
  if (x.unsure || std::isnan(x.lo)) return anything(value);
  return {value, std::min(x.lo, 0.0), std::max(x.hi, 0.0), 0, false};
}

Interval conjunction(const Interval& a, const Interval& b) {
  for (const Interval* side : {&a, &b}) {
    if (!side->unsure && side->integer == 0) return truth(false);
  }
  return truth(a.integer != 0 && b.integer != 0, a.unsure || b.unsure);
}

Interval negation(const Interval& a) { return truth(a.integer == 0, a.unsure); }

Interval disjunction(const Interval& a, const Interval& b) { return negation(conjunction(negation(a), negation(b))); }

}  // namespace

Float32Interval::Float32Interval(const Expr& bound, std::span<const CaptureView> captures, double tanh_error)
    : expr_(bound),
      captures_(captures.begin(), captures.end()),
      tanh_error_(tanh_error),
      values_(bound.nodes.size()),
      differentiable_(bound.nodes.size()),
      adjoints_(bound.nodes.size()),
      reached_(bound.nodes.size()) {
  for (std::size_t i = 0; i < bound.nodes.size(); ++i) {
    const Node& node = bound.nodes[i];
    if (node.type != Type::kFloat) continue;
    differentiable_[i] = node.op == Op::kScore || node.op == Op::kRead;
    for (const NodeId arg : node.args) {
      differentiable_[i] = differentiable_[i] || differentiable_[static_cast<std::size_t>(arg)];
    }
  }
}

const Interval& Float32Interval::arg(const Node& node, int number) const {
  return values_[static_cast<std::size_t>(node.args[static_cast<std::size_t>(number)])];
}

Interval Float32Interval::evaluate(const Point& point, double score_error) {
  point_ = point;
  score_error_ = score_error;
  for (std::size_t i = 0; i < expr_.nodes.size(); ++i) {
    values_[i] = node(expr_.nodes[i]);
    if (expr_.nodes[i].type == Type::kFloat) values_[i].slack = slack(expr_.nodes[i], values_[i]);
  }
  Interval result = values_[static_cast<std::size_t>(expr_.root)];
  if (std::isfinite(result.slack)) {
    result.lo -= result.slack;
    result.hi += result.slack;
  }
  return result;
}

Interval Float32Interval::call_float(const Node& node, const Interval& a, const Interval& b, const Interval& c) const {
  constexpr double kError = kFunction * kUnit;
  const auto nan_outside = [](auto f, double least) {
    return [f, least](double x) { return x < least ? kNan : f(x); };
  };
  switch (node.function) {
    case Function::kMin:
      return minimum(a, b, false);
    case Function::kMax:
      return minimum(a, b, true);
    case Function::kClamp:
      return minimum(minimum(a, b, true), c, false);
    case Function::kAbs: {
      Interval result = exact_step(a, [](double x) { return std::fabs(x); });
      if (!result.unsure && a.lo < 0.0 && a.hi > 0.0) result.lo = 0.0;
      return result;
    }
    case Function::kRelu: {
      // PyTorch's relu propagates NaN.
      return minimum(a, exactly(0.0), true);
    }
    case Function::kExp:
      return monotone(a, [](double x) { return std::exp(x); }, kError);
    case Function::kExp2:
      return monotone(a, [](double x) { return std::exp2(x); }, kError);
    // Near one a logarithm loses its relative precision, not its absolute one.
    case Function::kLog:
      return logarithm(a);
    case Function::kLog2:
      return monotone(a, [](double x) { return std::log2(x); }, kError, kError);
    case Function::kLog1p:
      return monotone(a, [](double x) { return std::log1p(x); }, kError, kError);
    case Function::kSqrt:
      return monotone(a, nan_outside([](double x) { return std::sqrt(x); }, 0.0), kError);
    case Function::kRsqrt:
      if (!a.unsure && a.lo <= 0.0 && a.hi >= 0.0) return anything(1.0 / std::sqrt(a.value));
      return monotone(a, nan_outside([](double x) { return 1.0 / std::sqrt(x); }, 0.0), kError);
    case Function::kTanh:
      return monotone(a, [](double x) { return std::tanh(x); }, kError + tanh_error_);
    case Function::kSigmoid:
      return monotone(a, sigmoid, kError);
    case Function::kErf:
      return monotone(a, [](double x) { return std::erf(x); }, kError);
    // The largest slopes: 1.0999 and 1.1290.
    case Function::kSilu:
      return lipschitz(a, a.value * sigmoid(a.value), 1.1, kError * std::fabs(a.value) + kFloatMin);
    case Function::kGelu:
      return lipschitz(a, gelu(a.value), 1.13, kError * std::fabs(a.value) + kFloatMin);
    case Function::kSin:
      return lipschitz(a, std::sin(a.value), 1.0, kError * (1.0 + std::fabs(a.value)));
    case Function::kCos:
      return lipschitz(a, std::cos(a.value), 1.0, kError * (1.0 + std::fabs(a.value)));
    case Function::kFloor:
      return exact_step(a, [](double x) { return std::floor(x); });
    case Function::kCeil:
      return exact_step(a, [](double x) { return std::ceil(x); });
    case Function::kRound:
      return exact_step(a, [](double x) { return std::nearbyint(x); });
    case Function::kSign:
      return exact_step(a, sign);
    default:
      return anything(kNan);
  }
}

// A kernel may multiply the modified score by log2(e) at its end or, where it is a sum of multiples, in every term:
// then what is exact in natural units is rounded in every term and every partial sum.
double Float32Interval::slack(const Node& node, const Interval& result) const {
  const double own = std::isfinite(result.value) ? kUnit * std::fabs(result.value) : 0.0;
  switch (node.op) {
    case Op::kAdd:
    case Op::kSub:
      return own + arg(node, 0).slack + arg(node, 1).slack;
    case Op::kNeg:
      return arg(node, 0).slack;
    case Op::kSelect:
      return arg(node, arg(node, 0).integer != 0 ? 1 : 2).slack;
    case Op::kMul:
      return own + arg(node, 0).slack * std::fabs(arg(node, 1).value) +
             arg(node, 1).slack * std::fabs(arg(node, 0).value);
    case Op::kDiv:
      return own + arg(node, 0).slack / std::fabs(arg(node, 1).value);
    default:
      return own;
  }
}

Interval Float32Interval::node(const Node& node) const {
  const bool is_float = node.type == Type::kFloat;
  const auto type_of = [&](int number) { return expr_[node.args[static_cast<std::size_t>(number)]].type; };
  switch (node.op) {
    case Op::kScore:
      return {point_.score, point_.score - score_error_, point_.score + score_error_, 0, false};
    case Op::kIndexB:
      return whole(point_.b);
    case Op::kIndexH:
      return whole(point_.h);
    case Op::kIndexQ:
      return whole(point_.q_idx);
    case Op::kIndexKv:
      return whole(point_.kv_idx);
    case Op::kInt:
    case Op::kBool:
      return whole(node.int_value);
    case Op::kFloat:
      return rounded(exactly(node.float_value), true);
    case Op::kRead: {
      const CaptureView& tensor = captures_[static_cast<std::size_t>(node.capture)];
      bool unsure = false;
      std::int64_t offset = 0;
      for (std::size_t i = 0; i < node.args.size(); ++i) {
        const Interval& position = arg(node, static_cast<int>(i));
        unsure = unsure || (position.unsure && tensor.extent[i] > 1);
        offset += std::clamp<std::int64_t>(position.integer, 0, tensor.extent[i] - 1) * tensor.stride[i];
      }
      if (!is_float) return whole(read_as_int(tensor.data, tensor.dtype, offset), unsure);
      const double value = read_as_double(tensor.data, tensor.dtype, offset);
      return unsure ? anything(value) : exactly(value);
    }
    case Op::kSelect: {
      const Interval& condition = arg(node, 0);
      const Interval& chosen = arg(node, condition.integer != 0 ? 1 : 2);
      if (!condition.unsure) return chosen;
      const Interval& other = arg(node, condition.integer != 0 ? 2 : 1);
      if (!is_float) return whole(chosen.integer, chosen.unsure || other.unsure || chosen.integer != other.integer);
      if (chosen.unsure || other.unsure) return anything(chosen.value);
      return hull(chosen.value, {chosen.lo, chosen.hi, other.lo, other.hi});
    }
    case Op::kNot:
      return truth(arg(node, 0).integer == 0, arg(node, 0).unsure);
    case Op::kAnd:
    case Op::kOr:
    case Op::kBitAnd:
    case Op::kBitOr: {
      const Interval &a = arg(node, 0), &b = arg(node, 1);
      const bool conjunction = node.op == Op::kAnd || node.op == Op::kBitAnd;
      const std::int64_t value = conjunction ? a.integer & b.integer : a.integer | b.integer;
      if (node.type == Type::kBool) {
        // A sure false decides an `and`, a sure true an `or`.
        for (const Interval* side : {&a, &b}) {
          if (!side->unsure && (side->integer == 0) == conjunction) return truth(!conjunction);
        }
      }
      return whole(value, a.unsure || b.unsure);
    }
    case Op::kBitNot: {
      const Interval& a = arg(node, 0);
      if (node.type == Type::kBool) return truth(a.integer == 0, a.unsure);
      return whole(~a.integer, a.unsure);
    }
    case Op::kLt:
    case Op::kLe:
    case Op::kGt:
    case Op::kGe:
    case Op::kEq:
    case Op::kNe: {
      const Interval &a = arg(node, 0), &b = arg(node, 1);
      if (type_of(0) == Type::kFloat) return compare_floats(node.op, a, b);
      return truth(compare_ints(node.op, a.integer, b.integer), a.unsure || b.unsure);
    }
    case Op::kNeg: {
      const Interval& a = arg(node, 0);
      if (!is_float) return whole(wrap(0 - static_cast<std::uint64_t>(a.integer)), a.unsure);
      return {-a.value, -a.hi, -a.lo, 0, a.unsure};
    }
    case Op::kAdd:
    case Op::kSub:
    case Op::kMul:
    case Op::kDiv:
    case Op::kFloorDiv:
    case Op::kMod:
    case Op::kPow: {
      const Interval &a = arg(node, 0), &b = arg(node, 1);
      const bool exact = is_point(a) && is_point(b);
      if (is_float) {
        switch (node.op) {
          case Op::kAdd:
            return rounded(corners(a, b, [](double x, double y) { return x + y; }), exact);
          case Op::kSub:
            return rounded(corners(a, b, [](double x, double y) { return x - y; }), exact);
          case Op::kMul:
            return rounded(corners(a, b, [](double x, double y) { return x * y; }), exact);
          case Op::kDiv:
            return divide(a, b);
          case Op::kFloorDiv:
            return floor_divide(a, b);
          case Op::kMod:
            return modulus(a, b);
          default:
            return power(a, b);
        }
      }
      const auto x = static_cast<std::uint64_t>(a.integer), y = static_cast<std::uint64_t>(b.integer);
      const bool unsure = a.unsure || b.unsure;
      switch (node.op) {
        case Op::kAdd:
          return whole(wrap(x + y), unsure);
        case Op::kSub:
          return whole(wrap(x - y), unsure);
        case Op::kMul:
          return whole(wrap(x * y), unsure);
        case Op::kFloorDiv:
          return whole(int_floor_divide(a.integer, b.integer), unsure);
        case Op::kMod:
          return whole(int_modulus(a.integer, b.integer), unsure);
        default:
          return whole(int_power(a.integer, b.integer), unsure);
      }
    }
    case Op::kCall: {
      const Interval& a = arg(node, 0);
      const Interval& b = node.args.size() > 1 ? arg(node, 1) : a;
      const Interval& c = node.args.size() > 2 ? arg(node, 2) : a;
      switch (node.function) {
        case Function::kToFloat:
          if (type_of(0) == Type::kFloat) return a;
          if (a.unsure) return anything(static_cast<double>(a.integer));
          return rounded(exactly(static_cast<double>(a.integer)), true);
        case Function::kToInt: {
          if (type_of(0) != Type::kFloat) return whole(a.integer, a.unsure);
          const std::int64_t value = to_int(a.value);
          return whole(value, a.unsure || to_int(a.lo) != value || to_int(a.hi) != value);
        }
        case Function::kToBool:
          if (type_of(0) == Type::kFloat) return compare_floats(Op::kNe, a, exactly(0.0));
          return truth(a.integer != 0, a.unsure);
        case Function::kIsNan:
          if (type_of(0) != Type::kFloat) return truth(false);
          return truth(std::isnan(a.value), a.unsure);
        case Function::kIsInf: {
          if (type_of(0) != Type::kFloat) return truth(false);
          const bool may = std::isinf(a.lo) || std::isinf(a.hi);
          return truth(std::isinf(a.value), a.unsure || (may && !is_point(a)));
        }
        default:
          return is_float ? call_float(node, a, b, c) : call_int(node, a, b, c);
      }
    }
  }
  return anything(kNan);
}

Interval Float32Interval::differentiate() {
  std::fill(reached_.begin(), reached_.end(), false);
  reads_.clear();
  Interval score = exactly(0.0);
  const auto root = static_cast<std::size_t>(expr_.root);
  adjoints_[root] = exactly(1.0);
  reached_[root] = differentiable_[root];
  for (std::size_t i = expr_.nodes.size(); i-- > 0;) {
    if (!reached_[i]) continue;
    const Node& node = expr_.nodes[i];
    if (node.op == Op::kScore) {
      score = is_nothing(score) ? adjoints_[i] : sum(score, adjoints_[i]);
    } else if (node.op == Op::kRead) {
      propagate_read(node, adjoints_[i]);
    } else if (node.op == Op::kCall) {
      propagate_call(node, values_[i], adjoints_[i]);
    } else {
      propagate(node, values_[i], adjoints_[i]);
    }
  }
  return score;
}

void Float32Interval::add(NodeId arg, const Interval& contribution) {
  const auto i = static_cast<std::size_t>(arg);
  if (!differentiable_[i]) return;
  adjoints_[i] = reached_[i] ? sum(adjoints_[i], contribution) : contribution;
  reached_[i] = true;
}

void Float32Interval::propagate_read(const Node& node, const Interval& adjoint) {
  const CaptureView& tensor = captures_[static_cast<std::size_t>(node.capture)];
  ReadDerivative read{.capture = node.capture, .derivative = adjoint};
  for (std::size_t i = 0; i < node.args.size(); ++i) {
    const Interval& position = arg(node, static_cast<int>(i));
    read.place_unsure = read.place_unsure || (position.unsure && tensor.extent[i] > 1);
    read.place = read.place * tensor.extent[i] + std::clamp<std::int64_t>(position.integer, 0, tensor.extent[i] - 1);
  }
  reads_.push_back(read);
}

void Float32Interval::propagate(const Node& node, const Interval& result, const Interval& adjoint) {
  const auto to = [&](std::size_t number, const Interval& contribution) { add(node.args[number], contribution); };
  switch (node.op) {
    case Op::kNeg:
      to(0, negated(adjoint));
      break;
    case Op::kAdd:
      to(0, adjoint);
      to(1, adjoint);
      break;
    case Op::kSub:
      to(0, adjoint);
      to(1, negated(adjoint));
      break;
    case Op::kMul:
      to(0, times(adjoint, arg(node, 1)));
      to(1, times(adjoint, arg(node, 0)));
      break;
    case Op::kDiv:
      to(0, over(adjoint, arg(node, 1)));
      if (wants(node, 1)) to(1, negated(over(over(times(adjoint, arg(node, 0)), arg(node, 1)), arg(node, 1))));
      break;
    case Op::kMod:
      to(0, adjoint);
      if (wants(node, 1)) to(1, negated(times(adjoint, floor_divide(arg(node, 0), arg(node, 1)))));
      break;
    case Op::kPow: {
      const Interval &a = arg(node, 0), &b = arg(node, 1);
      const Interval zero = exactly(0.0);
      if (wants(node, 0)) {
        const Interval less = rounded(corners(b, exactly(1.0), [](double x, double y) { return x - y; }), is_point(b));
        to(0, where(compare_floats(Op::kNe, b, zero), times(adjoint, times(b, power(a, less)))));
      }
      if (wants(node, 1)) {
        const Interval none = conjunction(compare_floats(Op::kEq, a, zero), compare_floats(Op::kGe, b, zero));
        to(1, where(negation(none), times(adjoint, times(result, logarithm(a)))));
      }
      break;
    }
    case Op::kSelect: {
      // What was surely not chosen is not even reached: it contributes nothing, whatever its derivative is.
      const Interval& condition = arg(node, 0);
      if (condition.unsure || condition.integer != 0) to(1, where(condition, adjoint));
      if (condition.unsure || condition.integer == 0) to(2, where(negation(condition), adjoint));
      break;
    }
    default:
      break;  // floored division
  }
}

void Float32Interval::propagate_call(const Node& node, const Interval& result, const Interval& adjoint) {
  constexpr double kError = kFunction * kUnit;
  const Interval& a = arg(node, 0);
  const Interval& b = node.args.size() > 1 ? arg(node, 1) : a;
  const Interval zero = exactly(0.0);
  const auto to = [&](std::size_t number, const Interval& contribution) { add(node.args[number], contribution); };
  // Likewise.
  const auto to_where = [&](std::size_t number, const Interval& condition, const Interval& contribution) {
    if (condition.unsure || condition.integer != 0) to(number, where(condition, contribution));
  };
  switch (node.function) {
    case Function::kMin:
    case Function::kMax: {
      const bool minimum = node.function == Function::kMin;
      if (is_point(a) && is_point(b) && a.value == b.value) {
        for (const std::size_t number : {0u, 1u}) to(number, times(adjoint, exactly(0.5), 0.0));
        break;
      }
      // Near a tie anything up to the whole.
      const Interval a_wins = compare_floats(minimum ? Op::kLt : Op::kGt, a, b);
      const Interval b_wins = compare_floats(minimum ? Op::kLt : Op::kGt, b, a);
      for (const std::size_t number : {0u, 1u}) {
        Interval condition = negation(number == 0 ? b_wins : a_wins);
        Interval contribution = adjoint;
        if (a.value == b.value) contribution.value /= 2.0;
        to_where(number, condition, contribution);
      }
      break;
    }
    case Function::kClamp: {
      const Interval& hi = arg(node, 2);
      to_where(0, conjunction(compare_floats(Op::kGe, a, b), compare_floats(Op::kLe, a, hi)), adjoint);
      to_where(1, conjunction(compare_floats(Op::kLt, a, b), compare_floats(Op::kLt, b, hi)), adjoint);
      to_where(2, disjunction(compare_floats(Op::kGt, a, hi), compare_floats(Op::kLt, hi, b)), adjoint);
      break;
    }
    case Function::kRelu:
      to_where(0, compare_floats(Op::kGt, a, zero), adjoint);
      break;
    case Function::kAbs:
      to(0, times(adjoint, exact_step(a, sign), 0.0));
      break;
    case Function::kExp:
      to(0, times(adjoint, result));
      break;
    case Function::kExp2:
      to(0, times(adjoint, times(result, exactly(std::numbers::ln2))));
      break;
    case Function::kLog:
      to(0, over(adjoint, a));
      break;
    case Function::kLog2:
      to(0, over(adjoint, times(a, exactly(std::numbers::ln2))));
      break;
    case Function::kLog1p:
      to(0, over(adjoint, rounded(corners(a, exactly(1.0), [](double x, double y) { return x + y; }), false)));
      break;
    case Function::kSqrt:
      to(0, over(adjoint, times(result, exactly(2.0))));
      break;
    case Function::kRsqrt:
      to(0, times(adjoint, times(times(result, result), times(result, exactly(-0.5)), kFunction)));
      break;
    case Function::kTanh:
      // 1 - t * t, from the kernel's t.
      to(0, times(adjoint, image(result, [](double t) { return 1.0 - t * t; }, 0.0, 1.0, 4.0 * kUnit)));
      break;
    case Function::kSigmoid:
      to(0, times(adjoint, image(result, [](double s) { return s * (1.0 - s); }, 0.5, 0.25, 4.0 * kUnit)));
      break;
    // From bounds of their own derivatives.
    case Function::kSilu: {
      const double s = sigmoid(a.value);
      to(0, times(adjoint, lipschitz(a, s * (1.0 + a.value * sigmoid(-a.value)), 0.5,
                                     2.0 * kError * (1.0 + std::fabs(a.value)))));
      break;
    }
    case Function::kGelu: {
      const double density = std::exp(-0.5 * a.value * a.value) * std::numbers::inv_sqrtpi / std::numbers::sqrt2;
      to(0, times(adjoint, lipschitz(a, 0.5 * (1.0 + std::erf(a.value / std::numbers::sqrt2)) + a.value * density, 0.8,
                                     2.0 * kError)));
      break;
    }
    case Function::kErf:
      to(0, times(adjoint,
                  lipschitz(a, 2.0 * std::numbers::inv_sqrtpi * std::exp(-a.value * a.value), 0.97, 2.0 * kError)));
      break;
    case Function::kSin:
      to(0, times(adjoint, lipschitz(a, std::cos(a.value), 1.0, kError * (1.0 + std::fabs(a.value)))));
      break;
    case Function::kCos:
      to(0, times(adjoint, lipschitz(a, -std::sin(a.value), 1.0, kError * (1.0 + std::fabs(a.value)))));
      break;
    case Function::kToFloat:
      to(0, adjoint);
      break;
    default:
      break;  // floor, ceil, round, sign
  }
}

}  // namespace attnjit::dsl
