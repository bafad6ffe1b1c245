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

// What an output may be off where its type has no more relative precision: half a step of float16's subnormal numbers;
// the kernels flush those of the other types to zero.
double smallest(ElementType type) { return type == ElementType::kFloat16 ? 0x1p-25 : 0x1p-126; }

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
}

double error_bound(const RowTruth& truth, std::size_t d, ElementType type) {
  if (truth.lse == -kInfinity) return 0.0;
  const double unit = unit_roundoff(type);
  return 2 * (unit + unit) * truth.value_mass[d] + 8 * 0x1p-24 * truth.score_mass[d] + smallest(type);
}

double lse_bound(double lse) { return 1e-4 + 1e-5 * std::fabs(lse); }

Verdict judge_row(std::span<const double> o, double lse, const RowTruth& truth, ElementType type,
                  const std::string& where) {
  Verdict verdict;
  const auto fail = [&](const std::string& why) {
    if (verdict.ok) verdict.why = fmt::format("{}: {}", where, why);
    verdict.ok = false;
  };
  for (std::size_t i = 0; i < o.size(); ++i) {
    const double bound = error_bound(truth, i, type);
    const double part = of_bound(o[i], truth.o[i], bound, largest(type));
    if (std::isfinite(o[i]) && std::isfinite(truth.o[i])) {
      verdict.max_error = std::max(verdict.max_error, std::fabs(o[i] - truth.o[i]));
    }
    verdict.o_of_bound = std::max(verdict.o_of_bound, part);
    // Written so that a NaN bound (a mass that overflowed) fails as well.
    if (!(part <= 1.0)) {
      fail(
          fmt::format("o[{}] is {:.9g}, the oracle has {:.9g}, allowed difference {:.3g}", i, o[i], truth.o[i], bound));
    }
  }
  const double allowed_lse = lse_bound(truth.lse);
  verdict.lse_of_bound = of_bound(lse, truth.lse, allowed_lse, std::numeric_limits<float>::max());
  if (!(verdict.lse_of_bound <= 1.0)) {
    fail(fmt::format("lse is {:.9g}, the oracle has {:.9g}, allowed difference {:.3g}", lse, truth.lse, allowed_lse));
  }
  return verdict;
}

}  // namespace attnjit::tool
