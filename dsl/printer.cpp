// Prints a tree through the writer of the C++ front end: one place decides on parentheses, lets and literals.
#include "dsl/printer.h"

#include "attnjit/expr.hpp"
#include "dsl/functions.h"

namespace attnjit::dsl {
namespace {

using expression::NodePtr;
using expression::Precedence;

Precedence precedence(Op op) {
  switch (op) {
    case Op::kOr:
      return Precedence::kOr;
    case Op::kAnd:
      return Precedence::kAnd;
    case Op::kBitOr:
      return Precedence::kBitOr;
    case Op::kBitAnd:
      return Precedence::kBitAnd;
    case Op::kAdd:
    case Op::kSub:
      return Precedence::kSum;
    case Op::kMul:
    case Op::kDiv:
    case Op::kFloorDiv:
    case Op::kMod:
      return Precedence::kProduct;
    case Op::kPow:
      return Precedence::kPower;
    default:
      return Precedence::kComparison;
  }
}

}  // namespace

std::string print(const Expr& expr) {
  std::vector<NodePtr> written;
  written.reserve(expr.nodes.size());
  for (const Node& node : expr.nodes) {
    std::vector<NodePtr> args;
    args.reserve(node.args.size());
    for (const NodeId arg : node.args) args.push_back(written[static_cast<std::size_t>(arg)]);
    const std::string name(op_name(node.op));
    NodePtr result;
    switch (node.op) {
      case Op::kScore:
      case Op::kIndexB:
      case Op::kIndexH:
      case Op::kIndexQ:
      case Op::kIndexKv:
        result = expression::atom(name);
        break;
      case Op::kInt:
        result = expression::int_literal(node.int_value);
        break;
      case Op::kFloat:
        result = expression::float_literal(node.float_value);
        break;
      case Op::kBool:
        result = expression::atom(node.int_value ? "true" : "false");
        break;
      case Op::kRead: {
        const std::string& captured = expr.captures[static_cast<std::size_t>(node.capture)].name;
        result = args.empty() ? expression::captured_scalar(captured) : expression::read(captured, std::move(args));
        break;
      }
      case Op::kNeg: {
        // The smallest int is a literal behind a minus only, where negating it gives itself.
        constexpr std::int64_t kSmallest = std::numeric_limits<std::int64_t>::min();
        const Node& operand = expr[node.args[0]];
        const bool is_smallest = operand.op == Op::kInt && operand.int_value == kSmallest;
        result = is_smallest ? expression::int_literal(kSmallest) : expression::prefix("-", args[0]);
        break;
      }
      case Op::kNot:
      case Op::kBitNot:
        result = expression::prefix(name, args[0]);
        break;
      case Op::kSelect:
        result = expression::call("where", std::move(args));
        break;
      case Op::kCall:
        result = expression::call(std::string(function_info(node.function).name), std::move(args));
        break;
      default:
        result = expression::infix(name, precedence(node.op), args[0], args[1]);
        break;
    }
    written.push_back(std::move(result));
  }
  return expression::Writer::write(written[static_cast<std::size_t>(expr.root)]);
}

}  // namespace attnjit::dsl
