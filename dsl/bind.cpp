// Types an expression node by node, in arena order, and writes every conversion out.
#include "dsl/bind.h"

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <utility>

#include "dsl/functions.h"

namespace attnjit::dsl {
namespace {

std::string with_article(Type type) {
  return std::string(type == Type::kInt ? "an " : "a ") + std::string(type_name(type));
}

std::string counted(int count, std::string_view one, std::string_view many) {
  return std::to_string(count) + " " + std::string(count == 1 ? one : many);
}

class Binder {
 public:
  Binder(const Expr& expr, std::span<const CaptureBinding> bindings) : in_(expr), bindings_(bindings) {}

  Expected<Expr> run(ModKind kind) {
    if (!check_captures()) return error();
    out_.captures = in_.captures;
    out_.nodes.reserve(in_.nodes.size() + in_.nodes.size() / 2);
    moved_.reserve(in_.nodes.size());
    for (const Node& node : in_.nodes) {
      at_ = node.location;
      const NodeId id = type(node);
      if (error_) return error();
      moved_.push_back(id);
    }
    out_.root = moved_[static_cast<std::size_t>(in_.root)];
    at_ = in_[in_.root].location;
    if (!check_root(kind)) return error();
    return std::move(out_);
  }

 private:
  Error error() const { return error_.value_or(Error{}); }

  bool fail(std::string message) {
    if (!error_) error_ = Error{std::move(message), at_};
    return false;
  }

  bool check_captures() {
    if (bindings_.size() != in_.captures.size()) {
      return fail("the expression captures " + counted(static_cast<int>(in_.captures.size()), "value", "values") +
                  ", but " + std::to_string(bindings_.size()) + " are bound");
    }
    for (std::size_t i = 0; i < bindings_.size(); ++i) {
      const Capture& capture = in_.captures[i];
      if (bindings_[i].rank == capture.rank) continue;
      at_ = capture.location;
      const std::string use =
          capture.rank == 0 ? "used as a scalar" : "read with " + counted(capture.rank, "index", "indices");
      return fail("'" + shortened(capture.name) + "' is " + use + ", but what is bound to it has " +
                  counted(bindings_[i].rank, "dimension", "dimensions"));
    }
    return true;
  }

  bool check_root(ModKind kind) {
    const Type type = type_of(out_.root);
    if (kind == ModKind::kScoreMod) {
      if (type == Type::kBool) {
        return fail(
            "a score_mod's value must be a number, this one is a condition; give it as a mask_mod, or write "
            "where(condition, score, -inf)");
      }
      out_.root = convert(out_.root, Type::kFloat);
    } else if (type != Type::kBool) {
      return fail("a mask_mod's value must be a bool (true keeps the element), this one is " + with_article(type) +
                  "; compare it with something");
    }
    return true;
  }

  Type type_of(NodeId id) const { return out_[id].type; }

  NodeId add(Node node, Type type) {
    node.type = type;
    out_.nodes.push_back(std::move(node));
    converted_.push_back({-1, -1, -1});
    return static_cast<NodeId>(out_.nodes.size()) - 1;
  }

  // `id` as a `type`; one conversion however many users ask.
  NodeId convert(NodeId id, Type type) {
    if (type_of(id) == type) return id;
    NodeId known = converted_[static_cast<std::size_t>(id)][static_cast<std::size_t>(type)];
    if (known >= 0) return known;
    const Function function = type == Type::kFloat ? Function::kToFloat
                              : type == Type::kInt ? Function::kToInt
                                                   : Function::kToBool;
    known = add({.op = Op::kCall, .function = function, .args = {id}, .location = out_[id].location}, type);
    converted_[static_cast<std::size_t>(id)][static_cast<std::size_t>(type)] = known;
    return known;
  }

  NodeId add_converted(const Node& node, std::vector<NodeId> args, Type operand, Type result) {
    for (NodeId& arg : args) arg = convert(arg, operand);
    Node copy = node;
    copy.args = std::move(args);
    return add(std::move(copy), result);
  }

  // The number type in which values meet: float if one is a float, int otherwise.
  Type common_number(const std::vector<NodeId>& args) const {
    const bool any = std::any_of(args.begin(), args.end(), [&](NodeId arg) { return type_of(arg) == Type::kFloat; });
    return any ? Type::kFloat : Type::kInt;
  }

  // Where a bool is needed, nothing else will do: a number in its place is likelier a mistake than a wish.
  bool require_bool(NodeId id, const std::string& what) {
    if (type_of(id) == Type::kBool) return true;
    return fail(what + " must be a bool, this one is " + with_article(type_of(id)) + "; write x != 0 or bool(x)");
  }

  NodeId type(const Node& node) {
    std::vector<NodeId> args;
    args.reserve(node.args.size());
    for (const NodeId arg : node.args) args.push_back(moved_[static_cast<std::size_t>(arg)]);
    switch (node.op) {
      case Op::kScore:
      case Op::kFloat:
        return add(node, Type::kFloat);
      case Op::kIndexB:
      case Op::kIndexH:
      case Op::kIndexQ:
      case Op::kIndexKv:
      case Op::kInt:
        return add(node, Type::kInt);
      case Op::kBool:
        return add(node, Type::kBool);
      case Op::kRead:
        return read(node, std::move(args));
      case Op::kNeg:
      case Op::kAdd:
      case Op::kSub:
      case Op::kMul:
      case Op::kFloorDiv:
      case Op::kMod: {
        const Type type = common_number(args);
        return add_converted(node, std::move(args), type, type);
      }
      case Op::kDiv:
        return add_converted(node, std::move(args), Type::kFloat, Type::kFloat);
      case Op::kPow: {
        const bool is_int =
            type_of(args[0]) != Type::kFloat && in_[node.args[1]].op == Op::kInt && in_[node.args[1]].int_value >= 0;
        const Type type = is_int ? Type::kInt : Type::kFloat;
        return add_converted(node, std::move(args), type, type);
      }
      case Op::kLt:
      case Op::kLe:
      case Op::kGt:
      case Op::kGe:
      case Op::kEq:
      case Op::kNe: {
        const Type type = common_number(args);
        return add_converted(node, std::move(args), type, Type::kBool);
      }
      case Op::kNot:
      case Op::kAnd:
      case Op::kOr:
        for (const NodeId arg : args) {
          if (!require_bool(arg, "an operand of '" + std::string(op_name(node.op)) + "'")) return -1;
        }
        return add_converted(node, std::move(args), Type::kBool, Type::kBool);
      case Op::kBitNot:
      case Op::kBitAnd:
      case Op::kBitOr:
        return bitwise(node, std::move(args));
      case Op::kSelect:
        return select(node, std::move(args));
      case Op::kCall:
        return call(node, std::move(args));
    }
    return -1;
  }

  NodeId read(const Node& node, std::vector<NodeId> args) {
    const auto capture = static_cast<std::size_t>(node.capture);
    for (const NodeId arg : args) {
      if (type_of(arg) != Type::kFloat) continue;
      fail("an index of '" + shortened(in_.captures[capture].name) +
           "' must be an int, this one is a float; write int(x)");
      return -1;
    }
    return add_converted(node, std::move(args), Type::kInt, value_type(bindings_[capture].dtype));
  }

  NodeId bitwise(const Node& node, std::vector<NodeId> args) {
    const Type first = type_of(args[0]);
    const bool same = std::all_of(args.begin(), args.end(), [&](NodeId arg) { return type_of(arg) == first; });
    if (same && first != Type::kFloat) return add_converted(node, std::move(args), first, first);
    const std::string op(op_name(node.op));
    if (node.op == Op::kBitNot) {
      fail("'~' takes a bool or an int, not a float");
    } else {
      fail("'" + op + "' takes two bools or two ints, not " + with_article(first) + " and " +
           with_article(type_of(args[1])) + "; it binds tighter than comparisons: write (a < b) " + op +
           " (c < d), or '" + (node.op == Op::kBitAnd ? "and" : "or") + "'");
    }
    return -1;
  }

  NodeId select(const Node& node, std::vector<NodeId> args) {
    if (!require_bool(args[0], "the condition of a choice")) return -1;
    const bool bools = type_of(args[1]) == Type::kBool && type_of(args[2]) == Type::kBool;
    const Type type = bools ? Type::kBool : common_number({args[1], args[2]});
    Node copy = node;
    copy.args = {args[0], convert(args[1], type), convert(args[2], type)};
    return add(std::move(copy), type);
  }

  NodeId call(const Node& node, std::vector<NodeId> args) {
    const FunctionInfo& function = function_info(node.function);
    const Type number = common_number(args);
    switch (function.signature) {
      case Signature::kFloat:
        return add_converted(node, std::move(args), Type::kFloat, Type::kFloat);
      case Signature::kTest:
        return add_converted(node, std::move(args), Type::kFloat, Type::kBool);
      case Signature::kConversion:
        return convert(args[0], function.result);
      case Signature::kRounding:
        if (number == Type::kInt) return convert(args[0], Type::kInt);
        return add_converted(node, std::move(args), Type::kFloat, Type::kFloat);
      case Signature::kNumeric:
        if (node.function == Function::kRelu && number == Type::kInt) {
          Node maximum = node;
          maximum.function = Function::kMax;
          args.push_back(add({.op = Op::kInt, .location = node.location}, Type::kInt));
          return add_converted(maximum, std::move(args), Type::kInt, Type::kInt);
        }
        return add_converted(node, std::move(args), number, number);
    }
    return -1;
  }

  const Expr& in_;
  std::span<const CaptureBinding> bindings_;
  Expr out_;
  std::vector<NodeId> moved_;                     // in_ node to out_ node
  std::vector<std::array<NodeId, 3>> converted_;  // out_ node and Type to its conversion
  SourceLocation at_;
  std::optional<Error> error_;
};

}  // namespace

Expected<Expr> bind(const Expr& expr, std::span<const CaptureBinding> bindings, ModKind kind) {
  return Binder(expr, bindings).run(kind);
}

}  // namespace attnjit::dsl
