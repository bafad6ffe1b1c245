// Turns a bound expression into passes over the materialised scores, and runs them.
#include "runtime/math_backend.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "dsl/functions.h"

namespace attnjit::runtime {
namespace {

constexpr std::size_t kAlignment = 64;
constexpr std::int64_t kElementsPerTask = 1 << 15;  // of one pass: 128 KiB of floats, well above the cost of a task
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Bits of the dimensions a tensor has.
constexpr unsigned kB = 1, kH = 2, kQ = 4, kKv = 8, kFull = 15;

std::size_t element_size(dsl::Type type) {
  switch (type) {
    case dsl::Type::kBool:
      return 1;
    case dsl::Type::kInt:
      return 8;
    case dsl::Type::kFloat:
      return 4;
  }
  return 0;
}

constexpr std::size_t kTooLarge = std::numeric_limits<std::size_t>::max();

// Saturating at kTooLarge.
std::size_t add_bytes(std::size_t a, std::size_t b) {
  std::size_t sum = 0;
  return __builtin_add_overflow(a, b, &sum) ? kTooLarge : sum;
}
std::size_t multiply_bytes(std::size_t a, std::size_t b) {
  std::size_t product = 0;
  return __builtin_mul_overflow(a, b, &product) ? kTooLarge : product;
}
std::size_t round_up(std::size_t bytes) {
  return bytes > kTooLarge - kAlignment ? kTooLarge : (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

// Hands out places of the workspace; a freed one is used again by the best fit.
class Arena {
 public:
  explicit Arena(std::size_t begin) : end_(begin) {}

  std::size_t take(std::size_t bytes) {
    bytes = round_up(bytes);
    std::size_t best = free_.size();
    for (std::size_t i = 0; i < free_.size(); ++i) {
      if (free_[i].bytes >= bytes && (best == free_.size() || free_[i].bytes < free_[best].bytes)) best = i;
    }
    if (best == free_.size()) {
      const std::size_t offset = end_;
      end_ = add_bytes(end_, bytes);
      return offset;
    }
    const std::size_t offset = free_[best].offset;
    free_[best].offset += bytes;
    free_[best].bytes -= bytes;
    if (free_[best].bytes == 0) free_.erase(free_.begin() + static_cast<std::ptrdiff_t>(best));
    return offset;
  }

  void give_back(std::size_t offset, std::size_t bytes) {
    bytes = round_up(bytes);
    auto next = std::find_if(free_.begin(), free_.end(), [&](const Block& block) { return block.offset > offset; });
    next = free_.insert(next, Block{offset, bytes});
    if (next + 1 != free_.end() && next->offset + next->bytes == (next + 1)->offset) {
      next->bytes += (next + 1)->bytes;
      free_.erase(next + 1);
    }
    if (next != free_.begin() && (next - 1)->offset + (next - 1)->bytes == next->offset) {
      (next - 1)->bytes += next->bytes;
      free_.erase(next);
    }
  }

  std::size_t end() const { return end_; }

 private:
  struct Block {
    std::size_t offset, bytes;
  };
  std::vector<Block> free_;  // by offset, no two adjacent
  std::size_t end_;
};

bool is_negative_infinity(const dsl::Expr& expr, const dsl::Node& node) {
  if (node.op == dsl::Op::kFloat) return node.float_value == -kInfinity;
  if (node.op != dsl::Op::kNeg) return false;
  const dsl::Node& operand = expr[node.args[0]];
  return operand.op == dsl::Op::kFloat && operand.float_value == kInfinity;
}

// A literal greater than zero; binding may have made a float of an int.
bool is_positive_literal(const dsl::Expr& expr, dsl::NodeId id) {
  const dsl::Node* node = &expr[id];
  if (node->op == dsl::Op::kCall && node->function == dsl::Function::kToFloat) node = &expr[node->args[0]];
  return (node->op == dsl::Op::kInt && node->int_value > 0) || (node->op == dsl::Op::kFloat && node->float_value > 0);
}

// Never NaN or infinite, whatever the inputs hold.
bool is_surely_finite(const dsl::Expr& expr, const dsl::Node& node) {
  if (node.op == dsl::Op::kFloat) return std::isfinite(node.float_value);
  return node.op == dsl::Op::kCall && node.function == dsl::Function::kToFloat &&
         expr[node.args[0]].type != dsl::Type::kFloat;
}

// The arguments whose `keep` a node's `keep` is made of; "Dropped elements" of the language's rules.
int keep_arguments(const dsl::Expr& expr, const dsl::Node& node, int (&arguments)[2]) {
  switch (node.op) {
    case dsl::Op::kSelect:
      arguments[0] = 1;
      arguments[1] = 2;
      return 2;
    case dsl::Op::kAdd:
      arguments[0] = 0;
      arguments[1] = 1;
      return 2;
    case dsl::Op::kSub:
      arguments[0] = 0;
      return 1;
    case dsl::Op::kMul:
      if (is_positive_literal(expr, node.args[0])) {
        arguments[0] = 1;
        return 1;
      }
      arguments[0] = 0;
      return is_positive_literal(expr, node.args[1]) ? 1 : 0;
    case dsl::Op::kCall:
      arguments[0] = 0;
      arguments[1] = 1;
      return node.function == dsl::Function::kMin ? 2 : 0;
    default:
      return 0;
  }
}

std::string operation_name(const dsl::Node& node) {
  switch (node.op) {
    case dsl::Op::kNeg:
      return "neg";
    case dsl::Op::kNot:
      return "not";
    case dsl::Op::kBitNot:
      return "bitwise not";
    case dsl::Op::kAdd:
      return "add";
    case dsl::Op::kSub:
      return "subtract";
    case dsl::Op::kMul:
      return "multiply";
    case dsl::Op::kDiv:
      return "divide";
    case dsl::Op::kFloorDiv:
      return "floor divide";
    case dsl::Op::kMod:
      return "modulus";
    case dsl::Op::kPow:
      return "power";
    case dsl::Op::kLt:
    case dsl::Op::kLe:
    case dsl::Op::kGt:
    case dsl::Op::kGe:
    case dsl::Op::kEq:
    case dsl::Op::kNe:
      return "compare";
    case dsl::Op::kAnd:
    case dsl::Op::kBitAnd:
      return "and";
    case dsl::Op::kOr:
    case dsl::Op::kBitOr:
      return "or";
    case dsl::Op::kSelect:
      return "where";
    case dsl::Op::kCall:
      return std::string(dsl::function_info(node.function).name);
    default:
      return "?";
  }
}

}  // namespace

// Lowers the expressions to steps over values, then gives the values their places.
class MathPlanBuilder {
 public:
  MathPlanBuilder(MathPlan* plan, std::size_t arena_begin) : plan_(*plan), arena_(arena_begin) {
    extent_[0] = plan_.batch_;
    extent_[1] = plan_.heads_;
    extent_[2] = plan_.seqlen_q_;
    extent_[3] = plan_.seqlen_kv_;
    score_ = add_value({.type = dsl::Type::kFloat, .dims = kFull});
  }

  // The value of the root; `keep`, when given, becomes the value that says which elements are kept, or kTrue.
  int lower(const dsl::Expr& expr, int* keep) {
    const std::size_t n = expr.nodes.size();
    std::vector<bool> used(n), keep_used(n);
    const auto root = static_cast<std::size_t>(expr.root);
    used[root] = true;
    keep_used[root] = keep != nullptr;
    for (std::size_t i = n; i-- > 0;) {
      const dsl::Node& node = expr.nodes[i];
      if (used[i]) {
        for (dsl::NodeId argument : node.args) used[static_cast<std::size_t>(argument)] = true;
      }
      if (keep_used[i]) {
        int arguments[2];
        const int count = keep_arguments(expr, node, arguments);
        for (int a = 0; a < count; ++a) {
          keep_used[static_cast<std::size_t>(node.args[static_cast<std::size_t>(arguments[a])])] = true;
        }
      }
    }

    std::vector<int> value(n, -1);
    for (std::size_t i = 0; i < n; ++i) {
      if (used[i]) value[i] = lower_node(expr, expr.nodes[i], value);
    }
    if (keep != nullptr) {
      emit_keep_ = false;
      *keep = lower_keep(expr, keep_used, value);
      emit_keep_ = true;
      if (*keep != kTrue) *keep = lower_keep(expr, keep_used, value);
    }
    return value[root];
  }

  int select(int condition, int then, int otherwise) {
    return elementwise(dsl::Op::kSelect, dsl::Function::kMin, values_[static_cast<std::size_t>(then)].type,
                       {condition, then, otherwise}, "where");
  }
  int literal(float value) { return constant(dsl::Type::kFloat, std::bit_cast<std::uint32_t>(value)); }

  // The modified scores as a tensor of their own over all four dimensions, which softmax may overwrite.
  int materialize(int value) {
    const Value v = values_[static_cast<std::size_t>(value)];
    if (v.dims == kFull && !v.constant) return value;
    const int out = add_value({.type = v.type, .dims = kFull});
    add_step(
        {.kind = MathPlan::Kind::kElementwise, .elementwise = plan_.options_.passes->copy(v.type), .text = "expand"},
        out, {value});
    return out;
  }

  // Places everything; `probabilities` and `keep` (or kTrue) live to the end.
  void finish(int probabilities, int keep) {
    const auto last = static_cast<int>(steps_.size());
    values_[static_cast<std::size_t>(probabilities)].last_use = last;
    if (keep >= 0) values_[static_cast<std::size_t>(keep)].last_use = last;
    for (int s = 0; s < last; ++s) {
      for (int in : steps_[static_cast<std::size_t>(s)].in)
        values_[static_cast<std::size_t>(in)].last_use = std::max(values_[static_cast<std::size_t>(in)].last_use, s);
    }
    for (int s = 0; s < last; ++s) place_step(s);
    plan_.probabilities_ = place_of(values_[static_cast<std::size_t>(probabilities)]);
    if (keep >= 0) {
      plan_.has_keep_ = true;
      plan_.keep_ = place_of(values_[static_cast<std::size_t>(keep)]);
      strides(values_[static_cast<std::size_t>(keep)].dims, plan_.keep_stride_);
    }
    plan_.workspace_size_ = arena_.end();
  }

  static constexpr int kTrue = -1;
  static constexpr int kFalse = -2;

 private:
  struct Value {
    dsl::Type type = dsl::Type::kFloat;
    unsigned dims = 0;
    bool constant = false;
    std::size_t offset = 0;
    bool owns_place = true;
    int last_use = -1;  // number of a step
  };
  struct Pending {
    MathPlan::Step step;
    int out;
    std::vector<int> in;
  };

  int add_value(const Value& value) {
    values_.push_back(value);
    return static_cast<int>(values_.size()) - 1;
  }

  int constant(dsl::Type type, std::uint64_t bits) {
    plan_.constants_.push_back(bits);
    return add_value({.type = type, .dims = 0, .constant = true, .offset = (plan_.constants_.size() - 1) * 8});
  }

  void add_step(MathPlan::Step step, int out, std::vector<int> in) {
    steps_.push_back({std::move(step), out, std::move(in)});
  }

  int elementwise(dsl::Op op, dsl::Function function, dsl::Type operand, const std::vector<int>& in,
                  const std::string& name) {
    return elementwise(op, function, operand, operand, in, name);
  }

  int elementwise(dsl::Op op, dsl::Function function, dsl::Type operand, dsl::Type result, const std::vector<int>& in,
                  const std::string& name) {
    unsigned dims = 0;
    for (int v : in) dims |= values_[static_cast<std::size_t>(v)].dims;
    const int out = add_value({.type = result, .dims = dims});
    add_step({.kind = MathPlan::Kind::kElementwise,
              .elementwise = plan_.options_.passes->elementwise(op, function, operand),
              .text = name},
             out, in);
    return out;
  }

  // One tensor of positions per index, however often it is named.
  int index(unsigned dim) {
    int& value = index_[std::countr_zero(dim)];
    if (value < 0) {
      value = add_value({.type = dsl::Type::kInt, .dims = dim});
      add_step({.kind = MathPlan::Kind::kIota, .text = "arange"}, value, {});
    }
    return value;
  }

  int score() {
    if (!has_scores_) {
      has_scores_ = true;
      add_step({.kind = MathPlan::Kind::kScores, .text = "q k^T"}, score_, {});
    }
    return score_;
  }

  int lower_node(const dsl::Expr& expr, const dsl::Node& node, const std::vector<int>& value) {
    if (node.op == dsl::Op::kCall && node.function == dsl::Function::kToFloat) {
      const dsl::Node& operand = expr[node.args[0]];
      if (operand.op == dsl::Op::kInt) return literal(static_cast<float>(operand.int_value));
    }
    std::vector<int> in;
    for (dsl::NodeId argument : node.args) in.push_back(value[static_cast<std::size_t>(argument)]);
    switch (node.op) {
      case dsl::Op::kScore:
        return score();
      case dsl::Op::kIndexB:
        return index(kB);
      case dsl::Op::kIndexH:
        return index(kH);
      case dsl::Op::kIndexQ:
        return index(kQ);
      case dsl::Op::kIndexKv:
        return index(kKv);
      case dsl::Op::kInt:
      case dsl::Op::kBool:
        return constant(node.type, static_cast<std::uint64_t>(node.int_value));
      case dsl::Op::kFloat:
        return literal(dsl::float32_literal(node.float_value));
      case dsl::Op::kRead:
        return lower_read(node, in);
      default: {
        // The operands' type is that of the last: a select's first is its condition.
        const dsl::Type operand = values_[static_cast<std::size_t>(in.back())].type;
        return elementwise(node.op, node.function, operand, node.type, in, operation_name(node));
      }
    }
  }

  int lower_read(const dsl::Node& node, const std::vector<int>& in) {
    unsigned dims = 0;
    for (int v : in) dims |= values_[static_cast<std::size_t>(v)].dims;
    const int out = add_value({.type = node.type, .dims = dims});
    add_step({.kind = MathPlan::Kind::kRead, .capture = node.capture, .text = "index"}, out, in);
    return out;
  }

  // The value that says which elements the root keeps; kTrue where the root already is -inf at all the others. Without
  // emit_keep_ it adds no steps and only the answer kTrue counts.
  int lower_keep(const dsl::Expr& expr, const std::vector<bool>& keep_used, const std::vector<int>& value) {
    const std::size_t n = expr.nodes.size();
    std::vector<int> keep(n, kTrue);
    // The value is -inf wherever the element is dropped, so that nothing is left to do there.
    std::vector<bool> exact(n, true);
    for (std::size_t i = 0; i < n; ++i) {
      if (!keep_used[i]) continue;
      const dsl::Node& node = expr.nodes[i];
      if (is_negative_infinity(expr, node)) {
        keep[i] = kFalse;
        continue;
      }
      int arguments[2];
      const int count = keep_arguments(expr, node, arguments);
      const auto argument = [&](int a) {
        return static_cast<std::size_t>(node.args[static_cast<std::size_t>(arguments[a])]);
      };
      if (count == 1) {
        keep[i] = keep[argument(0)];
      } else if (count == 2 && node.op == dsl::Op::kSelect) {
        keep[i] = keep_select(value[static_cast<std::size_t>(node.args[0])], keep[argument(0)], keep[argument(1)]);
      } else if (count == 2) {
        keep[i] = keep_and(keep[argument(0)], keep[argument(1)]);
      }
      if (keep[i] == kTrue) continue;
      for (int a = 0; a < count; ++a) exact[i] = exact[i] && exact[argument(a)];
      if (node.op != dsl::Op::kSelect && node.op != dsl::Op::kMul) {
        // -inf plus NaN or infinity is not -inf: one side drops, the other has to be finite.
        int finite = 0;
        for (dsl::NodeId id : node.args) finite += is_surely_finite(expr, expr[id]);
        exact[i] = exact[i] && finite > 0;
      }
    }
    const auto root = static_cast<std::size_t>(expr.root);
    if (exact[root]) return kTrue;
    return keep[root] == kFalse ? constant(dsl::Type::kBool, 0) : keep[root];
  }

  int keep_and(int a, int b) {
    if (a == kFalse || b == kFalse) return kFalse;
    if (a == kTrue) return b;
    if (b == kTrue) return a;
    if (!emit_keep_) return 0;
    return elementwise(dsl::Op::kAnd, dsl::Function::kMin, dsl::Type::kBool, {a, b}, "keep: and");
  }

  int keep_select(int condition, int then, int otherwise) {
    if (then == otherwise) return then;
    if (then == kTrue && otherwise == kFalse) return condition;
    if (!emit_keep_) return 0;
    if (then == kFalse && otherwise == kTrue) {
      return elementwise(dsl::Op::kNot, dsl::Function::kMin, dsl::Type::kBool, {condition}, "keep: not");
    }
    const auto as_value = [&](int keep) {
      return keep >= 0 ? keep : constant(dsl::Type::kBool, keep == kTrue ? 1 : 0);
    };
    return select(condition, as_value(then), as_value(otherwise));
  }

  std::size_t bytes(const Value& value) const {
    std::size_t size = element_size(value.type);
    for (int d = 0; d < 4; ++d) {
      if (value.dims & (1u << d)) size = multiply_bytes(size, static_cast<std::size_t>(extent_[d]));
    }
    return size;
  }

  // Of a contiguous tensor with these dimensions; 0 for the others.
  void strides(unsigned dims, std::int64_t (&stride)[4]) const {
    std::int64_t next = 1;
    for (int d = 3; d >= 0; --d) {
      stride[d] = dims & (1u << d) ? next : 0;
      if (dims & (1u << d)) next *= extent_[d];
    }
  }

  static MathPlan::Place place_of(const Value& value) { return {.constant = value.constant, .offset = value.offset}; }

  void place_step(int s) {
    Pending& pending = steps_[static_cast<std::size_t>(s)];
    Value& out = values_[static_cast<std::size_t>(pending.out)];
    const auto dies = [&](const Value& value) { return value.owns_place && !value.constant && value.last_use == s; };

    // An operand of the same shape that is read for the last time gives its place: each element is read before it is
    // written.
    bool in_place = false;
    if (pending.step.kind == MathPlan::Kind::kElementwise) {
      for (int in : pending.in) {
        Value& operand = values_[static_cast<std::size_t>(in)];
        if (in_place || !dies(operand) || operand.dims != out.dims ||
            element_size(operand.type) != element_size(out.type)) {
          continue;
        }
        in_place = true;
        out.offset = operand.offset;
        operand.owns_place = false;
      }
    }
    if (!in_place) out.offset = arena_.take(bytes(out));
    finish_step(pending);

    for (std::size_t i = 0; i < pending.in.size(); ++i) {
      Value& operand = values_[static_cast<std::size_t>(pending.in[i])];
      if (!dies(operand)) continue;
      arena_.give_back(operand.offset, bytes(operand));
      operand.owns_place = false;  // given back once, however often it is an operand
    }
    plan_.steps_.push_back(std::move(pending.step));
  }

  void finish_step(Pending& pending) {
    MathPlan::Step& step = pending.step;
    const Value& out = values_[static_cast<std::size_t>(pending.out)];
    step.out = place_of(out);
    step.out_size = element_size(out.type);
    step.num_in = static_cast<int>(pending.in.size());
    for (int i = 0; i < step.num_in; ++i) {
      const Value& operand = values_[static_cast<std::size_t>(pending.in[static_cast<std::size_t>(i)])];
      step.in[i] = place_of(operand);
      step.in_size[i] = element_size(operand.type);
    }
    merge_dimensions(pending, out.dims);
    step.text += ": " + std::string(dsl::type_name(out.type)) + " (";
    for (int d = 0, first = 1; d < 4; ++d) {
      if (!(out.dims & (1u << d))) continue;
      step.text += (first ? "" : ", ") + std::to_string(extent_[d]);
      first = 0;
    }
    step.text += ")";
  }

  void merge_dimensions(Pending& pending, unsigned dims) {
    MathPlan::Step& step = pending.step;
    std::int64_t stride[dsl::kMaxRank][4];
    for (int i = 0; i < step.num_in; ++i) {
      strides(values_[static_cast<std::size_t>(pending.in[static_cast<std::size_t>(i)])].dims, stride[i]);
    }
    step.rank = 0;
    step.elements = 1;
    for (int d = 0; d < 4; ++d) {
      if (!(dims & (1u << d)) || extent_[d] == 1) continue;
      step.elements *= extent_[d];
      bool merges = step.rank > 0;
      for (int i = 0; merges && i < step.num_in; ++i) {
        merges = step.in_stride[i][step.rank - 1] == stride[i][d] * extent_[d];
      }
      if (!merges) ++step.rank;
      step.extent[step.rank - 1] = merges ? step.extent[step.rank - 1] * extent_[d] : extent_[d];
      for (int i = 0; i < step.num_in; ++i) step.in_stride[i][step.rank - 1] = stride[i][d];
    }
    if (step.rank == 0) step.rank = 1;  // one element, all strides 0
  }

  MathPlan& plan_;
  Arena arena_;
  std::int64_t extent_[4];
  std::vector<Value> values_;
  std::vector<Pending> steps_;
  int index_[4] = {-1, -1, -1, -1};
  int score_;
  bool has_scores_ = false;
  bool emit_keep_ = false;
};

MathPlan::MathPlan(const ForwardCall& problem, const dsl::Expr& score_mod, const dsl::Expr* mask_mod,
                   const MathOptions& options)
    : options_(options),
      batch_(problem.q.shape[0]),
      heads_(problem.q.shape[1]),
      heads_kv_(problem.k.shape[1]),
      seqlen_q_(problem.q.shape[2]),
      seqlen_kv_(problem.k.shape[2]),
      head_dim_(problem.q.shape[3]),
      head_dim_v_(problem.v.shape[3]) {
  // Room for packed f32 copies. f32 tensors need them only where BLAS cannot take their strides, which may differ from
  // call to call.
  std::size_t end = 0;
  const auto reserve = [&](std::int64_t heads, std::int64_t rows, std::int64_t columns) {
    const std::size_t offset = end;
    std::size_t bytes = sizeof(float);
    for (std::int64_t n : {batch_, heads, rows, columns}) bytes = multiply_bytes(bytes, static_cast<std::size_t>(n));
    end = add_bytes(end, round_up(bytes));
    return offset;
  };
  q_f32_ = reserve(heads_, seqlen_q_, head_dim_);
  k_f32_ = reserve(heads_kv_, seqlen_kv_, head_dim_);
  v_f32_ = reserve(heads_kv_, seqlen_kv_, head_dim_v_);
  o_f32_ = reserve(heads_, seqlen_q_, head_dim_v_);

  std::size_t largest = sizeof(std::int64_t);
  for (std::int64_t n : {batch_, heads_, seqlen_q_, seqlen_kv_}) {
    largest = multiply_bytes(largest, static_cast<std::size_t>(n));
  }
  if (largest > kTooLarge / 4 || end > kTooLarge / 4) {
    workspace_size_ = kTooLarge;
    return;
  }

  MathPlanBuilder builder(this, end);
  int keep = MathPlanBuilder::kTrue;
  int value = builder.lower(score_mod, &keep);
  if (mask_mod != nullptr)
    value = builder.select(builder.lower(*mask_mod, nullptr), value, builder.literal(-kInfinity));
  builder.finish(builder.materialize(value), keep);
}

std::string MathPlan::describe() const {
  std::string text;
  for (const Step& step : steps_) text += step.text + "\n";
  text += has_keep_ ? "softmax of the kept elements\n" : "softmax\n";
  text += "p v\nproducts by " + (options_.blas != nullptr ? options_.blas->description() : std::string("plain code")) +
          ", passes for " + options_.passes->isa + "\n";
  return text;
}

void* MathPlan::at(const Place& place, void* workspace) const {
  if (place.constant) return const_cast<char*>(reinterpret_cast<const char*>(constants_.data()) + place.offset);
  return static_cast<char*>(workspace) + place.offset;
}

void MathPlan::gemm(bool transpose_b, std::int64_t m, std::int64_t n, std::int64_t k, float alpha, const float* a,
                    std::int64_t lda, const float* b, std::int64_t ldb, float* c, std::int64_t ldc) const {
  constexpr std::int64_t kMaxInt = std::numeric_limits<int>::max();
  if (options_.blas != nullptr && std::max({m, n, k, lda, ldb, ldc}) <= kMaxInt) {
    options_.blas->gemm(transpose_b, m, n, k, alpha, a, lda, b, ldb, c, ldc);
  } else {
    options_.passes->gemm(transpose_b, m, n, k, alpha, a, lda, b, ldb, c, ldc);
  }
}

// Query rows of one product: a whole head where there are heads enough to keep the threads busy.
std::int64_t MathPlan::rows_per_product(int threads) const {
  const std::int64_t products = batch_ * heads_;
  const std::int64_t parts = products >= 4 * threads || threads == 1 ? 1 : (4 * threads + products - 1) / products;
  return std::max<std::int64_t>((seqlen_q_ + parts - 1) / parts, std::min<std::int64_t>(seqlen_q_, 64));
}

namespace {

// A matrix of f32 that BLAS accepts, per batch and head.
struct Matrices {
  const float* data = nullptr;
  std::int64_t stride[3] = {};
  const float* of(std::int64_t b, std::int64_t h) const { return data + b * stride[0] + h * stride[1]; }
};

bool blas_takes(const TensorView& tensor) {
  const bool rows_apart = tensor.shape[2] <= 1 || (tensor.stride[2] >= std::max<std::int64_t>(tensor.shape[3], 1) &&
                                                   tensor.stride[2] <= std::numeric_limits<int>::max());
  return tensor.dtype == dsl::DType::kF32 && rows_apart;
}

// `tensor` itself, or its copy at `packed`.
Matrices as_f32(const TensorView& tensor, float* packed, const Passes& passes, ThreadPool& pool) {
  const std::int64_t heads = tensor.shape[1], rows = tensor.shape[2], columns = tensor.shape[3];
  if (blas_takes(tensor)) {
    return {static_cast<const float*>(tensor.data),
            {tensor.stride[0], tensor.stride[1], rows <= 1 ? columns : tensor.stride[2]}};
  }
  constexpr std::int64_t kRowsPerTask = 256;
  const std::int64_t parts = (rows + kRowsPerTask - 1) / kRowsPerTask;
  const auto size = dsl::dtype_size(tensor.dtype);
  pool.parallel_for(tensor.shape[0] * heads * parts, [&](std::int64_t task, int) {
    const std::int64_t b = task / parts / heads, h = task / parts % heads;
    const std::int64_t begin = task % parts * kRowsPerTask, end = std::min(rows, begin + kRowsPerTask);
    for (std::int64_t row = begin; row < end; ++row) {
      const std::int64_t offset = b * tensor.stride[0] + h * tensor.stride[1] + row * tensor.stride[2];
      passes.widen(tensor.dtype, static_cast<const char*>(tensor.data) + offset * size,
                   packed + ((b * heads + h) * rows + row) * columns, columns);
    }
  });
  return {packed, {heads * rows * columns, rows * columns, columns}};
}

}  // namespace

void MathPlan::run_scores(const Step& step, const ForwardCall& call, void* workspace, ThreadPool& pool) const {
  char* bytes = static_cast<char*>(workspace);
  const Matrices q = as_f32(call.q, reinterpret_cast<float*>(bytes + q_f32_), *options_.passes, pool);
  const Matrices k = as_f32(call.k, reinterpret_cast<float*>(bytes + k_f32_), *options_.passes, pool);
  float* scores = static_cast<float*>(at(step.out, workspace));
  const std::int64_t rows = rows_per_product(pool.size());
  const std::int64_t parts = (seqlen_q_ + rows - 1) / rows;
  // A factor of 0 would let BLAS pass over NaN and infinity in Q and K.
  const bool fold_scale = call.scale != 0.0f && std::isfinite(call.scale);
  pool.parallel_for(batch_ * heads_ * parts, [&](std::int64_t task, int) {
    const std::int64_t b = task / parts / heads_, h = task / parts % heads_;
    const std::int64_t begin = task % parts * rows, count = std::min(rows, seqlen_q_ - begin);
    float* c = scores + ((b * heads_ + h) * seqlen_q_ + begin) * seqlen_kv_;
    gemm(true, count, seqlen_kv_, head_dim_, fold_scale ? call.scale : 1.0f, q.of(b, h) + begin * q.stride[2],
         q.stride[2], k.of(b, h / (heads_ / heads_kv_)), k.stride[2], c, seqlen_kv_);
    if (!fold_scale) {
      for (std::int64_t i = 0; i < count * seqlen_kv_; ++i) c[i] *= call.scale;
    }
  });
}

void MathPlan::run_pass(const Step& step, const ForwardCall& call, void* workspace, ThreadPool& pool) const {
  char* out = static_cast<char*>(at(step.out, workspace));
  if (step.kind == Kind::kIota) {
    options_.passes->iota(reinterpret_cast<std::int64_t*>(out), 0, step.elements);
    return;
  }
  const char* in[dsl::kMaxRank];
  for (int i = 0; i < step.num_in; ++i) in[i] = static_cast<const char*>(at(step.in[i], workspace));
  GatherFn gather = nullptr;
  if (step.kind == Kind::kRead) gather = options_.passes->gather(call.captures[step.capture].dtype);

  const std::int64_t inner = step.extent[step.rank - 1];
  const std::int64_t tasks = (step.elements + kElementsPerTask - 1) / kElementsPerTask;
  pool.parallel_for(tasks, [&](std::int64_t task, int) {
    std::int64_t position = task * kElementsPerTask;
    const std::int64_t end = std::min(step.elements, position + kElementsPerTask);
    while (position < end) {
      const std::int64_t first = position % inner;
      const std::int64_t count = std::min(inner - first, end - position);
      std::int64_t offset[dsl::kMaxRank];
      for (int i = 0; i < step.num_in; ++i) offset[i] = first * step.in_stride[i][step.rank - 1];
      for (std::int64_t d = step.rank - 2, rest = position / inner; d >= 0; --d) {
        for (int i = 0; i < step.num_in; ++i) offset[i] += rest % step.extent[d] * step.in_stride[i][d];
        rest /= step.extent[d];
      }
      void* result = out + static_cast<std::size_t>(position) * step.out_size;
      const auto operand = [&](int i) { return in[i] + offset[i] * static_cast<std::int64_t>(step.in_size[i]); };
      const auto advance = [&](int i) { return static_cast<int>(step.in_stride[i][step.rank - 1]); };
      if (gather != nullptr) {
        const dsl::CaptureView& capture = call.captures[step.capture];
        GatherArgs args{.out = result, .data = capture.data, .rank = step.num_in, .n = count};
        for (int i = 0; i < step.num_in; ++i) {
          args.index[i] = reinterpret_cast<const std::int64_t*>(operand(i));
          args.step[i] = advance(i);
          args.extent[i] = capture.extent[i];
          args.stride[i] = capture.stride[i];
        }
        gather(args);
      } else {
        ElementwiseArgs args{.out = result, .n = count};
        for (int i = 0; i < step.num_in; ++i) {
          args.in[i] = operand(i);
          args.step[i] = advance(i);
        }
        step.elementwise(args);
      }
      position += count;
    }
  });
}

void MathPlan::run_softmax(const ForwardCall& call, void* workspace, ThreadPool& pool) const {
  float* x = static_cast<float*>(at(probabilities_, workspace));
  const std::uint8_t* keep = has_keep_ ? static_cast<const std::uint8_t*>(at(keep_, workspace)) : nullptr;
  const std::int64_t total = batch_ * heads_ * seqlen_q_;
  const std::int64_t rows = std::max<std::int64_t>(1, kElementsPerTask / seqlen_kv_);
  pool.parallel_for((total + rows - 1) / rows, [&](std::int64_t task, int) {
    for (std::int64_t row = task * rows; row < std::min(total, (task + 1) * rows); ++row) {
      const std::int64_t b = row / seqlen_q_ / heads_, h = row / seqlen_q_ % heads_, q_idx = row % seqlen_q_;
      const std::uint8_t* row_keep = nullptr;
      if (keep != nullptr) row_keep = keep + b * keep_stride_[0] + h * keep_stride_[1] + q_idx * keep_stride_[2];
      float lse, row_max;
      options_.passes->softmax_row(x + row * seqlen_kv_, seqlen_kv_, row_keep, static_cast<int>(keep_stride_[3]), &lse,
                                   &row_max);
      const auto put = [&](const RowView& view, float value) {
        if (view.data != nullptr) view.data[b * view.stride[0] + h * view.stride[1] + q_idx * view.stride[2]] = value;
      };
      put(call.lse, lse);
      put(call.row_max, row_max);
    }
  });
}

void MathPlan::run_output(const ForwardCall& call, void* workspace, ThreadPool& pool) const {
  char* bytes = static_cast<char*>(workspace);
  const Matrices v = as_f32(call.v, reinterpret_cast<float*>(bytes + v_f32_), *options_.passes, pool);
  const float* p = static_cast<const float*>(at(probabilities_, workspace));
  float* packed = reinterpret_cast<float*>(bytes + o_f32_);
  const bool direct = blas_takes(call.o);
  const std::int64_t rows = rows_per_product(pool.size());
  const std::int64_t parts = (seqlen_q_ + rows - 1) / rows;
  const auto size = dsl::dtype_size(call.o.dtype);
  pool.parallel_for(batch_ * heads_ * parts, [&](std::int64_t task, int) {
    const std::int64_t b = task / parts / heads_, h = task / parts % heads_;
    const std::int64_t begin = task % parts * rows, count = std::min(rows, seqlen_q_ - begin);
    const std::int64_t row = (b * heads_ + h) * seqlen_q_ + begin;
    char* o = static_cast<char*>(call.o.data) +
              (b * call.o.stride[0] + h * call.o.stride[1] + begin * call.o.stride[2]) * size;
    float* c = direct ? reinterpret_cast<float*>(o) : packed + row * head_dim_v_;
    const std::int64_t ldc = direct && seqlen_q_ > 1 ? call.o.stride[2] : head_dim_v_;
    gemm(false, count, head_dim_v_, seqlen_kv_, 1.0f, p + row * seqlen_kv_, seqlen_kv_,
         v.of(b, h / (heads_ / heads_kv_)), v.stride[2], c, ldc);
    for (std::int64_t i = 0; !direct && i < count; ++i) {
      options_.passes->narrow(call.o.dtype, c + i * ldc, o + i * call.o.stride[2] * size, head_dim_v_);
    }
  });
}

void MathPlan::run(const ForwardCall& call, void* workspace, ThreadPool& pool) const {
  for (const Step& step : steps_) {
    if (step.kind == Kind::kScores) {
      run_scores(step, call, workspace, pool);
    } else {
      run_pass(step, call, workspace, pool);
    }
  }
  run_softmax(call, workspace, pool);
  run_output(call, workspace, pool);
}

}  // namespace attnjit::runtime
