// Runs and judges a case.
#include "tests/numerics/check.h"

#include <fmt/format.h>

#include <cmath>
#include <exception>

#include "tests/numerics/target.h"

namespace attnjit::numerics {
namespace {

// Empty where the library's oracle agrees with ours.
std::string compare_reference(Problem& problem, const Gold& gold) {
  const RunResult reference = run_reference(problem, gold.rows());
  if (!reference.error.empty()) return reference.error;
  const auto same = [](double a, double b) {
    if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
    return a == b || std::fabs(a - b) <= 1e-9 * (1.0 + std::fabs(b));
  };
  const auto features = static_cast<std::size_t>(problem.spec.head_dim_v);
  for (std::size_t i = 0; i < gold.row.size(); ++i) {
    const GoldRow& row = gold.row[i];
    if (row.undecided) continue;
    const auto differs = [&](const char* what, double theirs, double ours) {
      return fmt::format("attnjit_reference: {} at b={} h={} q_idx={} is {:.17g}, expected {:.17g}", what, row.at.b,
                         row.at.h, row.at.q_idx, theirs, ours);
    };
    if (!row.poisoned && !same(reference.outcome.lse[i], row.lse)) {
      return differs("lse", reference.outcome.lse[i], row.lse);
    }
    if (!row.poisoned && !same(reference.outcome.row_max[i], row.row_max)) {
      return differs("row_max", reference.outcome.row_max[i], row.row_max);
    }
    for (std::size_t d = 0; d < features; ++d) {
      if (std::isinf(row.bound[d])) continue;
      const double theirs = reference.outcome.o[i * features + d];
      if (!same(theirs, row.o[d])) return differs("o", theirs, row.o[d]);
    }
  }
  return "";
}

}  // namespace

Check check_problem(Problem& problem, attnjit_context* context, bool reference) {
  Check check;
  const auto fail = [&](const std::string& why) {
    check.accepted = false;
    check.message = why + "\n  --case '" + to_line(problem.spec) + "'";
    return check;
  };
  try {
    if (!target().compile_only.empty()) {
      run(problem, context);
      check.accepted = true;
      return check;
    }
    const Gold gold = compute_gold(problem, sample_rows(problem.spec));
    const RunResult result = run(problem, context);
    if (!result.error.empty()) return fail(result.error);
    check.verdict = judge(problem, gold, result.outcome);
    if (!check.verdict.accepted) return fail(summary(check.verdict));
    if (reference) {
      if (const std::string differs = compare_reference(problem, gold); !differs.empty()) return fail(differs);
    }
  } catch (const std::exception& fault) {
    return fail(fault.what());
  }
  check.accepted = true;
  check.message = summary(check.verdict);
  return check;
}

Check check_case(const Case& spec, attnjit_context* context, bool reference) {
  Problem problem;
  std::string error;
  if (!make_problem(spec, &problem, &error)) {
    Check check;
    check.message = error + "\n  --case '" + to_line(spec) + "'";
    return check;
  }
  return check_problem(problem, context, reference);
}

}  // namespace attnjit::numerics
