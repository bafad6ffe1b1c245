// Runs and judges a case.
#include "tests/numerics/check.h"

#include <fmt/format.h>

#include <cmath>
#include <exception>
#include <utility>

#include "tests/numerics/target.h"

namespace attnjit::numerics {
namespace {

bool same(double a, double b) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  return a == b || std::fabs(a - b) <= 1e-9 * (1.0 + std::fabs(b));
}

// Empty where the library's oracle agrees with ours.
std::string compare_reference(Problem& problem, const Gold& gold) {
  const RunResult reference = run_reference(problem, gold.rows());
  if (!reference.error.empty()) return reference.error;
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

// Likewise of the backward.
std::string compare_reference(Problem& problem, const GoldGradients& gold, const GivenForward* given) {
  const ReferenceGradients reference = run_reference_backward(problem, given);
  if (!reference.error.empty()) return reference.error;
  const auto values = in_order(gold, reference.gradients), bounds = in_order(gold, reference.bounds);
  for (std::size_t i = 0; i < gold.wanted.size(); ++i) {
    const GoldGradient& expected = gold.wanted[i];
    for (std::size_t at = 0; at < expected.value.size(); ++at) {
      if (std::isinf((*bounds[i])[at]) || same((*values[i])[at], expected.value[at])) continue;
      return fmt::format("attnjit_reference_backward: {}, element {} is {:.17g}, expected {:.17g}", expected.name, at,
                         (*values[i])[at], expected.value[at]);
    }
  }
  return "";
}

// Why the backward of `problem` is not accepted; empty where it is. `given` null: it is given gold.
std::string check_backward(Problem& problem, attnjit_context* context, bool reference, const GivenForward* given,
                           GoldGradients* gold, Gradients* gradients, BackwardVerdict* verdict) {
  *gold = compute_gold_gradients(problem, given);
  BackwardResult result = run_backward(problem, gold->o, gold->lse, context);
  if (!result.error.empty()) return result.error;
  *verdict = judge(*gold, result.gradients);
  *gradients = std::move(result.gradients);
  if (!verdict->accepted) return summary(*verdict);
  return reference ? compare_reference(problem, *gold, given) : "";
}

// Compiles what a backward of `problem` runs.
void compile_backward(Problem& problem, attnjit_context* context) {
  const GoldGradients given = empty_forward(problem);
  run_backward(problem, given.o, given.lse, context);
}

}  // namespace

Check check_partial_keys(Problem& problem, const GivenForward& given, GoldGradients* gold, Gradients* gradients) {
  Check check;
  GoldGradients expected;
  Gradients got;
  std::string why;
  try {
    if (!target().compile_only.empty()) {
      compile_backward(problem, nullptr);
    } else {
      why = check_backward(problem, nullptr, true, &given, &expected, &got, &check.backward);
    }
  } catch (const std::exception& fault) {
    why = fault.what();
  }
  check.accepted = why.empty();
  check.message = why + "\n  of a part of the keys, without what was changed: --case '" + to_line(problem.spec) + "'";
  if (gold) *gold = std::move(expected);
  if (gradients) *gradients = std::move(got);
  return check;
}

Check check_problem(Problem& problem, attnjit_context* context, bool reference) {
  Check check;
  const auto fail = [&](const std::string& why) {
    check.accepted = false;
    check.message = why + "\n  --case '" + to_line(problem.spec) + "'";
    return check;
  };
  try {
    if (!target().compile_only.empty()) {
      if (problem.spec.backward.wanted()) {
        compile_backward(problem, context);
      } else {
        run(problem, context, Outputs::kNoRowMax);
        run(problem, context, Outputs::kAll);
      }
      check.accepted = true;
      return check;
    }
    if (problem.spec.backward.wanted()) {
      GoldGradients gold;
      Gradients gradients;
      const std::string why = check_backward(problem, context, reference, nullptr, &gold, &gradients, &check.backward);
      if (!why.empty()) return fail(why);
      check.accepted = true;
      check.message = summary(check.backward);
      return check;
    }
    const Gold gold = compute_gold(problem, sample_rows(problem.spec));
    for (const Outputs outputs : {Outputs::kNoRowMax, Outputs::kAll}) {
      const char* const which = outputs == Outputs::kAll ? "" : " (row_max not asked for)";
      const RunResult result = run(problem, context, outputs);
      if (!result.error.empty()) return fail(result.error + which);
      check.verdict = judge(problem, gold, result.outcome);
      if (!check.verdict.accepted) return fail(summary(check.verdict) + which);
    }
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
