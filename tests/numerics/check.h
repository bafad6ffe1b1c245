// From a case to a verdict: build it, run it, judge it.
#pragma once

#include <string>

#include "tests/numerics/execute.h"
#include "tests/numerics/judge.h"

namespace attnjit::numerics {

struct Check {
  bool accepted = false;
  std::string message;       // the verdict's summary, or what failed before it; then the line to paste back
  Verdict verdict;           // of a forward
  BackwardVerdict backward;  // of a backward

  std::int64_t judged() const { return verdict.judged + backward.judged; }
  std::int64_t undecided() const { return verdict.undecided + backward.undecided; }
};

// `context` null: the shared one of the case's threads. `reference`: also compares attnjit_reference, or
// attnjit_reference_backward, with the oracle.
Check check_case(const Case& spec, attnjit_context* context = nullptr, bool reference = false);

// The same for a problem whose tensors were changed after it was made.
Check check_problem(Problem& problem, attnjit_context* context = nullptr, bool reference = false);

// A backward, given `given`, which is of more keys than the problem's, and judged by that, the library's own oracle
// included. Leaves in `gold` and `gradients`, where they are not null, what was expected and what came.
Check check_partial_keys(Problem& problem, const GivenForward& given, GoldGradients* gold = nullptr,
                         Gradients* gradients = nullptr);

}  // namespace attnjit::numerics
