// Evaluates a bound expression node by node, in arena order: no recursion, whatever the shape of the tree.
#include "dsl/interpreter.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

namespace attnjit::dsl {
namespace {

template <typename T>
T load(const void* data, std::int64_t offset) {
  T value;
  std::memcpy(&value, static_cast<const char*>(data) + offset * static_cast<std::int64_t>(sizeof(T)), sizeof(T));
  return value;
}

double widen_bf16(std::uint16_t bits) { return std::bit_cast<float>(std::uint32_t{bits} << 16); }

double widen_f16(std::uint16_t bits) {
  const int exponent = (bits >> 10) & 0x1f;
  const int mantissa = bits & 0x3ff;
  double magnitude;
  if (exponent == 0x1f) {
    magnitude = mantissa ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity();
  } else if (exponent == 0) {
    magnitude = std::ldexp(mantissa, -24);
  } else {
    magnitude = std::ldexp(mantissa + 1024, exponent - 25);
  }
  return bits & 0x8000 ? -magnitude : magnitude;
}

bool is_negative_infinity(const Expr& expr, const Node& node) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  if (node.op == Op::kFloat) return node.float_value == -kInf;
  return node.op == Op::kNeg && expr[node.args[0]].op == Op::kFloat && expr[node.args[0]].float_value == kInf;
}

// A literal greater than zero, where binding may have converted an int literal to a float.
bool is_positive_literal(const Expr& expr, NodeId id) {
  const Node* node = &expr[id];
  if (node->op == Op::kCall && node->function == Function::kToFloat) node = &expr[node->args[0]];
  return (node->op == Op::kInt && node->int_value > 0) || (node->op == Op::kFloat && node->float_value > 0);
}

bool compare(Op op, auto a, auto b) {
  switch (op) {
    case Op::kLt:
      return a < b;
    case Op::kLe:
      return a <= b;
    case Op::kGt:
      return a > b;
    case Op::kGe:
      return a >= b;
    case Op::kEq:
      return a == b;
    default:
      return a != b;
  }
}

std::int64_t int_arithmetic(Op op, std::int64_t a, std::int64_t b) {
  switch (op) {
    case Op::kAdd:
      return wrapping_add(a, b);
    case Op::kSub:
      return wrapping_sub(a, b);
    case Op::kMul:
      return wrapping_mul(a, b);
    case Op::kFloorDiv:
      return floor_div(a, b);
    case Op::kMod:
      return floor_mod(a, b);
    default:
      return wrapping_pow(a, b);
  }
}

double float_arithmetic(Op op, double a, double b) {
  switch (op) {
    case Op::kAdd:
      return a + b;
    case Op::kSub:
      return a - b;
    case Op::kMul:
      return a * b;
    case Op::kDiv:
      return a / b;
    case Op::kFloorDiv:
      return std::floor(a / b);
    case Op::kMod:
      return floor_mod(a, b);
    default:
      return std::pow(a, b);
  }
}

}  // namespace

double read_as_double(const void* data, DType dtype, std::int64_t offset) {
  switch (dtype) {
    case DType::kF16:
      return widen_f16(load<std::uint16_t>(data, offset));
    case DType::kBF16:
      return widen_bf16(load<std::uint16_t>(data, offset));
    case DType::kF32:
      return load<float>(data, offset);
    default:
      return static_cast<double>(read_as_int(data, dtype, offset));
  }
}

std::int64_t read_as_int(const void* data, DType dtype, std::int64_t offset) {
  switch (dtype) {
    case DType::kBool:
      return load<std::uint8_t>(data, offset) != 0;
    case DType::kInt8:
      return load<std::int8_t>(data, offset);
    case DType::kInt16:
      return load<std::int16_t>(data, offset);
    case DType::kInt32:
      return load<std::int32_t>(data, offset);
    case DType::kInt64:
      return load<std::int64_t>(data, offset);
    case DType::kUInt8:
      return load<std::uint8_t>(data, offset);
    default:
      return saturating_int(read_as_double(data, dtype, offset));
  }
}

Interpreter::Interpreter(const Expr& bound, std::span<const CaptureView> captures)
    : expr_(bound),
      captures_(captures.begin(), captures.end()),
      values_(bound.nodes.size()),
      keep_(bound.nodes.size()),
      used_(bound.nodes.size()) {}

Element Interpreter::score_mod(const Point& point) {
  evaluate(point);
  const auto root = static_cast<std::size_t>(expr_.root);
  if (!keep_[root]) return {.value = -std::numeric_limits<double>::infinity(), .keep = false};
  return {.value = values_[root].f, .keep = true};
}

bool Interpreter::mask_mod(const Point& point) {
  evaluate(point);
  return values_[static_cast<std::size_t>(expr_.root)].i != 0;
}

std::span<const ClampedIndex> Interpreter::clamped_indices() {
  clamped_.clear();
  std::fill(used_.begin(), used_.end(), false);
  used_[static_cast<std::size_t>(expr_.root)] = true;
  // Users before what they use.
  for (std::size_t n = expr_.nodes.size(); n-- > 0;) {
    if (!used_[n]) continue;
    const Node& node = expr_.nodes[n];
    for (std::size_t i = 0; i < node.args.size(); ++i) {
      const auto arg = static_cast<std::size_t>(node.args[i]);
      const bool decides = node.op != Op::kSelect ? keep_[n] || !keep_[arg]
                           : i == 0 ? true
                                    : (values_[static_cast<std::size_t>(node.args[0])].i != 0) == (i == 1);
      used_[arg] = used_[arg] || decides;
      if (node.op != Op::kRead) continue;
      const auto capture = static_cast<std::size_t>(node.capture);
      const std::int64_t index = values_[arg].i;
      if (index < 0 || index >= captures_[capture].extent[i])
        clamped_.push_back({.capture = node.capture, .dimension = static_cast<int>(i), .index = index});
    }
  }
  return clamped_;
}

void Interpreter::evaluate(const Point& point) {
  for (std::size_t n = 0; n < expr_.nodes.size(); ++n) {
    const Node& node = expr_.nodes[n];
    const auto arg = [&](std::size_t i) -> const Scalar& { return values_[static_cast<std::size_t>(node.args[i])]; };
    const Type operand = node.args.empty() ? Type::kInt : expr_[node.args[0]].type;
    Scalar& out = values_[n];
    switch (node.op) {
      case Op::kScore:
        out.f = point.score;
        break;
      case Op::kIndexB:
        out.i = point.b;
        break;
      case Op::kIndexH:
        out.i = point.h;
        break;
      case Op::kIndexQ:
        out.i = point.q_idx;
        break;
      case Op::kIndexKv:
        out.i = point.kv_idx;
        break;
      case Op::kInt:
      case Op::kBool:
        out.i = node.int_value;
        break;
      case Op::kFloat:
        out.f = node.float_value;
        break;
      case Op::kRead:
        out = read(node);
        break;
      case Op::kNeg:
        out = {.i = wrapping_sub(0, arg(0).i), .f = -arg(0).f};
        break;
      case Op::kNot:
        out.i = !arg(0).i;
        break;
      case Op::kBitNot:
        out.i = node.type == Type::kBool ? !arg(0).i : ~arg(0).i;
        break;
      case Op::kAdd:
      case Op::kSub:
      case Op::kMul:
      case Op::kDiv:
      case Op::kFloorDiv:
      case Op::kMod:
      case Op::kPow:
        if (node.type == Type::kInt) {
          out.i = int_arithmetic(node.op, arg(0).i, arg(1).i);
        } else {
          out.f = float_arithmetic(node.op, arg(0).f, arg(1).f);
        }
        break;
      case Op::kLt:
      case Op::kLe:
      case Op::kGt:
      case Op::kGe:
      case Op::kEq:
      case Op::kNe:
        out.i = operand == Type::kFloat ? compare(node.op, arg(0).f, arg(1).f) : compare(node.op, arg(0).i, arg(1).i);
        break;
      case Op::kAnd:
      case Op::kBitAnd:
        out.i = arg(0).i & arg(1).i;
        break;
      case Op::kOr:
      case Op::kBitOr:
        out.i = arg(0).i | arg(1).i;
        break;
      case Op::kSelect:
        out = arg(0).i ? arg(1) : arg(2);
        break;
      case Op::kCall: {
        Scalar args[3];
        for (std::size_t i = 0; i < node.args.size() && i < 3; ++i) args[i] = arg(i);
        out = function_info(node.function).evaluate(args, operand);
        break;
      }
    }
    keep_[n] = keep(node);
  }
}

// The rule of "Dropped elements", from the arguments' values and keeps.
bool Interpreter::keep(const Node& node) const {
  const auto kept = [&](std::size_t i) -> bool { return keep_[static_cast<std::size_t>(node.args[i])]; };
  switch (node.op) {
    case Op::kFloat:
    case Op::kNeg:
      return !is_negative_infinity(expr_, node);
    case Op::kSelect:
      return values_[static_cast<std::size_t>(node.args[0])].i ? kept(1) : kept(2);
    case Op::kAdd:
      return kept(0) && kept(1);
    case Op::kSub:
      return kept(0);
    case Op::kMul:
      if (is_positive_literal(expr_, node.args[0])) return kept(1);
      return is_positive_literal(expr_, node.args[1]) ? kept(0) : true;
    case Op::kCall:
      return node.function == Function::kMin ? kept(0) && kept(1) : true;
    default:
      return true;
  }
}

Scalar Interpreter::read(const Node& node) const {
  const CaptureView& view = captures_[static_cast<std::size_t>(node.capture)];
  std::int64_t offset = 0;
  for (std::size_t i = 0; i < node.args.size(); ++i) {
    const std::int64_t index = values_[static_cast<std::size_t>(node.args[i])].i;
    offset += std::clamp<std::int64_t>(index, 0, std::max<std::int64_t>(view.extent[i] - 1, 0)) * view.stride[i];
  }
  if (node.type == Type::kFloat) return {.f = read_as_double(view.data, view.dtype, offset)};
  return {.i = read_as_int(view.data, view.dtype, offset)};
}

}  // namespace attnjit::dsl
