// Accepts or rejects a result by the rules of docs/numerics.md.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "tests/numerics/gradients.h"
#include "tests/numerics/oracle.h"

namespace attnjit::numerics {

// A result, widened. `o` is (B, Hq, Sq, Dv) packed, lse and row_max (B, Hq, Sq); empty where not asked for.
struct Outcome {
  std::vector<double> o, lse, row_max;
};

struct Verdict {
  bool accepted = false;
  std::string why;             // of a rejection: rule, place, numbers
  std::int64_t judged = 0;     // rows
  std::int64_t undecided = 0;  // rows left out: float32 does not decide them
  double worst = 0.0;          // largest |o - gold| / bound
  double mean_error = 0.0;     // mean |o - gold|
  double ideal_error = 0.0;    // the same of the ideal fused kernel
  double eager_error = 0.0;    // the same of eager math in the input type: reported, not judged by
};

// Tensors smaller than this have no mean worth comparing (rule 1).
inline constexpr std::int64_t kRatioElements = 4096;

Verdict judge(const Problem& problem, const Gold& gold, const Outcome& outcome);

// One line: errors, ratios, rows.
std::string summary(const Verdict& verdict);

// One gradient tensor's part of a verdict.
struct GradientFigures {
  std::string name;
  std::int64_t judged = 0;  // elements
  double mean_error = 0.0, ideal_error = 0.0, worst = 0.0;
};

struct BackwardVerdict {
  bool accepted = false;
  std::string why;
  std::int64_t judged = 0, undecided = 0;  // query rows
  std::vector<GradientFigures> gradients;
};

BackwardVerdict judge(const GoldGradients& gold, const Gradients& gradients);

std::string summary(const BackwardVerdict& verdict);

}  // namespace attnjit::numerics
