// The rules.
#include "tests/numerics/judge.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace attnjit::numerics {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Mean errors over the elements where everything is finite (rule 1).
struct Means {
  double ours = 0.0, ideal = 0.0, eager = 0.0, gold = 0.0, scatter = 0.0;
  std::int64_t count = 0, eager_count = 0;
};

}  // namespace

Verdict judge(const Problem& problem, const Gold& gold, const Outcome& outcome) {
  const Case& spec = problem.spec;
  Verdict verdict;
  const auto reject = [&](std::string why) {
    verdict.accepted = false;
    verdict.why = std::move(why);
    return verdict;
  };
  const auto features = static_cast<std::size_t>(spec.head_dim_v);
  const auto rows = static_cast<std::size_t>(spec.batch * spec.num_heads * spec.seqlen_q);
  if (outcome.o.size() != rows * features) return reject("the output has another size");

  Means means;
  for (const GoldRow& row : gold.row) {
    if (row.undecided) {
      ++verdict.undecided;
      continue;
    }
    ++verdict.judged;
    const auto flat = static_cast<std::size_t>((row.at.b * spec.num_heads + row.at.h) * spec.seqlen_q + row.at.q_idx);
    const std::string place = fmt::format("b={} h={} q_idx={}", row.at.b, row.at.h, row.at.q_idx);
    for (std::size_t d = 0; d < features; ++d) {
      const double ours = outcome.o[flat * features + d], expected = row.o[d];
      if (row.bound[d] == kInfinity) continue;
      if (!std::isfinite(expected) || !std::isfinite(ours)) {
        const bool same = std::isnan(expected) ? std::isnan(ours) : ours == expected;
        if (!same)
          return reject(fmt::format("rule 3, pattern: o at {} d={} is {}, expected {}", place, d, ours, expected));
        continue;
      }
      const double error = std::fabs(ours - expected);
      if (row.bound[d] > 0.0) verdict.worst = std::max(verdict.worst, error / row.bound[d]);
      // Written so that a NaN bound fails as well.
      if (!(error <= row.bound[d])) {
        return reject(
            fmt::format("rule 2, element: o at {} d={} is {:.9g}, expected {:.9g}: off by {:.3g}, allowed {:.3g}",
                        place, d, ours, expected, error, row.bound[d]));
      }
      means.ours += error;
      means.ideal += std::fabs(row.ideal[d] - expected);
      means.gold += std::fabs(expected);
      means.scatter += row.scatter[d];
      ++means.count;
      if (std::isfinite(row.eager[d])) {
        means.eager += std::fabs(row.eager[d] - expected);
        ++means.eager_count;
      }
    }
    if (!outcome.lse.empty()) {
      const double ours = outcome.lse[flat];
      if (row.poisoned) {
        // exp of +infinity may also be taken at its word.
        if (!std::isnan(ours) && ours != kInfinity) {
          return reject(fmt::format("rule 3, pattern: lse at {} is {}, expected NaN", place, ours));
        }
      } else if (!std::isfinite(row.lse) || !std::isfinite(ours)) {
        if (ours != row.lse) {
          return reject(fmt::format("rule 3, pattern: lse at {} is {}, expected {}", place, ours, row.lse));
        }
      } else {
        if (!(std::fabs(ours - row.lse) <= row.lse_bound)) {
          return reject(fmt::format("rule 4, lse: at {} is {:.9g}, expected {:.9g}, allowed {:.3g}", place, ours,
                                    row.lse, row.lse_bound));
        }
      }
    }
    if (!outcome.row_max.empty() && !row.poisoned) {
      const double ours = outcome.row_max[flat];
      // The maximum goes through log2 units and back: two more roundings than the score.
      const double slack = std::isfinite(row.row_max) ? 8.0 * 0x1p-24 * (1.0 + std::fabs(row.row_max)) : 0.0;
      if (!(ours >= row.row_max_lo - slack && ours <= row.row_max_hi + slack)) {
        return reject(fmt::format("rule 4, row maximum: at {} is {:.9g}, expected {:.9g}", place, ours, row.row_max));
      }
    }
  }

  if (means.count > 0) {
    const auto count = static_cast<double>(means.count);
    verdict.mean_error = means.ours / count;
    verdict.ideal_error = means.ideal / count;
    if (means.eager_count > 0) verdict.eager_error = means.eager / static_cast<double>(means.eager_count);
    const double gold_mean = means.gold / count;
    const double factor = spec.dtype == dsl::DType::kF32 ? 10.0 : 1.5;
    const double allowed = factor * verdict.ideal_error + 2e-5 * gold_mean + means.scatter / count / 8.0;
    if (means.count >= kRatioElements && verdict.mean_error > allowed) {
      return reject(fmt::format("rule 1, ratio: mean error {:.3g}, of the ideal fused kernel {:.3g}, allowed {:.3g}",
                                verdict.mean_error, verdict.ideal_error, allowed));
    }
  }
  verdict.accepted = true;
  return verdict;
}

std::string summary(const Verdict& verdict) {
  const auto ratio = [](double ours, double other) { return other > 0.0 ? ours / other : 0.0; };
  return fmt::format(
      "{}: mean error {:.3g}, {:.2f} times the ideal fused kernel's, {:.2f} times eager's; worst element {:.2f} of its "
      "bound; {} rows judged, {} undecided{}",
      verdict.accepted ? "accepted" : "rejected", verdict.mean_error, ratio(verdict.mean_error, verdict.ideal_error),
      ratio(verdict.mean_error, verdict.eager_error), verdict.worst, verdict.judged, verdict.undecided,
      verdict.accepted ? "" : "\n  " + verdict.why);
}

}  // namespace attnjit::numerics
