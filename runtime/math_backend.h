// The eager reference: attention as an eager framework runs it, scores materialised and one pass per operation of the
// expression. It knows the language and not the compiler, so it checks the compiled path independently.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "dsl/expr.h"
#include "runtime/blas.h"
#include "runtime/forward.h"
#include "runtime/math_passes.h"
#include "runtime/thread_pool.h"

namespace attnjit::runtime {

// What the plan computes with; the defaults are the best of this machine.
struct MathOptions {
  const Passes* passes = &host_passes();
  const Blas* blas = Blas::get();  // null: plain code
};

// A call as a list of passes over a workspace. Immutable once built: one plan may run in several threads at once, each
// run with its own workspace.
//
// Scores are f32 of (B, Hq, Sq, Skv); 16-bit inputs are widened first. An operation's result has the broadcast shape of
// its operands (`q_idx - kv_idx` is one (Sq, Skv) tensor of int64, `bias[h]` one of (Hq)) and lives until its last use.
class MathPlan {
 public:
  // Shapes and dtypes of `problem` are used, data and strides are not. Every extent is positive. `score_mod` and
  // `mask_mod` are bound and share one table of captures; mask_mod may be null.
  MathPlan(const ForwardCall& problem, const dsl::Expr& score_mod, const dsl::Expr* mask_mod,
           const MathOptions& options = {});

  // Bytes, alignment 64. The largest size_t where the scores cannot be addressed: such a plan cannot run.
  std::size_t workspace_size() const { return workspace_size_; }

  // One line per pass: what it computes and the shape it runs at.
  std::string describe() const;

  // `call` has the shapes and dtypes of the problem. Allocates nothing.
  void run(const ForwardCall& call, void* workspace, ThreadPool& pool) const;

 private:
  friend class MathPlanBuilder;

  // A tensor: a place in the workspace or among the constants.
  struct Place {
    bool constant = false;
    std::size_t offset = 0;  // bytes
  };

  enum class Kind : std::uint8_t { kScores, kIota, kElementwise, kRead };

  // One pass: the output is contiguous, dimensions that every operand walks alike are merged, and of the innermost one
  // each operand has the stride 0 or 1.
  struct Step {
    Kind kind = Kind::kElementwise;
    ElementwiseFn elementwise = nullptr;
    std::int32_t capture = -1;
    Place out = {};
    std::size_t out_size = 0;  // bytes of an element
    int num_in = 0;
    Place in[dsl::kMaxRank] = {};
    std::size_t in_size[dsl::kMaxRank] = {};
    std::int64_t in_stride[dsl::kMaxRank][4] = {};
    int rank = 1;
    std::int64_t extent[4] = {1, 1, 1, 1};
    std::int64_t elements = 1;
    std::string text;
  };

  void* at(const Place& place, void* workspace) const;
  void run_scores(const Step& step, const ForwardCall& call, void* workspace, ThreadPool& pool) const;
  void run_pass(const Step& step, const ForwardCall& call, void* workspace, ThreadPool& pool) const;
  void run_softmax(const ForwardCall& call, void* workspace, ThreadPool& pool) const;
  void run_output(const ForwardCall& call, void* workspace, ThreadPool& pool) const;
  void gemm(bool transpose_b, std::int64_t m, std::int64_t n, std::int64_t k, float alpha, const float* a,
            std::int64_t lda, const float* b, std::int64_t ldb, float* c, std::int64_t ldc) const;
  std::int64_t rows_per_product(int threads) const;

  MathOptions options_;
  std::int64_t batch_ = 0, heads_ = 0, heads_kv_ = 0, seqlen_q_ = 0, seqlen_kv_ = 0, head_dim_ = 0, head_dim_v_ = 0;
  std::vector<std::uint64_t> constants_;  // one element each
  std::vector<Step> steps_;
  Place probabilities_;  // the modified scores, then what softmax makes of them
  bool has_keep_ = false;
  Place keep_;  // bytes; an element is dropped where it is 0
  std::int64_t keep_stride_[4] = {};
  std::size_t q_f32_ = 0, k_f32_ = 0, v_f32_ = 0, o_f32_ = 0;  // offsets in the workspace
  std::size_t workspace_size_ = 0;
};

}  // namespace attnjit::runtime
