// Reverse mode over the nodes of the expression, and the products around it.
#include "runtime/math_backward.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>

namespace attnjit::runtime {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Captured gradients are added up in so many parts at most, together of so many elements.
constexpr std::int64_t kMaxParts = 16;
constexpr std::int64_t kMaxPartElements = 1 << 20;

// How the gradient of an operation reaches one of its arguments.
struct Link {
  enum Kind : std::uint8_t { kNone, kSame, kNegated, kSelected, kPass } kind = kNone;
  GradientPass pass = GradientPass::kTimes;
  std::vector<int> operands = {};  // of the pass behind the gradient; of a selection the condition and which one (0, 1)
};

// Of argument `a` of `node`, which is a float: `x` are its arguments' values and `r` its own.
Link link_of(const dsl::Node& node, std::size_t a, const std::vector<int>& x, int r) {
  using P = GradientPass;
  using F = dsl::Function;
  const auto pass = [](P pass, std::vector<int> operands) {
    return Link{.kind = Link::kPass, .pass = pass, .operands = std::move(operands)};
  };
  switch (node.op) {
    case dsl::Op::kNeg:
      return {.kind = Link::kNegated};
    case dsl::Op::kAdd:
      return {.kind = Link::kSame};
    case dsl::Op::kSub:
      return {.kind = a == 0 ? Link::kSame : Link::kNegated};
    case dsl::Op::kMul:
      return pass(P::kTimes, {x[1 - a]});
    case dsl::Op::kDiv:
      return a == 0 ? pass(P::kOver, {x[1]}) : pass(P::kDivisor, x);
    case dsl::Op::kMod:
      return a == 0 ? Link{.kind = Link::kSame} : pass(P::kModulus, x);
    case dsl::Op::kPow:
      return pass(a == 0 ? P::kBase : P::kExponent, x);
    case dsl::Op::kSelect:
      return {.kind = Link::kSelected, .operands = {x[0]}};
    case dsl::Op::kCall:
      break;
    default:
      return {};
  }
  switch (node.function) {
    case F::kMin:
      return pass(P::kMin, {x[a], x[1 - a]});
    case F::kMax:
      return pass(P::kMax, {x[a], x[1 - a]});
    case F::kClamp:
      return pass(a == 0 ? P::kClampValue : a == 1 ? P::kClampLow : P::kClampHigh, x);
    case F::kAbs:
      return pass(P::kAbs, x);
    case F::kExp:
      return pass(P::kTimes, {r});
    case F::kExp2:
      return pass(P::kExp2, {r});
    case F::kLog:
      return pass(P::kOver, x);
    case F::kLog2:
      return pass(P::kLog2, x);
    case F::kLog1p:
      return pass(P::kLog1p, x);
    case F::kSqrt:
      return pass(P::kSqrt, {r});
    case F::kRsqrt:
      return pass(P::kRsqrt, {r});
    case F::kTanh:
      return pass(P::kTanh, {r});
    case F::kSigmoid:
      return pass(P::kSigmoid, {r});
    case F::kSilu:
      return pass(P::kSilu, x);
    case F::kGelu:
      return pass(P::kGelu, x);
    case F::kRelu:
      return pass(P::kRelu, x);
    case F::kErf:
      return pass(P::kErf, x);
    case F::kSin:
      return pass(P::kSin, x);
    case F::kCos:
      return pass(P::kCos, x);
    case F::kToFloat:
      return {.kind = Link::kSame};
    case F::kFloor:
    case F::kCeil:
    case F::kRound:
    case F::kSign:
    case F::kToInt:
    case F::kToBool:
    case F::kIsInf:
    case F::kIsNan:
      return {};
  }
  return {};
}

}  // namespace

// Lowers the reverse mode of one expression.
//
// An adjoint has two parts. `row` is a factor f that is the same along a row: it stands for dm * f, element by element,
// and nothing has been computed yet. `element` is what was computed, summed to the shape of its node. So what reaches a
// captured read by row factors alone is known to be the row's sum of dm times f, and that sum over all keys is the
// gradient of the row's LSE, exactly 0 where there is none.
class Differentiation {
 public:
  Differentiation(MathBuilder* builder, const MathBackwardPlan* plan, const dsl::Expr& expr, const LoweredExpr& lowered,
                  int dm)
      : builder_(*builder), plan_(*plan), expr_(expr), lowered_(lowered), dm_(dm), adjoints_(expr.nodes.size()) {}

  // Adds the steps. The gradient of the score, a tensor of its own; -1 where the expression does not depend on it.
  int run() {
    const std::vector<bool> needs = needed();
    int dscore = -1;
    adjoints_[static_cast<std::size_t>(expr_.root)].row = kOne;
    for (std::size_t i = static_cast<std::size_t>(expr_.root) + 1; i-- > 0;) {
      const Adjoint& adjoint = adjoints_[i];
      if (!needs[i] || (adjoint.row == kNone && adjoint.element == kNone)) continue;
      const dsl::Node& node = expr_.nodes[i];
      if (node.op == dsl::Op::kScore) {
        const int sum = in_full(adjoint);
        dscore = dscore < 0 ? sum : add(dscore, sum);
      } else if (node.op == dsl::Op::kRead) {
        reach_read(node, adjoint, builder_.dims(lowered_.value[i]));
      } else {
        for (std::size_t a = 0; a < node.args.size(); ++a) {
          if (needs[static_cast<std::size_t>(node.args[a])]) reach_argument(i, a);
        }
      }
    }
    return dscore;
  }

 private:
  static constexpr int kNone = -1;
  static constexpr int kOne = -2;  // a factor
  struct Adjoint {
    int row = kNone, element = kNone;
  };

  bool is_wanted(const dsl::Node& node) const {
    return node.op == dsl::Op::kScore ? plan_.wanted_.dq || plan_.wanted_.dk
                                      : node.op == dsl::Op::kRead && (plan_.wanted_.captures >> node.capture & 1) != 0;
  }

  // Nodes whose gradient leads to one that is wanted.
  std::vector<bool> needed() const {
    std::vector<bool> needs(expr_.nodes.size());
    for (std::size_t i = 0; i < needs.size(); ++i) {
      const dsl::Node& node = expr_.nodes[i];
      if (lowered_.value[i] < 0 || node.type != dsl::Type::kFloat) continue;
      needs[i] = is_wanted(node);
      for (std::size_t a = 0; a < node.args.size(); ++a) {
        if (needs[static_cast<std::size_t>(node.args[a])] && link(i, a).kind != Link::kNone) needs[i] = true;
      }
    }
    return needs;
  }

  Link link(std::size_t i, std::size_t a) const {
    const dsl::Node& node = expr_.nodes[i];
    if (node.op == dsl::Op::kSelect && a > 0 && lowered_.decides[i] &&
        lowered_.drops[static_cast<std::size_t>(node.args[3 - a])]) {
      return {.kind = Link::kSame};  // where the other one is chosen, there is no gradient
    }
    std::vector<int> x;
    x.reserve(node.args.size());
    for (dsl::NodeId argument : node.args) x.push_back(lowered_.value[static_cast<std::size_t>(argument)]);
    return link_of(node, a, x, lowered_.value[i]);
  }

  int gradient(GradientPass pass, const std::vector<int>& in, const char* name) {
    return builder_.elementwise(plan_.program_.options.passes->gradient(pass), dsl::Type::kFloat, in, name);
  }

  int add(int a, int b) {
    return builder_.elementwise(dsl::Op::kAdd, dsl::Function::kMin, dsl::Type::kFloat, dsl::Type::kFloat, {a, b},
                                "add gradients");
  }

  // g through a link, of the shape of g and the operands.
  int follow(const Link& link, std::size_t a, int g) {
    switch (link.kind) {
      case Link::kNone:
      case Link::kSame:
        return g;
      case Link::kNegated:
        return builder_.elementwise(dsl::Op::kNeg, dsl::Function::kMin, dsl::Type::kFloat, dsl::Type::kFloat, {g},
                                    "gradient: neg");
      case Link::kSelected:
        return a == 1 ? builder_.select(link.operands[0], g, builder_.literal(0.0f))
                      : builder_.select(link.operands[0], builder_.literal(0.0f), g);
      case Link::kPass: {
        std::vector<int> in = {g};
        in.insert(in.end(), link.operands.begin(), link.operands.end());
        return gradient(link.pass, in, "gradient");
      }
    }
    return g;
  }

  // base * f, for base the gradient of the modified scores or of lse.
  int times(int base, int factor) {
    return factor == kOne ? base : gradient(GradientPass::kRowFactor, {base, factor}, "gradient: multiply");
  }

  // Over all four dimensions.
  int in_full(const Adjoint& adjoint) {
    const int row = adjoint.row == kNone ? kNone : times(dm_, adjoint.row);
    if (adjoint.element == kNone) return row;
    return row == kNone ? adjoint.element : add(row, adjoint.element);
  }

  void accumulate(int* into, int value) {
    if (*into == kNone) {
      *into = value;
    } else {
      const auto as_value = [&](int x) { return x == kOne ? builder_.literal(1.0f) : x; };
      *into = add(as_value(*into), as_value(value));
    }
  }

  void reach_argument(std::size_t i, std::size_t a) {
    const Link link = this->link(i, a);
    if (link.kind == Link::kNone) return;
    const Adjoint from = adjoints_[i];
    const auto argument = static_cast<std::size_t>(expr_.nodes[i].args[a]);
    Adjoint& to = adjoints_[argument];
    const unsigned dims = builder_.dims(lowered_.value[argument]);
    if (from.element != kNone) accumulate(&to.element, builder_.sum(follow(link, a, from.element), dims));
    if (from.row == kNone) return;
    unsigned operands = 0;
    for (int operand : link.operands) operands |= builder_.dims(operand);
    if ((operands & kDimKv) != 0) {
      accumulate(&to.element, builder_.sum(follow(link, a, times(dm_, from.row)), dims));
    } else if (link.kind == Link::kSame) {
      accumulate(&to.row, from.row);
    } else {
      accumulate(&to.row, follow(link, a, from.row == kOne ? builder_.literal(1.0f) : from.row));
    }
  }

  void reach_read(const dsl::Node& node, const Adjoint& adjoint, unsigned dims) {
    const auto sums = std::find_if(plan_.sums_.begin(), plan_.sums_.end(),
                                   [&](const MathBackwardPlan::Sums& s) { return s.capture == node.capture; });
    // Where the indices are positions of dimensions of their own, all of them, no two elements meet.
    unsigned positions = 0;
    bool collides = false;
    for (std::size_t d = 0; d < node.args.size(); ++d) {
      const unsigned dim = builder_.position_of(lowered_.value[static_cast<std::size_t>(node.args[d])]);
      collides = collides || dim == 0 || (positions & dim) != 0 || builder_.extent(dim) > sums->capture_extent[d];
      positions |= dim;
    }
    const auto scatter = [&](int value) {
      std::vector<int> in = {value};
      for (dsl::NodeId argument : node.args) in.push_back(lowered_.value[static_cast<std::size_t>(argument)]);
      builder_.consume({.kind = MathProgram::Kind::kScatter,
                        .capture = node.capture,
                        .parts = collides ? sums->parts : kMaxParts,
                        .apart = collides,
                        .out = {.offset = sums->offset},
                        .text = "add to the gradient of capture " + std::to_string(node.capture)},
                       in);
    };
    if (adjoint.element != kNone) scatter(adjoint.element);
    if (adjoint.row == kNone) return;
    if ((dims & kDimKv) != 0 || plan_.wanted_.partial_keys) {
      scatter(builder_.sum(times(dm_, adjoint.row), dims));
    } else {
      if (grad_lse_ < 0) grad_lse_ = builder_.produce(MathProgram::Kind::kGradLse, kRowDims, {}, "gradient of lse");
      scatter(builder_.sum(times(grad_lse_, adjoint.row), dims));
    }
  }

  MathBuilder& builder_;
  const MathBackwardPlan& plan_;
  const dsl::Expr& expr_;
  const LoweredExpr& lowered_;
  const int dm_;
  int grad_lse_ = -1;
  std::vector<Adjoint> adjoints_;
};

MathBackwardPlan::MathBackwardPlan(const ForwardCall& problem, const WantedGradients& wanted,
                                   const dsl::Expr& score_mod, const dsl::Expr* mask_mod, const MathOptions& options)
    : program_(problem, options), wanted_(wanted) {
  MathProgram& p = program_;
  using Kind = MathProgram::Kind;
  const bool needs_dm = wanted.dq || wanted.dk || wanted.captures != 0;
  q_ = p.reserve(p.heads, p.seqlen_q, p.head_dim);
  k_ = p.reserve(p.heads_kv, p.seqlen_kv, p.head_dim);
  v_ = p.reserve(needs_dm ? p.heads_kv : 0, p.seqlen_kv, p.head_dim_v);
  o_ = p.reserve(needs_dm ? p.heads : 0, p.seqlen_q, p.head_dim_v);
  grad_out_ = p.reserve(p.heads, p.seqlen_q, p.head_dim_v);
  dq_ = p.reserve(wanted.dq ? p.heads : 0, p.seqlen_q, p.head_dim);
  dk_ = p.reserve(wanted.dk ? p.heads_kv : 0, p.seqlen_kv, p.head_dim);
  dv_ = p.reserve(wanted.dv ? p.heads_kv : 0, p.seqlen_kv, p.head_dim_v);
  for (std::int32_t i = 0; i < dsl::kMaxCaptures; ++i) {
    if ((wanted.captures >> i & 1) == 0) continue;
    Sums sums{.capture = i, .elements = 1};
    const dsl::CaptureView& capture = problem.captures[i];
    std::copy_n(capture.extent, capture.rank, sums.capture_extent);
    for (int d = 0; d < capture.rank; ++d) sums.elements *= capture.extent[d];
    sums.parts = std::clamp<std::int64_t>(kMaxPartElements / sums.elements, 1, kMaxParts);
    sums.offset = p.reserve_bytes(static_cast<std::size_t>(sums.elements * sums.parts) * sizeof(double));
    sums_.push_back(sums);
  }
  if (!p.is_addressable()) {
    p.workspace_size = std::numeric_limits<std::size_t>::max();
    return;
  }

  MathBuilder builder(&p);
  const LoweredExpr lowered = builder.lower(score_mod, true);
  const int modified = builder.materialize(builder.masked(lowered.root, mask_mod));
  std::vector<int> in = {modified, builder.produce(Kind::kLse, kRowDims, {}, "lse")};
  if (lowered.keep != LoweredExpr::kTrue) in.push_back(lowered.keep);
  const int probabilities =
      builder.elementwise(p.options.passes->gradient(GradientPass::kProbability), dsl::Type::kFloat, in, "softmax");
  if (wanted.dv) builder.consume({.kind = Kind::kGradV, .text = "p^T grad_out"}, {probabilities});
  if (needs_dm) {
    const int dp = builder.produce(Kind::kGradProbabilities, kAllDims, {}, "grad_out v^T");
    const int delta = builder.produce(Kind::kDelta, kRowDims, {}, "delta");
    const int dm = builder.elementwise(p.options.passes->gradient(GradientPass::kScore), dsl::Type::kFloat,
                                       {probabilities, dp, delta}, "gradient of the modified scores");
    const int dscore = Differentiation(&builder, this, score_mod, lowered, dm).run();
    needs_score_ = dscore >= 0;
    if (needs_score_ && wanted.dq) builder.consume({.kind = Kind::kGradQ, .text = "ds k"}, {dscore});
    if (needs_score_ && wanted.dk) builder.consume({.kind = Kind::kGradK, .text = "ds^T q"}, {dscore});
  }
  builder.finish({});
}

std::string MathBackwardPlan::describe() const {
  std::string text;
  for (const MathProgram::Step& step : program_.steps) text += step.text + "\n";
  return text + program_.describe_engine();
}

namespace {

void write_zeros(const TensorView& tensor) {
  const std::int64_t size = dsl::dtype_size(tensor.dtype);
  for (std::int64_t b = 0; b < tensor.shape[0]; ++b) {
    for (std::int64_t h = 0; h < tensor.shape[1]; ++h) {
      for (std::int64_t s = 0; s < tensor.shape[2]; ++s) {
        const std::int64_t offset = b * tensor.stride[0] + h * tensor.stride[1] + s * tensor.stride[2];
        std::memset(static_cast<char*>(tensor.data) + offset * size, 0,
                    static_cast<std::size_t>(tensor.shape[3] * size));
      }
    }
  }
}

float at_row(const RowView& rows, std::int64_t b, std::int64_t h, std::int64_t q) {
  return rows.data[b * rows.stride[0] + h * rows.stride[1] + q * rows.stride[2]];
}

}  // namespace

// What is given, or computed, of each row. A row without a kept element has no gradients.
void MathBackwardPlan::run_rows(const MathProgram::Step& step, const ForwardCall& call, const Gradients& gradients,
                                void* workspace, ThreadPool& pool) const {
  const MathProgram& p = program_;
  const bool is_delta = step.kind == MathProgram::Kind::kDelta;
  Matrices o, grad_out;
  if (is_delta) {
    o = p.as_f32(call.o, o_, workspace, pool);
    grad_out = p.as_f32(gradients.grad_out, grad_out_, workspace, pool);
  }
  auto* out = static_cast<float*>(p.at(step.out, workspace));
  constexpr std::int64_t kRowsPerTask = 256;
  const std::int64_t rows = p.batch * p.heads * p.seqlen_q;
  pool.parallel_for((rows + kRowsPerTask - 1) / kRowsPerTask, [&](std::int64_t task, int) {
    for (std::int64_t row = task * kRowsPerTask; row < std::min(rows, (task + 1) * kRowsPerTask); ++row) {
      const std::int64_t b = row / p.seqlen_q / p.heads, h = row / p.seqlen_q % p.heads, q = row % p.seqlen_q;
      const float lse = at_row(call.lse, b, h, q);
      if (step.kind == MathProgram::Kind::kLse) {
        out[row] = lse;
        continue;
      }
      const float grad_lse =
          gradients.grad_lse.data != nullptr && lse != -kInfinity ? at_row(gradients.grad_lse, b, h, q) : 0.0f;
      out[row] = grad_lse;
      if (!is_delta) continue;
      const float* x = o.of(b, h) + q * o.stride[2];
      const float* y = grad_out.of(b, h) + q * grad_out.stride[2];
      double sum = -static_cast<double>(grad_lse);
      for (std::int64_t d = 0; d < p.head_dim_v; ++d) sum += static_cast<double>(x[d]) * static_cast<double>(y[d]);
      out[row] = static_cast<float>(sum);
    }
  });
}

void MathBackwardPlan::run_step(const MathProgram::Step& step, const ForwardCall& call, const Gradients& gradients,
                                void* workspace, ThreadPool& pool) const {
  const MathProgram& p = program_;
  const auto in = [&] { return static_cast<const float*>(p.at(step.in[0], workspace)); };
  switch (step.kind) {
    case MathProgram::Kind::kScores:
      return p.run_scores(step, call, q_, k_, workspace, pool);
    case MathProgram::Kind::kLse:
    case MathProgram::Kind::kGradLse:
    case MathProgram::Kind::kDelta:
      return run_rows(step, call, gradients, workspace, pool);
    case MathProgram::Kind::kGradProbabilities:
      return p.multiply_features(1.0f, p.as_f32(gradients.grad_out, grad_out_, workspace, pool),
                                 p.as_f32(call.v, v_, workspace, pool), p.head_dim_v,
                                 static_cast<float*>(p.at(step.out, workspace)), pool);
    case MathProgram::Kind::kGradQ:
      return p.multiply_keys(call.scale, in(), p.as_f32(call.k, k_, workspace, pool), gradients.dq, dq_, workspace,
                             pool);
    case MathProgram::Kind::kGradK:
      return p.multiply_queries(call.scale, in(), p.as_f32(call.q, q_, workspace, pool), gradients.dk, dk_, workspace,
                                pool);
    case MathProgram::Kind::kGradV:
      return p.multiply_queries(1.0f, in(), p.as_f32(gradients.grad_out, grad_out_, workspace, pool), gradients.dv, dv_,
                                workspace, pool);
    default:
      return p.run_pass(step, call, workspace, pool);
  }
}

// Parts in order, to the tensor's type and strides; without sums, zeros.
void MathBackwardPlan::store_sums(const Sums& sums, const ForwardCall& call, const Gradients& gradients,
                                  const void* workspace, ThreadPool& pool) const {
  const dsl::CaptureView& capture = call.captures[sums.capture];
  const CaptureGradient& gradient = gradients.captures[sums.capture];
  const auto* parts = reinterpret_cast<const double*>(static_cast<const char*>(workspace) + sums.offset);
  const std::int64_t size = dsl::dtype_size(capture.dtype);
  pool.parallel_for((sums.elements + kElementsPerTask - 1) / kElementsPerTask, [&](std::int64_t task, int) {
    for (std::int64_t i = task * kElementsPerTask; i < std::min(sums.elements, (task + 1) * kElementsPerTask); ++i) {
      double sum = 0.0;
      for (std::int64_t part = 0; part < sums.parts; ++part) sum += parts[part * sums.elements + i];
      std::int64_t offset = 0;
      for (std::int64_t d = capture.rank - 1, rest = i; d >= 0; rest /= capture.extent[d], --d) {
        offset += rest % capture.extent[d] * gradient.stride[d];
      }
      const auto rounded = static_cast<float>(sum);
      program_.options.passes->narrow(capture.dtype, &rounded, static_cast<char*>(gradient.data) + offset * size, 1);
    }
  });
}

void MathBackwardPlan::run(const ForwardCall& call, const Gradients& gradients, void* workspace,
                           ThreadPool& pool) const {
  for (const Sums& sums : sums_) {
    auto* const all = reinterpret_cast<double*>(static_cast<char*>(workspace) + sums.offset);
    const std::int64_t elements = sums.elements * sums.parts;
    pool.parallel_for((elements + kElementsPerTask - 1) / kElementsPerTask, [&](std::int64_t task, int) {
      const std::int64_t begin = task * kElementsPerTask;
      std::fill_n(all + begin, std::min(elements - begin, kElementsPerTask), 0.0);
    });
  }
  for (const MathProgram::Step& step : program_.steps) run_step(step, call, gradients, workspace, pool);
  if (!needs_score_) {
    if (wanted_.dq) write_zeros(gradients.dq);
    if (wanted_.dk) write_zeros(gradients.dk);
  }
  for (const Sums& sums : sums_) store_sums(sums, call, gradients, workspace, pool);
}

}  // namespace attnjit::runtime
