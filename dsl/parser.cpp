// Recursive descent over the expression grammar, with Python's precedence; one Parser per text, one Builder per tree.
#include "dsl/parser.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <map>
#include <optional>
#include <set>
#include <tuple>
#include <utility>

#include "dsl/functions.h"
#include "dsl/lexer.h"

namespace attnjit::dsl {
namespace {

constexpr NodeId kFailed = -1;

struct ElementName {
  std::string_view name;
  Op op;
};
// The first of an op is its name, the others are aliases.
constexpr ElementName kElementNames[] = {
    {"score", Op::kScore},    {"b", Op::kIndexB},  {"h", Op::kIndexH},
    {"q_idx", Op::kIndexQ},   {"m", Op::kIndexQ},  {"token_q", Op::kIndexQ},
    {"kv_idx", Op::kIndexKv}, {"n", Op::kIndexKv}, {"token_kv", Op::kIndexKv},
};

constexpr std::string_view kKeywords[] = {"and",  "or",    "not",  "if",    "else", "let",
                                          "true", "false", "True", "False", "inf",  "nan"};

// Words and symbols of Python and C that look meaningful here, and what to write instead.
struct Refused {
  std::string_view text;
  std::string_view hint;
};
constexpr Refused kRefusedWords[] = {
    {"lambda", "write name(score, b, h, q_idx, kv_idx) = expression"},
    {"def", "write name(score, b, h, q_idx, kv_idx) = expression"},
    {"return", "the expression itself is the result"},
    {"in", "compare with == and join with or"},
    {"is", "compare with =="},
    {"None", "every value is a bool, an int or a float"},
    {"elif", "nest: a if c else b if d else e"},
    {"for", "an expression computes one element; there are no loops"},
    {"while", "an expression computes one element; there are no loops"},
    {"import", "functions are known without a module"},
    {"from", "functions are known without a module"},
    {"as", ""},
    {"assert", ""},
    {"async", ""},
    {"await", ""},
    {"break", ""},
    {"class", ""},
    {"continue", ""},
    {"del", ""},
    {"except", ""},
    {"finally", ""},
    {"global", ""},
    {"nonlocal", ""},
    {"pass", ""},
    {"raise", ""},
    {"try", ""},
    {"with", ""},
    {"yield", ""},
};
constexpr Refused kRefusedSymbols[] = {
    {"^", "write ** for a power, != for the exclusive or of two bools"},
    {"<<", "multiply by a power of two"},
    {">>", "divide by a power of two with //"},
    {"@", "an expression computes one element; there are no matrices"},
    {":=", "write let name = value; before the expression"},
    {"=", "write == to compare, let name = value; to name a value"},
    {"+=", "write let name = value; to name a value"},
    {"-=", "write let name = value; to name a value"},
    {"*=", "write let name = value; to name a value"},
    {"/=", "write let name = value; to name a value"},
    {"&&", "write and, or & between two bools"},
    {"||", "write or, or | between two bools"},
    {"!", "write not, or ~ before a bool"},
    {"?", "write a if c else b, or where(c, a, b)"},
    {":", "write a if c else b for a choice; a captured tensor takes one index per dimension, no slices"},
    {".", "there are no modules and attributes: write exp(x), not torch.exp(x)"},
    {"{", "there are no dictionaries and sets"},
    {"}", "there are no dictionaries and sets"},
    {"\"", "there are no strings"},
    {"'", "there are no strings"},
    {"->", ""},
};
// Functions of Python, NumPy and PyTorch that go by another name here.
constexpr Refused kOtherNames[] = {
    {"pow", "write x ** y"},          {"maximum", "write max(x, y)"},
    {"minimum", "write min(x, y)"},   {"fmax", "write max(x, y)"},
    {"fmin", "write min(x, y)"},      {"absolute", "write abs(x)"},
    {"ln", "write log(x)"},           {"floordiv", "write x // y"},
    {"floor_divide", "write x // y"}, {"remainder", "write x % y"},
    {"fmod", "write x % y"},          {"mod", "write x % y"},
    {"logical_and", "write x and y"}, {"logical_or", "write x or y"},
    {"logical_not", "write not x"},   {"select", "write where(c, x, y)"},
    {"expm1", "write exp(x) - 1"},    {"ceiling", "write ceil(x)"},
};

const Refused* find_refused(std::span<const Refused> table, std::string_view text) {
  const auto found = std::find_if(table.begin(), table.end(), [&](const Refused& row) { return row.text == text; });
  return found == table.end() ? nullptr : &*found;
}

const ElementName* find_element_name(std::string_view name) {
  const auto found = std::find_if(std::begin(kElementNames), std::end(kElementNames),
                                  [&](const ElementName& row) { return row.name == name; });
  return found == std::end(kElementNames) ? nullptr : found;
}

std::string quoted(std::string_view name) { return "'" + shortened(name) + "'"; }

std::string counted(std::size_t count, std::string_view noun) {
  return std::to_string(count) + " " + std::string(noun) + (count == 1 ? "" : "s");
}

// Optimal string alignment distance: insertions, deletions, substitutions and swaps of neighbours.
std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::vector<std::size_t>> d(a.size() + 1, std::vector<std::size_t>(b.size() + 1));
  for (std::size_t i = 0; i <= a.size(); ++i) {
    for (std::size_t j = 0; j <= b.size(); ++j) {
      if (i == 0 || j == 0) {
        d[i][j] = i + j;
        continue;
      }
      d[i][j] = std::min({d[i - 1][j] + 1, d[i][j - 1] + 1, d[i - 1][j - 1] + (a[i - 1] != b[j - 1])});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) {
        d[i][j] = std::min(d[i][j], d[i - 2][j - 2] + 1);
      }
    }
  }
  return d[a.size()][b.size()];
}

// The nearest of some names, if one is near at all.
class Nearest {
 public:
  explicit Nearest(std::string_view name) : name_(name), best_(std::max<std::size_t>(name.size() / 3, 1) + 1) {}
  void offer(std::string_view candidate) {
    if (name_.size() > 64 || candidate.size() > 64 || candidate == name_) return;
    const std::size_t distance = edit_distance(name_, candidate);
    if (distance < best_ && distance < candidate.size()) {
      best_ = distance;
      found_ = candidate;
    }
  }
  const std::string& found() const { return found_; }

 private:
  std::string_view name_;
  std::size_t best_;
  std::string found_;
};

// The tree under construction, shared by the parser of the text and those of the registered mods in it.
struct Builder {
  const Registry& registry;
  ModKind kind;
  Expr expr = {};
  std::vector<bool> is_mask = {};  // by node: made of registered masks only
  std::map<std::tuple<Op, std::uint64_t>, NodeId> leaves = {};
  std::optional<Error> error = {};
  int depth = 0;
  int expansions = 0;

  NodeId fail(SourceLocation location, std::string message) {
    if (!error) error = Error{std::move(message), location};
    return kFailed;
  }

  NodeId add(Node node) {
    for (const NodeId arg : node.args) {
      if (arg < 0) return kFailed;
    }
    if (expr.nodes.size() >= static_cast<std::size_t>(kMaxNodes)) {
      return fail(node.location,
                  "the expression has more than " + std::to_string(kMaxNodes) + " operations and values");
    }
    const bool joins = node.op == Op::kAnd || node.op == Op::kOr || node.op == Op::kNot || node.op == Op::kBitAnd ||
                       node.op == Op::kBitOr || node.op == Op::kBitNot;
    is_mask.push_back(joins && std::all_of(node.args.begin(), node.args.end(),
                                           [&](NodeId arg) { return is_mask[static_cast<std::size_t>(arg)]; }));
    expr.nodes.push_back(std::move(node));
    return static_cast<NodeId>(expr.nodes.size()) - 1;
  }

  // Equal leaves are one node, so that sharing of leaves is no difference between trees.
  NodeId leaf(Node node) {
    const std::uint64_t value = node.op == Op::kFloat  ? std::bit_cast<std::uint64_t>(node.float_value)
                                : node.op == Op::kRead ? static_cast<std::uint64_t>(node.capture)
                                                       : static_cast<std::uint64_t>(node.int_value);
    const auto key = std::make_tuple(node.op, value);
    if (const auto found = leaves.find(key); found != leaves.end()) return found->second;
    const NodeId id = add(std::move(node));
    if (id >= 0) leaves.emplace(key, id);
    return id;
  }

  std::int32_t capture(std::string_view name, int rank, SourceLocation location) {
    const auto shape = [](int r) { return r == 0 ? std::string("a scalar") : "a tensor of rank " + std::to_string(r); };
    for (std::size_t i = 0; i < expr.captures.size(); ++i) {
      const Capture& known = expr.captures[i];
      if (known.name != name) continue;
      if (known.rank == rank) return static_cast<std::int32_t>(i);
      return fail(location, quoted(name) + " is captured as " + shape(rank) + " here and as " + shape(known.rank) +
                                " at line " + std::to_string(known.location.line) + ", column " +
                                std::to_string(known.location.column));
    }
    if (expr.captures.size() >= static_cast<std::size_t>(kMaxCaptures)) {
      return fail(location, "the expression captures more than " + std::to_string(kMaxCaptures) +
                                " tensors and scalars; " + quoted(name) + " is one too many");
    }
    expr.captures.push_back({std::string(name), rank, location});
    return static_cast<std::int32_t>(expr.captures.size()) - 1;
  }

  // The finished tree: only what the root uses, in the same order.
  Expr finish(NodeId root) {
    std::vector<NodeId> moved(expr.nodes.size(), kFailed);
    std::vector<std::int32_t> moved_capture(expr.captures.size(), -1);
    std::vector<bool> used(expr.nodes.size());
    used[static_cast<std::size_t>(root)] = true;
    for (std::size_t i = expr.nodes.size(); i-- > 0;) {
      if (!used[i]) continue;
      for (const NodeId arg : expr.nodes[i].args) used[static_cast<std::size_t>(arg)] = true;
      if (expr.nodes[i].capture >= 0) moved_capture[static_cast<std::size_t>(expr.nodes[i].capture)] = 0;
    }
    Expr result;
    for (std::size_t i = 0; i < expr.captures.size(); ++i) {
      if (moved_capture[i] < 0) continue;
      moved_capture[i] = static_cast<std::int32_t>(result.captures.size());
      result.captures.push_back(std::move(expr.captures[i]));
    }
    for (std::size_t i = 0; i < expr.nodes.size(); ++i) {
      if (!used[i]) continue;
      Node node = std::move(expr.nodes[i]);
      for (NodeId& arg : node.args) arg = moved[static_cast<std::size_t>(arg)];
      if (node.capture >= 0) node.capture = moved_capture[static_cast<std::size_t>(node.capture)];
      moved[i] = static_cast<NodeId>(result.nodes.size());
      result.nodes.push_back(std::move(node));
    }
    result.root = moved[static_cast<std::size_t>(root)];
    return result;
  }
};

// What a name of a header, a `let` or a parameter stands for.
struct Binding {
  enum class Kind : std::uint8_t { kValue, kElement, kCaptured } kind = Kind::kValue;
  NodeId value = kFailed;     // kValue
  Op element = Op::kScore;    // kElement
  std::string captured = {};  // kCaptured: a name that becomes a scalar or a tensor where it is used
};

using Scope = std::map<std::string, Binding, std::less<>>;

class Parser {
 public:
  // `call_site`: where a registered mod is used; its own text's locations mean nothing to the user.
  Parser(Builder& builder, std::string_view text, Scope scope, std::optional<SourceLocation> call_site)
      : builder_(builder), text_(text), scope_(std::move(scope)), call_site_(call_site) {}

  // program := [header] { "let" name "=" expression ";" } expression
  NodeId program() {
    auto tokens = lex(text_);
    if (!tokens) return builder_.fail(call_site_.value_or(tokens.error().location), tokens.error().message);
    tokens_ = std::move(*tokens);
    if (at_header() && !header()) return kFailed;
    while (is_word("let")) {
      if (!let()) return kFailed;
    }
    const NodeId root = expression();
    if (root < 0) return kFailed;
    if (peek().kind != TokenKind::kEnd) return unexpected("an operator or the end of the expression");
    return root;
  }

 private:
  // Counts the constructs that stack: parentheses, calls, indices, unary operators, powers, choices, registered mods.
  class Nested {
   public:
    Nested(Parser& parser) : builder_(parser.builder_) {
      ok_ = ++builder_.depth <= kMaxNesting;
      if (!ok_) {
        builder_.fail(parser.location(), "the expression nests deeper than " + std::to_string(kMaxNesting) + " levels");
      }
    }
    ~Nested() { --builder_.depth; }
    Nested(const Nested&) = delete;
    explicit operator bool() const { return ok_; }

   private:
    Builder& builder_;
    bool ok_;
  };

  // ---- Tokens ----

  const Token& peek(std::size_t ahead = 0) const { return tokens_[std::min(at_ + ahead, tokens_.size() - 1)]; }
  const Token& take() {
    const Token& token = peek();
    if (at_ + 1 < tokens_.size()) ++at_;
    return token;
  }
  SourceLocation location_of(const Token& token) const { return call_site_.value_or(token.location); }
  SourceLocation location() const { return location_of(peek()); }
  bool is_symbol(std::string_view text, std::size_t ahead = 0) const {
    return peek(ahead).kind == TokenKind::kPunctuation && peek(ahead).text == text;
  }
  bool is_word(std::string_view text) const { return peek().kind == TokenKind::kName && peek().text == text; }
  bool accept(std::string_view symbol) {
    if (!is_symbol(symbol)) return false;
    take();
    return true;
  }

  NodeId fail(const Token& token, std::string message) { return builder_.fail(location_of(token), std::move(message)); }

  bool refuse(const Token& token, std::string message) { return fail(token, std::move(message)) != kFailed; }

  // The current token is wrong: says what was expected, or why the language does not have it.
  NodeId unexpected(std::string_view expected) {
    const Token& token = peek();
    if (token.kind == TokenKind::kEnd) return fail(token, "expected " + std::string(expected) + ", but the text ends");
    const Refused* refused = nullptr;
    if (token.kind == TokenKind::kPunctuation) refused = find_refused(kRefusedSymbols, token.text);
    if (token.kind == TokenKind::kName) refused = find_refused(kRefusedWords, token.text);
    if (refused) {
      return fail(token, quoted(token.text) + " is not part of the language" + (refused->hint.empty() ? "" : "; ") +
                             std::string(refused->hint));
    }
    if (token.text == "let") return fail(token, "'let' stands at the start of the text only: let name = value; ...");
    return fail(token, "expected " + std::string(expected) + ", found " + quoted(token.text));
  }

  bool expect(std::string_view symbol, std::string_view after) {
    if (accept(symbol)) return true;
    unexpected(quoted(symbol) + " " + std::string(after));
    return false;
  }

  // ---- Headers and let ----

  // name(p0, ..., pk) = ...
  bool at_header() const {
    if (peek().kind != TokenKind::kName || !is_symbol("(", 1)) return false;
    for (std::size_t ahead = 2;; ++ahead) {
      if (is_symbol(")", ahead)) return is_symbol("=", ahead + 1);
      if (peek(ahead).kind != TokenKind::kName && !is_symbol(",", ahead)) return false;
    }
  }

  bool header() {
    constexpr Op kOrder[] = {Op::kScore, Op::kIndexB, Op::kIndexH, Op::kIndexQ, Op::kIndexKv};
    const bool is_mask = builder_.kind == ModKind::kMaskMod;
    const std::span<const Op> order = std::span(kOrder).subspan(is_mask ? 1 : 0);
    const Token& name = take();
    take();
    std::vector<Token> names;
    while (!accept(")")) {
      if (!names.empty() && !expect(",", "between two parameters")) return false;
      if (peek().kind != TokenKind::kName) {
        unexpected("the name of a parameter");
        return false;
      }
      names.push_back(take());
    }
    take();
    if (names.size() != order.size()) {
      return refuse(name, quoted(name.text) + " has " + counted(names.size(), "parameter") + "; " +
                              (is_mask ? "a mask_mod takes four: (b, h, q_idx, kv_idx)"
                                       : "a score_mod takes five: (score, b, h, q_idx, kv_idx)"));
    }
    for (std::size_t i = 0; i < names.size(); ++i) {
      const NameKind kind = name_kind(names[i].text);
      if (kind == NameKind::kFunction || kind == NameKind::kKeyword) {
        return refuse(names[i], quoted(names[i].text) + " is a word of the language and cannot name a parameter");
      }
      Binding binding{.kind = Binding::Kind::kElement, .element = order[i]};
      if (!scope_.emplace(names[i].text, std::move(binding)).second) {
        return refuse(names[i], "two parameters are named " + quoted(names[i].text));
      }
    }
    has_header_ = true;
    return true;
  }

  bool let() {
    take();
    const Token name = peek();
    if (name.kind != TokenKind::kName) {
      unexpected("a name after 'let'");
      return false;
    }
    const auto local = scope_.find(name.text);
    const bool is_parameter = local != scope_.end() && !let_names_.contains(name.text);
    if (name_kind(name.text) != NameKind::kFree || is_parameter) {
      return refuse(name, quoted(name.text) + " has a meaning already; choose another name for the value");
    }
    if (captured_names_.contains(name.text)) {
      return refuse(name, quoted(name.text) + " is captured earlier in the text; choose another name for the value");
    }
    take();
    if (!expect("=", "after the name of a value")) return false;
    const NodeId value = expression();
    if (value < 0) return false;
    // Checked again: the value itself may capture the name.
    if (captured_names_.contains(name.text)) {
      return refuse(name, quoted(name.text) + " has no value yet where its own value uses it");
    }
    if (!expect(";", "after the value of " + quoted(name.text))) return false;
    let_names_.emplace(name.text);
    scope_[std::string(name.text)] = Binding{.kind = Binding::Kind::kValue, .value = value};
    return true;
  }

  // ---- Expressions, loosest first ----

  // expression := disjunction [ "if" disjunction "else" expression ]
  NodeId expression() {
    const Nested nested(*this);
    if (!nested) return kFailed;
    const NodeId value = disjunction();
    if (value < 0 || !is_word("if")) return value;
    const Token& token = take();
    const NodeId condition = disjunction();
    if (condition < 0) return kFailed;
    if (!is_word("else")) return unexpected("'else' (a choice is written a if c else b)");
    take();
    const NodeId otherwise = expression();
    return make(Op::kSelect, token, {condition, value, otherwise});
  }

  // disjunction := conjunction { "or" conjunction }
  NodeId disjunction() {
    NodeId left = conjunction();
    while (left >= 0 && is_word("or")) {
      const Token& token = take();
      left = make(Op::kOr, token, {left, conjunction()});
    }
    return left;
  }

  // conjunction := inversion { "and" inversion }
  NodeId conjunction() {
    NodeId left = inversion();
    while (left >= 0 && is_word("and")) {
      const Token& token = take();
      left = make(Op::kAnd, token, {left, inversion()});
    }
    return left;
  }

  // inversion := "not" inversion | comparison
  NodeId inversion() {
    if (!is_word("not")) return comparison();
    const Nested nested(*this);
    if (!nested) return kFailed;
    const Token& token = take();
    return make(Op::kNot, token, {inversion()});
  }

  static std::optional<Op> comparison_op(const Token& token) {
    if (token.kind != TokenKind::kPunctuation) return std::nullopt;
    if (token.text == "<") return Op::kLt;
    if (token.text == "<=") return Op::kLe;
    if (token.text == ">") return Op::kGt;
    if (token.text == ">=") return Op::kGe;
    if (token.text == "==") return Op::kEq;
    if (token.text == "!=") return Op::kNe;
    return std::nullopt;
  }

  // comparison := bits { ("<" | "<=" | ">" | ">=" | "==" | "!=") bits }
  // A chain a < b < c means a < b and b < c, with b evaluated once.
  NodeId comparison() {
    const std::size_t begin = at_;
    NodeId left = bit_or();
    NodeId all = kFailed;
    int links = 0;
    while (left >= 0) {
      const std::optional<Op> op = comparison_op(peek());
      if (!op) break;
      const Token& token = take();
      const NodeId right = bit_or();
      const NodeId link = make(*op, token, {left, right});
      if (link < 0) return kFailed;
      all = links++ == 0 ? link : make(Op::kAnd, token, {all, link});
      left = right;
    }
    if (left < 0 || links == 0) return left;
    return links > 1 && !check_chain(begin) ? kFailed : all;
  }

  // Refuses a chain with a bare & or | between its comparisons: the author meant (a >= b) & (c < d), and Python's
  // precedence reads a >= (b & c) < d.
  bool check_chain(std::size_t begin) {
    int parentheses = 0;
    std::size_t first = 0;
    std::string suggestion;
    const auto slice = [&](std::size_t from, std::size_t to) {
      const Token& last = tokens_[to - 1];
      const char* start = tokens_[from].text.data();
      return "(" + std::string(start, static_cast<std::size_t>(last.text.data() + last.text.size() - start)) + ")";
    };
    std::size_t part = begin;
    for (std::size_t i = begin; i < at_; ++i) {
      const std::string_view text = tokens_[i].text;
      if (text == "(" || text == "[") ++parentheses;
      if (text == ")" || text == "]") --parentheses;
      if (parentheses > 0 || (text != "&" && text != "|")) continue;
      if (first == 0) first = i;
      suggestion += slice(part, i) + " " + std::string(text) + " ";
      part = i + 1;
    }
    if (first == 0) return true;
    suggestion += slice(part, at_);
    const std::string op(tokens_[first].text);
    std::string message = "'" + op + "' binds tighter than comparisons; put parentheses around them";
    if (suggestion.size() <= 120) message += ": " + suggestion;
    return refuse(tokens_[first], message + ", or write '" + (op == "&" ? "and" : "or") + "'");
  }

  NodeId bit_or() {
    NodeId left = bit_and();
    while (left >= 0 && is_symbol("|")) {
      const Token& token = take();
      left = make(Op::kBitOr, token, {left, bit_and()});
    }
    return left;
  }

  NodeId bit_and() {
    NodeId left = sum();
    while (left >= 0 && is_symbol("&")) {
      const Token& token = take();
      left = make(Op::kBitAnd, token, {left, sum()});
    }
    return left;
  }

  NodeId sum() {
    NodeId left = product();
    while (left >= 0 && (is_symbol("+") || is_symbol("-"))) {
      const Token& token = take();
      left = make(token.text == "+" ? Op::kAdd : Op::kSub, token, {left, product()});
    }
    return left;
  }

  NodeId product() {
    NodeId left = unary();
    while (left >= 0) {
      const Op op = is_symbol("*")    ? Op::kMul
                    : is_symbol("/")  ? Op::kDiv
                    : is_symbol("//") ? Op::kFloorDiv
                    : is_symbol("%")  ? Op::kMod
                                      : Op::kScore;
      if (op == Op::kScore) break;
      const Token& token = take();
      left = make(op, token, {left, unary()});
    }
    return left;
  }

  // unary := ("-" | "+" | "~") unary | power
  NodeId unary() {
    if (!is_symbol("-") && !is_symbol("+") && !is_symbol("~")) return power();
    const Nested nested(*this);
    if (!nested) return kFailed;
    const Token& token = take();
    if (token.text == "-" && peek().kind == TokenKind::kInt && peek().int_value == kSmallestIntMagnitude &&
        !is_symbol("**", 1)) {
      const Token& literal = take();
      return make(Op::kNeg, token, {int_literal(literal)});
    }
    const NodeId operand = unary();
    if (token.text == "+") return operand;
    return make(token.text == "-" ? Op::kNeg : Op::kBitNot, token, {operand});
  }

  // power := primary [ "**" unary ]
  NodeId power() {
    const NodeId base = primary();
    if (base < 0 || !is_symbol("**")) return base;
    const Nested nested(*this);
    if (!nested) return kFailed;
    const Token& token = take();
    return make(Op::kPow, token, {base, unary()});
  }

  // primary := number | name | name "(" arguments ")" | name "[" indices "]" | "(" expression ")"
  NodeId primary() {
    const Token& token = peek();
    NodeId value = kFailed;
    if (token.kind == TokenKind::kInt) {
      take();
      if (token.int_value > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
        return fail(token, "the integer " + quoted(token.text) + " does not fit in 64 bits with a sign");
      }
      value = int_literal(token);
    } else if (token.kind == TokenKind::kFloat) {
      take();
      value = float_literal(token, token.float_value);
    } else if (token.kind == TokenKind::kName) {
      value = named();
    } else if (accept("(")) {
      value = expression();
      if (value < 0) return kFailed;
      if (is_symbol(",")) return fail(peek(), "there are no tuples; an expression is one value");
      if (!expect(")", "to close the parenthesis")) return kFailed;
    } else if (is_symbol("[")) {
      return fail(token, "there are no lists; '[' follows the name of a captured tensor");
    } else {
      return unexpected("a value");
    }
    if (value >= 0 && is_symbol("[")) {
      return fail(peek(), "only a captured tensor has indices, all in one pair of brackets: name[i, j]");
    }
    if (value >= 0 && is_symbol("(")) return fail(peek(), "only a function's name can be called");
    return value;
  }

  // ---- Names ----

  NodeId named() {
    const Token& token = peek();
    const std::string_view name = token.text;
    if (name == "true" || name == "True") return bool_literal(take(), true);
    if (name == "false" || name == "False") return bool_literal(take(), false);
    if (name == "inf") return float_literal(take(), std::numeric_limits<double>::infinity());
    if (name == "nan") return float_literal(take(), std::numeric_limits<double>::quiet_NaN());
    if (name_kind(name) == NameKind::kKeyword) return unexpected("a value");
    if (is_symbol("[", 1)) return read();
    if (is_symbol("(", 1)) return call();
    take();
    if (const auto local = scope_.find(name); local != scope_.end()) return value_of(local->second, token);
    if (const ElementName* element = find_element_name(name)) {
      if (has_header_)
        return fail(token, quoted(name) + " is called " + quoted(header_name(element->op)) + " in this text");
      return element_value(element->op, token);
    }
    if (name_kind(name) == NameKind::kFunction) {
      return fail(token, quoted(name) + " is a function; call it: " + std::string(name) + "(...)");
    }
    if (const RegistryEntry* entry = builder_.registry.find(name)) return expand(*entry, {}, token);
    captured_names_.emplace(name);
    return captured_scalar(name, token);
  }

  NodeId value_of(const Binding& binding, const Token& token) {
    switch (binding.kind) {
      case Binding::Kind::kValue:
        return binding.value;
      case Binding::Kind::kElement:
        return element_value(binding.element, token);
      case Binding::Kind::kCaptured:
        return captured_scalar(binding.captured, token);
    }
    return kFailed;
  }

  NodeId element_value(Op op, const Token& token) {
    if (op == Op::kScore && builder_.kind == ModKind::kMaskMod) {
      return fail(token, "a mask_mod decides without the score: it may read b, h, q_idx, kv_idx and captured values");
    }
    return builder_.leaf({.op = op, .location = location_of(token)});
  }

  NodeId captured_scalar(std::string_view name, const Token& token) {
    const std::int32_t capture = builder_.capture(name, 0, location_of(token));
    return capture < 0 ? kFailed : builder_.leaf({.op = Op::kRead, .capture = capture, .location = location_of(token)});
  }

  std::string_view header_name(Op op) const {
    for (const auto& [name, binding] : scope_) {
      if (binding.kind == Binding::Kind::kElement && binding.element == op) return name;
    }
    return op_name(op);
  }

  // name "[" expression { "," expression } "]"
  NodeId read() {
    const Token& token = take();
    std::string_view name = token.text;
    if (const auto local = scope_.find(name); local != scope_.end()) {
      if (local->second.kind != Binding::Kind::kCaptured) {
        return fail(token, quoted(name) + " names a value here, not a captured tensor");
      }
      name = local->second.captured;
    } else {
      captured_names_.emplace(name);
    }
    take();
    if (is_symbol("]")) return fail(peek(), "an index is missing; a captured scalar is written without brackets");
    std::vector<NodeId> indices;
    do {
      const NodeId index = expression();
      if (index < 0) return kFailed;
      indices.push_back(index);
    } while (accept(","));
    if (!expect("]", "to close the indices of " + quoted(name))) return kFailed;
    if (is_symbol("[")) {
      return fail(peek(), "the indices of " + quoted(name) + " stand in one pair of brackets: name[i, j]");
    }
    if (indices.size() > static_cast<std::size_t>(kMaxRank)) {
      return fail(token, quoted(name) + " has " + counted(indices.size(), "index") +
                             "es; a captured tensor has at most " + std::to_string(kMaxRank) + " dimensions");
    }
    const std::int32_t capture = builder_.capture(name, static_cast<int>(indices.size()), location_of(token));
    if (capture < 0) return kFailed;
    return builder_.add(
        {.op = Op::kRead, .capture = capture, .args = std::move(indices), .location = location_of(token)});
  }

  // An argument that is nothing but a name nobody knows may become the name of a captured tensor.
  std::optional<Binding> captured_argument() const {
    if (peek().kind != TokenKind::kName || !(is_symbol(",", 1) || is_symbol(")", 1))) return std::nullopt;
    const std::string_view name = peek().text;
    if (const auto local = scope_.find(name); local != scope_.end()) {
      if (local->second.kind != Binding::Kind::kCaptured) return std::nullopt;
      return local->second;
    }
    if (name_kind(name) != NameKind::kFree || builder_.registry.find(name)) return std::nullopt;
    return Binding{.kind = Binding::Kind::kCaptured, .captured = std::string(name)};
  }

  // name "(" [ expression { "," expression } ] ")"
  NodeId call() {
    const Token& token = take();
    const std::string_view name = token.text;
    const FunctionInfo* function = find_function(name);
    const RegistryEntry* entry = builder_.registry.find(name);
    if (scope_.contains(name) || find_element_name(name)) {
      return fail(token, quoted(name) + " is a value, not a function");
    }
    if (!function && !entry && name != "where") return unknown_function(token);
    take();
    std::vector<Binding> arguments;
    if (!accept(")")) {
      do {
        std::optional<Binding> captured = entry ? captured_argument() : std::nullopt;
        if (captured) {
          if (!scope_.contains(peek().text)) captured_names_.emplace(peek().text);
          take();
          arguments.push_back(std::move(*captured));
          continue;
        }
        const NodeId value = expression();
        if (value < 0) return kFailed;
        if (is_symbol("=")) return fail(peek(), "arguments are given in order, without names");
        arguments.push_back({.kind = Binding::Kind::kValue, .value = value});
      } while (accept(","));
      if (!expect(")", "to close the arguments of " + quoted(name))) return kFailed;
    }
    if (entry) return expand(*entry, std::move(arguments), token);
    const std::size_t arity = function ? static_cast<std::size_t>(function->arity) : 3;
    const bool variadic = function && function->variadic;
    if (arguments.size() < arity || (arguments.size() > arity && !variadic)) {
      return fail(token, quoted(name) + " takes " + counted(arity, "argument") + (variadic ? " or more" : "") +
                             ", not " + std::to_string(arguments.size()));
    }
    if (!function) {
      return make(Op::kSelect, token, {arguments[0].value, arguments[1].value, arguments[2].value});
    }
    std::vector<NodeId> args;
    args.reserve(arity);
    for (std::size_t i = 0; i < arity; ++i) args.push_back(arguments[i].value);
    for (std::size_t next = arity;; ++next) {
      const NodeId result = builder_.add(
          {.op = Op::kCall, .function = function->function, .args = std::move(args), .location = location_of(token)});
      if (result < 0 || next == arguments.size()) return result;
      args = {result, arguments[next].value};
    }
  }

  NodeId unknown_function(const Token& token) {
    const std::string_view name = token.text;
    if (const Refused* other = find_refused(kOtherNames, name)) {
      return fail(token, "there is no function " + quoted(name) + "; " + std::string(other->hint));
    }
    Nearest nearest(name);
    for (const FunctionInfo& info : functions()) nearest.offer(info.name);
    nearest.offer("where");
    for (const RegistryEntry* entry : builder_.registry.entries()) nearest.offer(entry->name);
    if (!nearest.found().empty()) {
      return fail(token,
                  "there is no function or mod " + quoted(name) + "; did you mean " + quoted(nearest.found()) + "?");
    }
    return fail(
        token, "there is no function or mod " + quoted(name) + "; a captured tensor is read with brackets: name[i, j]");
  }

  // A registered mod in place. Its parameters are values or captured names, computed once; its text sees no name of
  // this one.
  NodeId expand(const RegistryEntry& entry, std::vector<Binding> arguments, const Token& token) {
    if (arguments.size() != entry.parameters.size()) {
      std::string usage = entry.name;
      for (std::size_t i = 0; i < entry.parameters.size(); ++i) usage += (i ? ", " : "(") + entry.parameters[i];
      if (!entry.parameters.empty()) usage += ")";
      return fail(token, "the mod " + quoted(entry.name) + " takes " + counted(entry.parameters.size(), "argument") +
                             ", not " + std::to_string(arguments.size()) + ": " + usage);
    }
    const Nested nested(*this);
    if (!nested) return kFailed;
    if (++builder_.expansions > kMaxNodes) {
      return fail(token, "the expression expands more than " + std::to_string(kMaxNodes) + " registered mods");
    }
    Scope scope;
    for (std::size_t i = 0; i < arguments.size(); ++i) scope.emplace(entry.parameters[i], std::move(arguments[i]));
    const NodeId value = Parser(builder_, entry.body, std::move(scope), location_of(token)).program();
    if (value < 0) return kFailed;
    if (entry.is_mask) builder_.is_mask[static_cast<std::size_t>(value)] = true;
    return value;
  }

  // ---- Nodes ----

  NodeId make(Op op, const Token& token, std::vector<NodeId> args) {
    return builder_.add({.op = op, .args = std::move(args), .location = location_of(token)});
  }
  NodeId int_literal(const Token& token) {
    return builder_.leaf(
        {.op = Op::kInt, .int_value = static_cast<std::int64_t>(token.int_value), .location = location_of(token)});
  }
  NodeId float_literal(const Token& token, double value) {
    return builder_.leaf({.op = Op::kFloat, .float_value = value, .location = location_of(token)});
  }
  NodeId bool_literal(const Token& token, bool value) {
    return builder_.leaf({.op = Op::kBool, .int_value = value, .location = location_of(token)});
  }

  // The magnitude of the smallest int, which is a literal only behind a minus.
  static constexpr std::uint64_t kSmallestIntMagnitude = std::uint64_t{1} << 63;

  Builder& builder_;
  std::string_view text_;
  std::vector<Token> tokens_;
  std::size_t at_ = 0;
  Scope scope_;
  std::set<std::string, std::less<>> let_names_;
  std::set<std::string, std::less<>> captured_names_;  // that this text itself captures
  std::optional<SourceLocation> call_site_;
  bool has_header_ = false;
};

}  // namespace

Expected<Expr> parse(std::string_view text, ModKind kind, const Registry& registry) {
  Builder builder{.registry = registry, .kind = kind};
  NodeId root = Parser(builder, text, {}, std::nullopt).program();
  if (root >= 0 && kind == ModKind::kScoreMod && builder.is_mask[static_cast<std::size_t>(root)]) {
    const SourceLocation location = builder.expr[root].location;
    const NodeId score = builder.leaf({.op = Op::kScore, .location = location});
    const NodeId infinity =
        builder.leaf({.op = Op::kFloat, .float_value = std::numeric_limits<double>::infinity(), .location = location});
    const NodeId dropped = builder.add({.op = Op::kNeg, .args = {infinity}, .location = location});
    root = builder.add({.op = Op::kSelect, .args = {root, score, dropped}, .location = location});
  }
  if (root < 0) return builder.error.value_or(Error{"the expression is not valid", {}});
  return builder.finish(root);
}

std::optional<Error> check_body(const RegistryEntry& entry, const Registry& registry) {
  Builder builder{.registry = registry, .kind = entry.is_mask ? ModKind::kMaskMod : ModKind::kScoreMod};
  Scope scope;
  for (const std::string& parameter : entry.parameters) {
    scope.emplace(parameter, Binding{.kind = Binding::Kind::kCaptured, .captured = parameter});
  }
  if (Parser(builder, entry.body, std::move(scope), std::nullopt).program() >= 0) return std::nullopt;
  return builder.error.value_or(Error{"the expression is not valid", {}});
}

NameKind name_kind(std::string_view name) {
  if (find_element_name(name)) return NameKind::kElement;
  if (find_function(name) || name == "where") return NameKind::kFunction;
  const bool is_keyword = std::find(std::begin(kKeywords), std::end(kKeywords), name) != std::end(kKeywords);
  return is_keyword || find_refused(kRefusedWords, name) ? NameKind::kKeyword : NameKind::kFree;
}

std::string nearest_name(std::string_view name, std::span<const std::string> others, const Registry& registry) {
  Nearest nearest(name);
  for (const std::string& other : others) nearest.offer(other);
  for (const ElementName& element : kElementNames) nearest.offer(element.name);
  for (const FunctionInfo& info : functions()) nearest.offer(info.name);
  nearest.offer("where");
  for (const RegistryEntry* entry : registry.entries()) nearest.offer(entry->name);
  return nearest.found();
}

}  // namespace attnjit::dsl
