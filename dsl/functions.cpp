// The table of the language's functions and the integer arithmetic they share with the operators.
#include "dsl/functions.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numbers>

namespace attnjit::dsl {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
using S = const Scalar*;

Scalar of_int(std::int64_t i) { return {.i = i}; }
Scalar of_float(double f) { return {.f = f}; }

// PyTorch's minimum and maximum: a NaN on either side is the result.
double min_nan(double a, double b) { return std::isnan(a) || std::isnan(b) ? kNan : (b < a ? b : a); }
double max_nan(double a, double b) { return std::isnan(a) || std::isnan(b) ? kNan : (a < b ? b : a); }

Scalar min_of(S a, Type t) {
  return t == Type::kInt ? of_int(std::min(a[0].i, a[1].i)) : of_float(min_nan(a[0].f, a[1].f));
}
Scalar max_of(S a, Type t) {
  return t == Type::kInt ? of_int(std::max(a[0].i, a[1].i)) : of_float(max_nan(a[0].f, a[1].f));
}
// The upper bound wins where the bounds cross.
Scalar clamp_of(S a, Type t) {
  if (t == Type::kInt) return of_int(std::min(std::max(a[0].i, a[1].i), a[2].i));
  return of_float(min_nan(max_nan(a[0].f, a[1].f), a[2].f));
}
Scalar abs_of(S a, Type t) {
  if (t == Type::kInt) return of_int(a[0].i < 0 ? wrapping_sub(0, a[0].i) : a[0].i);
  return of_float(std::fabs(a[0].f));
}
Scalar sign_of(S a, Type t) {
  if (t == Type::kInt) return of_int((a[0].i > 0) - (a[0].i < 0));
  return of_float(std::isnan(a[0].f) ? kNan : double((a[0].f > 0) - (a[0].f < 0)));
}
// NaN is not zero, hence true.
Scalar to_bool(S a, Type t) { return of_int(t == Type::kFloat ? a[0].f != 0 : a[0].i != 0); }

// To the smaller one, or the larger; half to each of two that are equal, and all to both where one is NaN.
Adjoints chosen(double a, double b, bool a_wins, bool b_wins, double grad) {
  if (a == b) return {grad / 2, grad / 2};
  return {b_wins ? 0.0 : grad, a_wins ? 0.0 : grad};
}
Adjoints min_adjoints(S a, double grad) { return chosen(a[0].f, a[1].f, a[0].f < a[1].f, a[1].f < a[0].f, grad); }
Adjoints max_adjoints(S a, double grad) { return chosen(a[0].f, a[1].f, a[0].f > a[1].f, a[1].f > a[0].f, grad); }
Adjoints clamp_adjoints(S a, double grad) {
  const double x = a[0].f, lo = a[1].f, hi = a[2].f;
  if (x >= lo && x <= hi) return {grad};
  return {0.0, x < lo && lo < hi ? grad : 0.0, x > hi || hi < lo ? grad : 0.0};
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
double normal_density(double x) { return std::exp(-x * x / 2) / std::sqrt(2 * std::numbers::pi); }
double normal_distribution(double x) { return std::erfc(-x / std::numbers::sqrt2) / 2; }

using enum Function;
using enum Signature;

// clang-format off
constexpr std::array<FunctionInfo, 28> kFunctions = {{
  {kMin,     "min",     2, true,  kNumeric,    Type::kFloat, min_of, min_adjoints},
  {kMax,     "max",     2, true,  kNumeric,    Type::kFloat, max_of, max_adjoints},
  {kClamp,   "clamp",   3, false, kNumeric,    Type::kFloat, clamp_of, clamp_adjoints},
  {kAbs,     "abs",     1, false, kNumeric,    Type::kFloat, abs_of,
   [](S a, double g) -> Adjoints { return {g * sign_of(a, Type::kFloat).f}; }},
  {kExp,     "exp",     1, false, kFloat,      Type::kFloat, [](S a, Type) { return of_float(std::exp(a->f)); },
   [](S a, double g) -> Adjoints { return {g * std::exp(a->f)}; }},
  {kExp2,    "exp2",    1, false, kFloat,      Type::kFloat, [](S a, Type) { return of_float(std::exp2(a->f)); },
   [](S a, double g) -> Adjoints { return {g * std::exp2(a->f) * std::numbers::ln2}; }},
  {kLog,     "log",     1, false, kFloat,      Type::kFloat, [](S a, Type) { return of_float(std::log(a->f)); },
   [](S a, double g) -> Adjoints { return {g / a->f}; }},
  {kLog2,    "log2",    1, false, kFloat,      Type::kFloat, [](S a, Type) { return of_float(std::log2(a->f)); },
   [](S a, double g) -> Adjoints { return {g / (a->f * std::numbers::ln2)}; }},
  {kLog1p,   "log1p",   1, false, kFloat,      Type::kFloat, [](S a, Type) { return of_float(std::log1p(a->f)); },
   [](S a, double g) -> Adjoints { return {g / (1 + a->f)}; }},
  {kSqrt,    "sqrt",    1, false, kFloat,      Type::kFloat, [](S a, Type) { return of_float(std::sqrt(a->f)); },
   [](S a, double g) -> Adjoints { return {g / (2 * std::sqrt(a->f))}; }},
  {kRsqrt,   "rsqrt",   1, false, kFloat,      Type::kFloat, [](S a, Type) { return of_float(1 / std::sqrt(a->f)); },
   [](S a, double g) -> Adjoints { return {g * -0.5 * std::pow(a->f, -1.5)}; }},
  {kTanh,    "tanh",    1, false, kFloat,      Type::kFloat, [](S a, Type) { return of_float(std::tanh(a->f)); },
   [](S a, double g) -> Adjoints { return {g / (std::cosh(a->f) * std::cosh(a->f))}; }},
  {kSigmoid, "sigmoid", 1, false, kFloat,      Type::kFloat, [](S a, Type) { return of_float(1 / (1 + std::exp(-a->f))); },
   [](S a, double g) -> Adjoints { return {g * sigmoid(a->f) * sigmoid(-a->f)}; }},
  {kSilu,    "silu",    1, false, kFloat,      Type::kFloat, [](S a, Type) { return of_float(a->f / (1 + std::exp(-a->f))); },
   [](S a, double g) -> Adjoints { return {g * sigmoid(a->f) * (1 + a->f * sigmoid(-a->f))}; }},
  {kGelu,    "gelu",    1, false, kFloat,      Type::kFloat, [](S a, Type) { return of_float(0.5 * a->f * std::erfc(-a->f * 0.70710678118654752440)); },
   [](S a, double g) -> Adjoints { return {g * (normal_distribution(a->f) + a->f * normal_density(a->f))}; }},
  {kRelu,    "relu",    1, false, kNumeric,    Type::kFloat, [](S a, Type t) { const Scalar x[2] = {*a, {}}; return max_of(x, t); },
   [](S a, double g) -> Adjoints { return {a->f > 0 ? g : 0.0}; }},
  {kErf,     "erf",     1, false, kFloat,      Type::kFloat, [](S a, Type) { return of_float(std::erf(a->f)); },
   [](S a, double g) -> Adjoints { return {g * 2 * std::numbers::inv_sqrtpi * std::exp(-a->f * a->f)}; }},
  {kSin,     "sin",     1, false, kFloat,      Type::kFloat, [](S a, Type) { return of_float(std::sin(a->f)); },
   [](S a, double g) -> Adjoints { return {g * std::cos(a->f)}; }},
  {kCos,     "cos",     1, false, kFloat,      Type::kFloat, [](S a, Type) { return of_float(std::cos(a->f)); },
   [](S a, double g) -> Adjoints { return {g * -std::sin(a->f)}; }},
  {kFloor,   "floor",   1, false, kRounding,   Type::kFloat, [](S a, Type) { return of_float(std::floor(a->f)); }},
  {kCeil,    "ceil",    1, false, kRounding,   Type::kFloat, [](S a, Type) { return of_float(std::ceil(a->f)); }},
  {kRound,   "round",   1, false, kRounding,   Type::kFloat, [](S a, Type) { return of_float(std::nearbyint(a->f)); }},
  {kSign,    "sign",    1, false, kNumeric,    Type::kFloat, sign_of},
  {kToFloat, "float",   1, false, kConversion, Type::kFloat, [](S a, Type t) { return of_float(t == Type::kFloat ? a->f : double(a->i)); },
   [](S a, double g) -> Adjoints { return {g}; }},
  {kToInt,   "int",     1, false, kConversion, Type::kInt,   [](S a, Type t) { return of_int(t == Type::kFloat ? saturating_int(a->f) : a->i); }},
  {kToBool,  "bool",    1, false, kConversion, Type::kBool,  to_bool},
  {kIsInf,   "isinf",   1, false, kTest,       Type::kBool,  [](S a, Type) { return of_int(std::isinf(a->f)); }},
  {kIsNan,   "isnan",   1, false, kTest,       Type::kBool,  [](S a, Type) { return of_int(std::isnan(a->f)); }},
}};
// clang-format on

constexpr bool in_order() {
  for (std::size_t i = 0; i < kFunctions.size(); ++i) {
    if (static_cast<std::size_t>(kFunctions[i].function) != i) return false;
  }
  return true;
}
static_assert(in_order(), "the table follows enum Function");

std::uint64_t bits(std::int64_t x) { return static_cast<std::uint64_t>(x); }

}  // namespace

std::span<const FunctionInfo> functions() { return kFunctions; }

const FunctionInfo& function_info(Function function) { return kFunctions[static_cast<std::size_t>(function)]; }

const FunctionInfo* find_function(std::string_view name) {
  for (const FunctionInfo& info : kFunctions) {
    if (info.name == name) return &info;
  }
  return nullptr;
}

std::int64_t wrapping_add(std::int64_t a, std::int64_t b) { return static_cast<std::int64_t>(bits(a) + bits(b)); }
std::int64_t wrapping_sub(std::int64_t a, std::int64_t b) { return static_cast<std::int64_t>(bits(a) - bits(b)); }
std::int64_t wrapping_mul(std::int64_t a, std::int64_t b) { return static_cast<std::int64_t>(bits(a) * bits(b)); }

std::int64_t floor_div(std::int64_t a, std::int64_t b) {
  if (b == 0) return 0;
  if (b == -1) return wrapping_sub(0, a);
  const std::int64_t quotient = a / b;
  return a % b != 0 && (a < 0) != (b < 0) ? quotient - 1 : quotient;
}

std::int64_t floor_mod(std::int64_t a, std::int64_t b) {
  if (b == 0 || b == -1) return 0;
  const std::int64_t remainder = a % b;
  return remainder != 0 && (remainder < 0) != (b < 0) ? remainder + b : remainder;
}

std::int64_t wrapping_pow(std::int64_t base, std::int64_t exponent) {
  std::int64_t result = 1;
  for (; exponent > 0; exponent >>= 1) {
    if (exponent & 1) result = wrapping_mul(result, base);
    base = wrapping_mul(base, base);
  }
  return result;
}

double floor_mod(double a, double b) {
  const double remainder = std::fmod(a, b);
  return remainder != 0 && (remainder < 0) != (b < 0) ? remainder + b : remainder;
}

std::int64_t saturating_int(double x) {
  if (std::isnan(x)) return 0;
  // 2^63 is a double, the largest int is not.
  if (x >= 0x1p63) return std::numeric_limits<std::int64_t>::max();
  if (x < -0x1p63) return std::numeric_limits<std::int64_t>::min();
  return static_cast<std::int64_t>(x);
}

float float32_literal(double x) {
  using Limits = std::numeric_limits<float>;
  if (!std::isfinite(x) || x == 0) return static_cast<float>(x);
  const double magnitude = std::clamp<double>(std::fabs(x), Limits::denorm_min(), Limits::max());
  return static_cast<float>(std::copysign(magnitude, x));
}

}  // namespace attnjit::dsl
