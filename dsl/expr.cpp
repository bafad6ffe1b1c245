// Names of types and operators, equality of trees, and how an expression error is shown.
#include "dsl/expr.h"

#include <algorithm>
#include <bit>
#include <utility>

namespace attnjit::dsl {

std::string_view type_name(Type type) {
  switch (type) {
    case Type::kBool:
      return "bool";
    case Type::kInt:
      return "int";
    case Type::kFloat:
      return "float";
  }
  return "?";
}

std::string_view dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kBool:
      return "bool";
    case DType::kInt8:
      return "int8";
    case DType::kInt16:
      return "int16";
    case DType::kInt32:
      return "int32";
    case DType::kInt64:
      return "int64";
    case DType::kUInt8:
      return "uint8";
    case DType::kF16:
      return "float16";
    case DType::kBF16:
      return "bfloat16";
    case DType::kF32:
      return "float32";
  }
  return "?";
}

std::int64_t dtype_size(DType dtype) {
  switch (dtype) {
    case DType::kBool:
    case DType::kInt8:
    case DType::kUInt8:
      return 1;
    case DType::kInt16:
    case DType::kF16:
    case DType::kBF16:
      return 2;
    case DType::kInt32:
    case DType::kF32:
      return 4;
    case DType::kInt64:
      return 8;
  }
  return 0;
}

Type value_type(DType dtype) {
  switch (dtype) {
    case DType::kBool:
      return Type::kBool;
    case DType::kF16:
    case DType::kBF16:
    case DType::kF32:
      return Type::kFloat;
    default:
      return Type::kInt;
  }
}

std::string_view op_name(Op op) {
  switch (op) {
    case Op::kScore:
      return "score";
    case Op::kIndexB:
      return "b";
    case Op::kIndexH:
      return "h";
    case Op::kIndexQ:
      return "q_idx";
    case Op::kIndexKv:
      return "kv_idx";
    case Op::kInt:
      return "integer";
    case Op::kFloat:
      return "float";
    case Op::kBool:
      return "bool";
    case Op::kRead:
      return "captured value";
    case Op::kNeg:
      return "-";
    case Op::kNot:
      return "not";
    case Op::kBitNot:
      return "~";
    case Op::kAdd:
      return "+";
    case Op::kSub:
      return "-";
    case Op::kMul:
      return "*";
    case Op::kDiv:
      return "/";
    case Op::kFloorDiv:
      return "//";
    case Op::kMod:
      return "%";
    case Op::kPow:
      return "**";
    case Op::kLt:
      return "<";
    case Op::kLe:
      return "<=";
    case Op::kGt:
      return ">";
    case Op::kGe:
      return ">=";
    case Op::kEq:
      return "==";
    case Op::kNe:
      return "!=";
    case Op::kAnd:
      return "and";
    case Op::kOr:
      return "or";
    case Op::kBitAnd:
      return "&";
    case Op::kBitOr:
      return "|";
    case Op::kSelect:
      return "where";
    case Op::kCall:
      return "call";
  }
  return "?";
}

bool same_structure(const Expr& a, const Expr& b) {
  std::vector<NodeId> in_b(a.nodes.size(), -1);
  std::vector<NodeId> in_a(b.nodes.size(), -1);
  std::vector<std::pair<NodeId, NodeId>> open = {{a.root, b.root}};
  while (!open.empty()) {
    const auto [x, y] = open.back();
    open.pop_back();
    const Node& p = a[x];
    const Node& q = b[y];
    if (p.op != q.op || p.args.size() != q.args.size() || p.int_value != q.int_value ||
        std::bit_cast<std::uint64_t>(p.float_value) != std::bit_cast<std::uint64_t>(q.float_value) ||
        (p.op == Op::kCall && p.function != q.function) || (p.capture < 0) != (q.capture < 0)) {
      return false;
    }
    if (p.capture >= 0) {
      const Capture& s = a.captures[static_cast<std::size_t>(p.capture)];
      const Capture& t = b.captures[static_cast<std::size_t>(q.capture)];
      if (s.name != t.name || s.rank != t.rank) return false;
    }
    if (p.args.empty()) continue;
    // A shared value is shared on both sides.
    NodeId& there = in_b[static_cast<std::size_t>(x)];
    NodeId& back = in_a[static_cast<std::size_t>(y)];
    if (there != -1 || back != -1) {
      if (there != y || back != x) return false;
      continue;
    }
    there = y;
    back = x;
    for (std::size_t i = 0; i < p.args.size(); ++i) open.emplace_back(p.args[i], q.args[i]);
  }
  return true;
}

std::string shortened(std::string_view name) {
  constexpr std::size_t kLongest = 60;
  return name.size() <= kLongest ? std::string(name) : std::string(name.substr(0, kLongest - 3)) + "...";
}

std::string format_error(const Error& error, std::string_view text) {
  std::size_t begin = 0;
  for (int line = 1; line < error.location.line; ++line) {
    const std::size_t newline = text.find('\n', begin);
    if (newline == std::string_view::npos) break;
    begin = newline + 1;
  }
  const std::size_t end = std::min(text.find('\n', begin), text.size());
  std::string shown(text.substr(begin, end - begin));
  for (char& c : shown) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte == 0x7f) c = ' ';
    if (byte > 0x7f) c = '?';
  }
  std::size_t column = error.location.column > 0 ? static_cast<std::size_t>(error.location.column) - 1 : 0;
  column = std::min(column, shown.size());
  // Of a long line, what stands around the place.
  constexpr std::size_t kReach = 60;
  if (shown.size() > column + kReach + 3) shown = shown.substr(0, column + kReach) + "...";
  if (column > kReach + 3) {
    shown = "..." + shown.substr(column - kReach);
    column = kReach + 3;
  }
  return "line " + std::to_string(error.location.line) + ", column " + std::to_string(error.location.column) + ": " +
         error.message + "\n  " + shown + "\n  " + std::string(column, ' ') + "^";
}

}  // namespace attnjit::dsl
