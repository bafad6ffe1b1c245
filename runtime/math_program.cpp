// Turns a bound expression into passes over the materialised scores, and runs passes and products.
#include "runtime/math_program.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <span>
#include <utility>

#include "dsl/functions.h"

namespace attnjit::runtime {
namespace {

constexpr std::size_t kAlignment = 64;
constexpr std::int64_t kColumnsPerTask = 1 << 12;  // of a sum over rows
constexpr float kInfinity = std::numeric_limits<float>::infinity();

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
std::span<const std::size_t> keep_arguments(const dsl::Expr& expr, const dsl::Node& node) {
  static constexpr std::size_t kPositions[] = {0, 1, 2};
  const std::span all(kPositions);
  switch (node.op) {
    case dsl::Op::kSelect:
      return all.subspan(1, 2);
    case dsl::Op::kAdd:
      return all.first(2);
    case dsl::Op::kSub:
      return all.first(1);
    case dsl::Op::kMul:
      if (is_positive_literal(expr, node.args[0])) return all.subspan(1, 1);
      return all.first(is_positive_literal(expr, node.args[1]) ? 1 : 0);
    case dsl::Op::kCall:
      return all.first(node.function == dsl::Function::kMin ? 2 : 0);
    default:
      return {};
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

// ---- The workspace

std::size_t MathBuilder::Arena::take(std::size_t bytes) {
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

void MathBuilder::Arena::give_back(std::size_t offset, std::size_t bytes) {
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

MathProgram::MathProgram(const ForwardCall& problem, const MathOptions& with)
    : options(with),
      batch(problem.q.shape[0]),
      heads(problem.q.shape[1]),
      heads_kv(problem.k.shape[1]),
      seqlen_q(problem.q.shape[2]),
      seqlen_kv(problem.k.shape[2]),
      head_dim(problem.q.shape[3]),
      head_dim_v(problem.v.shape[3]) {}

std::size_t MathProgram::reserve_bytes(std::size_t bytes) {
  const std::size_t offset = workspace_size;
  workspace_size = add_bytes(workspace_size, round_up(bytes));
  return offset;
}

std::size_t MathProgram::reserve(std::int64_t all_heads, std::int64_t rows, std::int64_t columns) {
  std::size_t bytes = sizeof(float);
  for (std::int64_t n : {batch, all_heads, rows, columns}) bytes = multiply_bytes(bytes, static_cast<std::size_t>(n));
  return reserve_bytes(bytes);
}

bool MathProgram::is_addressable() const {
  std::size_t largest = sizeof(std::int64_t);
  for (std::int64_t n : {batch, heads, seqlen_q, seqlen_kv}) {
    largest = multiply_bytes(largest, static_cast<std::size_t>(n));
  }
  return largest <= kTooLarge / 4 && workspace_size <= kTooLarge / 4;
}

std::string MathProgram::describe_engine() const {
  return "products by " + (options.blas != nullptr ? options.blas->description() : std::string("plain code")) +
         ", passes for " + options.passes->isa + "\n";
}

// ---- Lowering

MathBuilder::MathBuilder(MathProgram* program)
    : program_(*program),
      arena_(program->workspace_size),
      extent_{program->batch, program->heads, program->seqlen_q, program->seqlen_kv} {}

LoweredExpr MathBuilder::lower(const dsl::Expr& expr, bool wants_keep) {
  const std::size_t n = expr.nodes.size();
  LoweredExpr lowered{.value = std::vector<int>(n, -1), .decides = std::vector<bool>(n), .drops = std::vector<bool>(n)};
  std::vector<bool> used(n);
  const auto root = static_cast<std::size_t>(expr.root);
  used[root] = true;
  lowered.decides[root] = wants_keep;
  for (std::size_t i = n; i-- > 0;) {
    const dsl::Node& node = expr.nodes[i];
    if (used[i]) {
      for (dsl::NodeId argument : node.args) used[static_cast<std::size_t>(argument)] = true;
    }
    if (!lowered.decides[i]) continue;
    for (std::size_t a : keep_arguments(expr, node)) lowered.decides[static_cast<std::size_t>(node.args[a])] = true;
  }

  for (std::size_t i = 0; i < n; ++i) {
    if (used[i]) lowered.value[i] = lower_node(expr, expr.nodes[i], lowered.value);
  }
  lowered.root = lowered.value[root];
  if (wants_keep) {
    emit_keep_ = false;
    lowered.keep = lower_keep(expr, &lowered);
    emit_keep_ = true;
    if (lowered.keep != LoweredExpr::kTrue) lowered.keep = lower_keep(expr, &lowered);
  }
  return lowered;
}

int MathBuilder::add_value(const Value& value) {
  values_.push_back(value);
  return static_cast<int>(values_.size()) - 1;
}

void MathBuilder::add_step(MathProgram::Step step, int out, std::vector<int> in) {
  steps_.push_back({std::move(step), out, std::move(in)});
}

int MathBuilder::constant(dsl::Type type, std::uint64_t bits) {
  program_.constants.push_back(bits);
  return add_value({.type = type, .dims = 0, .constant = true, .offset = (program_.constants.size() - 1) * 8});
}

int MathBuilder::literal(float value) { return constant(dsl::Type::kFloat, std::bit_cast<std::uint32_t>(value)); }

int MathBuilder::elementwise(ElementwiseFn function, dsl::Type result, const std::vector<int>& in,
                             const std::string& name) {
  unsigned all = 0;
  for (int v : in) all |= dims(v);
  const int out = add_value({.type = result, .dims = all});
  add_step({.kind = MathProgram::Kind::kElementwise, .elementwise = function, .text = name}, out, in);
  return out;
}

int MathBuilder::elementwise(dsl::Op op, dsl::Function function, dsl::Type operand, dsl::Type result,
                             const std::vector<int>& in, const std::string& name) {
  return elementwise(program_.options.passes->elementwise(op, function, operand), result, in, name);
}

int MathBuilder::select(int condition, int then, int otherwise) {
  const dsl::Type type = values_[static_cast<std::size_t>(then)].type;
  return elementwise(dsl::Op::kSelect, dsl::Function::kMin, type, type, {condition, then, otherwise}, "where");
}

int MathBuilder::masked(int value, const dsl::Expr* mask_mod) {
  if (mask_mod == nullptr) return value;
  const int mask = lower(*mask_mod, false).root;
  return select(mask, value, literal(-kInfinity));
}

int MathBuilder::materialize(int value) {
  const Value v = values_[static_cast<std::size_t>(value)];
  if (v.dims == kAllDims && !v.constant) return value;
  const int out = add_value({.type = v.type, .dims = kAllDims});
  add_step(
      {.kind = MathProgram::Kind::kElementwise, .elementwise = program_.options.passes->copy(v.type), .text = "expand"},
      out, {value});
  return out;
}

int MathBuilder::sum(int value, unsigned to) {
  for (unsigned dim : {kDimKv, kDimQ, kDimH, kDimB}) {
    if ((dims(value) & dim) != 0 && (to & dim) == 0) {
      value = produce(MathProgram::Kind::kSum, dims(value) & ~dim, {value}, "sum");
    }
  }
  return value;
}

int MathBuilder::produce(MathProgram::Kind kind, unsigned dims, const std::vector<int>& in, const std::string& name) {
  const int out = add_value({.type = dsl::Type::kFloat, .dims = dims});
  add_step({.kind = kind, .text = name}, out, in);
  return out;
}

void MathBuilder::consume(MathProgram::Step step, const std::vector<int>& in) { add_step(std::move(step), -1, in); }

// One tensor of positions per index, however often it is named.
int MathBuilder::index(unsigned dim) {
  int& value = index_[std::countr_zero(dim)];
  if (value < 0) {
    value = add_value({.type = dsl::Type::kInt, .dims = dim});
    add_step({.kind = MathProgram::Kind::kIota, .text = "arange"}, value, {});
  }
  return value;
}

unsigned MathBuilder::position_of(int value) const {
  const int* const found = std::find(index_, index_ + 4, value);
  return found < index_ + 4 ? 1u << (found - index_) : 0u;
}

int MathBuilder::score() {
  if (score_ < 0) score_ = produce(MathProgram::Kind::kScores, kAllDims, {}, "q k^T");
  return score_;
}

int MathBuilder::lower_node(const dsl::Expr& expr, const dsl::Node& node, const std::vector<int>& value) {
  if (node.op == dsl::Op::kCall && node.function == dsl::Function::kToFloat) {
    const dsl::Node& operand = expr[node.args[0]];
    if (operand.op == dsl::Op::kInt) return literal(static_cast<float>(operand.int_value));
  }
  std::vector<int> in;
  in.reserve(node.args.size());
  for (dsl::NodeId argument : node.args) in.push_back(value[static_cast<std::size_t>(argument)]);
  switch (node.op) {
    case dsl::Op::kScore:
      return score();
    case dsl::Op::kIndexB:
      return index(kDimB);
    case dsl::Op::kIndexH:
      return index(kDimH);
    case dsl::Op::kIndexQ:
      return index(kDimQ);
    case dsl::Op::kIndexKv:
      return index(kDimKv);
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

int MathBuilder::lower_read(const dsl::Node& node, const std::vector<int>& in) {
  unsigned all = 0;
  for (int v : in) all |= dims(v);
  const int out = add_value({.type = node.type, .dims = all});
  add_step({.kind = MathProgram::Kind::kRead, .capture = node.capture, .text = "index"}, out, in);
  return out;
}

// The value that says which elements the root keeps; kTrue where the root already is -inf at all the others. Without
// emit_keep_ it adds no steps and only the answer kTrue counts.
int MathBuilder::lower_keep(const dsl::Expr& expr, LoweredExpr* lowered) {
  const std::size_t n = expr.nodes.size();
  std::vector<int> keep(n, LoweredExpr::kTrue);
  // The value is -inf wherever the element is dropped, so that nothing is left to do there.
  std::vector<bool> exact(n, true);
  for (std::size_t i = 0; i < n; ++i) {
    if (!lowered->decides[i]) continue;
    const dsl::Node& node = expr.nodes[i];
    if (is_negative_infinity(expr, node)) {
      keep[i] = LoweredExpr::kFalse;
      lowered->drops[i] = true;
      continue;
    }
    const std::span<const std::size_t> arguments = keep_arguments(expr, node);
    const auto argument = [&](std::size_t a) { return static_cast<std::size_t>(node.args[arguments[a]]); };
    if (arguments.size() == 1) {
      keep[i] = keep[argument(0)];
    } else if (arguments.size() == 2 && node.op == dsl::Op::kSelect) {
      keep[i] =
          keep_select(lowered->value[static_cast<std::size_t>(node.args[0])], keep[argument(0)], keep[argument(1)]);
    } else if (arguments.size() == 2) {
      keep[i] = keep_and(keep[argument(0)], keep[argument(1)]);
    }
    lowered->drops[i] = keep[i] == LoweredExpr::kFalse;
    if (keep[i] == LoweredExpr::kTrue) continue;
    for (std::size_t a = 0; a < arguments.size(); ++a) exact[i] = exact[i] && exact[argument(a)];
    if (node.op != dsl::Op::kSelect && node.op != dsl::Op::kMul) {
      // -inf plus NaN or infinity is not -inf: one side drops, the other has to be finite.
      int finite = 0;
      for (dsl::NodeId id : node.args) finite += is_surely_finite(expr, expr[id]);
      exact[i] = exact[i] && finite > 0;
    }
  }
  const auto root = static_cast<std::size_t>(expr.root);
  if (exact[root]) return LoweredExpr::kTrue;
  return keep[root] == LoweredExpr::kFalse ? constant(dsl::Type::kBool, 0) : keep[root];
}

int MathBuilder::keep_and(int a, int b) {
  if (a == LoweredExpr::kFalse || b == LoweredExpr::kFalse) return LoweredExpr::kFalse;
  if (a == LoweredExpr::kTrue) return b;
  if (b == LoweredExpr::kTrue) return a;
  if (!emit_keep_) return 0;
  return elementwise(dsl::Op::kAnd, dsl::Function::kMin, dsl::Type::kBool, dsl::Type::kBool, {a, b}, "keep: and");
}

int MathBuilder::keep_select(int condition, int then, int otherwise) {
  if (then == otherwise) return then;
  if (then == LoweredExpr::kTrue && otherwise == LoweredExpr::kFalse) return condition;
  if (!emit_keep_) return 0;
  if (then == LoweredExpr::kFalse && otherwise == LoweredExpr::kTrue) {
    return elementwise(dsl::Op::kNot, dsl::Function::kMin, dsl::Type::kBool, dsl::Type::kBool, {condition},
                       "keep: not");
  }
  const auto as_value = [&](int keep) {
    return keep >= 0 ? keep : constant(dsl::Type::kBool, keep == LoweredExpr::kTrue ? 1 : 0);
  };
  return select(condition, as_value(then), as_value(otherwise));
}

// ---- Places

std::size_t MathBuilder::bytes(const Value& value) const {
  std::size_t size = element_size(value.type);
  for (int d = 0; d < 4; ++d) {
    if (value.dims & (1u << d)) size = multiply_bytes(size, static_cast<std::size_t>(extent_[d]));
  }
  return size;
}

void MathBuilder::strides(unsigned dims, std::int64_t (&stride)[4]) const {
  std::int64_t next = 1;
  for (int d = 3; d >= 0; --d) {
    stride[d] = dims & (1u << d) ? next : 0;
    if (dims & (1u << d)) next *= extent_[d];
  }
}

MathProgram::Place MathBuilder::place(int value) const {
  const Value& v = values_[static_cast<std::size_t>(value)];
  return {.constant = v.constant, .offset = v.offset};
}

void MathBuilder::finish(const std::vector<int>& live) {
  const auto last = static_cast<int>(steps_.size());
  for (int s = 0; s < last; ++s) {
    for (int in : steps_[static_cast<std::size_t>(s)].in) values_[static_cast<std::size_t>(in)].last_use = s;
  }
  for (int value : live) values_[static_cast<std::size_t>(value)].last_use = last;
  for (int s = 0; s < last; ++s) place_step(s);
  program_.workspace_size = arena_.end();
}

void MathBuilder::place_step(int s) {
  Pending& pending = steps_[static_cast<std::size_t>(s)];
  const auto dies = [&](const Value& value) { return value.owns_place && !value.constant && value.last_use == s; };

  if (pending.out >= 0) {
    Value& out = values_[static_cast<std::size_t>(pending.out)];
    // An operand of the same shape that is read for the last time gives its place: each element is read before it is
    // written.
    bool in_place = false;
    if (pending.step.kind == MathProgram::Kind::kElementwise) {
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
  }
  finish_step(pending);

  for (std::size_t i = 0; i < pending.in.size(); ++i) {
    Value& operand = values_[static_cast<std::size_t>(pending.in[i])];
    if (!dies(operand)) continue;
    arena_.give_back(operand.offset, bytes(operand));
    operand.owns_place = false;  // given back once, however often it is an operand
  }
  program_.steps.push_back(std::move(pending.step));
}

void MathBuilder::finish_step(Pending& pending) {
  MathProgram::Step& step = pending.step;
  step.num_in = static_cast<int>(pending.in.size());
  for (int i = 0; i < step.num_in; ++i) {
    const Value& operand = values_[static_cast<std::size_t>(pending.in[static_cast<std::size_t>(i)])];
    step.in[i] = place(pending.in[static_cast<std::size_t>(i)]);
    step.in_size[i] = element_size(operand.type);
  }
  if (pending.out < 0) {
    merge_dimensions(pending, dims(pending.in[0]));
    return;
  }
  const Value& out = values_[static_cast<std::size_t>(pending.out)];
  step.out = place(pending.out);
  step.out_size = element_size(out.type);
  if (step.kind == MathProgram::Kind::kSum) {
    arrange_sum(pending);
  } else {
    merge_dimensions(pending, out.dims);
  }
  step.text += ": " + std::string(dsl::type_name(out.type)) + " (";
  for (int d = 0, first = 1; d < 4; ++d) {
    if (!(out.dims & (1u << d))) continue;
    step.text += (first ? "" : ", ") + std::to_string(extent_[d]);
    first = 0;
  }
  step.text += ")";
}

void MathBuilder::arrange_sum(Pending& pending) {
  const unsigned all = dims(pending.in[0]), kept = dims(pending.out);
  MathProgram::Step& step = pending.step;
  step.rank = 3;
  int part = 0;  // in front of the dimension that is summed over, or behind
  for (int d = 0; d < 4; ++d) {
    if ((all & (1u << d)) == 0) continue;
    if ((kept & (1u << d)) == 0) {
      step.extent[1] = extent_[d];
      part = 2;
    } else {
      step.extent[part] *= extent_[d];
    }
  }
  step.elements = step.extent[0] * step.extent[2];
}

void MathBuilder::merge_dimensions(Pending& pending, unsigned dims) {
  MathProgram::Step& step = pending.step;
  std::int64_t stride[MathProgram::kMaxOperands][4];
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

// ---- Passes

void* MathProgram::at(const Place& place, void* workspace) const {
  if (place.constant) return const_cast<char*>(reinterpret_cast<const char*>(constants.data()) + place.offset);
  return static_cast<char*>(workspace) + place.offset;
}

// Calls visit(position, count, operand, advance) for the stretches of [begin, end) along which every operand is a
// pointer that advances by 0 or 1.
template <typename Visit>
void MathProgram::walk(const Step& step, void* workspace, std::int64_t begin, std::int64_t end, Visit&& visit) const {
  const char* in[kMaxOperands];
  for (int i = 0; i < step.num_in; ++i) in[i] = static_cast<const char*>(at(step.in[i], workspace));
  const std::int64_t inner = step.extent[step.rank - 1];
  for (std::int64_t position = begin; position < end;) {
    const std::int64_t first = position % inner;
    const std::int64_t count = std::min(inner - first, end - position);
    std::int64_t offset[kMaxOperands];
    for (int i = 0; i < step.num_in; ++i) offset[i] = first * step.in_stride[i][step.rank - 1];
    for (std::int64_t d = step.rank - 2, rest = position / inner; d >= 0; --d) {
      for (int i = 0; i < step.num_in; ++i) offset[i] += rest % step.extent[d] * step.in_stride[i][d];
      rest /= step.extent[d];
    }
    const auto operand = [&](int i) { return in[i] + offset[i] * static_cast<std::int64_t>(step.in_size[i]); };
    const auto advance = [&](int i) { return static_cast<int>(step.in_stride[i][step.rank - 1]); };
    visit(position, count, operand, advance);
    position += count;
  }
}

void MathProgram::run_pass(const Step& step, const ForwardCall& call, void* workspace, ThreadPool& pool) const {
  if (step.kind == Kind::kSum) return run_sum(step, workspace, pool);
  if (step.kind == Kind::kScatter) return run_scatter(step, call, workspace, pool);
  char* out = static_cast<char*>(at(step.out, workspace));
  if (step.kind == Kind::kIota) {
    options.passes->iota(reinterpret_cast<std::int64_t*>(out), 0, step.elements);
    return;
  }
  GatherFn gather = nullptr;
  if (step.kind == Kind::kRead) gather = options.passes->gather(call.captures[step.capture].dtype);

  const std::int64_t tasks = (step.elements + kElementsPerTask - 1) / kElementsPerTask;
  pool.parallel_for(tasks, [&](std::int64_t task, int) {
    const std::int64_t begin = task * kElementsPerTask;
    const std::int64_t end = std::min(step.elements, begin + kElementsPerTask);
    walk(step, workspace, begin, end, [&](std::int64_t position, std::int64_t count, auto operand, auto advance) {
      void* result = out + static_cast<std::size_t>(position) * step.out_size;
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
    });
  });
}

void MathProgram::run_sum(const Step& step, void* workspace, ThreadPool& pool) const {
  const auto* in = static_cast<const float*>(at(step.in[0], workspace));
  auto* out = static_cast<float*>(at(step.out, workspace));
  const std::int64_t outer = step.extent[0], terms = step.extent[1], inner = step.extent[2];
  if (inner == 1) {
    const std::int64_t rows = std::max<std::int64_t>(1, kElementsPerTask / terms);
    pool.parallel_for((outer + rows - 1) / rows, [&](std::int64_t task, int) {
      for (std::int64_t row = task * rows; row < std::min(outer, (task + 1) * rows); ++row) {
        out[row] = options.passes->sum_row(in + row * terms, terms);
      }
    });
    return;
  }
  const std::int64_t parts = (inner + kColumnsPerTask - 1) / kColumnsPerTask;
  pool.parallel_for(outer * parts, [&](std::int64_t task, int) {
    const std::int64_t o = task / parts, begin = task % parts * kColumnsPerTask;
    options.passes->sum_rows(in + o * terms * inner + begin, inner, terms, std::min(inner - begin, kColumnsPerTask),
                             out + o * inner + begin);
  });
}

// Each part goes through its share of the elements in order, whatever the threads.
void MathProgram::run_scatter(const Step& step, const ForwardCall& call, void* workspace, ThreadPool& pool) const {
  const dsl::CaptureView& capture = call.captures[step.capture];
  std::int64_t stride[dsl::kMaxRank], size = 1;
  for (int d = capture.rank - 1; d >= 0; --d) {
    stride[d] = size;
    size *= capture.extent[d];
  }
  auto* sums = static_cast<double*>(at(step.out, workspace));
  const std::int64_t share = (step.elements + step.parts - 1) / step.parts;
  pool.parallel_for(step.parts, [&](std::int64_t part, int) {
    double* own = sums + (step.apart ? part * size : 0);
    const std::int64_t begin = std::min(step.elements, part * share), end = std::min(step.elements, begin + share);
    walk(step, workspace, begin, end, [&](std::int64_t, std::int64_t count, auto operand, auto advance) {
      const auto* values = reinterpret_cast<const float*>(operand(0));
      const std::int64_t* index[dsl::kMaxRank];
      for (int d = 0; d < capture.rank; ++d) index[d] = reinterpret_cast<const std::int64_t*>(operand(d + 1));
      for (std::int64_t i = 0; i < count; ++i) {
        std::int64_t place = 0;
        for (int d = 0; d < capture.rank; ++d) {
          place += std::clamp<std::int64_t>(index[d][i * advance(d + 1)], 0, capture.extent[d] - 1) * stride[d];
        }
        own[place] += static_cast<double>(values[i * advance(0)]);
      }
    });
  });
}

// ---- Products

void MathProgram::gemm(const GemmArgs& args) const {
  constexpr std::int64_t kMaxInt = std::numeric_limits<int>::max();
  if (options.blas != nullptr && std::max({args.m, args.n, args.k, args.lda, args.ldb, args.ldc}) <= kMaxInt) {
    options.blas->gemm(args);
  } else {
    options.passes->gemm(args);
  }
}

// Rows of one of `products`: all of them where there are products enough to keep the threads busy.
std::int64_t MathProgram::rows_per_product(std::int64_t products, std::int64_t rows, int threads) const {
  const std::int64_t parts = products >= 4 * threads || threads == 1 ? 1 : (4 * threads + products - 1) / products;
  return std::max<std::int64_t>((rows + parts - 1) / parts, std::min<std::int64_t>(rows, 64));
}

namespace {

bool blas_takes(const TensorView& tensor) {
  const bool rows_apart = tensor.shape[2] <= 1 || (tensor.stride[2] >= std::max<std::int64_t>(tensor.shape[3], 1) &&
                                                   tensor.stride[2] <= std::numeric_limits<int>::max());
  return tensor.dtype == dsl::DType::kF32 && rows_apart;
}

// A factor of 0 would let BLAS pass over NaN and infinity in its operands.
bool blas_takes(float alpha) { return alpha != 0.0f && std::isfinite(alpha); }

}  // namespace

Matrices MathProgram::as_f32(const TensorView& tensor, std::size_t packed, void* workspace, ThreadPool& pool) const {
  const std::int64_t all_heads = tensor.shape[1], rows = tensor.shape[2], columns = tensor.shape[3];
  if (blas_takes(tensor)) {
    return {static_cast<const float*>(tensor.data),
            {tensor.stride[0], tensor.stride[1], rows <= 1 ? columns : tensor.stride[2]}};
  }
  auto* copy = reinterpret_cast<float*>(static_cast<char*>(workspace) + packed);
  constexpr std::int64_t kRowsPerTask = 256;
  const std::int64_t parts = (rows + kRowsPerTask - 1) / kRowsPerTask;
  const auto size = dsl::dtype_size(tensor.dtype);
  pool.parallel_for(tensor.shape[0] * all_heads * parts, [&](std::int64_t task, int) {
    const std::int64_t b = task / parts / all_heads, h = task / parts % all_heads;
    const std::int64_t begin = task % parts * kRowsPerTask, end = std::min(rows, begin + kRowsPerTask);
    for (std::int64_t row = begin; row < end; ++row) {
      const std::int64_t offset = b * tensor.stride[0] + h * tensor.stride[1] + row * tensor.stride[2];
      options.passes->widen(tensor.dtype, static_cast<const char*>(tensor.data) + offset * size,
                            copy + ((b * all_heads + h) * rows + row) * columns, columns);
    }
  });
  return {copy, {all_heads * rows * columns, rows * columns, columns}};
}

void MathProgram::run_scores(const Step& step, const ForwardCall& call, std::size_t q, std::size_t k, void* workspace,
                             ThreadPool& pool) const {
  multiply_features(call.scale, as_f32(call.q, q, workspace, pool), as_f32(call.k, k, workspace, pool), head_dim,
                    static_cast<float*>(at(step.out, workspace)), pool);
}

void MathProgram::multiply_features(float alpha, const Matrices& x, const Matrices& y, std::int64_t depth,
                                    float* scores, ThreadPool& pool) const {
  const std::int64_t rows = rows_per_product(batch * heads, seqlen_q, pool.size());
  const std::int64_t parts = (seqlen_q + rows - 1) / rows;
  pool.parallel_for(batch * heads * parts, [&](std::int64_t task, int) {
    const std::int64_t b = task / parts / heads, h = task / parts % heads;
    const std::int64_t begin = task % parts * rows, count = std::min(rows, seqlen_q - begin);
    float* c = scores + ((b * heads + h) * seqlen_q + begin) * seqlen_kv;
    gemm({.transpose_b = true,
          .m = count,
          .n = seqlen_kv,
          .k = depth,
          .alpha = blas_takes(alpha) ? alpha : 1.0f,
          .a = x.of(b, h) + begin * x.stride[2],
          .lda = x.stride[2],
          .b = y.of(b, h / (heads / heads_kv)),
          .ldb = y.stride[2],
          .c = c,
          .ldc = seqlen_kv});
    if (!blas_takes(alpha)) {
      for (std::int64_t i = 0; i < count * seqlen_kv; ++i) c[i] *= alpha;
    }
  });
}

// Where f32 rows from `begin` of a head of `out` are computed: in place where that is possible.
float* MathProgram::rows_of(const TensorView& out, std::size_t packed, void* workspace, std::int64_t b, std::int64_t h,
                            std::int64_t begin, std::int64_t* stride) const {
  const std::int64_t columns = out.shape[3];
  *stride = columns;
  if (!blas_takes(out)) {
    auto* rows = reinterpret_cast<float*>(static_cast<char*>(workspace) + packed);
    return rows + ((b * out.shape[1] + h) * out.shape[2] + begin) * columns;
  }
  if (out.shape[2] > 1) *stride = out.stride[2];
  return static_cast<float*>(out.data) + b * out.stride[0] + h * out.stride[1] + begin * out.stride[2];
}

// What a product's factor leaves to do, and the conversion to the tensor's type.
void MathProgram::finish_rows(float alpha, const TensorView& out, std::int64_t b, std::int64_t h, std::int64_t begin,
                              std::int64_t count, float* rows, std::int64_t stride) const {
  const std::int64_t columns = out.shape[3];
  const auto size = dsl::dtype_size(out.dtype);
  for (std::int64_t i = 0; i < count; ++i) {
    float* row = rows + i * stride;
    for (std::int64_t d = 0; d < columns && !blas_takes(alpha); ++d) row[d] *= alpha;
    if (blas_takes(out)) continue;
    const std::int64_t offset = b * out.stride[0] + h * out.stride[1] + (begin + i) * out.stride[2];
    options.passes->narrow(out.dtype, row, static_cast<char*>(out.data) + offset * size, columns);
  }
}

void MathProgram::multiply_keys(float alpha, const float* scores, const Matrices& y, const TensorView& out,
                                std::size_t packed, void* workspace, ThreadPool& pool) const {
  const std::int64_t rows = rows_per_product(batch * heads, seqlen_q, pool.size());
  const std::int64_t parts = (seqlen_q + rows - 1) / rows;
  pool.parallel_for(batch * heads * parts, [&](std::int64_t task, int) {
    const std::int64_t b = task / parts / heads, h = task / parts % heads;
    const std::int64_t begin = task % parts * rows, count = std::min(rows, seqlen_q - begin);
    std::int64_t stride = 0;
    float* c = rows_of(out, packed, workspace, b, h, begin, &stride);
    gemm({.m = count,
          .n = out.shape[3],
          .k = seqlen_kv,
          .alpha = blas_takes(alpha) ? alpha : 1.0f,
          .a = scores + ((b * heads + h) * seqlen_q + begin) * seqlen_kv,
          .lda = seqlen_kv,
          .b = y.of(b, h / (heads / heads_kv)),
          .ldb = y.stride[2],
          .c = c,
          .ldc = stride});
    finish_rows(alpha, out, b, h, begin, count, c, stride);
  });
}

void MathProgram::multiply_queries(float alpha, const float* scores, const Matrices& x, const TensorView& out,
                                   std::size_t packed, void* workspace, ThreadPool& pool) const {
  const std::int64_t group = heads / heads_kv;
  const std::int64_t rows = rows_per_product(batch * heads_kv, seqlen_kv, pool.size());
  const std::int64_t parts = (seqlen_kv + rows - 1) / rows;
  pool.parallel_for(batch * heads_kv * parts, [&](std::int64_t task, int) {
    const std::int64_t b = task / parts / heads_kv, h_kv = task / parts % heads_kv;
    const std::int64_t begin = task % parts * rows, count = std::min(rows, seqlen_kv - begin);
    std::int64_t stride = 0;
    float* c = rows_of(out, packed, workspace, b, h_kv, begin, &stride);
    for (std::int64_t h = h_kv * group; h < (h_kv + 1) * group; ++h) {
      gemm({.transpose_a = true,
            .accumulate = h > h_kv * group,
            .m = count,
            .n = out.shape[3],
            .k = seqlen_q,
            .alpha = blas_takes(alpha) ? alpha : 1.0f,
            .a = scores + (b * heads + h) * seqlen_q * seqlen_kv + begin,
            .lda = seqlen_kv,
            .b = x.of(b, h),
            .ldb = x.stride[2],
            .c = c,
            .ldc = stride});
    }
    finish_rows(alpha, out, b, h_kv, begin, count, c, stride);
  });
}

}  // namespace attnjit::runtime
