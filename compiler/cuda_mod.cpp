// From the mod's operations to text that people read: operations become the nodes of a small graph of CUDA expressions,
// nodes are sorted into the hooks by what they depend on, and each hook prints what it needs.
#include "compiler/cuda_mod.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <map>
#include <numbers>
#include <optional>
#include <set>
#include <span>
#include <tuple>
#include <utility>
#include <vector>

#include "compiler/dialect/dialect.h"
#include "compiler/passes/passes.h"
#include "compiler/tile_facts.h"
#include "llvm/ADT/DenseMap.h"
#include "llvm/ADT/DenseSet.h"
#include "llvm/ADT/SmallString.h"
#include "llvm/ADT/TypeSwitch.h"
#include "mlir/Dialect/Arith/IR/Arith.h"
#include "mlir/Dialect/Math/IR/Math.h"
#include "mlir/IR/Matchers.h"

namespace attnjit::compiler {
namespace {

namespace arith = mlir::arith;
namespace math = mlir::math;
using mlir::Value;

// ---- The graph

// In the order of C++'s conversions.
enum class CType : std::uint8_t { kBool, kInt, kLong, kFloat };
const char* type_name(CType type) {
  constexpr const char* kNames[] = {"bool", "int", "long long", "float"};
  return kNames[static_cast<int>(type)];
}

// Where a value is known, and so which hook computes it. What is known anywhere (literals, the parameters' strides and
// extents) is written out at each use.
enum class Level : std::uint8_t { kAnywhere, kBlock, kRow, kColumn, kDiagonal, kElement };
enum Dependence : unsigned {
  kOnBlock = 1,
  kOnQuery = 2,
  kOnKey = 4,
  kOnDifference = 8,
  kOnScore = 16,      // or on the gradient that the caller gives
  kOnGradients = 32,  // a layout that only a sink's offset() is given
};
Level level_of(unsigned depends) {
  switch (depends & ~kOnBlock) {
    case 0:
      return depends & kOnBlock ? Level::kBlock : Level::kAnywhere;
    case kOnQuery:
      return Level::kRow;
    case kOnKey:
      return Level::kColumn;
    case kOnDifference:
      return Level::kDiagonal;
    default:
      return Level::kElement;
  }
}

// C++'s precedences, as far as they matter here; operands of & | ^ and shifts get parentheses in any case.
enum Precedence { kChoice, kBits, kEquality, kOrder, kSum, kProduct, kUnary, kPostfix };

enum class Form : std::uint8_t { kLeaf, kUnary, kBinary, kChoice, kCall };

using NodeId = int;
struct Node {
  Form form = Form::kLeaf;
  std::string text;  // of a leaf, or the operator, or the function
  std::vector<NodeId> args = {};
  CType type = CType::kFloat;
  unsigned depends = 0;
  Precedence precedence = kPostfix;
  std::string name = {};  // a wish
};

class Graph {
 public:
  const Node& operator[](NodeId id) const { return nodes_[static_cast<std::size_t>(id)]; }
  int size() const { return static_cast<int>(nodes_.size()); }
  Level level(NodeId id) const { return level_of((*this)[id].depends); }

  bool is_load(NodeId id) const { return (*this)[id].text.starts_with("load<"); }

  // Visits what `root` is made of, each node once; where `enters` says no, not what that one is made of.
  void walk(NodeId root, llvm::function_ref<bool(NodeId)> enters) const {
    std::set<NodeId> seen;
    std::vector<NodeId> open{root};
    while (!open.empty()) {
      const NodeId id = open.back();
      open.pop_back();
      if (!seen.insert(id).second || !enters(id)) continue;
      open.insert(open.end(), (*this)[id].args.begin(), (*this)[id].args.end());
    }
  }

  // The same node for the same operation.
  NodeId add(Node node) {
    for (const NodeId arg : node.args) node.depends |= (*this)[arg].depends;
    const auto key = std::tuple(node.form, node.text, node.args, node.type);
    const auto [found, is_new] = known_.try_emplace(key, size());
    if (is_new) nodes_.push_back(std::move(node));
    return found->second;
  }
  NodeId leaf(std::string text, CType type, unsigned depends = 0) {
    return add({.form = Form::kLeaf, .text = std::move(text), .type = type, .depends = depends});
  }
  NodeId binary(const char* op, NodeId a, NodeId b, CType type, Precedence precedence) {
    return add({.form = Form::kBinary, .text = op, .args = {a, b}, .type = type, .precedence = precedence});
  }
  NodeId unary(const char* op, NodeId a, CType type) {
    return add({.form = Form::kUnary, .text = op, .args = {a}, .type = type, .precedence = kUnary});
  }
  NodeId call(std::string function, std::vector<NodeId> args, CType type, unsigned depends = 0, std::string name = {}) {
    return add({.form = Form::kCall,
                .text = std::move(function),
                .args = std::move(args),
                .type = type,
                .depends = depends,
                .name = std::move(name)});
  }

 private:
  std::vector<Node> nodes_;  // arguments precede their users
  std::map<std::tuple<Form, std::string, std::vector<NodeId>, CType>, NodeId> known_;
};

// ---- From operations to nodes

std::string float_text(float value) {
  if (std::isnan(value)) return "kNan";
  if (std::isinf(value)) return value < 0 ? "-kInfinity" : "kInfinity";
  if (std::abs(value) == std::numeric_limits<float>::max()) return value < 0 ? "-kMaxFloat" : "kMaxFloat";
  // The fewest digits that read back.
  char text[32];
  std::string result(text, std::to_chars(text, text + sizeof(text), value).ptr);
  if (result.find_first_of(".e") == std::string::npos) result += ".0";
  return result + "f";
}

std::string integer_text(std::int64_t value, CType type) {
  if (type == CType::kInt)
    return value == std::numeric_limits<std::int32_t>::min() ? "(-2147483647 - 1)" : std::to_string(value);
  if (value == std::numeric_limits<std::int64_t>::min()) return "(-9223372036854775807ll - 1)";
  return std::to_string(value) + "ll";
}

bool fits_int(std::int64_t value) { return value == static_cast<std::int32_t>(value); }

// What the score's approximations may do: how far a value's error is multiplied on its way to the result, and whether a
// jump is in between. Values not listed do not reach the result.
struct Reach {
  double gain = 0;  // infinite where it cannot be told
  bool jumps = false;
};

// Where a captured read's gradient goes.
struct Sink {
  int capture = 0;
  NodeId value = -1, offset = -1;
  SinkLevel level = SinkLevel::kElement;
  bool row_shift = false;
};

// Whether attnjit-differentiate made it.
bool is_backward(mlir::func::FuncOp function) { return function.getNumArguments() == 2; }

// As a float: every position, and so every difference, is below 2^24.
bool difference_is_exact(const ModProblem& problem) {
  constexpr std::int64_t kExact = 1 << 24;
  return problem.seqlen_q <= kExact && problem.seqlen_kv <= kExact;
}

class Lowering {
 public:
  Lowering(Graph& graph, mlir::func::FuncOp function, const ModProblem& problem, CudaAccuracy accuracy)
      : g_(graph), function_(function), problem_(problem), accuracy_(accuracy) {}

  // False with `error` set.
  bool run() {
    find_reach();
    nodes_[function_.getArgument(0)] = g_.leaf("s", CType::kFloat, kOnScore);
    if (is_backward(function_)) {
      nodes_[function_.getArgument(1)] = g_.leaf("grad", CType::kFloat, kOnScore);
      if (accuracy_ != CudaAccuracy::kFull) {
        const CudaAccuracy wanted = std::exchange(accuracy_, CudaAccuracy::kFull);
        if (!lower_all()) return false;
        exact_ = nodes_;
        accuracy_ = wanted;
      }
    }
    if (!lower_all()) return false;
    mlir::Operation* const ret = function_.front().getTerminator();
    value = nodes_[ret->getOperand(0)];
    keep = nodes_[ret->getOperand(1)];
    if (!is_backward(function_)) return true;
    dscore = nodes_[ret->getOperand(2)];
    for (const Value result : ret->getOperands().drop_front(3)) {
      auto sink = result.getDefiningOp<SinkOp>();
      if (!sink) {
        error = "the function returns more than its sinks";
        return false;
      }
      sinks.push_back(place(sink));
    }
    return true;
  }

  // Of compiler/tile_facts.h's function: the nodes of its results, or none with `error` set.
  std::vector<NodeId> run_tile_facts() {
    std::vector<NodeId> results;
    if (!lower_all()) return results;
    for (const Value result : function_.front().getTerminator()->getOperands()) results.push_back(node(result));
    return results;
  }

  NodeId value = -1, keep = -1;
  // Of the backward only.
  NodeId dscore = -1;
  std::vector<Sink> sinks;
  std::string error;

 private:
  bool lower_all() {
    for (mlir::Operation& op : function_.front().without_terminator()) {
      const Value result = op.getResult(0);
      const NodeId exact = jumps_in_derivative_only(op) ? exact_.lookup_or(result, NodeId{-1}) : -1;
      const NodeId node = exact >= 0 ? exact : lower(op);
      if (node < 0) {
        error = "'" + op.getName().getStringRef().str() + "' has no CUDA spelling";
        return false;
      }
      nodes_[result] = node;
    }
    return true;
  }

  NodeId node(Value v) { return nodes_.lookup(v); }
  NodeId arg(mlir::Operation& op, unsigned i) { return node(op.getOperand(i)); }
  NodeId f32(float x) { return literal(float_text(x), CType::kFloat); }
  NodeId literal(std::string text, CType type) {
    const bool negative = text[0] == '-';
    return g_.add(
        {.form = Form::kLeaf, .text = std::move(text), .type = type, .precedence = negative ? kUnary : kPostfix});
  }
  NodeId integer(std::int64_t x) {
    const CType type = fits_int(x) ? CType::kInt : CType::kLong;
    return literal(integer_text(x, type), type);
  }
  NodeId to(NodeId id, CType type) {
    if (g_[id].type == type) return id;
    if (type == CType::kFloat && g_[id].depends == kOnDifference && difference_is_exact(problem_)) {
      const bool negated = g_[id].form == Form::kUnary && g_[id].text == "-";
      const Node& difference = negated ? g_[g_[id].args[0]] : g_[id];
      if (difference.text == "q_minus_kv") {
        const NodeId as_float = g_.leaf("q_minus_kv_float", CType::kFloat, kOnDifference);
        return negated ? g_.unary("-", as_float, CType::kFloat) : as_float;
      }
    }
    if (type == CType::kLong && g_[id].form == Form::kLeaf && g_[id].depends == 0) {
      std::int64_t literal_value = 0;
      if (!llvm::StringRef(g_[id].text).getAsInteger(10, literal_value))
        return literal(integer_text(literal_value, CType::kLong), CType::kLong);
    }
    std::string name;
    if (type == CType::kFloat && g_[id].form == Form::kLeaf)  // of `tile.q_first` the member
      name = g_[id].text.substr(g_[id].text.rfind('.') + 1) + "_float";
    return g_.call(std::string("static_cast<") + type_name(type) + ">", {id}, type, 0, std::move(name));
  }
  NodeId same(const char* op, NodeId a, NodeId b, Precedence precedence) {
    return g_.binary(op, a, b, std::max(g_[a].type, g_[b].type), precedence);
  }

  // ---- Approximations

  static bool is_literal(Value v, float* value = nullptr) {
    mlir::FloatAttr attribute;
    if (!mlir::matchPattern(v, mlir::m_Constant(&attribute))) return false;
    if (value) *value = attribute.getValue().convertToFloat();
    return true;
  }

  // Of the value alone, whatever a derivative makes of the same operations: the backward has to compute the very value
  // that the forward summed up in LSE.
  void find_reach() {
    mlir::Block& block = function_.front();
    constexpr double kUnknown = std::numeric_limits<double>::infinity();
    const mlir::OperandRange results = block.getTerminator()->getOperands();
    in_value_ = {results[0], results[1]};
    reach_[results[0]] = {1.0, false};
    for (mlir::Operation& op : llvm::reverse(block.without_terminator())) {
      const Value result = op.getResult(0);
      if (!in_value_.contains(result)) continue;
      in_value_.insert(op.operand_begin(), op.operand_end());
      const Reach reach = result.getType().isF32() ? reach_.lookup(result) : Reach{kUnknown, true};
      for (unsigned i = 0; i < op.getNumOperands(); ++i) {
        Reach through = reach;
        float other = 0;
        if (llvm::isa<arith::MulFOp>(op)) {
          through.gain *= is_literal(op.getOperand(1 - i), &other) ? std::abs(static_cast<double>(other)) : kUnknown;
        } else if (llvm::isa<arith::DivFOp>(op)) {
          through.gain /= i == 0 && is_literal(op.getOperand(1), &other) ? std::abs(static_cast<double>(other)) : 0.0;
        } else if (llvm::isa<arith::CmpFOp>(op)) {
          // Where masks made of float's smallest numbers are told apart nothing is near.
          const bool far = is_literal(op.getOperand(1 - i), &other) && !(std::abs(other) < 1e37f);
          through = far ? Reach{} : Reach{kUnknown, true};
        } else if (llvm::isa<math::FloorOp, math::CeilOp, math::RoundEvenOp, arith::RemFOp, ToIntOp>(op)) {
          through = {kUnknown, true};
        } else if (!llvm::isa<arith::AddFOp, arith::SubFOp, arith::NegFOp, arith::SelectOp, arith::MinimumFOp,
                              arith::MaximumFOp>(op)) {
          through.gain = kUnknown;
        }
        Reach& known = reach_[op.getOperand(i)];
        known.gain = std::max(known.gain, through.gain);
        known.jumps |= through.jumps;
      }
    }
  }

  // A jump that the value does not have, as of a minimum's derivative: it is to be where exact operands put it, also
  // where the value's own are approximate.
  bool jumps_in_derivative_only(mlir::Operation& op) const {
    return !in_value_.contains(op.getResult(0)) &&
           llvm::isa<arith::CmpFOp, math::FloorOp, math::CeilOp, math::RoundEvenOp, arith::RemFOp, ToIntOp>(op);
  }

  // Whether `op` depends on the score, which is rounded more than an approximation of a few last places is off, and
  // nothing behind it jumps.
  bool approximate(mlir::Operation& op) {
    if (accuracy_ == CudaAccuracy::kFull || reach_.lookup(op.getResult(0)).jumps) return false;
    return llvm::any_of(op.getOperands(), [&](Value v) { return (g_[node(v)].depends & kOnScore) != 0; });
  }

  NodeId tanh(mlir::Operation& op) {
    // Absolute errors count: those of soft caps that people use. The forward's value comes in log2 units.
    const double largest_gain = is_backward(function_) ? 128 : 128 * std::numbers::log2e;
    const Value result = op.getResult(0);
    const bool coarse = approximate(op) && in_value_.contains(result) && reach_.lookup(result).gain <= largest_gain;
    const char* const function = !coarse                                ? "tanhf"
                                 : accuracy_ == CudaAccuracy::kBFloat16 ? "tanh_approx"
                                                                        : "tanh_by_exp2";
    return g_.call(function, {arg(op, 0)}, CType::kFloat);
  }

  NodeId divide(mlir::Operation& op) {
    const NodeId a = arg(op, 0), b = arg(op, 1);
    float divisor = 0;
    // Far from float's ends, where the steps of divide_by neither overflow nor vanish.
    if (is_literal(op.getOperand(1), &divisor) && std::abs(divisor) > 0x1p-60f && std::abs(divisor) < 0x1p60f) {
      const float reciprocal = 1.0f / divisor;
      if (approximate(op)) return g_.binary("*", a, f32(reciprocal), CType::kFloat, kProduct);
      if (g_.level(a) == Level::kElement) return g_.call("divide_by", {a, b, f32(reciprocal)}, CType::kFloat);
    }
    if (!approximate(op)) return g_.binary("/", a, b, CType::kFloat, kProduct);
    float dividend = 0;
    if (is_literal(op.getOperand(0), &dividend) && dividend == 1.0f)
      return g_.call("reciprocal_approx", {b}, CType::kFloat);
    return g_.call("divide_approx", {a, b}, CType::kFloat);
  }

  // ---- Integers

  // query * q_idx + key * kv_idx + rest, exactly; `rest` -1 for nothing.
  struct Linear {
    int query = 0, key = 0;
    NodeId rest = -1;
  };

  // As far as it helps to find differences of the two positions: coefficients of -1, 0 and 1.
  std::optional<Linear> linear(NodeId id) {
    if (id == q_idx_) return Linear{.query = 1};
    if (id == kv_idx_) return Linear{.key = 1};
    if (const auto found = linear_.find(id); found != linear_.end()) return found->second;
    if ((g_[id].depends & (kOnQuery | kOnKey)) == 0 && g_[id].type == CType::kInt) return Linear{.rest = id};
    return std::nullopt;
  }
  // a + sign * b, where at most one of them has a rest that would have to be added or negated.
  std::optional<Linear> combined(NodeId a, int sign, NodeId b) {
    const std::optional<Linear> x = linear(a), y = linear(b);
    if (!x || !y || (x->rest >= 0 && y->rest >= 0)) return std::nullopt;
    NodeId rest = x->rest;
    if (y->rest >= 0) rest = sign > 0 ? y->rest : negated(y->rest);
    if (y->rest >= 0 && rest < 0) return std::nullopt;
    const Linear sum{.query = x->query + sign * y->query, .key = x->key + sign * y->key, .rest = rest};
    if (std::abs(sum.query) > 1 || std::abs(sum.key) > 1) return std::nullopt;
    return sum;
  }
  // A literal with the other sign, or -1.
  NodeId negated(NodeId id) {
    std::int64_t value = 0;
    const llvm::StringRef text = g_[id].text;
    if (g_[id].form != Form::kLeaf || text.getAsInteger(10, value)) return -1;
    return integer(-value);
  }
  NodeId q_minus_kv() { return g_.leaf("q_minus_kv", CType::kInt, kOnDifference); }

  static bool is_difference(const Linear& x) { return x.query != 0 && x.query + x.key == 0; }
  // The difference of two positions fits 32 bits, and what is added to it gives a proven result.
  NodeId by_difference(const Linear& x) {
    if (x.rest < 0) return x.query > 0 ? q_minus_kv() : g_.unary("-", q_minus_kv(), CType::kInt);
    return x.query > 0 ? g_.binary("+", q_minus_kv(), x.rest, CType::kInt, kSum)
                       : g_.binary("-", x.rest, q_minus_kv(), CType::kInt, kSum);
  }

  NodeId arithmetic(mlir::Operation& op, const char* symbol, const char* wrapping, Precedence precedence) {
    const NodeId a = arg(op, 0), b = arg(op, 1);
    // 32-bit operations are those proven not to overflow.
    if (!op.getResult(0).getType().isInteger(32)) return g_.call(wrapping, {a, b}, CType::kLong);
    if (llvm::isa<arith::SubIOp>(op) && mlir::matchPattern(op.getOperand(0), mlir::m_Zero()))
      return g_.unary("-", to(b, CType::kInt), CType::kInt);
    std::optional<Linear> sum;
    if (precedence == kSum) sum = combined(a, llvm::isa<arith::SubIOp>(op) ? -1 : 1, b);
    if (sum && is_difference(*sum)) return by_difference(*sum);
    const NodeId result = g_.binary(symbol, to(a, CType::kInt), to(b, CType::kInt), CType::kInt, precedence);
    if (sum) linear_.insert_or_assign(result, *sum);
    return result;
  }

  NodeId extreme(mlir::Operation& op, const char* function) {
    const NodeId a = arg(op, 0), b = arg(op, 1);
    const CType type = std::max(g_[a].type, g_[b].type);
    return g_.call(function, {to(a, type), to(b, type)}, type);
  }

  NodeId bits(mlir::Operation& op, const char* symbol) {
    const NodeId a = arg(op, 0), b = arg(op, 1);
    const bool is_xor = llvm::isa<arith::XOrIOp>(op);
    llvm::APInt literal;
    const bool inverts =
        is_xor && mlir::matchPattern(op.getOperand(1), mlir::m_ConstantInt(&literal)) && literal.isAllOnes();
    if (op.getResult(0).getType().isInteger(1)) {
      if (inverts) return g_.unary("!", a, CType::kBool);
      return is_xor ? g_.binary("!=", a, b, CType::kBool, kEquality) : g_.binary(symbol, a, b, CType::kBool, kBits);
    }
    if (inverts) return g_.unary("~", a, g_[a].type);
    return same(symbol, a, b, kBits);
  }

  NodeId divide_integers(mlir::Operation& op) {
    const bool is_mod = llvm::isa<FloorModOp>(op);
    NodeId a = arg(op, 0);
    const NodeId b = arg(op, 1);
    const CType type =
        op.getResult(0).getType().isInteger(32) ? CType::kInt : std::max({CType::kLong, g_[a].type, g_[b].type});
    a = to(a, type);
    llvm::APInt divisor;
    if (mlir::matchPattern(op.getOperand(1), mlir::m_ConstantInt(&divisor)) && divisor.isStrictlyPositive() &&
        divisor.isPowerOf2()) {
      // Shifts and masks round down.
      return is_mod ? same("&", a, integer(divisor.getSExtValue() - 1), kBits)
                    : g_.binary(">>", a, integer(divisor.logBase2()), type, kBits);
    }
    return g_.call(is_mod ? "floor_mod" : "floor_div", {a, to(b, type)}, type);
  }

  NodeId compare_integers(arith::CmpIOp op) {
    using P = arith::CmpIPredicate;
    const P p = op.getPredicate();
    NodeId a = node(op.getLhs()), b = node(op.getRhs());
    const bool is_unsigned = p == P::ult || p == P::ule || p == P::ugt || p == P::uge;
    const bool is_bool = op.getLhs().getType().isInteger(1);
    if (!is_bool && !is_unsigned) {
      // a < b where a - b is a difference of positions and a rest: the rest goes to the other side.
      const std::optional<Linear> x = linear(a), y = linear(b);
      if (x && y && x->query + x->key == 1 && y->query + y->key == 1 && x->query * x->key == 0 &&
          y->query * y->key == 0 && x->query != y->query && (x->rest < 0 || y->rest < 0)) {
        const bool query_first = x->query == 1;
        // query + r < key is q_minus_kv < -r; query < key + r is q_minus_kv < r.
        const NodeId with_query = query_first ? x->rest : y->rest;
        const NodeId with_key = query_first ? y->rest : x->rest;
        const NodeId bound = with_key >= 0 ? with_key : with_query >= 0 ? negated(with_query) : integer(0);
        if (bound >= 0) {
          a = query_first ? q_minus_kv() : bound;
          b = query_first ? bound : q_minus_kv();
        }
      }
    }
    if (is_bool && !is_unsigned && p != P::eq && p != P::ne) return -1;
    if (!is_bool && is_unsigned) {
      const bool is_long = g_[a].type == CType::kLong || g_[b].type == CType::kLong;
      const char* const cast = is_long ? "static_cast<unsigned long long>" : "static_cast<unsigned>";
      const CType type = is_long ? CType::kLong : CType::kInt;
      a = g_.call(cast, {a}, type);
      b = g_.call(cast, {b}, type);
    }
    switch (p) {
      case P::eq:
        return g_.binary("==", a, b, CType::kBool, kEquality);
      case P::ne:
        return g_.binary("!=", a, b, CType::kBool, kEquality);
      case P::slt:
      case P::ult:
        return g_.binary("<", a, b, CType::kBool, kOrder);
      case P::sle:
      case P::ule:
        return g_.binary("<=", a, b, CType::kBool, kOrder);
      case P::sgt:
      case P::ugt:
        return g_.binary(">", a, b, CType::kBool, kOrder);
      case P::sge:
      case P::uge:
        return g_.binary(">=", a, b, CType::kBool, kOrder);
    }
    return -1;
  }

  NodeId compare_floats(arith::CmpFOp op) {
    using P = arith::CmpFPredicate;
    const NodeId a = node(op.getLhs()), b = node(op.getRhs());
    const auto is = [&](const char* symbol) {
      const bool equality = symbol[0] == '=' || symbol[0] == '!';
      return g_.binary(symbol, a, b, CType::kBool, equality ? kEquality : kOrder);
    };
    const auto is_not = [&](const char* symbol) { return g_.unary("!", is(symbol), CType::kBool); };
    const auto is_nan = [&](NodeId x) { return g_.binary("!=", x, x, CType::kBool, kEquality); };
    const auto unordered = [&] {
      const bool a_literal = is_literal(op.getLhs()), b_literal = is_literal(op.getRhs());
      if (a == b || b_literal) return is_nan(a);
      return a_literal ? is_nan(b) : g_.binary("|", is_nan(a), is_nan(b), CType::kBool, kBits);
    };
    switch (op.getPredicate()) {
      case P::OEQ:
        return is("==");
      case P::UNE:
        return is("!=");
      case P::OLT:
        return is("<");
      case P::OLE:
        return is("<=");
      case P::OGT:
        return is(">");
      case P::OGE:
        return is(">=");
      case P::ULT:
        return is_not(">=");
      case P::ULE:
        return is_not(">");
      case P::UGT:
        return is_not("<=");
      case P::UGE:
        return is_not("<");
      case P::ONE:
        return g_.binary("|", is("<"), is(">"), CType::kBool, kBits);
      case P::UEQ:
        return g_.unary("!", g_.binary("|", is("<"), is(">"), CType::kBool, kBits), CType::kBool);
      case P::UNO:
        return unordered();
      case P::ORD:
        return g_.unary("!", unordered(), CType::kBool);
      case P::AlwaysFalse:
        return literal("false", CType::kBool);
      case P::AlwaysTrue:
        return literal("true", CType::kBool);
    }
    return -1;
  }

  // ---- Captured reads

  std::string capture_name(unsigned capture) const {
    const std::vector<dsl::Capture>& names = problem_.score_mod.captures;
    // Behind a user's name there is no keyword and no name of ours.
    return (capture < names.size() ? names[capture].name : "captured" + std::to_string(capture)) + "_value";
  }

  static std::pair<const char*, CType> element(mlir::Type type) {
    if (type.isF32()) return {"float", CType::kFloat};
    if (type.isF16()) return {"Float16", CType::kFloat};
    if (type.isBF16()) return {"BFloat16", CType::kFloat};
    switch (type.getIntOrFloatBitWidth()) {
      case 1:
        return {"bool", CType::kBool};
      case 8:
        return {type.isUnsignedInteger() ? "unsigned char" : "signed char", CType::kInt};
      case 16:
        return {"short", CType::kInt};
      case 32:
        return {"int", CType::kInt};
      default:
        return {"long long", CType::kLong};
    }
  }

  NodeId read(ReadOp op) {
    const unsigned capture = op.getCapture();
    const std::string view = "captured[" + std::to_string(capture) + "]";
    const NodeId view_node = g_.leaf(view, CType::kInt);
    const bool summary = capture >= problem_.captures.size();  // of fewer than 2^31 elements
    const bool fits_32 = summary || problem_.captures[capture].offsets_fit_32;
    const auto [stored, type] = element(op.getElement());
    const std::string function = std::string("load<") + stored + ">";
    if (op.getIndices().empty()) return g_.call(function, {view_node}, type, kOnBlock, capture_name(capture));

    Sums offset(*this);
    const llvm::SmallVector<bool> unproven(op.getIndices().size(), false);
    const llvm::ArrayRef<bool> in_bounds = op.getInBounds().value_or(unproven);
    for (unsigned i = 0; i < op.getIndices().size(); ++i) {
      if (op.getStrides()[i] == 0 || op.getExtents()[i] == 1) continue;
      const NodeId index = bounded(view, i, node(op.getIndices()[i]), in_bounds[i]);
      offset.add(index, op.getStrides()[i] == 1 ? -1 : stride(view, view_node, i, fits_32));
    }
    return g_.call(function, {view_node, offset.total()}, type, kOnBlock, capture_name(capture));
  }

  // Index number `i` of a captured tensor, within its extent.
  NodeId bounded(const std::string& view, unsigned i, NodeId index, bool in_bounds) {
    if (in_bounds) return to(index, CType::kInt);
    const std::string extent = view + ".extent[" + std::to_string(i) + "]";
    return g_.call("clamped", {index, g_.leaf(extent, CType::kInt)}, CType::kInt);
  }
  NodeId stride(const std::string& view, NodeId view_node, unsigned i, bool fits_32) {
    if (fits_32) return g_.call("stride32", {view_node, integer(i)}, CType::kInt);
    return g_.leaf(view + ".stride[" + std::to_string(i) + "]", CType::kLong, g_[view_node].depends);
  }

  // The terms of an offset, one sum per level, so that what is known early is added early.
  class Sums {
   public:
    explicit Sums(Lowering& lowering) : l_(lowering) {}
    // `stride` -1: of 1.
    void add(NodeId index, NodeId stride) {
      if (l_.g_[index].text == "0") return;
      depends |= l_.g_[index].depends;
      const NodeId term = stride < 0 ? index : l_.same("*", index, stride, kProduct);
      const auto [found, is_new] = sums_.try_emplace(l_.g_.level(index), term);
      if (!is_new) found->second = l_.same("+", found->second, term, kSum);
    }
    NodeId total() {
      NodeId offset = -1;
      for (const auto& [level, sum] : sums_) offset = offset < 0 ? sum : l_.same("+", offset, sum, kSum);
      return offset < 0 ? l_.integer(0) : offset;
    }

    unsigned depends = 0;  // of the indices

   private:
    Lowering& l_;
    std::map<Level, NodeId> sums_;
  };

  // A gradient is packed, whatever the strides of its tensor are.
  Sink place(SinkOp op) {
    const auto capture = static_cast<unsigned>(op.getCapture());
    const std::string number = "[" + std::to_string(capture) + "]";
    const NodeId gradient = g_.leaf("gradients" + number, CType::kInt, kOnGradients);
    std::int64_t elements = 1;
    bool fits_32 = true;
    for (const std::int64_t extent : op.getExtents())
      fits_32 &= !llvm::MulOverflow(elements, extent, elements) && fits_int(elements);
    Sums offset(*this);
    const std::size_t rank = op.getIndices().size();
    const llvm::SmallVector<bool> unproven(rank, false);
    const llvm::ArrayRef<bool> in_bounds = op.getInBounds().value_or(unproven);
    for (unsigned i = 0; i < rank; ++i) {
      if (op.getExtents()[i] == 1) continue;
      const NodeId index = bounded("captured" + number, i, node(op.getIndices()[i]), in_bounds[i]);
      offset.add(index, i + 1 == rank ? -1 : stride("gradients" + number, gradient, i, fits_32));
    }
    return {.capture = static_cast<int>(capture),
            .value = node(op.getValue()),
            .offset = offset.total(),
            .level = sink_level(level_of(offset.depends)),
            .row_shift = op.getRowShift()};
  }
  static SinkLevel sink_level(Level level) {
    switch (level) {
      case Level::kAnywhere:
      case Level::kBlock:
        return SinkLevel::kBlock;
      case Level::kRow:
        return SinkLevel::kRow;
      case Level::kColumn:
        return SinkLevel::kColumn;
      case Level::kDiagonal:
        return SinkLevel::kDiagonal;
      case Level::kElement:
        return SinkLevel::kElement;
    }
    return SinkLevel::kElement;
  }

  // ---- Everything

  NodeId constant(arith::ConstantOp op) {
    if (const auto value = llvm::dyn_cast<mlir::FloatAttr>(op.getValue()))
      return f32(value.getValue().convertToFloat());
    const auto value = llvm::cast<mlir::IntegerAttr>(op.getValue());
    if (op.getType().isInteger(1)) return literal(value.getValue().isZero() ? "false" : "true", CType::kBool);
    return integer(value.getValue().getSExtValue());
  }

  // `v < c ? c : v` and `v > c ? c : v` for a literal c, which an instruction does.
  NodeId bound(arith::SelectOp op) {
    auto compare = op.getCondition().getDefiningOp<arith::CmpFOp>();
    if (!compare || compare.getLhs() != op.getFalseValue() || compare.getRhs() != op.getTrueValue()) return -1;
    float literal = 0;
    if (!is_literal(compare.getRhs(), &literal) || std::isnan(literal)) return -1;
    const bool below = compare.getPredicate() == arith::CmpFPredicate::OLT;
    if (!below && compare.getPredicate() != arith::CmpFPredicate::OGT) return -1;
    return g_.call(below ? "max_nan" : "min_nan", {node(compare.getLhs()), node(compare.getRhs())}, CType::kFloat);
  }

  NodeId select(arith::SelectOp op) {
    if (const NodeId bounded = bound(op); bounded >= 0) return bounded;
    const NodeId a = node(op.getTrueValue()), b = node(op.getFalseValue());
    const CType type = std::max(g_[a].type, g_[b].type);
    return g_.add({.form = Form::kChoice,
                   .text = "?",
                   .args = {node(op.getCondition()), to(a, type), to(b, type)},
                   .type = type,
                   .precedence = kChoice});
  }

  NodeId add(mlir::Operation& op) {
    const NodeId a = arg(op, 0), b = arg(op, 1);
    float x = 0;
    // `x - 1`, as people write it.
    if (is_literal(op.getOperand(1), &x) && x < 0) return g_.binary("-", a, f32(-x), CType::kFloat, kSum);
    return g_.binary("+", a, b, CType::kFloat, kSum);
  }

  NodeId multiply(mlir::Operation& op) {
    const NodeId a = arg(op, 0), b = arg(op, 1);
    float factor = 0;
    // The log2(e) that turns the score's units goes to the factor that is known first, as many roundings as before: a
    // slope is turned once, and not every element's or diagonal's product with it.
    if (g_[a].form == Form::kBinary && g_[a].text == "*" && is_literal(op.getOperand(1), &factor) &&
        factor == std::numbers::log2e_v<float>) {
      const NodeId x = g_[a].args[0], y = g_[a].args[1];
      const bool first = g_.level(x) <= g_.level(y);
      const NodeId early = first ? x : y, late = first ? y : x;
      if (g_.level(early) != Level::kAnywhere && g_.level(early) < g_.level(late))
        return g_.binary("*", g_.call("in_log2", {early}, CType::kFloat), late, CType::kFloat, kProduct);
    }
    return g_.binary("*", a, b, CType::kFloat, kProduct);
  }

  NodeId function(mlir::Operation& op, const char* exact, const char* approximation = nullptr) {
    std::vector<NodeId> args;
    for (const Value operand : op.getOperands()) args.push_back(node(operand));
    return g_.call(approximation && approximate(op) ? approximation : exact, std::move(args), CType::kFloat);
  }

  NodeId index(IndexOp op) {
    switch (op.getRole()) {
      case Role::B:
        return g_.leaf("b", CType::kInt, kOnBlock);
      case Role::H:
        return g_.leaf("h", CType::kInt, kOnBlock);
      case Role::Q:
        return q_idx_ = g_.leaf("q_idx", CType::kInt, kOnQuery);
      case Role::Kv:
        return kv_idx_ = g_.leaf("kv_idx", CType::kInt, kOnKey);
    }
    return -1;
  }

  NodeId tile_end(TileEndOp op) {
    constexpr const char* kNames[] = {"b", "h", "q", "kv"};
    std::string name = std::string("tile.") + kNames[static_cast<int>(op.getRole())];
    if (op.getRole() != Role::B) name += op.getEnd() == End::Last ? "_last" : "_first";
    return g_.leaf(std::move(name), CType::kInt, kOnBlock);
  }

  NodeId truncate(mlir::Operation& op) {
    if (op.getResult(0).getType().isInteger(32)) return to(arg(op, 0), CType::kInt);
    return -1;
  }

  NodeId extend(mlir::Operation& op, bool is_signed) {
    const bool from_bool = op.getOperand(0).getType().isInteger(1);
    if (from_bool != is_signed) return from_bool ? to(arg(op, 0), CType::kInt) : arg(op, 0);
    return -1;
  }

  NodeId lower(mlir::Operation& op) {
    return llvm::TypeSwitch<mlir::Operation*, NodeId>(&op)
        .Case<arith::ConstantOp>([&](arith::ConstantOp o) { return constant(o); })
        .Case<IndexOp>([&](IndexOp o) { return index(o); })
        .Case<TileEndOp>([&](TileEndOp o) { return tile_end(o); })
        .Case<ReadOp>([&](ReadOp o) { return read(o); })
        .Case<SinkOp>([&](SinkOp o) { return node(o.getValue()); })
        .Case<arith::SelectOp>([&](arith::SelectOp o) { return select(o); })
        .Case<arith::CmpIOp>([&](arith::CmpIOp o) { return compare_integers(o); })
        .Case<arith::CmpFOp>([&](arith::CmpFOp o) { return compare_floats(o); })
        // Integers.
        .Case<arith::AddIOp>([&](auto) { return arithmetic(op, "+", "wrapping_add", kSum); })
        .Case<arith::SubIOp>([&](auto) { return arithmetic(op, "-", "wrapping_sub", kSum); })
        .Case<arith::MulIOp>([&](auto) { return arithmetic(op, "*", "wrapping_mul", kProduct); })
        .Case<math::IPowIOp>([&](auto) { return g_.call("wrapping_pow", {arg(op, 0), arg(op, 1)}, CType::kLong); })
        .Case<FloorLog2Op>([&](auto) { return g_.call("floor_log2", {to(arg(op, 0), CType::kInt)}, CType::kInt); })
        .Case<arith::MaxSIOp>([&](auto) { return extreme(op, "max"); })
        .Case<arith::MinSIOp>([&](auto) { return extreme(op, "min"); })
        .Case<arith::AndIOp>([&](auto) { return bits(op, "&"); })
        .Case<arith::OrIOp>([&](auto) { return bits(op, "|"); })
        .Case<arith::XOrIOp>([&](auto) { return bits(op, "^"); })
        .Case<FloorDivOp, FloorModOp>([&](auto) { return divide_integers(op); })
        .Case<arith::ExtUIOp>([&](auto) { return extend(op, false); })
        .Case<arith::ExtSIOp>([&](auto) { return extend(op, true); })
        .Case<arith::TruncIOp>([&](auto) { return truncate(op); })
        .Case<ToIntOp>([&](auto) { return g_.call("to_int", {arg(op, 0)}, CType::kLong); })
        // Floats.
        .Case<arith::SIToFPOp>(
            [&](auto o) { return o.getIn().getType().isInteger(1) ? -1 : to(arg(op, 0), CType::kFloat); })
        .Case<arith::UIToFPOp>(
            [&](auto o) { return o.getIn().getType().isInteger(1) ? to(arg(op, 0), CType::kFloat) : -1; })
        .Case<arith::AddFOp>([&](auto) { return add(op); })
        .Case<arith::SubFOp>([&](auto) { return g_.binary("-", arg(op, 0), arg(op, 1), CType::kFloat, kSum); })
        .Case<arith::MulFOp>([&](auto) { return multiply(op); })
        .Case<arith::DivFOp>([&](auto) { return divide(op); })
        .Case<arith::RemFOp>([&](auto) { return function(op, "fmodf"); })
        .Case<arith::NegFOp>([&](auto) { return g_.unary("-", arg(op, 0), CType::kFloat); })
        .Case<arith::MaximumFOp>([&](auto) { return function(op, "max_nan"); })
        .Case<arith::MinimumFOp>([&](auto) { return function(op, "min_nan"); })
        .Case<math::AbsFOp>([&](auto) { return function(op, "fabsf"); })
        .Case<math::ExpOp>([&](auto) { return function(op, "expf", "exp_approx"); })
        .Case<math::Exp2Op>([&](auto) { return function(op, "exp2f", "exp2_approx"); })
        .Case<math::LogOp>([&](auto) { return function(op, "logf", "log_approx"); })
        .Case<math::Log2Op>([&](auto) { return function(op, "log2f", "log2_approx"); })
        .Case<math::Log1pOp>([&](auto) { return function(op, "log1pf"); })
        .Case<math::SqrtOp>([&](auto) { return function(op, "sqrtf", "sqrt_approx"); })
        .Case<math::RsqrtOp>([&](auto) { return function(op, "rsqrtf"); })
        .Case<math::TanhOp>([&](auto) { return tanh(op); })
        .Case<math::ErfOp>([&](auto) { return function(op, "erff"); })
        .Case<GeluOp>([&](auto) { return function(op, "gelu"); })
        .Case<math::SinOp>([&](auto) { return function(op, "sinf"); })
        .Case<math::CosOp>([&](auto) { return function(op, "cosf"); })
        .Case<math::PowFOp>([&](auto) { return function(op, "powf"); })
        .Case<math::FloorOp>([&](auto) { return function(op, "floorf"); })
        .Case<math::CeilOp>([&](auto) { return function(op, "ceilf"); })
        .Case<math::RoundEvenOp>([&](auto) { return function(op, "rintf"); })
        .Default([](mlir::Operation*) { return -1; });
  }

  Graph& g_;
  mlir::func::FuncOp function_;
  const ModProblem& problem_;
  CudaAccuracy accuracy_;
  llvm::DenseMap<Value, NodeId> nodes_;
  llvm::DenseMap<Value, NodeId> exact_;  // without any approximation, where the others have some
  llvm::DenseMap<Value, Reach> reach_;
  llvm::DenseSet<Value> in_value_;  // what the value or the condition to keep it is made of
  NodeId q_idx_ = -1, kv_idx_ = -1;
  std::map<NodeId, Linear> linear_;
};

// ---- The folded form

// A forward's value as compiler::ModForm::kFolded has it: shift + value. -1: there is none.
struct Folded {
  NodeId shift = -1;  // what softmax cannot see
  NodeId value = -1;
  NodeId term = -1;   // the value is the score and this
  NodeId slope = -1;  // the term is this times the difference of the positions
  bool drifts = false;
};

// Takes apart only the chain of sums that carries the score. What is added to it stays one term, in which a row's part
// and a key's may cancel exactly: beside the score, each was rounded as it is written.
class Folding {
 public:
  // `exact_difference`: q_minus_kv_float may be used.
  Folding(Graph& graph, bool exact_difference)
      : g_(graph), score_(graph.leaf("s", CType::kFloat, kOnScore)), exact_difference_(exact_difference) {}

  Folded run(NodeId root, bool in_log2) {
    const Parts parts = split(root);
    Folded folded{.shift = parts.shift, .value = parts.rest < 0 ? literal(0.0f) : parts.rest};
    const std::optional<NodeId> term = in_log2 ? beside_score(folded.value) : std::nullopt;
    if (term && *term >= 0) {
      folded.term = *term;
      if (const std::optional<Line> line = exact_difference_ ? line_of(*term) : std::nullopt) {
        folded.shift = sum("+", folded.shift, line->shift);
        folded.slope = line->slope;
        folded.term = product(g_.leaf("q_minus_kv_float", CType::kFloat, kOnDifference), line->slope);
      }
      folded.value = g_.binary("+", score_, folded.term, CType::kFloat, kSum);
    }
    folded.drifts = folded.slope < 0 && drifts(folded.value);
    return folded;
  }

 private:
  struct Parts {
    NodeId shift = -1, rest = -1;
  };
  // slope * q_minus_kv_float + shift, both floats and the same for all elements of a head.
  struct Line {
    NodeId slope = -1, shift = -1;
  };

  bool is_sum(NodeId id) const {
    return g_[id].form == Form::kBinary && (g_[id].text == "+" || g_[id].text == "-") && g_[id].type != CType::kLong;
  }
  bool is_negation(NodeId id) const { return g_[id].form == Form::kUnary && g_[id].text == "-"; }
  bool is_product(NodeId id) const { return g_[id].form == Form::kBinary && g_[id].text == "*"; }
  bool reads_score(NodeId id) const { return (g_[id].depends & kOnScore) != 0; }
  bool is_uniform(NodeId id) const { return g_.level(id) <= Level::kBlock; }

  std::optional<float> value_of(NodeId id) const {
    const std::string& text = g_[id].text;
    double value = 0;
    if (g_[id].form != Form::kLeaf || llvm::StringRef(text).rtrim('f').getAsDouble(value)) return std::nullopt;
    return static_cast<float>(value);
  }
  // Far from float's ends, where products neither overflow nor vanish.
  static bool is_usual(float factor) { return std::abs(factor) > 0x1p-60f && std::abs(factor) < 0x1p60f; }
  NodeId literal(float x) {
    return g_.add({.form = Form::kLeaf, .text = float_text(x), .precedence = std::signbit(x) ? kUnary : kPostfix});
  }
  NodeId as_float(NodeId id) {
    if (g_[id].type == CType::kFloat) return id;
    if (const std::optional<float> value = value_of(id)) return literal(*value);
    return g_.call("static_cast<float>", {id}, CType::kFloat);
  }
  NodeId negated(NodeId id) {
    if (id < 0) return -1;
    if (is_negation(id)) return g_[id].args[0];
    if (const std::optional<float> value = value_of(id)) return literal(-*value);
    if (is_sum(id) && g_[id].text == "-") return sum("-", g_[id].args[1], g_[id].args[0]);
    return g_.unary("-", id, CType::kFloat);
  }
  // Of what is there.
  NodeId sum(const std::string& op, NodeId a, NodeId b) {
    if (b < 0) return a;
    if (a < 0) return op == "-" ? negated(b) : b;
    if (is_negation(b)) return sum(op == "-" ? "+" : "-", a, g_[b].args[0]);
    return g_.binary(op.c_str(), a, b, CType::kFloat, kSum);
  }
  NodeId product(NodeId a, NodeId b) {
    if (a < 0 || b < 0) return -1;
    if (value_of(a) == 1.0f) return b;
    if (value_of(a) == -1.0f) return negated(b);
    // `30 * tanh(s)` in log2 units is one product.
    const NodeId first = is_product(a) ? g_[a].args[1] : a;
    const float x = value_of(first).value_or(0.0f), y = value_of(b).value_or(0.0f);
    if (is_usual(x) && is_usual(y)) return first == a ? literal(x * y) : product(g_[a].args[0], literal(x * y));
    return g_.binary("*", a, b, CType::kFloat, kProduct);
  }

  Parts split(NodeId id) {
    if (g_.level(id) <= Level::kRow) return {.shift = id};
    const std::vector<NodeId> args = g_[id].args;
    if (!reads_score(id)) return {.rest = id};
    Parts parts;
    if (is_negation(id)) {
      const Parts of = split(args[0]);
      parts = {negated(of.shift), negated(of.rest)};
    } else if (is_sum(id)) {
      const std::string op = g_[id].text;
      const Parts a = split(args[0]), b = split(args[1]);
      parts = {sum(op, a.shift, b.shift), sum(op, a.rest, b.rest)};
    } else if (is_product(id) && is_usual(value_of(args[1]).value_or(0.0f))) {
      const Parts of = split(args[0]);
      parts = {product(of.shift, args[1]), product(of.rest, args[1])};
    }
    return parts.shift < 0 ? Parts{.rest = id} : parts;
  }

  // What is added to the score in `id`, -1 for nothing.
  std::optional<NodeId> beside_score(NodeId id) {
    if (id == score_) return NodeId{-1};
    if (!is_sum(id)) return std::nullopt;
    const std::string op = g_[id].text;
    const NodeId a = g_[id].args[0], b = g_[id].args[1];
    if (reads_score(a) == reads_score(b) || (op == "-" && reads_score(b))) return std::nullopt;
    const std::optional<NodeId> term = beside_score(reads_score(a) ? a : b);
    if (!term) return std::nullopt;
    return reads_score(a) ? sum(op, *term, b) : sum(op, a, *term);
  }

  // A constant beside a difference that is exact goes to the shift only if it is small: where both cancel, they would
  // do so behind roundings.
  bool may_leave(NodeId constant, const Line& line) const {
    constexpr float kSmall = 8;
    const std::optional<float> value = value_of(constant), slope = value_of(line.slope);
    if (value && std::abs(*value) <= kSmall) return true;
    return g_[constant].type == CType::kFloat && !(slope && std::abs(*slope) == 1.0f);
  }

  // Of floats and, below a conversion, of integers that do not overflow.
  std::optional<Line> line_of(NodeId id) {
    const std::string text = g_[id].text;
    const std::vector<NodeId> args = g_[id].args;
    if (text == "q_minus_kv_float" || text == "q_minus_kv") return Line{.slope = literal(1.0f)};
    if (text == "static_cast<float>" && g_[args[0]].type == CType::kInt) return line_of(args[0]);
    if (is_negation(id)) {
      const std::optional<Line> line = line_of(args[0]);
      if (!line) return std::nullopt;
      return Line{negated(line->slope), negated(line->shift)};
    }
    if (is_sum(id)) {
      const bool first = is_uniform(args[0]), second = is_uniform(args[1]);
      std::optional<Line> a = first ? Line{} : line_of(args[0]), b = second ? Line{} : line_of(args[1]);
      if (!a || !b || (first && !may_leave(args[0], *b)) || (second && !may_leave(args[1], *a))) return std::nullopt;
      if (first) a->shift = as_float(args[0]);
      if (second) b->shift = as_float(args[1]);
      return Line{sum(text, a->slope, b->slope), sum(text, a->shift, b->shift)};
    }
    const bool is_quotient = g_[id].form == Form::kBinary && text == "/";
    if (!(is_product(id) || is_quotient) || g_[id].type == CType::kLong) return std::nullopt;
    const bool first = is_product(id) && is_uniform(args[0]);
    if (!first && !is_uniform(args[1])) return std::nullopt;
    const std::optional<Line> line = line_of(args[first ? 1 : 0]);
    const NodeId given = args[first ? 0 : 1];
    if (!line || (line->shift >= 0 &&
                  !(is_usual(value_of(given).value_or(0.0f)) || (is_product(id) && g_[given].type == CType::kInt)))) {
      // Times infinity, the parts would be NaN or infinite where their sum is 0 or of the other sign.
      return std::nullopt;
    }
    const NodeId factor = as_float(given);
    const auto times = [&](NodeId x) {
      return is_product(id) || x < 0 ? product(x, factor) : g_.binary("/", x, factor, CType::kFloat, kProduct);
    };
    return Line{times(line->slope), times(line->shift)};
  }

  // Whether the key's position is reached, and not as the place of a captured element.
  bool drifts(NodeId root) const {
    bool reached = false;
    g_.walk(root, [&](NodeId id) {
      reached |= g_[id].form == Form::kLeaf && (g_[id].depends & (kOnKey | kOnDifference)) != 0;
      return !g_.is_load(id);
    });
    return reached;
  }

  Graph& g_;
  const NodeId score_;
  const bool exact_difference_;
};

// ---- The cost

// What a node's own operation takes of a multiprocessor. Of CUDA's functions as CUDA 13 compiles them, on the way that
// usual arguments take; divisions of 64-bit integers and `wrapping_pow`, which loop, are rough.
const std::map<std::string, Slots>& function_slots() {
  static const std::map<std::string, Slots> slots{
      {"__fmul_rn", {.fma = 1}},
      {"fabsf", {}},
      {"max_nan", {.alu = 1}},
      {"min_nan", {.alu = 1}},
      {"in_log2", {.alu = 4, .fma = 1}},
      {"divide_by", {.alu = 2, .fma = 3}},
      {"floorf", {.mufu = 1}},
      {"ceilf", {.mufu = 1}},
      {"rintf", {.mufu = 1}},
      {"fmodf", {.alu = 8, .fma = 6, .mufu = 2}},
      {"exp2_approx", {.mufu = 1}},
      {"exp_approx", {.fma = 1, .mufu = 1}},
      {"log2_approx", {.alu = 1, .fma = 2, .mufu = 1}},
      {"log_approx", {.alu = 1, .fma = 3, .mufu = 1}},
      {"sqrt_approx", {.alu = 1, .fma = 2, .mufu = 1}},
      {"reciprocal_approx", {.mufu = 1}},
      {"divide_approx", {.alu = 1, .fma = 3, .mufu = 1}},
      {"tanh_approx", {.mufu = 1}},
      {"tanh_by_exp2", {.fma = 3, .mufu = 2}},
      {"expf", {.alu = 1, .fma = 6, .mufu = 1}},
      {"exp2f", {.alu = 1, .fma = 2, .mufu = 1}},
      {"logf", {.alu = 9, .fma = 15, .mufu = 1}},
      {"log2f", {.alu = 9, .fma = 17, .mufu = 1}},
      {"log1pf", {.alu = 8, .fma = 16, .mufu = 1}},
      {"sqrtf", {.alu = 2, .fma = 5, .mufu = 1}},
      {"rsqrtf", {.alu = 1, .fma = 2, .mufu = 1}},
      {"tanhf", {.alu = 5, .fma = 9, .mufu = 2}},
      {"erff", {.alu = 12, .fma = 9, .mufu = 1}},
      {"gelu", {.alu = 13, .fma = 45, .mufu = 4}},
      {"sinf", {.alu = 8, .fma = 12, .mufu = 2}},
      {"cosf", {.alu = 8, .fma = 12, .mufu = 2}},
      {"powf", {.alu = 33, .fma = 44, .mufu = 5}},
      {"to_int", {.alu = 3, .mufu = 1}},
      {"wrapping_add", {.alu = 2}},
      {"wrapping_sub", {.alu = 2}},
      {"wrapping_mul", {.fma = 3}},
      {"wrapping_pow", {.alu = 60, .fma = 60}},
      {"clamped", {.alu = 2}},
      {"stride32", {}},
  };
  return slots;
}

// Counts what the hooks of a mod compute where, each node once.
class Costs {
 public:
  explicit Costs(const Graph& graph) : g_(graph) {}

  // Adds what `root` needs beside what is counted: of an element to `element`, else to the cost's own.
  void count(NodeId root, Slots& element) {
    std::vector<NodeId> fresh;
    g_.walk(root, [&](NodeId id) {
      if (!counted_.insert(id).second) return false;
      fresh.push_back(id);
      for (const NodeId arg : g_[id].args) {
        ++uses_[arg];
        outside_[arg] |= g_.level(arg) != g_.level(id);
      }
      return true;
    });
    std::set<NodeId> fused;
    for (const NodeId id : fresh)
      if (const NodeId product = product_of(id); product >= 0) fused.insert(product);
    for (const NodeId id : fresh) {
      if (fused.contains(id)) continue;
      Slots* const slots = g_.level(id) == Level::kElement ? &element : hoisted(g_.level(id));
      if (slots) *slots += own(id);
    }
  }

  ModCost cost;

 private:
  Slots* hoisted(Level level) {
    return level == Level::kDiagonal ? &cost.diagonal
           : level == Level::kColumn ? &cost.column
           : level == Level::kRow    ? &cost.row
                                     : nullptr;
  }

  bool is_binary(NodeId id, const char* op) const { return g_[id].form == Form::kBinary && g_[id].text == op; }
  bool is_sum(NodeId id) const { return (is_binary(id, "+") || is_binary(id, "-")) && g_[id].type != CType::kLong; }

  // The product that a multiply-add takes in, or -1.
  NodeId product_of(NodeId sum) const {
    if (!is_sum(sum)) return -1;
    for (const NodeId arg : g_[sum].args) {
      const auto uses = uses_.find(arg);
      if (is_binary(arg, "*") && g_[arg].type == g_[sum].type && uses != uses_.end() && uses->second == 1 &&
          !outside_.at(arg))
        return arg;
    }
    return -1;
  }
  bool is_comparison(NodeId id) const {
    return g_[id].form == Form::kBinary && (g_[id].precedence == kOrder || g_[id].precedence == kEquality);
  }

  Slots own(NodeId id) const {
    const Node& node = g_[id];
    switch (node.form) {
      case Form::kLeaf:
        return {};
      case Form::kUnary:
        // The sign of an operand, and the sense of a predicate, cost nothing.
        return {.alu = node.text == "~" ? words(node.type) : 0};
      case Form::kChoice:
        return {.alu = words(node.type)};
      case Form::kBinary:
        return binary(id);
      case Form::kCall:
        return call(node);
    }
    return {};
  }

  Slots binary(NodeId id) const {
    const Node& node = g_[id];
    const CType operands = g_[node.args[0]].type;
    if (is_comparison(id)) return {.alu = words(std::max(operands, g_[node.args[1]].type))};
    if (node.type == CType::kBool) {
      // A comparison joins its result to another.
      const auto joins = [&](NodeId arg) { return is_comparison(arg) && g_.level(arg) == g_.level(id); };
      return {.alu = joins(node.args[0]) || joins(node.args[1]) ? 0 : 1};
    }
    if (node.text == "/") return {.alu = 2, .fma = 6, .mufu = 1};
    if (node.type == CType::kFloat) return {.fma = 1};
    if (node.text == "*") return {.fma = node.type == CType::kLong ? 3 : 1};
    if (product_of(id) >= 0) return {.fma = 1};
    return {.alu = words(node.type)};
  }

  Slots call(const Node& node) const {
    if (node.text.starts_with("load<")) {
      Slots slots{.fma = 1, .load = 1};  // its address, and itself
      if (node.text == "load<BFloat16>" || node.text == "load<bool>") slots.alu = 1;
      if (node.text == "load<Float16>") slots.fma = 2;
      return slots;
    }
    const CType from = node.args.empty() ? node.type : g_[node.args[0]].type;
    if (node.text == "static_cast<float>") return from == CType::kBool ? Slots{.alu = 1} : Slots{.mufu = 1};
    if (node.text == "static_cast<int>" || node.text == "static_cast<long long>") return {.alu = 1};
    if (node.text.starts_with("static_cast<")) return {};
    if (node.text == "min" || node.text == "max") return {.alu = node.type == CType::kLong ? 4 : 1};
    if (node.text == "floor_div" || node.text == "floor_mod")
      return node.type == CType::kLong ? Slots{.alu = 60, .fma = 30, .mufu = 3} : Slots{.alu = 14, .fma = 4, .mufu = 3};
    const auto found = function_slots().find(node.text);
    return found == function_slots().end() ? Slots{} : found->second;
  }

  // Registers of a value.
  static int words(CType type) { return type == CType::kLong ? 2 : 1; }

  const Graph& g_;
  std::set<NodeId> counted_;
  std::map<NodeId, int> uses_;
  std::map<NodeId, bool> outside_;  // whether it is a member of its level's struct
};

// ---- From nodes to text

// Breaks lines at spaces.
std::string wrapped(const std::string& text, std::size_t width) {
  std::string result;
  std::size_t start = 0;
  while (start < text.size()) {
    std::size_t end = text.find('\n', start);
    if (end == std::string::npos) end = text.size();
    std::string line = text.substr(start, end - start);
    start = end + 1;
    const std::size_t indent = line.find_first_not_of(' ');
    while (line.size() > width) {
      const std::size_t space = line.rfind(' ', width);
      if (space == std::string::npos || space <= indent + 4) break;
      result += line.substr(0, space) + "\n";
      line = std::string(indent + 4, ' ') + line.substr(space + 1);
    }
    result += line + "\n";
  }
  return result;
}

constexpr std::size_t kWidth = 120;   // of a line
constexpr std::size_t kInlined = 72;  // longer expressions get a name

struct Hook {
  Level level;
  const char* type;  // the struct, and what others call an object of it
  const char* object;
  const char* signature;  // of the function that makes it
};
constexpr Hook kHooks[] = {
    {Level::kBlock, "Block", "block", "block(const CapturedView* captured, int b, int h)"},
    {Level::kRow, "Row", "row", "row(const CapturedView* captured, const Block& block, int q_idx)"},
    {Level::kColumn, "Column", "column", "column(const CapturedView* captured, const Block& block, int kv_idx)"},
    {Level::kDiagonal, "Diagonal", "diagonal",
     "diagonal(const CapturedView* captured, const Block& block,\n"
     "                                                      int q_minus_kv, float q_minus_kv_float)"},
};

class Printer {
 public:
  explicit Printer(const Graph& graph) : g_(graph) {}

  // A hook whose root is -1 is left to the defaults.
  struct Roots {
    NodeId value = -1, keep = -1, dscore = -1;
    NodeId shift = -1, term = -1, slope = -1;  // of the folded form
    std::vector<Sink> sinks;
  };

  // `tiles`: text of further hooks.
  std::string run(const Roots& roots, const std::vector<std::string>& traits, const std::vector<bool>& injective,
                  const std::string& tiles) {
    for (const NodeId root : {roots.value, roots.keep, roots.dscore, roots.shift, roots.term, roots.slope})
      if (root >= 0) need(root, Level::kElement);
    for (const Sink& sink : roots.sinks) {
      need(sink.value, Level::kElement);
      need(sink.offset, Level::kElement);
    }
    if (roots.value < 0 && roots.keep < 0 && traits.empty()) return "struct Mod : ModDefaults {};\n";
    std::string text = "struct Mod : ModDefaults {\n";
    for (const std::string& trait : traits) text += "  static constexpr " + trait + ";\n";
    for (const Hook& hook : kHooks) text += maker(hook);
    if (roots.value >= 0) text += element_function("  ", "float score", kOfScore, roots.value);
    if (roots.shift >= 0) text += element_function("  ", "float shift", kOfShift, roots.shift);
    if (roots.term >= 0) text += element_function("  ", "float term", kOfTerm, roots.term);
    if (roots.slope >= 0) text += element_function("  ", "float slope", kOfSlope, roots.slope);
    if (roots.keep >= 0) text += element_function("  ", "bool keep", kOfScore, roots.keep);
    if (roots.dscore >= 0) text += element_function("  ", "float dscore", kOfGradient, roots.dscore);
    text += tiles;
    std::string list;
    for (std::size_t i = 0; i < roots.sinks.size(); ++i) {
      const std::string name = "Sink" + std::to_string(i);
      text += sink(name, roots.sinks[i], injective[i]);
      list += (i ? ", " : "") + name;
    }
    if (!list.empty()) text += "\n  using Sinks = SinkList<" + list + ">;\n";
    return wrapped(text + "};\n", kWidth);
  }

  // Hooks of the graph of a tile's facts. `by_row`: below 0, or where it is asked for.
  std::string tile_kind(NodeId never, NodeId always, NodeId by_row) {
    Body body(*this, Level::kBlock);
    body.count(never);
    body.count(always);
    if (by_row >= 0) body.count(by_row);
    std::string returned;
    if (g_[never].text != "false") returned = "    if (" + body.result(never) + ") return TileKind::kSkip;\n";
    if (by_row >= 0 && g_[always].text != "false")
      returned += "    if (" + body.result(always) + ") return TileKind::kFull;\n";
    const NodeId last = by_row >= 0 ? by_row : always;
    if (g_[last].text == "false") {
      returned += "    return TileKind::kPartial;\n";
    } else {
      const char* const kind = by_row >= 0 ? "kByRow" : "kFull";
      returned +=
          "    return " + body.expression(last, kEquality) + " ? TileKind::" + kind + " : TileKind::kPartial;\n";
    }
    return tile_function("TileKind tile_kind", body.statements + returned);
  }
  std::string tile_range(const char* name, NodeId first, NodeId last) {
    Body body(*this, Level::kBlock);
    for (const NodeId root : {first, last}) body.count(root);
    const std::string from = body.expression(first, kChoice);
    const std::string to = body.expression(last, kChoice);
    return tile_function(std::string("IndexRange ") + name,
                         body.statements + "    return {" + from + ", " + to + "};\n");
  }

 private:
  static std::string tile_function(const std::string& head, const std::string& text) {
    return "\n  static __device__ __forceinline__ " + head + "(const CapturedView* captured, const Tile& tile) {\n" +
           text + "  }\n";
  }

  // Marks what `id`, used at `level`, needs; a value of another level becomes a member there.
  void need(NodeId id, Level level) {
    const Level own = g_.level(id);
    if (own != Level::kAnywhere && own != level) members_.insert(id);
    if (!needed_.insert(id).second) return;
    for (const NodeId arg : g_[id].args) need(arg, own);
  }

  // Given when first asked for, so that what is written out at its only use takes no number.
  const std::string& name_of(NodeId id) {
    std::string& known = names_[id];
    if (!known.empty()) return known;
    const Node& node = g_[id];
    std::string name = node.form == Form::kLeaf ? node.text : node.name;
    const bool numbered = name.empty();
    if (numbered) name = node.type == CType::kFloat ? "x" : node.type == CType::kBool ? "c" : "i";
    known = numbered ? name + "1" : name;
    for (int i = 2; !taken_.insert(known).second; ++i) known = name + std::to_string(i);
    return known;
  }

  // One function's text: what is used twice, long or better not evaluated twice gets a name.
  class Body {
   public:
    Body(Printer& printer, Level level, std::string indent = "    ")
        : p_(printer), level_(level), indent_(std::move(indent)) {}

    void count(NodeId id) {
      if (++uses_[id] > 1 || p_.g_.level(id) != level_) return;
      for (const NodeId arg : p_.g_[id].args) count(arg);
    }

    // What a function returns: however long, it needs no name.
    std::string result(NodeId id) {
      const bool own = p_.g_.level(id) == level_ && p_.g_[id].form != Form::kLeaf;
      return own ? spelled(id) : expression(id, kChoice);
    }

    // What a member is set to: `&` makes an int of bools, which braces do not take back.
    std::string member(NodeId id) {
      const Node& node = p_.g_[id];
      const bool narrows = node.type == CType::kBool && (node.precedence == kBits || node.form == Form::kChoice);
      return narrows && !named_.contains(id) ? name(id, spelled(id)) : expression(id, kChoice);
    }

    // The expression, after the statements that it needs.
    std::string expression(NodeId id, int precedence) {
      const Node& node = p_.g_[id];
      const Level own = p_.g_.level(id);
      if (own != Level::kAnywhere && own != level_) return p_.object(own) + "." + p_.name_of(id);
      if (node.form == Form::kLeaf) return parenthesised(node.text, node.precedence, precedence);
      if (const auto named = named_.find(id); named != named_.end()) return named->second;
      const std::string text = spelled(id);
      const bool simple = own == Level::kAnywhere;
      if (simple || (uses_[id] <= 1 && text.size() <= kInlined))
        return parenthesised(text, node.precedence, precedence);
      return name(id, text);
    }

    std::string name(NodeId id, const std::string& text) {
      const std::string& chosen = p_.name_of(id);
      statements += indent_ + "const " + type_name(p_.g_[id].type) + " " + chosen + " = " + text + ";\n";
      named_[id] = chosen;
      return chosen;
    }

    std::string statements;

   private:
    static std::string parenthesised(const std::string& text, int own, int wanted) {
      return own < wanted ? "(" + text + ")" : text;
    }

    // An arm of a choice is computed in any case: a branch costs more than what it saves.
    std::string arm(NodeId id) {
      if (!calls(id)) return expression(id, kBits);
      return name(id, spelled(id));
    }

    // Whether the text of `id` would call anything. Each node is looked at once: what is used twice would double the
    // way.
    bool calls(NodeId id) const {
      std::set<NodeId> seen;
      std::vector<NodeId> open{id};
      while (!open.empty()) {
        const NodeId next = open.back();
        open.pop_back();
        const Node& node = p_.g_[next];
        if (!seen.insert(next).second || p_.g_.level(next) != level_ || named_.contains(next)) continue;
        if (node.form == Form::kCall && !node.text.starts_with("static_cast")) return true;
        open.insert(open.end(), node.args.begin(), node.args.end());
      }
      return false;
    }

    std::string spelled(NodeId id) {
      const Node& node = p_.g_[id];
      switch (node.form) {
        case Form::kLeaf:
          return node.text;
        case Form::kUnary:
          return node.text + expression(node.args[0], kUnary + 1);
        case Form::kBinary: {
          // Operands of operators whose precedence few remember stand in parentheses; a chain of one operator does not.
          // A product that others add is rounded here: fused into their sums it would be computed in each of them.
          if (node.text == "*" && node.type == CType::kFloat && p_.members_.contains(id)) {
            const std::string a = expression(node.args[0], kChoice);
            return "__fmul_rn(" + a + ", " + expression(node.args[1], kChoice) + ")";
          }
          const Node& first = p_.g_[node.args[0]];
          const bool is_bits = node.precedence == kBits;
          const bool chain = is_bits && first.form == Form::kBinary && first.text == node.text;
          const int left = is_bits ? (chain ? kBits : kUnary) : node.precedence;
          const int right = is_bits ? kUnary : node.precedence + 1;
          const std::string a = expression(node.args[0], left);
          return a + " " + node.text + " " + expression(node.args[1], right);
        }
        case Form::kChoice: {
          const std::string condition = expression(node.args[0], kEquality);
          const std::string yes = arm(node.args[1]);
          return condition + " ? " + yes + " : " + arm(node.args[2]);
        }
        case Form::kCall: {
          std::string text = node.text + "(";
          for (std::size_t i = 0; i < node.args.size(); ++i)
            text += (i ? ", " : "") + expression(node.args[i], kChoice);
          return text + ")";
        }
      }
      return {};
    }

    Printer& p_;
    Level level_;
    std::string indent_;
    std::map<NodeId, int> uses_;
    std::map<NodeId, std::string> named_;
  };

  static std::string object(Level level) {
    for (const Hook& hook : kHooks)
      if (hook.level == level) return hook.object;
    return {};
  }

  // A struct of what other levels use, and the function that fills it.
  std::string maker(const Hook& hook) {
    std::vector<NodeId> members;
    for (const NodeId id : members_)
      if (g_.level(id) == hook.level) members.push_back(id);
    if (members.empty()) return {};
    std::string text = std::string("\n  struct ") + hook.type + " {\n";
    Body body(*this, hook.level);
    std::vector<std::string> values;
    for (const NodeId id : members) {
      text += std::string("    ") + type_name(g_[id].type) + " " + name_of(id) + ";\n";
      body.count(id);
    }
    std::size_t width = 0;
    for (const NodeId id : members) {
      values.push_back("." + name_of(id) + " = " + body.member(id));
      width += values.back().size() + 2;
    }
    text += std::string("  };\n  static __device__ __forceinline__ ") + hook.type + " " + hook.signature + " {\n";
    text += body.statements + "    return {";
    const bool one_line = width + 12 <= kWidth;
    for (std::size_t i = 0; i < values.size(); ++i) {
      if (!one_line) {
        text += "\n        " + values[i] + ",";
      } else {
        text += (i ? ", " : "") + values[i];
      }
    }
    return text + (one_line ? "};\n  }\n" : "\n    };\n  }\n");
  }

  // Parameters, as their lines are broken.
  static constexpr const char* kOfScore[] = {"const CapturedView* captured, float s, const Block& block,",
                                             "const Row& row, const Column& column, const Diagonal& diagonal"};
  static constexpr const char* kOfGradient[] = {
      "const CapturedView* captured, float s, float grad, const Block& block,",
      "const Row& row, const Column& column, const Diagonal& diagonal"};
  static constexpr const char* kOfPlace[] = {"const CapturedView* captured, const GradientView* gradients,",
                                             "float s, const Block& block, const Row& row,",
                                             "const Column& column, const Diagonal& diagonal"};

  static constexpr const char* kOfShift[] = {"const CapturedView* captured, const Block& block, const Row& row"};
  static constexpr const char* kOfTerm[] = {"const CapturedView* captured, const Block& block, const Row& row,",
                                            "const Column& column, const Diagonal& diagonal"};
  static constexpr const char* kOfSlope[] = {"const CapturedView* captured, const Block& block"};

  std::string element_function(const std::string& indent, const std::string& head,
                               std::span<const char* const> parameters, NodeId root) {
    const std::string start = indent + "static __device__ __forceinline__ " + head + "(";
    std::string text = "\n" + start;
    for (const char* line : parameters)
      text += std::string(line == parameters.front() ? "" : "\n" + std::string(start.size(), ' ')) + line;
    Body body(*this, Level::kElement, indent + "  ");
    body.count(root);
    const std::string result = body.result(root);
    return text + ") {\n" + body.statements + indent + "  return " + result + ";\n" + indent + "}\n";
  }

  std::string sink(const std::string& name, const Sink& sink, bool injective) {
    constexpr const char* kLevels[] = {"kBlock", "kRow", "kColumn", "kDiagonal", "kElement"};
    std::string text = "\n  struct " + name + " {\n";
    const auto constant = [&](const std::string& head, const std::string& value) {
      text += "    static constexpr " + head + " = " + value + ";\n";
    };
    constant("int kCapture", std::to_string(sink.capture));
    constant("SinkLevel kLevel", std::string("SinkLevel::") + kLevels[static_cast<int>(sink.level)]);
    constant("bool kRowShift", sink.row_shift ? "true" : "false");
    constant("bool kInjective", injective ? "true" : "false");
    text += element_function("    ", "float value", kOfGradient, sink.value);
    text += element_function("    ", std::string(type_name(g_[sink.offset].type)) + " offset", kOfPlace, sink.offset);
    return text + "  };\n";
  }

  const Graph& g_;
  std::set<NodeId> needed_, members_;
  std::map<NodeId, std::string> names_;
  std::set<std::string> taken_;
};

// The hooks that tell of tiles, whose traits it adds; empty with `error` set where an operation has no spelling.
// `by_row`: tile_kind() says kByRow, too.
std::string tile_hooks(mlir::func::FuncOp tile_facts, const ModProblem& problem, bool by_row,
                       std::vector<std::string>& traits, std::string& error) {
  Graph graph;
  Lowering lowering(graph, tile_facts, problem, CudaAccuracy::kFull);
  const std::vector<NodeId> results = lowering.run_tile_facts();
  error = lowering.error;
  if (results.empty()) return {};
  const auto node = [&](TileResult result) { return results[static_cast<std::size_t>(result)]; };
  const bool kv = knows_kv_range(tile_facts), q = knows_q_range(tile_facts);
  std::string text;
  if (knows_tiles(tile_facts)) {
    traits.emplace_back("bool kKnowsTiles = true");
    by_row &= knows_rows(tile_facts);
    if (by_row) traits.emplace_back("bool kKnowsRows = true");
    text += Printer(graph).tile_kind(node(TileResult::kNever), node(TileResult::kAlways),
                                     by_row ? node(TileResult::kByRow) : NodeId{-1});
  }
  if (kv || q) traits.emplace_back("bool kKnowsRanges = true");
  if (kv) text += Printer(graph).tile_range("kv_range", node(TileResult::kKvFirst), node(TileResult::kKvLast));
  if (q) text += Printer(graph).tile_range("q_range", node(TileResult::kQFirst), node(TileResult::kQLast));
  return text;
}

}  // namespace

CudaMod emit_cuda_mod(mlir::func::FuncOp function, const ModProblem& problem, CudaAccuracy accuracy,
                      std::span<const SinkFacts> facts, mlir::func::FuncOp tile_facts, ModForm form) {
  Graph graph;
  Lowering lowering(graph, function, problem, accuracy);
  if (!lowering.run()) return {.text = {}, .error = lowering.error};
  mlir::Operation* const ret = function.front().getTerminator();
  const bool has_mask = !mlir::matchPattern(ret->getOperand(1), mlir::m_One());
  const auto factor = function->getAttrOfType<mlir::FloatAttr>(kScoreFactorAttr);
  const bool in_log2 = factor && factor.getValueAsDouble() == std::numbers::log2e;
  const bool backward = is_backward(function);
  const bool folds = form == ModForm::kFolded && !backward;
  const Folded folded = folds ? Folding(graph, difference_is_exact(problem)).run(lowering.value, in_log2)
                              : Folded{.value = lowering.value};
  const bool is_score = graph[folded.value].text == "s";
  const bool unit_derivative = !backward || ret->getOperand(2) == function.getArgument(1);
  bool reads = false;
  function.walk([&](ReadOp) { reads = true; });
  std::vector<std::string> traits;
  if (!in_log2) traits.emplace_back("bool kScoresInLog2 = false");
  if (!is_score || (!in_log2 && !backward)) traits.emplace_back("bool kIdentity = false");
  if (has_mask) traits.emplace_back("bool kHasMask = true");
  if (has_mask && (graph[lowering.keep].depends & kOnScore)) traits.emplace_back("bool kMaskReadsScore = true");
  if (folded.shift >= 0) traits.emplace_back("bool kHasShift = true");
  if (folded.term >= 0) traits.emplace_back("bool kAdditive = true");
  if (folded.slope >= 0) traits.emplace_back("bool kLinear = true");
  if (folded.drifts) traits.emplace_back("bool kDrifts = true");
  if (reads) traits.emplace_back("bool kReadsCaptured = true");
  if (!unit_derivative) traits.emplace_back("bool kUnitDerivative = false");
  std::string tiles, tiles_error;
  if (tile_facts) tiles = tile_hooks(tile_facts, problem, folds, traits, tiles_error);
  if (!tiles_error.empty()) return {.text = {}, .error = tiles_error};

  CudaMod mod;
  bool column_loads = false;
  mod.demand = has_mask || !unit_derivative ? ModDemand::kBusy : ModDemand::kNone;
  std::vector<NodeId> looped{folded.value, lowering.keep};
  if (backward) looped.push_back(lowering.dscore);
  for (const Sink& sink : lowering.sinks) looped.insert(looped.end(), {sink.value, sink.offset});
  for (const NodeId root : looped) {
    graph.walk(root, [&](NodeId id) {
      if (!graph.is_load(id)) return true;
      column_loads |= graph.level(id) == Level::kColumn;
      mod.demand = std::max(mod.demand, graph.level(id) == Level::kElement ? ModDemand::kDense : ModDemand::kBusy);
      return true;
    });
  }
  if (folds && column_loads) traits.emplace_back("bool kColumnLoads = true");
  std::vector<bool> injective;
  for (std::size_t i = 0; i < lowering.sinks.size(); ++i) {
    const Sink& sink = lowering.sinks[i];
    mod.sink_levels.push_back(sink.level);
    injective.push_back(i < facts.size() && facts[i].injective);
    if (sink.row_shift) continue;
    mod.demand = std::max(mod.demand, sink.level == SinkLevel::kElement ? ModDemand::kDense : ModDemand::kBusy);
  }
  Costs costs(graph);
  costs.count(folded.value, costs.cost.score);
  if (has_mask) {
    costs.count(lowering.keep, costs.cost.mask);
    costs.cost.mask.alu += 1;  // the -inf in place of what it drops
  }
  if (!unit_derivative) costs.count(lowering.dscore, costs.cost.gradient);
  for (const Sink& sink : lowering.sinks) {
    if (sink.row_shift) continue;
    costs.count(sink.value, costs.cost.gradient);
    if (sink.level == SinkLevel::kElement) costs.count(sink.offset, costs.cost.gradient);
  }
  mod.cost = costs.cost;
  if (folds)
    mod.folded = FoldedFacts{.has_shift = folded.shift >= 0,
                             .additive = folded.term >= 0,
                             .linear = folded.slope >= 0,
                             .drifts = folded.drifts};
  const Printer::Roots roots{.value = is_score ? -1 : folded.value,
                             .keep = has_mask ? lowering.keep : -1,
                             .dscore = unit_derivative ? -1 : lowering.dscore,
                             .shift = folded.shift,
                             .term = folded.term,
                             .slope = folded.slope,
                             .sinks = std::move(lowering.sinks)};
  mod.text = Printer(graph).run(roots, traits, injective, tiles);
  return mod;
}

}  // namespace attnjit::compiler
