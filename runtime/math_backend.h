// The eager forward on the CPU: scores materialised and one pass per operation of the expression.
#pragma once

#include <cstddef>
#include <string>

#include "dsl/expr.h"
#include "runtime/forward.h"
#include "runtime/math_program.h"
#include "runtime/thread_pool.h"

namespace attnjit::runtime {

// A call as a list of passes over a workspace. Immutable once built: one plan may run in several threads at once, each
// run with its own workspace.
class MathPlan {
 public:
  // Shapes and dtypes of `problem` are used, data and strides are not. Every extent is positive. `score_mod` and
  // `mask_mod` are bound and share one table of captures; mask_mod may be null.
  MathPlan(const ForwardCall& problem, const dsl::Expr& score_mod, const dsl::Expr* mask_mod,
           const MathOptions& options = {});

  // Bytes, alignment 64. The largest size_t where the scores cannot be addressed: such a plan cannot run.
  std::size_t workspace_size() const { return program_.workspace_size; }

  // One line per pass: what it computes and the shape it runs at.
  std::string describe() const;

  // `call` has the shapes and dtypes of the problem. Allocates nothing.
  void run(const ForwardCall& call, void* workspace, ThreadPool& pool) const;

 private:
  void run_softmax(const ForwardCall& call, void* workspace, ThreadPool& pool) const;

  MathProgram program_;
  MathProgram::Place probabilities_;  // the modified scores, then what softmax makes of them
  bool has_keep_ = false;
  MathProgram::Place keep_;  // bytes; an element is dropped where it is 0
  std::int64_t keep_stride_[4] = {};
  std::size_t q_f32_, k_f32_, v_f32_, o_f32_;  // offsets in the workspace
};

}  // namespace attnjit::runtime
