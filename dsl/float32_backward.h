// The gradients of attention in double precision, what an ideal fused kernel makes of them, and how far one that
// computes in float32 may be off (docs/numerics.md, "The backward"). The widened inputs of one key/value head at a
// time.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "dsl/expr.h"
#include "dsl/float32_row.h"
#include "dsl/interpreter.h"

namespace attnjit::dsl {

// One key/value head of one batch and the query heads that share it. Everything is packed.
struct BackwardHead {
  std::int64_t b = 0;
  std::int64_t h = 0;          // the first of the query heads
  std::int64_t num_heads = 1;  // of the group
  std::int64_t seqlen_q = 0, seqlen_kv = 0, head_dim = 0, head_dim_v = 0;
  std::span<const double> q;         // (num_heads, seqlen_q, head_dim)
  std::span<const double> k;         // (seqlen_kv, head_dim)
  std::span<const double> v;         // (seqlen_kv, head_dim_v)
  std::span<const double> grad_out;  // (num_heads, seqlen_q, head_dim_v)
  std::span<const double> grad_lse;  // (num_heads, seqlen_q), or empty: zero
  // What a kernel is given where the keys are a part of the rows', as it is: (num_heads, seqlen_q, head_dim_v) and
  // (num_heads, seqlen_q). Both empty: those of these keys.
  std::span<const double> o, lse;
};

// One gradient tensor, packed.
struct JudgedGradient {
  std::vector<double> value;    // gold
  std::vector<double> ideal;    // rounded where a fused kernel must round
  std::vector<double> bound;    // of |ours - value|; infinite where nothing can be said
  std::vector<double> scatter;  // the part of `bound` that comes from float32 arithmetic before P and dS are rounded
};

struct HeadGradients {
  JudgedGradient dq;  // (num_heads, seqlen_q, head_dim)
  JudgedGradient dk;  // (seqlen_kv, head_dim)
  JudgedGradient dv;  // (seqlen_kv, head_dim_v)
  // What the forward gives, (num_heads, seqlen_q, head_dim_v) and (num_heads, seqlen_q): NaN in poisoned rows, 0 and
  // -inf in those without a kept element.
  std::vector<double> o, lse;
  std::vector<char> decided;  // (num_heads, seqlen_q): float32 decides the row (rule 5); else its dq has no bound. With
                              // a given lse: all P of the row have a bound
  bool agree = true;          // false: two evaluations of an expression or of its derivative differ, a fault of one
};

// Runs function(task, thread), which does not throw, for all 0 <= task < tasks, in any order; tasks of one thread do
// not overlap.
using ParallelFor =
    std::function<void(std::int64_t tasks, const std::function<void(std::int64_t task, int thread)>& function)>;

struct BackwardOptions {
  DType dtype = DType::kF32;  // of q, k, v, o and their gradients
  double scale = 1.0;
  // Of the kernel's functions: see function_approximation.
  double approximation = 0.0;
  // What the kernel is given: o and lse of a forward that was right by rules 2 and 4. Else gold, rounded to their
  // types, or what the head says.
  bool own_forward = false;
  // Of score_mod's captures, a bit by number: those whose gradients are computed. Floating types only.
  std::uint32_t captures = 0;
  int threads = 1;                // of parallel_for
  ParallelFor parallel_for = {};  // null: one after another
};

// Runs head after head. The expressions and what is captured must outlive it.
class Float32Backward {
 public:
  // `mask_mod` null: none.
  Float32Backward(const BackwardOptions& options, const Expr& score_mod, std::span<const CaptureView> score_captures,
                  const Expr* mask_mod, std::span<const CaptureView> mask_captures);
  ~Float32Backward();
  // Throws std::bad_alloc, or std::length_error, where there is not enough memory.
  HeadGradients run(const BackwardHead& head);
  // Of a captured tensor, packed in its extents: what all heads so far contribute.
  JudgedGradient captured(int capture) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace attnjit::dsl
