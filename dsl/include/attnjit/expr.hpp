// Score and mask mods as C++ lambdas: operators on traced values write the expression that attnjit compiles.
//
//   auto bias = attnjit::captured("bias");
//   auto mod = attnjit::score_mod([&](auto score, auto b, auto h, auto q_idx, auto kv_idx) {
//     return attnjit::where(q_idx >= kv_idx, score + bias(h, q_idx), -attnjit::inf);
//   });
//   mod.text();  // "where(q_idx >= kv_idx, score + bias[h, q_idx], -inf)"
//
// The lambda runs once, when the mod is made. Its operators mean what they mean in the expression language
// (docs/language.md), not in C++: `/` always gives a float, `%` is the floor modulus, `&&` and `||` evaluate both
// sides, `^`, `<<`, `>>` do not exist. What C++ cannot spell is a function: floordiv, pow, where, to_float, to_int,
// to_bool.
// A condition on a traced value in `if` or `?:` does not compile: write where().
// A value used several times is computed once: it becomes a `let`.
//
// Needs the standard library only. Throws std::invalid_argument for a captured name that the language cannot read.
#pragma once

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

namespace attnjit {

inline constexpr double inf = std::numeric_limits<double>::infinity();   // NOLINT(readability-identifier-naming)
inline constexpr double nan = std::numeric_limits<double>::quiet_NaN();  // NOLINT(readability-identifier-naming)

namespace expression {

// How tightly an operator binds; higher is tighter.
enum class Precedence { kOr = 1, kAnd, kNot, kComparison, kBitOr, kBitAnd, kSum, kProduct, kUnary, kPower, kPrimary };

struct Node;
using NodePtr = std::shared_ptr<Node>;

// One step of a traced expression. Immutable once it has a user.
struct Node {
  enum class Kind { kAtom, kCaptured, kPrefix, kInfix, kCall, kRead };
  Kind kind = Kind::kAtom;
  std::string text;  // atoms: as written; operators: the symbol; calls and reads: the name
  Precedence precedence = Precedence::kPrimary;
  std::vector<NodePtr> args = {};

  Node(Kind kind, std::string text, Precedence precedence, std::vector<NodePtr> args)
      : kind(kind), text(std::move(text)), precedence(precedence), args(std::move(args)) {}
  Node(const Node&) = delete;
  // Frees a long chain without recursion.
  ~Node() {
    std::vector<NodePtr> pending = std::move(args);
    while (!pending.empty()) {
      const NodePtr node = std::move(pending.back());
      pending.pop_back();
      if (node.use_count() > 1) continue;
      for (NodePtr& arg : node->args) pending.push_back(std::move(arg));
      node->args.clear();
    }
  }
  bool is_leaf() const { return args.empty() && kind != Kind::kCall; }
};

inline NodePtr atom(std::string text) {
  return std::make_shared<Node>(Node::Kind::kAtom, std::move(text), Precedence::kPrimary, std::vector<NodePtr>{});
}
inline NodePtr captured_scalar(std::string name) {
  return std::make_shared<Node>(Node::Kind::kCaptured, std::move(name), Precedence::kPrimary, std::vector<NodePtr>{});
}
inline NodePtr prefix(std::string op, NodePtr x) {
  const Precedence precedence = op == "not" ? Precedence::kNot : Precedence::kUnary;
  return std::make_shared<Node>(Node::Kind::kPrefix, std::move(op), precedence, std::vector<NodePtr>{std::move(x)});
}
inline NodePtr infix(std::string op, Precedence precedence, NodePtr x, NodePtr y) {
  return std::make_shared<Node>(Node::Kind::kInfix, std::move(op), precedence,
                                std::vector<NodePtr>{std::move(x), std::move(y)});
}
inline NodePtr call(std::string name, std::vector<NodePtr> args) {
  return std::make_shared<Node>(Node::Kind::kCall, std::move(name), Precedence::kPrimary, std::move(args));
}
inline NodePtr read(std::string name, std::vector<NodePtr> indices) {
  return std::make_shared<Node>(Node::Kind::kRead, std::move(name), Precedence::kPrimary, std::move(indices));
}

// A float literal that reads back as the same value. T is float or double: 0.1f is written 0.1.
template <std::floating_point T>
NodePtr float_literal(T value) {
  if (std::isnan(value)) return atom("nan");
  if (std::signbit(value)) return prefix("-", float_literal(-value));
  if (std::isinf(value)) return atom("inf");
  std::array<char, 64> buffer;
  const auto end = std::to_chars(buffer.data(), buffer.data() + buffer.size(), value).ptr;
  std::string text(buffer.data(), end);
  if (text.find_first_of(".e") == std::string::npos) text += ".0";
  return atom(std::move(text));
}

inline NodePtr int_literal(std::int64_t value) {
  if (value >= 0) return atom(std::to_string(value));
  return prefix("-", atom(std::to_string(std::uint64_t{0} - static_cast<std::uint64_t>(value))));
}

// Writes an expression as text. Shared values become `let`, and so do values nested deeper than the parser follows.
class Writer {
 public:
  static std::string write(const NodePtr& root) {
    Writer writer;
    writer.order(*root);
    for (std::size_t i = 0; i < writer.steps_.size(); ++i) writer.write_step(i);
    return writer.lets_ + writer.steps_.back().text;
  }

 private:
  // Far below the language's limit, so that what stands around a value fits as well.
  static constexpr int kMaxHeight = 64;

  struct Step {
    const Node* node;
    int uses = 0;
    int height = 0;  // of nested constructs in text
    std::string text = {};
    Precedence precedence = Precedence::kPrimary;
  };

  // Steps in evaluation order, and how often each is used.
  void order(const Node& root) {
    std::vector<std::pair<const Node*, std::size_t>> open = {{&root, 0}};
    while (!open.empty()) {
      auto& [node, next] = open.back();
      if (next < node->args.size()) {
        const Node* arg = node->args[next++].get();
        if (!index_.contains(arg)) open.emplace_back(arg, 0);
        continue;
      }
      if (node->kind != Node::Kind::kAtom) taken_.insert(node->text);
      if (index_.emplace(node, steps_.size()).second) steps_.push_back({.node = node});
      open.pop_back();
    }
    for (const Step& step : steps_) {
      for (const NodePtr& arg : step.node->args) ++steps_[index_.at(arg.get())].uses;
    }
  }

  void write_step(std::size_t i) {
    Step& step = steps_[i];
    const Node& node = *step.node;
    step.precedence = node.precedence;
    switch (node.kind) {
      case Node::Kind::kAtom:
      case Node::Kind::kCaptured:
        step.text = node.text;
        return;
      case Node::Kind::kPrefix:
        step.text = node.text + (node.text == "not" ? " " : "") + operand(step, 0, node.precedence);
        ++step.height;
        break;
      case Node::Kind::kInfix:
        write_infix(step);
        break;
      case Node::Kind::kCall:
      case Node::Kind::kRead: {
        const bool is_call = node.kind == Node::Kind::kCall;
        std::string list;
        for (std::size_t arg = 0; arg < node.args.size(); ++arg) {
          if (arg > 0) list += ", ";
          list += operand(step, arg, Precedence::kOr);
        }
        step.text = node.text + (is_call ? "(" : "[") + list + (is_call ? ")" : "]");
        ++step.height;
        break;
      }
    }
    const bool is_root = i + 1 == steps_.size();
    if (is_root || node.is_leaf() || (step.uses <= 1 && step.height <= kMaxHeight)) return;
    std::string name = next_name();
    lets_ += "let " + name + " = " + step.text + "; ";
    step.text = std::move(name);
    step.precedence = Precedence::kPrimary;
    step.height = 0;
  }

  void write_infix(Step& step) {
    const Node& node = *step.node;
    const auto tighter = [](Precedence p) { return static_cast<Precedence>(static_cast<int>(p) + 1); };
    Precedence left = node.precedence;
    Precedence right = tighter(node.precedence);
    if (node.precedence == Precedence::kComparison) left = right;  // a < b < c is a chain
    if (node.precedence == Precedence::kPower) {
      left = Precedence::kPrimary;
      right = Precedence::kUnary;
    }
    step.text = operand(step, 0, left);
    step.text += " " + node.text + " ";
    step.text += operand(step, 1, right);
    if (node.precedence == Precedence::kPower) ++step.height;
  }

  // An argument's text, in parentheses if it binds looser than `least`.
  std::string operand(Step& user, std::size_t arg, Precedence least) {
    Step& step = steps_[index_.at(user.node->args[arg].get())];
    const bool parentheses = step.precedence < least;
    user.height = std::max(user.height, step.height + parentheses);
    // The only user may take the text: a long sum is then written without copies.
    std::string text = step.uses == 1 ? std::move(step.text) : step.text;
    return parentheses ? "(" + text + ")" : text;
  }

  std::string next_name() {
    std::string name;
    do {
      name = "t" + std::to_string(names_++);
    } while (taken_.contains(name));
    return name;
  }

  std::vector<Step> steps_;
  std::unordered_map<const Node*, std::size_t> index_;
  std::set<std::string> taken_;  // names that a `let` must not hide: captured ones and those of mods
  std::string lets_;
  int names_ = 0;
};

inline constexpr std::string_view kKeywords[] = {
    "and",   "or",     "not",     "if",     "else",     "let",   "true",  "false", "True",  "False",
    "inf",   "nan",    "lambda",  "def",    "return",   "in",    "is",    "None",  "elif",  "for",
    "while", "import", "from",    "as",     "assert",   "async", "await", "break", "class", "continue",
    "del",   "except", "finally", "global", "nonlocal", "pass",  "raise", "try",   "with",  "yield"};
inline constexpr std::string_view kReserved[] = {
    "score", "b",     "h",       "q_idx", "m",    "token_q", "kv_idx", "n",    "token_kv", "where",
    "min",   "max",   "clamp",   "abs",   "exp",  "exp2",    "log",    "log2", "log1p",    "sqrt",
    "rsqrt", "tanh",  "sigmoid", "silu",  "gelu", "relu",    "erf",    "sin",  "cos",      "floor",
    "ceil",  "round", "sign",    "float", "int",  "bool",    "isinf",  "isnan"};

inline bool is_name(std::string_view name) {
  const auto is_letter = [](char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; };
  if (name.empty() || !is_letter(name[0])) return false;
  if (std::find(std::begin(kKeywords), std::end(kKeywords), name) != std::end(kKeywords)) return false;
  return std::all_of(name.begin(), name.end(), [&](char c) { return is_letter(c) || (c >= '0' && c <= '9'); });
}

// A captured scalar may not have a name that means something else in text.
inline void check_scalar_names(const NodePtr& root) {
  std::vector<const Node*> open = {root.get()};
  std::set<const Node*> seen = {root.get()};
  while (!open.empty()) {
    const Node* node = open.back();
    open.pop_back();
    if (node->kind == Node::Kind::kCaptured &&
        std::find(std::begin(kReserved), std::end(kReserved), node->text) != std::end(kReserved)) {
      throw std::invalid_argument("attnjit: a captured scalar cannot be named '" + node->text +
                                  "', which has a meaning in expressions; a captured tensor can");
    }
    for (const NodePtr& arg : node->args) {
      if (seen.insert(arg.get()).second) open.push_back(arg.get());
    }
  }
}

}  // namespace expression

// A traced value: the score, an index, a literal, a captured scalar or element, or what operators made of them.
class Value {
 public:
  template <typename T>
    requires std::is_arithmetic_v<T>
  Value(T literal) : node_(literal_of(literal)) {}
  explicit Value(expression::NodePtr node) : node_(std::move(node)) {}

  explicit operator bool() const = delete;  // not known while the lambda runs: write where(condition, a, b)
  const expression::NodePtr& node() const { return node_; }

 private:
  template <typename T>
  static expression::NodePtr literal_of(T literal) {
    if constexpr (std::is_same_v<T, bool>) {
      return expression::atom(literal ? "true" : "false");
    } else if constexpr (std::is_same_v<T, float>) {
      return expression::float_literal(literal);
    } else if constexpr (std::is_floating_point_v<T>) {
      return expression::float_literal(static_cast<double>(literal));
    } else if constexpr (std::is_unsigned_v<T>) {
      return expression::atom(std::to_string(literal));
    } else {
      return expression::int_literal(literal);
    }
  }

  expression::NodePtr node_;
};

// A tensor or scalar that is bound by name when the mod is used. As a value: the scalar.
class Captured : public Value {
 public:
  explicit Captured(std::string name) : Value(expression::captured_scalar(check(std::move(name)))) {}

  // One element of a tensor, one index per dimension; each is clamped to its extent.
  template <std::convertible_to<Value>... Indices>
    requires(sizeof...(Indices) >= 1)
  Value operator()(const Indices&... indices) const {
    return Value(expression::read(node()->text, {Value(indices).node()...}));
  }
  Value operator[](const Value& index) const { return (*this)(index); }

 private:
  static std::string check(std::string name) {
    if (!expression::is_name(name)) {
      throw std::invalid_argument("attnjit: '" + name +
                                  "' cannot name a captured value: letters, digits and _, no "
                                  "digit first, no keyword");
    }
    return name;
  }
};

inline Captured captured(std::string name) { return Captured(std::move(name)); }

// ---- Operators ----

namespace expression {
inline Value binary(const char* op, Precedence precedence, const Value& x, const Value& y) {
  return Value(infix(op, precedence, x.node(), y.node()));
}
}  // namespace expression

inline Value operator+(const Value& x) { return x; }
inline Value operator-(const Value& x) { return Value(expression::prefix("-", x.node())); }
inline Value operator~(const Value& x) { return Value(expression::prefix("~", x.node())); }
inline Value operator!(const Value& x) { return Value(expression::prefix("not", x.node())); }

inline Value operator+(const Value& x, const Value& y) {
  return expression::binary("+", expression::Precedence::kSum, x, y);
}
inline Value operator-(const Value& x, const Value& y) {
  return expression::binary("-", expression::Precedence::kSum, x, y);
}
inline Value operator*(const Value& x, const Value& y) {
  return expression::binary("*", expression::Precedence::kProduct, x, y);
}
// Always a float.
inline Value operator/(const Value& x, const Value& y) {
  return expression::binary("/", expression::Precedence::kProduct, x, y);
}
// The floor modulus, with the sign of y.
inline Value operator%(const Value& x, const Value& y) {
  return expression::binary("%", expression::Precedence::kProduct, x, y);
}
inline Value operator<(const Value& x, const Value& y) {
  return expression::binary("<", expression::Precedence::kComparison, x, y);
}
inline Value operator<=(const Value& x, const Value& y) {
  return expression::binary("<=", expression::Precedence::kComparison, x, y);
}
inline Value operator>(const Value& x, const Value& y) {
  return expression::binary(">", expression::Precedence::kComparison, x, y);
}
inline Value operator>=(const Value& x, const Value& y) {
  return expression::binary(">=", expression::Precedence::kComparison, x, y);
}
inline Value operator==(const Value& x, const Value& y) {
  return expression::binary("==", expression::Precedence::kComparison, x, y);
}
inline Value operator!=(const Value& x, const Value& y) {
  return expression::binary("!=", expression::Precedence::kComparison, x, y);
}
inline Value operator&&(const Value& x, const Value& y) {
  return expression::binary("and", expression::Precedence::kAnd, x, y);
}
inline Value operator||(const Value& x, const Value& y) {
  return expression::binary("or", expression::Precedence::kOr, x, y);
}
inline Value operator&(const Value& x, const Value& y) {
  return expression::binary("&", expression::Precedence::kBitAnd, x, y);
}
inline Value operator|(const Value& x, const Value& y) {
  return expression::binary("|", expression::Precedence::kBitOr, x, y);
}
inline Value floordiv(const Value& x, const Value& y) {
  return expression::binary("//", expression::Precedence::kProduct, x, y);
}
inline Value pow(const Value& x, const Value& y) {
  return expression::binary("**", expression::Precedence::kPower, x, y);
}

// ---- Functions ----

// A registered mod by name, e.g. registered("softcap", 30) or registered("document", captured("ids")).
template <std::convertible_to<Value>... Arguments>
Value registered(std::string name, const Arguments&... arguments) {
  if (!expression::is_name(name)) throw std::invalid_argument("attnjit: '" + name + "' is not the name of a mod");
  return Value(expression::call(std::move(name), {Value(arguments).node()...}));
}

inline Value where(const Value& condition, const Value& x, const Value& y) {
  return Value(expression::call("where", {condition.node(), x.node(), y.node()}));
}
template <std::convertible_to<Value>... Rest>
Value min(const Value& x, const Value& y, const Rest&... rest) {
  Value least(expression::call("min", {x.node(), y.node()}));
  if constexpr (sizeof...(rest) == 0) {
    return least;
  } else {
    return min(least, rest...);
  }
}
template <std::convertible_to<Value>... Rest>
Value max(const Value& x, const Value& y, const Rest&... rest) {
  Value greatest(expression::call("max", {x.node(), y.node()}));
  if constexpr (sizeof...(rest) == 0) {
    return greatest;
  } else {
    return max(greatest, rest...);
  }
}
inline Value clamp(const Value& x, const Value& low, const Value& high) {
  return Value(expression::call("clamp", {x.node(), low.node(), high.node()}));
}
inline Value abs(const Value& x) { return Value(expression::call("abs", {x.node()})); }
inline Value exp(const Value& x) { return Value(expression::call("exp", {x.node()})); }
inline Value exp2(const Value& x) { return Value(expression::call("exp2", {x.node()})); }
inline Value log(const Value& x) { return Value(expression::call("log", {x.node()})); }
inline Value log2(const Value& x) { return Value(expression::call("log2", {x.node()})); }
inline Value log1p(const Value& x) { return Value(expression::call("log1p", {x.node()})); }
inline Value sqrt(const Value& x) { return Value(expression::call("sqrt", {x.node()})); }
inline Value rsqrt(const Value& x) { return Value(expression::call("rsqrt", {x.node()})); }
inline Value tanh(const Value& x) { return Value(expression::call("tanh", {x.node()})); }
inline Value sigmoid(const Value& x) { return Value(expression::call("sigmoid", {x.node()})); }
inline Value silu(const Value& x) { return Value(expression::call("silu", {x.node()})); }
inline Value gelu(const Value& x) { return Value(expression::call("gelu", {x.node()})); }
inline Value relu(const Value& x) { return Value(expression::call("relu", {x.node()})); }
inline Value erf(const Value& x) { return Value(expression::call("erf", {x.node()})); }
inline Value sin(const Value& x) { return Value(expression::call("sin", {x.node()})); }
inline Value cos(const Value& x) { return Value(expression::call("cos", {x.node()})); }
inline Value floor(const Value& x) { return Value(expression::call("floor", {x.node()})); }
inline Value ceil(const Value& x) { return Value(expression::call("ceil", {x.node()})); }
inline Value round(const Value& x) { return Value(expression::call("round", {x.node()})); }
inline Value sign(const Value& x) { return Value(expression::call("sign", {x.node()})); }
inline Value isinf(const Value& x) { return Value(expression::call("isinf", {x.node()})); }
inline Value isnan(const Value& x) { return Value(expression::call("isnan", {x.node()})); }
// float(x), int(x) and bool(x) of the language.
inline Value to_float(const Value& x) { return Value(expression::call("float", {x.node()})); }
inline Value to_int(const Value& x) { return Value(expression::call("int", {x.node()})); }
inline Value to_bool(const Value& x) { return Value(expression::call("bool", {x.node()})); }

// ---- Mods ----

// What a lambda computes, as the text that the library takes as score_mod.
class ScoreMod {
 public:
  explicit ScoreMod(std::string text) : text_(std::move(text)) {}
  const std::string& text() const { return text_; }

 private:
  std::string text_;
};

// A condition to keep an element, as the text that the library takes as mask_mod.
class MaskMod {
 public:
  explicit MaskMod(std::string text) : text_(std::move(text)) {}
  const std::string& text() const { return text_; }

 private:
  std::string text_;
};

// `lambda(score, b, h, q_idx, kv_idx)`, each a Value; returns a Value or something that converts to one.
template <typename Lambda>
  requires std::is_invocable_v<Lambda, Value, Value, Value, Value, Value>
ScoreMod score_mod(Lambda&& lambda) {
  using expression::atom;
  const Value result = std::forward<Lambda>(lambda)(Value(atom("score")), Value(atom("b")), Value(atom("h")),
                                                    Value(atom("q_idx")), Value(atom("kv_idx")));
  expression::check_scalar_names(result.node());
  return ScoreMod(expression::Writer::write(result.node()));
}

// `lambda(b, h, q_idx, kv_idx)`, each a Value; returns a condition.
template <typename Lambda>
  requires std::is_invocable_v<Lambda, Value, Value, Value, Value>
MaskMod mask_mod(Lambda&& lambda) {
  using expression::atom;
  const Value result =
      std::forward<Lambda>(lambda)(Value(atom("b")), Value(atom("h")), Value(atom("q_idx")), Value(atom("kv_idx")));
  expression::check_scalar_names(result.node());
  return MaskMod(expression::Writer::write(result.node()));
}

}  // namespace attnjit
