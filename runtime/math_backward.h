// The eager backward on the CPU: scores and probabilities materialised anew, then reverse mode, one pass per operation
// of the expression.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "dsl/expr.h"
#include "runtime/backward.h"
#include "runtime/forward.h"
#include "runtime/math_program.h"
#include "runtime/thread_pool.h"

namespace attnjit::runtime {

// As MathPlan. Adjoints have the broadcast shape of their node: a sum over the dimensions that it lacks. Sums are added
// in a fixed order, which the number of threads may change.
class MathBackwardPlan {
 public:
  // As MathPlan's; of captured tensors that are wanted the extents are used, too. They are of floating types.
  MathBackwardPlan(const ForwardCall& problem, const WantedGradients& wanted, const dsl::Expr& score_mod,
                   const dsl::Expr* mask_mod, const MathOptions& options = {});

  // Bytes, alignment 64. The largest size_t where the scores cannot be addressed: such a plan cannot run.
  std::size_t workspace_size() const { return program_.workspace_size; }

  // One line per pass: what it computes and the shape it runs at.
  std::string describe() const;

  // `call` and `gradients` have the shapes and dtypes of the problem, and those gradients are given that were wanted.
  // Allocates nothing.
  void run(const ForwardCall& call, const Gradients& gradients, void* workspace, ThreadPool& pool) const;

 private:
  friend class Differentiation;

  // Where the gradient of a captured tensor is added up: doubles, `parts` tensors one behind the other.
  struct Sums {
    std::int32_t capture = 0;
    std::int64_t capture_extent[dsl::kMaxRank] = {};
    std::int64_t elements = 0;
    std::int64_t parts = 1;
    std::size_t offset = 0;  // in the workspace
  };

  void run_rows(const MathProgram::Step& step, const ForwardCall& call, const Gradients& gradients, void* workspace,
                ThreadPool& pool) const;
  void run_step(const MathProgram::Step& step, const ForwardCall& call, const Gradients& gradients, void* workspace,
                ThreadPool& pool) const;
  void store_sums(const Sums& sums, const ForwardCall& call, const Gradients& gradients, const void* workspace,
                  ThreadPool& pool) const;

  MathProgram program_;
  WantedGradients wanted_;
  std::vector<Sums> sums_;
  bool needs_score_ = false;  // its gradient is not zero everywhere
  // Packed copies: offsets in the workspace.
  std::size_t q_ = 0, k_ = 0, v_ = 0, o_ = 0, grad_out_ = 0, dq_ = 0, dk_ = 0, dv_ = 0;
};

}  // namespace attnjit::runtime
