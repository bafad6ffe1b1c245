// The double-precision backward by plain loops, and the ideal roundings and the error bounds of every gradient.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "tests/numerics/problem.h"

namespace attnjit::numerics {

// Gradients, widened and packed; empty where not wanted. `captures` in the order of the case's.
struct Gradients {
  std::vector<double> dq, dk, dv;
  std::vector<std::vector<double>> captures;
};

// What is known of one gradient tensor, packed.
struct GoldGradient {
  std::string name;  // dq, dk, dv or d_NAME
  std::vector<std::int64_t> shape;
  dsl::DType dtype = dsl::DType::kF32;
  std::vector<double> value;
  std::vector<double> ideal;    // rounded where a fused kernel must round
  std::vector<double> bound;    // of |ours - value|; infinite where unspecified, 0 where nothing contributes
  std::vector<double> scatter;  // the part of `bound` that comes from float32 scores
};

// What a forward gives and a backward is given.
struct GivenForward {
  Tensor o, lse;
};

struct GoldGradients {
  // The forward's results that the backward is given: gold, rounded to their types, or what was given.
  Tensor o, lse;
  std::vector<GoldGradient> wanted;      // dq, dk, dv and the captures', in this order
  std::int64_t rows = 0, undecided = 0;  // query rows, and those that float32 does not decide
};

// `given`: o and lse of a forward over more keys than the problem's, which are taken as they are; null: the problem's
// own. Throws std::logic_error where two evaluations of the expressions differ, or two of the gradients do: a fault of
// one of them.
GoldGradients compute_gold_gradients(const Problem& problem, const GivenForward* given = nullptr);

// Only o and lse, as they lie in memory, unwritten.
GoldGradients empty_forward(const Problem& problem);

// What the gradients are of: sum(grad_out * o) + sum(grad_lse * lse) over the rows with a kept element.
double compute_loss(const Problem& problem);

// The gradients in the order of GoldGradients::wanted.
std::vector<const std::vector<double>*> in_order(const GoldGradients& gold, const Gradients& gradients);

}  // namespace attnjit::numerics
