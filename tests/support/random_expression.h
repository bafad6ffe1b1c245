// Random well-typed expressions of the language, as text: every operator, function, literal form, let and header.
#pragma once

#include <algorithm>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

namespace attnjit::test {

struct RandomCapture {
  std::string name;
  std::string dtype;  // "bool", "int8", ..., "float32"
  int rank = 0;
};

struct RandomExpression {
  std::string text;
  std::vector<RandomCapture> captures = {};  // a superset of what the expression captures
};

struct RandomExpressionOptions {
  int size = 12;         // about how many operations
  bool is_mask = false;  // a condition without the score
  // Values stay moderate where score and captured floats are: no infinity or NaN except to drop elements, no poles, no
  // overflow, ints of at most a few million. Otherwise anything.
  bool moderate = false;
  bool drops = true;  // may drop elements
  bool jumps = true;  // may compare floats, round them or turn them into ints
  int max_captures = 5;
  int max_rank = 3;
};

class ExpressionGenerator {
 public:
  ExpressionGenerator(std::mt19937_64& random, const RandomExpressionOptions& options)
      : random_(random), options_(options) {}

  RandomExpression run() {
    const bool header = chance(0.15);
    if (header) {
      for (std::string* name : {&score_, &b_, &h_, &q_, &kv_}) *name = "p" + std::to_string(names_++);
    }
    std::string text;
    const int lets = chance(0.5) ? pick(3) : 0;
    for (int i = 0; i < lets; ++i) {
      const Kind kind = static_cast<Kind>(pick(3));
      const std::string name = "v" + std::to_string(names_++);
      text += "let " + name + " = " + make(kind, options_.size / 3 + 1).text + ";" + (chance(0.5) ? " " : "\n");
      named_.push_back({.name = name, .kind = kind});
    }
    text += options_.is_mask ? make(Kind::kBool, options_.size).text : root();
    if (header) {
      const std::string rest = b_ + ", " + h_ + ", " + q_ + ", " + kv_ + ") = ";
      text = "mod(" + (options_.is_mask ? "" : score_ + ", ") + rest + text;
    }
    return {.text = text, .captures = captures_};
  }

 private:
  enum class Kind { kBool, kInt, kFloat };
  // Python's levels: 0 choice, 1 or, 2 and, 3 not, 4 comparison, 5 |, 6 &, 7 sum, 8 product, 9 unary, 10 power, 11
  // rest.
  struct Text {
    std::string text;
    int level = 11;
  };
  struct Named {
    std::string name;
    Kind kind;
  };

  int pick(int n) { return static_cast<int>(random_() % static_cast<std::uint64_t>(n)); }
  bool chance(double p) { return static_cast<double>(random_() >> 11) * 0x1p-53 < p; }
  // In parentheses where needed, and sometimes where not.
  std::string at(const Text& x, int level) { return x.level < level || chance(0.05) ? "(" + x.text + ")" : x.text; }
  Text infix(const std::string& op, int level, const Text& x, const Text& y) {
    return {at(x, level) + " " + op + " " + at(y, level + 1), level};
  }
  Text call(const std::string& name, std::initializer_list<Text> args) {
    std::string text = name + "(";
    for (const Text& arg : args) text += (text.back() == '(' ? "" : ", ") + at(arg, 0);
    return {text + ")"};
  }

  Text make(Kind kind, int size) {
    switch (kind) {
      case Kind::kBool:
        return make_bool(size);
      case Kind::kInt:
        return make_int(size);
      case Kind::kFloat:
        return make_float(size);
    }
    return {};
  }

  std::string root() {
    const int size = options_.size;
    if (!options_.drops || chance(0.4)) return make_float(size).text;
    const Text dropped{"-inf", 9};
    switch (pick(5)) {
      case 0:
        return call("where", {make_bool(size / 2), make_float(size / 2), dropped}).text;
      case 1:
        return call("where", {make_bool(size / 2), dropped, make_float(size / 2)}).text;
      case 2:
        return infix("+", 7, make_float(size / 2), call("where", {make_bool(size / 2), {"0"}, dropped})).text;
      case 3: {
        const Text choice = {at(make_float(size / 2), 1) + " if " + at(make_bool(size / 2), 1) + " else -inf", 0};
        return infix("*", 8, {"0.5"}, choice).text;
      }
      default:
        return call("min", {make_float(size / 2), call("where", {make_bool(size / 2), {"1e4"}, dropped})}).text;
    }
  }

  Text make_bool(int size) {
    const int half = size / 2;
    if (size <= 2 && chance(0.3)) {
      if (const Named* named = find(Kind::kBool)) return {named->name};
      if (chance(0.3))
        return {std::vector<std::string>{"true", "false", "True", "False"}[static_cast<std::size_t>(pick(4))]};
      return captured(Kind::kBool, size);
    }
    const auto comparison = [&] {
      return std::vector<std::string>{"<", "<=", ">", ">=", "==", "!="}[static_cast<std::size_t>(pick(6))];
    };
    const Kind compared = options_.jumps && chance(0.4) ? Kind::kFloat : Kind::kInt;
    switch (size <= 2 ? pick(4) : pick(11)) {
      case 0:
      case 1:
      case 2: {
        const Text x = make(compared, half);
        const Text y = make(options_.jumps && chance(0.2) ? Kind::kFloat : compared, half);
        return {at(x, 5) + " " + comparison() + " " + at(y, 5), 4};
      }
      case 3: {
        // In a chain a bare & or | is refused.
        std::string text = at(make(compared, half), 7);
        for (int i = 0; i < 2; ++i) text += " " + comparison() + " " + at(make(compared, half), 7);
        return {text, 4};
      }
      case 4:
        return infix("and", 2, make_bool(half), make_bool(half));
      case 5:
        return infix("or", 1, make_bool(half), make_bool(half));
      case 6:
        return {"not " + at(make_bool(size - 1), 3), 3};
      case 7:
        return infix(chance(0.5) ? "&" : "|", chance(0.5) ? 6 : 5, {"(" + make_bool(half).text + ")"},
                     {"(" + make_bool(half).text + ")"});
      case 8:
        return {"~" + at(make_bool(size - 1), 9), 9};
      case 9: {
        if (!options_.jumps) return call("bool", {make_int(size - 1)});
        const std::vector<std::string> tests = {"isinf", "isnan", "bool"};
        return call(tests[static_cast<std::size_t>(pick(3))], {make_float(size - 1)});
      }
      default:
        return choice(Kind::kBool, size);
    }
  }

  Text make_int(int size) {
    const int half = size / 2;
    if (size <= 1) {
      switch (pick(8)) {
        case 0:
          return int_literal();
        case 1:
          return captured(Kind::kInt, 1);
        case 2:
          if (const Named* named = find(Kind::kInt)) return {named->name};
          [[fallthrough]];
        default:
          return index();
      }
    }
    switch (pick(14)) {
      case 0:
      case 1:
        return infix("+", 7, make_int(half), make_int(half));
      case 2:
      case 3:
        return infix("-", 7, make_int(half), make_int(half));
      case 4:
        return infix("*", 8, options_.moderate ? small_int() : make_int(half),
                     options_.moderate ? index() : make_int(half));
      case 5:
        return infix("//", 8, make_int(half), chance(0.7) ? small_int() : make_int(half));
      case 6:
        return infix("%", 8, make_int(half), chance(0.7) ? small_int() : make_int(half));
      case 7:
        return {(chance(0.8) ? "-" : "~") + at(make_int(size - 1), 9), 9};
      case 8:
        return chance(0.5) ? infix("&", 6, make_int(half), make_int(half))
                           : infix("|", 5, make_int(half), make_int(half));
      case 9:
        return {at(options_.moderate ? index() : make_int(size - 1), 11) + " ** " +
                    std::to_string(pick(options_.moderate ? 3 : 8)),
                10};
      case 10: {
        if (chance(0.5)) return call(chance(0.5) ? "min" : "max", {make_int(half), make_int(half)});
        if (chance(0.3)) return call("clamp", {make_int(half), small_int(), make_int(half)});
        const std::vector<std::string> names = {"abs", "sign", "relu", "floor", "int"};
        return call(names[static_cast<std::size_t>(pick(5))], {make_int(size - 1)});
      }
      case 11:
        if (options_.jumps && (!options_.moderate || chance(0.5))) {
          const Text x = make_float(size - 1);
          return call("int", {options_.moderate ? call("clamp", {x, {"-1000", 9}, {"1e3"}}) : x});
        }
        return call("int", {make_bool(size - 1)});
      case 12:
        return captured(Kind::kInt, size);
      default:
        return choice(Kind::kInt, size);
    }
  }

  Text make_float(int size) {
    const int half = size / 2;
    if (size <= 1) {
      switch (pick(6)) {
        case 0:
          return float_literal();
        case 1:
          return captured(Kind::kFloat, 1);
        case 2:
          if (const Named* named = find(Kind::kFloat)) return {named->name};
          [[fallthrough]];
        default:
          return score();
      }
    }
    if (chance(0.1)) return infix("+", 7, make_float(half), make_int(half));
    switch (pick(options_.moderate ? 11 : 14)) {
      case 0:
      case 1:
        return infix("+", 7, make_float(half), make_float(half));
      case 2:
      case 3:
        return infix("-", 7, make_float(half), make_float(half));
      case 4:
        return infix("*", 8, options_.moderate ? float_literal() : make_float(half), make_float(half));
      case 5:
        return infix("/", 8, make_float(half),
                     options_.moderate ? Text{"(1 + abs(" + make_float(half).text + "))"} : make_float(half));
      case 6:
        return {"-" + at(make_float(size - 1), 9), 9};
      case 7:
      case 8:
        return function(size - 1);
      case 9:
        return captured(Kind::kFloat, size);
      case 10:
        return choice(Kind::kFloat, size);
      case 11:
        return {at(make_float(half), 11) + " ** " +
                    at(chance(0.5)   ? float_literal()
                       : chance(0.5) ? small_int()
                                     : make_float(half),
                       9),
                10};
      case 12:
        return infix(options_.jumps ? (chance(0.5) ? "//" : "%") : "-", options_.jumps ? 8 : 7, make_float(half),
                     make_float(half));
      default:
        return infix("*", 8, make_bool(half), make_float(half));
    }
  }

  Text function(int size) {
    const int half = size / 2;
    switch (pick(options_.jumps ? 5 : 4)) {
      case 0:
        return call(chance(0.5) ? "min" : "max", {make_float(half), make_float(half)});
      case 1:
        if (chance(0.3)) return call("max", {make_float(half), make_float(half), make_int(half)});
        return call("clamp", {make_float(half), {"-2.5", 9}, chance(0.5) ? make_int(half) : Text{"3"}});
      case 4: {
        const std::vector<std::string> names = {"floor", "ceil", "round", "sign"};
        return call(names[static_cast<std::size_t>(pick(4))], {make_float(size)});
      }
      default:
        break;
    }
    const std::vector<std::string> bounded = {"tanh", "sigmoid", "silu", "gelu", "relu", "erf", "abs", "float"};
    if (chance(0.6)) return call(bounded[static_cast<std::size_t>(pick(8))], {make_float(size)});
    const std::vector<std::string> others = {"exp", "exp2", "log", "log2", "log1p", "sqrt", "rsqrt", "sin", "cos"};
    const int which = pick(9);
    Text x = make_float(size);
    if (options_.moderate) {
      // Keep away from poles, overflow and arguments whose error a period would amplify.
      x = which < 2 || which > 6 ? call("clamp", {x, {"-4", 9}, {"4"}}) : Text{"0.5 + " + at(call("abs", {x}), 8), 7};
    }
    return call(others[static_cast<std::size_t>(which)], {x});
  }

  Text choice(Kind kind, int size) {
    const int third = size / 3;
    const Text condition = make_bool(third);
    const Text x = make(kind, third);
    const Text y = make(kind, third);
    if (chance(0.5)) return call("where", {condition, x, y});
    return {at(x, 1) + " if " + at(condition, 1) + " else " + at(y, 0), 0};
  }

  Text score() {
    if (options_.is_mask) return float_literal();
    return {score_};
  }

  Text index() {
    switch (pick(6)) {
      case 0:
        return {b_};
      case 1:
        return {h_};
      case 2:
      case 3:
        return {q_ == "q_idx" && chance(0.2) ? "m" : q_};
      default:
        return {kv_ == "kv_idx" && chance(0.2) ? "n" : kv_};
    }
  }

  Text small_int() { return {std::to_string(1 + pick(9))}; }

  Text int_literal() {
    if (!options_.moderate && chance(0.1)) {
      const std::vector<std::string> large = {"9223372036854775807", "4294967296", "0x7fffffff", "3000000000"};
      return {large[static_cast<std::size_t>(pick(4))]};
    }
    if (chance(0.1)) return {"0x1f"};
    return {std::to_string(pick(chance(0.5) ? 4 : 100))};
  }

  Text float_literal() {
    if (!options_.moderate && chance(0.15)) {
      const std::vector<std::string> extreme = {"inf", "nan", "1e30", "1e-30", "-inf", "1e300"};
      const std::string& text = extreme[static_cast<std::size_t>(pick(6))];
      return {text, text[0] == '-' ? 9 : 11};
    }
    const std::vector<std::string> usual = {"0.5", "2.0", "1.5", ".25", "3.", "1e-1", "0.125", "1.25e0"};
    return {usual[static_cast<std::size_t>(pick(8))]};
  }

  Text captured(Kind kind, int size) {
    std::vector<const RandomCapture*> known;
    for (const RandomCapture& capture : captures_) {
      if (kind_of(capture.dtype) == kind) known.push_back(&capture);
    }
    const bool full = static_cast<int>(captures_.size()) >= options_.max_captures;
    if (full && known.empty())
      return kind == Kind::kBool ? Text{"true"} : kind == Kind::kInt ? index() : float_literal();
    RandomCapture capture;
    if (!known.empty() && (full || chance(0.6))) {
      capture = *known[static_cast<std::size_t>(pick(static_cast<int>(known.size())))];
    } else {
      // The printer's own names are among these.
      const std::vector<std::string> names = {"t0", "bias", "ids", "t1", "slopes", "w"};
      const std::vector<std::string> ints = {"int8", "int16", "int32", "int64", "uint8"};
      const std::vector<std::string> floats = {"float32", "float16", "bfloat16"};
      const std::size_t n = captures_.size();
      capture = {.name = n < names.size() ? names[n] : "c" + std::to_string(n),
                 .dtype = kind == Kind::kBool  ? "bool"
                          : kind == Kind::kInt ? ints[static_cast<std::size_t>(pick(options_.moderate ? 3 : 5))]
                                               : floats[static_cast<std::size_t>(pick(3))],
                 .rank = pick(options_.max_rank + 1)};
      captures_.push_back(capture);
    }
    if (capture.rank == 0) return {capture.name};
    std::string text = capture.name + "[";
    for (int i = 0; i < capture.rank; ++i) text += (i ? ", " : "") + make_int(size / (2 * capture.rank)).text;
    return {text + "]"};
  }

  static Kind kind_of(const std::string& dtype) {
    if (dtype == "bool") return Kind::kBool;
    return dtype.find("float") == std::string::npos ? Kind::kInt : Kind::kFloat;
  }

  const Named* find(Kind kind) {
    std::vector<const Named*> fitting;
    for (const Named& named : named_) {
      if (named.kind == kind) fitting.push_back(&named);
    }
    if (fitting.empty()) return nullptr;
    return fitting[static_cast<std::size_t>(pick(static_cast<int>(fitting.size())))];
  }

  std::mt19937_64& random_;
  const RandomExpressionOptions& options_;
  std::vector<RandomCapture> captures_;
  std::vector<Named> named_;
  std::string score_ = "score", b_ = "b", h_ = "h", q_ = "q_idx", kv_ = "kv_idx";
  int names_ = 0;
};

// The same engine state and options give the same expression (with one compiler: argument order is its choice).
inline RandomExpression random_expression(std::mt19937_64& random, const RandomExpressionOptions& options = {}) {
  return ExpressionGenerator(random, options).run();
}

}  // namespace attnjit::test
