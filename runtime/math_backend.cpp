// Scores, the expression's passes, softmax by rows, the product with V.
#include "runtime/math_backend.h"

#include <algorithm>
#include <limits>

namespace attnjit::runtime {

MathPlan::MathPlan(const ForwardCall& problem, const dsl::Expr& score_mod, const dsl::Expr* mask_mod,
                   const MathOptions& options)
    : program_(problem, options),
      q_f32_(program_.reserve(program_.heads, program_.seqlen_q, program_.head_dim)),
      k_f32_(program_.reserve(program_.heads_kv, program_.seqlen_kv, program_.head_dim)),
      v_f32_(program_.reserve(program_.heads_kv, program_.seqlen_kv, program_.head_dim_v)),
      o_f32_(program_.reserve(program_.heads, program_.seqlen_q, program_.head_dim_v)) {
  if (!program_.is_addressable()) {
    program_.workspace_size = std::numeric_limits<std::size_t>::max();
    return;
  }
  MathBuilder builder(&program_);
  const LoweredExpr lowered = builder.lower(score_mod, true);
  const int modified = builder.materialize(builder.masked(lowered.root, mask_mod));
  has_keep_ = lowered.keep != LoweredExpr::kTrue;
  builder.finish(has_keep_ ? std::vector<int>{modified, lowered.keep} : std::vector<int>{modified});
  probabilities_ = builder.place(modified);
  if (has_keep_) {
    keep_ = builder.place(lowered.keep);
    builder.strides(builder.dims(lowered.keep), keep_stride_);
  }
}

std::string MathPlan::describe() const {
  std::string text;
  for (const MathProgram::Step& step : program_.steps) text += step.text + "\n";
  text += has_keep_ ? "softmax of the kept elements\n" : "softmax\n";
  return text + "p v\n" + program_.describe_engine();
}

void MathPlan::run_softmax(const ForwardCall& call, void* workspace, ThreadPool& pool) const {
  const std::int64_t heads = program_.heads, seqlen_q = program_.seqlen_q, seqlen_kv = program_.seqlen_kv;
  float* x = static_cast<float*>(program_.at(probabilities_, workspace));
  const std::uint8_t* keep = has_keep_ ? static_cast<const std::uint8_t*>(program_.at(keep_, workspace)) : nullptr;
  const std::int64_t total = program_.batch * heads * seqlen_q;
  const std::int64_t rows = std::max<std::int64_t>(1, kElementsPerTask / seqlen_kv);
  pool.parallel_for((total + rows - 1) / rows, [&](std::int64_t task, int) {
    for (std::int64_t row = task * rows; row < std::min(total, (task + 1) * rows); ++row) {
      const std::int64_t b = row / seqlen_q / heads, h = row / seqlen_q % heads, q_idx = row % seqlen_q;
      const std::uint8_t* row_keep = nullptr;
      if (keep != nullptr) row_keep = keep + b * keep_stride_[0] + h * keep_stride_[1] + q_idx * keep_stride_[2];
      float lse, row_max;
      program_.options.passes->softmax_row(x + row * seqlen_kv, seqlen_kv, row_keep, static_cast<int>(keep_stride_[3]),
                                           &lse, &row_max);
      const auto put = [&](const RowView& view, float value) {
        if (view.data != nullptr) view.data[b * view.stride[0] + h * view.stride[1] + q_idx * view.stride[2]] = value;
      };
      put(call.lse, lse);
      put(call.row_max, row_max);
    }
  });
}

void MathPlan::run(const ForwardCall& call, void* workspace, ThreadPool& pool) const {
  for (const MathProgram::Step& step : program_.steps) {
    if (step.kind == MathProgram::Kind::kScores) {
      program_.run_scores(step, call, q_f32_, k_f32_, workspace, pool);
    } else {
      program_.run_pass(step, call, workspace, pool);
    }
  }
  run_softmax(call, workspace, pool);
  const Matrices v = program_.as_f32(call.v, v_f32_, workspace, pool);
  program_.multiply_keys(1.0f, static_cast<const float*>(program_.at(probabilities_, workspace)), v, call.o, o_f32_,
                         workspace, pool);
}

}  // namespace attnjit::runtime
