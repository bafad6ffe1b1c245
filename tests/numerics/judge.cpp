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

std::size_t flat_index(const Case& spec, const RowIndex& at) {
  return static_cast<std::size_t>((at.b * spec.num_heads + at.h) * spec.seqlen_q + at.q_idx);
}

// Rules 2 to 4 for one row that float32 decides. Why it is rejected; empty where it is right.
std::string judge_row(const Case& spec, const GoldRow& row, const Outcome& outcome, Means* means, double* worst) {
  const auto features = static_cast<std::size_t>(spec.head_dim_v);
  const std::size_t flat = flat_index(spec, row.at);
  const std::string place = fmt::format("b={} h={} q_idx={}", row.at.b, row.at.h, row.at.q_idx);
  for (std::size_t d = 0; d < features; ++d) {
    const double ours = outcome.o[flat * features + d], expected = row.o[d];
    if (row.bound[d] == kInfinity) continue;
    if (!std::isfinite(expected) || !std::isfinite(ours)) {
      const bool same = std::isnan(expected) ? std::isnan(ours) : ours == expected;
      if (!same) {
        return fmt::format("rule 3, pattern: o at {} d={} is {}, expected {}", place, d, ours, expected);
      }
      continue;
    }
    const double error = std::fabs(ours - expected);
    if (row.bound[d] > 0.0) *worst = std::max(*worst, error / row.bound[d]);
    // Written so that a NaN bound fails as well.
    if (!(error <= row.bound[d])) {
      return fmt::format("rule 2, element: o at {} d={} is {:.9g}, expected {:.9g}: off by {:.3g}, allowed {:.3g}",
                         place, d, ours, expected, error, row.bound[d]);
    }
    means->ours += error;
    means->ideal += std::fabs(row.ideal[d] - expected);
    means->gold += std::fabs(expected);
    means->scatter += row.scatter[d];
    ++means->count;
    if (std::isfinite(row.eager[d])) {
      means->eager += std::fabs(row.eager[d] - expected);
      ++means->eager_count;
    }
  }
  if (!outcome.lse.empty()) {
    const double ours = outcome.lse[flat];
    if (row.poisoned) {
      // exp of +infinity may also be taken at its word.
      if (!std::isnan(ours) && ours != kInfinity) {
        return fmt::format("rule 3, pattern: lse at {} is {}, expected NaN", place, ours);
      }
    } else if (!std::isfinite(row.lse) || !std::isfinite(ours)) {
      if (ours != row.lse) {
        return fmt::format("rule 3, pattern: lse at {} is {}, expected {}", place, ours, row.lse);
      }
    } else {
      if (!(std::fabs(ours - row.lse) <= row.lse_bound)) {
        return fmt::format("rule 4, lse: at {} is {:.9g}, expected {:.9g}, allowed {:.3g}", place, ours, row.lse,
                           row.lse_bound);
      }
    }
  }
  if (!outcome.row_max.empty() && !row.poisoned) {
    const double ours = outcome.row_max[flat];
    // The maximum goes through log2 units and back: two more roundings than the score.
    const double slack = std::isfinite(row.row_max) ? 8.0 * 0x1p-24 * (1.0 + std::fabs(row.row_max)) : 0.0;
    if (!(ours >= row.row_max_lo - slack && ours <= row.row_max_hi + slack)) {
      return fmt::format("rule 4, row maximum: at {} is {:.9g}, expected {:.9g}", place, ours, row.row_max);
    }
  }
  return "";
}

// Rows that were not sampled and hold a NaN, as one that was never written does: outputs are NaN before a run.
std::vector<RowIndex> other_nan_rows(const Case& spec, const Gold& gold, const Outcome& outcome) {
  const auto features = static_cast<std::size_t>(spec.head_dim_v);
  std::vector<bool> sampled(static_cast<std::size_t>(spec.batch * spec.num_heads * spec.seqlen_q), false);
  for (const GoldRow& row : gold.row) sampled[flat_index(spec, row.at)] = true;
  const auto has_nan = [](const std::vector<double>& values, std::size_t begin, std::size_t count) {
    return !values.empty() &&
           std::any_of(values.begin() + static_cast<std::ptrdiff_t>(begin),
                       values.begin() + static_cast<std::ptrdiff_t>(begin + count), [](double x) { return x != x; });
  };
  std::vector<RowIndex> rows;
  for (std::int64_t b = 0; b < spec.batch; ++b) {
    for (std::int64_t h = 0; h < spec.num_heads; ++h) {
      for (std::int64_t q_idx = 0; q_idx < spec.seqlen_q; ++q_idx) {
        const RowIndex at{b, h, q_idx};
        const std::size_t flat = flat_index(spec, at);
        if (sampled[flat]) continue;
        if (has_nan(outcome.o, flat * features, features) || has_nan(outcome.lse, flat, 1) ||
            has_nan(outcome.row_max, flat, 1)) {
          rows.push_back(at);
        }
      }
    }
  }
  return rows;
}

// Rule 1: what a mean error may be.
double allowed_mean(bool is_float32, double ideal, double gold, double scatter) {
  return (is_float32 ? 10.0 : 1.5) * ideal + 2e-5 * gold + scatter / 8.0;
}

}  // namespace

Verdict judge(const Problem& problem, const Gold& gold, const Outcome& outcome) {
  const Case& spec = problem.spec;
  Verdict verdict;
  const auto reject = [&](std::string why) {
    verdict.accepted = false;
    verdict.why = std::move(why);
    return verdict;
  };
  const auto rows = static_cast<std::size_t>(spec.batch * spec.num_heads * spec.seqlen_q);
  if (outcome.o.size() != rows * static_cast<std::size_t>(spec.head_dim_v)) {
    return reject("the output has another size");
  }

  Means means;
  for (const GoldRow& row : gold.row) {
    if (row.undecided) {
      ++verdict.undecided;
      continue;
    }
    ++verdict.judged;
    if (std::string why = judge_row(spec, row, outcome, &means, &verdict.worst); !why.empty()) return reject(why);
  }
  // No part of the sample, so neither of its means nor of its counts.
  Means ignored;
  for (const GoldRow& row : compute_gold(problem, other_nan_rows(spec, gold, outcome)).row) {
    if (row.undecided) continue;
    if (std::string why = judge_row(spec, row, outcome, &ignored, &verdict.worst); !why.empty()) return reject(why);
  }

  if (means.count > 0) {
    const auto count = static_cast<double>(means.count);
    verdict.mean_error = means.ours / count;
    verdict.ideal_error = means.ideal / count;
    if (means.eager_count > 0) verdict.eager_error = means.eager / static_cast<double>(means.eager_count);
    const double allowed =
        allowed_mean(spec.dtype == dsl::DType::kF32, verdict.ideal_error, means.gold / count, means.scatter / count);
    if (means.count >= kRatioElements && verdict.mean_error > allowed) {
      return reject(fmt::format("rule 1, ratio: mean error {:.3g}, of the ideal fused kernel {:.3g}, allowed {:.3g}",
                                verdict.mean_error, verdict.ideal_error, allowed));
    }
  }
  verdict.accepted = true;
  return verdict;
}

namespace {

// The rules for one gradient. Why it is rejected; empty where it is right.
std::string judge_gradient(const GoldGradient& gold, const std::vector<double>& ours, bool is_float32,
                           GradientFigures* figures) {
  figures->name = gold.name;
  if (ours.size() != gold.value.size()) return fmt::format("{} has another size", gold.name);
  const auto place = [&](std::size_t at) {
    std::string text = gold.name + "[";
    std::size_t rest = ours.size();
    for (const std::int64_t extent : gold.shape) {
      rest /= static_cast<std::size_t>(extent);
      text += fmt::format("{}{}", text.back() == '[' ? "" : ", ", at / rest);
      at %= rest;
    }
    return text + "]";
  };
  double error_sum = 0.0, ideal_sum = 0.0, gold_sum = 0.0, scatter_sum = 0.0;
  for (std::size_t at = 0; at < ours.size(); ++at) {
    const double expected = gold.value[at], bound = gold.bound[at];
    if (bound == kInfinity) continue;
    ++figures->judged;
    if (!std::isfinite(expected) || !std::isfinite(ours[at])) {
      const bool same = std::isnan(expected) ? std::isnan(ours[at]) : ours[at] == expected;
      if (!same) return fmt::format("rule 3, pattern: {} is {}, expected {}", place(at), ours[at], expected);
      continue;
    }
    const double error = std::fabs(ours[at] - expected);
    if (bound > 0.0) figures->worst = std::max(figures->worst, error / bound);
    if (!(error <= bound)) {
      return fmt::format("rule 2, element: {} is {:.9g}, expected {:.9g}: off by {:.3g}, allowed {:.3g}", place(at),
                         ours[at], expected, error, bound);
    }
    error_sum += error;
    ideal_sum += std::fabs(gold.ideal[at] - expected);
    gold_sum += std::fabs(expected);
    scatter_sum += gold.scatter[at];
  }
  if (figures->judged == 0) return "";
  const auto count = static_cast<double>(figures->judged);
  figures->mean_error = error_sum / count;
  figures->ideal_error = ideal_sum / count;
  const double allowed = allowed_mean(is_float32, figures->ideal_error, gold_sum / count, scatter_sum / count);
  if (figures->judged >= kRatioElements && figures->mean_error > allowed) {
    return fmt::format("rule 1, ratio: mean error of {} {:.3g}, of the ideal fused kernel {:.3g}, allowed {:.3g}",
                       gold.name, figures->mean_error, figures->ideal_error, allowed);
  }
  return "";
}

}  // namespace

BackwardVerdict judge(const GoldGradients& gold, const Gradients& gradients) {
  BackwardVerdict verdict;
  verdict.judged = gold.rows - gold.undecided;
  verdict.undecided = gold.undecided;
  const auto ours = in_order(gold, gradients);
  for (std::size_t i = 0; i < gold.wanted.size(); ++i) {
    verdict.why =
        judge_gradient(gold.wanted[i], *ours[i], gold.o.dtype() == dsl::DType::kF32, &verdict.gradients.emplace_back());
    if (!verdict.why.empty()) return verdict;
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

std::string summary(const BackwardVerdict& verdict) {
  std::string text = verdict.accepted ? "accepted" : "rejected";
  for (const GradientFigures& each : verdict.gradients) {
    text += fmt::format(
        "; {}: mean error {:.3g}, {:.2f} times the ideal fused kernel's, worst element {:.2f} of its bound", each.name,
        each.mean_error, each.ideal_error > 0.0 ? each.mean_error / each.ideal_error : 0.0, each.worst);
  }
  return text + fmt::format("; {} rows, {} undecided{}", verdict.judged + verdict.undecided, verdict.undecided,
                            verdict.accepted ? "" : "\n  " + verdict.why);
}

}  // namespace attnjit::numerics
