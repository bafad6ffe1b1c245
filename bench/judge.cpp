// The judge of sampled rows.
#include "bench/judge.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace attnjit::tool {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// The largest finite value of an output type: beyond it the right result is an infinity.
double largest(ElementType type) {
  switch (type) {
    case ElementType::kFloat16:
      return 65504.0;
    case ElementType::kBFloat16:
      return 0x1.fep127;
    default:
      return std::numeric_limits<float>::max();
  }
}

// |value - gold| in units of what is allowed: at most 1 is right. Not finite where one is finite and the other is not.
double of_bound(double value, double gold, double bound, double limit) {
  if (std::isnan(gold)) return std::isnan(value) ? 0.0 : kInfinity;
  if (std::isnan(value)) return kInfinity;
  if (value == gold) return 0.0;
  if (std::isinf(value)) {
    // Rounding may carry a value at the edge of the range over it.
    return std::signbit(value) == std::signbit(gold) && std::fabs(gold) + bound >= limit ? 0.0 : kInfinity;
  }
  if (std::isinf(gold)) return kInfinity;
  return bound > 0.0 ? std::fabs(value - gold) / bound : kInfinity;
}

}  // namespace

void Verdict::merge(const Verdict& other) {
  if (ok && !other.ok) why = other.why;
  ok = ok && other.ok;
  max_error = std::max(max_error, other.max_error);
  o_of_bound = std::max(o_of_bound, other.o_of_bound);
  lse_of_bound = std::max(lse_of_bound, other.lse_of_bound);
  rows += other.rows;
  left_out += other.left_out;
  unbounded += other.unbounded;
}

std::size_t allowed_left_out(std::size_t rows) { return std::max<std::size_t>(1, rows / 100); }

Verdict judge_values(std::span<const double> values, std::span<const double> gold, std::span<const double> bound,
                     ElementType type, const std::string& name, const std::string& where) {
  Verdict verdict{.rows = 1};
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (bound[i] == kInfinity) {
      verdict.unbounded = 1;
      continue;
    }
    const double part = of_bound(values[i], gold[i], bound[i], largest(type));
    if (std::isfinite(values[i]) && std::isfinite(gold[i])) {
      verdict.max_error = std::max(verdict.max_error, std::fabs(values[i] - gold[i]));
    }
    verdict.o_of_bound = std::max(verdict.o_of_bound, part);
    // Written so that a NaN bound (a sum that overflowed) fails as well.
    if (part <= 1.0) continue;
    if (verdict.ok) {
      verdict.why = fmt::format("{}: {}[{}] is {:.9g}, the oracle has {:.9g}, allowed difference {:.3g}", where, name,
                                i, values[i], gold[i], bound[i]);
    }
    verdict.ok = false;
  }
  return verdict;
}

Verdict judge_row(std::span<const double> o, double lse, const RowTruth& truth, ElementType type,
                  const std::string& where) {
  if (!truth.decided) return {.rows = 1, .left_out = 1};
  Verdict verdict = judge_values(o, truth.o, truth.o_bound, type, "o", where);
  const bool nan_as_infinity = std::isnan(truth.lse) && lse == kInfinity;
  verdict.lse_of_bound =
      nan_as_infinity ? 0.0 : of_bound(lse, truth.lse, truth.lse_bound, std::numeric_limits<float>::max());
  if (!(verdict.lse_of_bound <= 1.0)) {
    if (verdict.ok) {
      verdict.why = fmt::format("{}: lse is {:.9g}, the oracle has {:.9g}, allowed difference {:.3g}", where, lse,
                                truth.lse, truth.lse_bound);
    }
    verdict.ok = false;
  }
  return verdict;
}

}  // namespace attnjit::tool
