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

Verdict judge_row(std::span<const double> o, double lse, const RowTruth& truth, ElementType type,
                  const std::string& where) {
  Verdict verdict{.rows = 1};
  if (!truth.decided) {
    verdict.left_out = 1;
    return verdict;
  }
  const auto fail = [&](const std::string& why) {
    if (verdict.ok) verdict.why = fmt::format("{}: {}", where, why);
    verdict.ok = false;
  };
  for (std::size_t i = 0; i < o.size(); ++i) {
    const double bound = truth.o_bound[i];
    if (bound == kInfinity) {
      verdict.unbounded = 1;
      continue;
    }
    const double part = of_bound(o[i], truth.o[i], bound, largest(type));
    if (std::isfinite(o[i]) && std::isfinite(truth.o[i])) {
      verdict.max_error = std::max(verdict.max_error, std::fabs(o[i] - truth.o[i]));
    }
    verdict.o_of_bound = std::max(verdict.o_of_bound, part);
    // Written so that a NaN bound (a sum that overflowed) fails as well.
    if (!(part <= 1.0)) {
      fail(
          fmt::format("o[{}] is {:.9g}, the oracle has {:.9g}, allowed difference {:.3g}", i, o[i], truth.o[i], bound));
    }
  }
  const bool nan_as_infinity = std::isnan(truth.lse) && lse == kInfinity;
  verdict.lse_of_bound =
      nan_as_infinity ? 0.0 : of_bound(lse, truth.lse, truth.lse_bound, std::numeric_limits<float>::max());
  if (!(verdict.lse_of_bound <= 1.0)) {
    fail(fmt::format("lse is {:.9g}, the oracle has {:.9g}, allowed difference {:.3g}", lse, truth.lse,
                     truth.lse_bound));
  }
  return verdict;
}

}  // namespace attnjit::tool
