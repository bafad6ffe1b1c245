// attnjit-differentiate: the gradients of the score and of captured tensors, by docs/backward.md.
#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numbers>
#include <optional>
#include <tuple>
#include <vector>

#include "compiler/dialect/dialect.h"
#include "compiler/passes/passes.h"
#include "llvm/ADT/DenseMap.h"
#include "llvm/ADT/DenseSet.h"
#include "llvm/ADT/TypeSwitch.h"
#include "mlir/Dialect/Arith/IR/Arith.h"
#include "mlir/Dialect/Math/IR/Math.h"
#include "mlir/IR/Matchers.h"

namespace attnjit::compiler {

#define GEN_PASS_DEF_DIFFERENTIATE
#include "AttnjitPasses.h.inc"

namespace {

namespace arith = mlir::arith;
namespace math = mlir::math;
using arith::CmpFPredicate;
using mlir::Value;

constexpr double kUnbounded = std::numeric_limits<double>::infinity();

// Conditions that an element went through, as the number of the last one; the empty list is kNone.
using Conditions = int;
constexpr Conditions kNone = -1;

// What flows into a value from the modified score: `raw * factor` under its conditions, else exactly 0. So a chain of
// operations is a chain of products, and one select at its end keeps out what was not chosen; and literals meet in one
// product, or in none: 30 * tanh(score / 30).
struct Flow {
  Value raw;
  double factor = 1.0;
  Conditions under = kNone;
  bool of_row = false;  // `raw` is `grad` times what is free of kv_idx and score
};

class Differentiator {
 public:
  Differentiator(mlir::func::FuncOp function, std::uint32_t gradients, bool partial_keys)
      : function_(function),
        gradients_(gradients),
        partial_keys_(partial_keys),
        b_(function),
        loc_(function.getLoc()) {}

  mlir::LogicalResult run() {
    mlir::Block& block = function_.front();
    const Value score = block.getArgument(0);
    auto ret = llvm::cast<mlir::func::ReturnOp>(block.getTerminator());
    std::vector<mlir::Operation*> operations;
    active_.insert(score);
    varies_.insert(score);
    for (mlir::Operation& op : block.without_terminator()) {
      note(op);
      find_active(op);
      operations.push_back(&op);
    }

    grad_ = block.addArgument(b_.getF32Type(), loc_);
    b_.setInsertionPoint(ret);
    give(ret.getOperand(0), {.raw = grad_, .of_row = true});
    for (mlir::Operation* op : llvm::reverse(operations)) {
      const auto found = incoming_.find(op->getResult(0));
      if (found == incoming_.end()) continue;
      const Incoming incoming = found->second;
      for (const std::optional<Flow>& flow : {incoming.of_row, incoming.other})
        if (flow && mlir::failed(propagate(*op, *flow))) return mlir::failure();
    }

    llvm::SmallVector<Value> results(ret.getOperands());
    const std::optional<Flow> of_score = incoming_[score].other;
    results.push_back(of_score ? value_under(*of_score, kNone) : literal(0.0));
    for (mlir::Operation* op : operations) {
      auto read = llvm::dyn_cast<ReadOp>(op);
      if (!read) continue;
      const Incoming incoming = incoming_.lookup(read);
      for (const std::optional<Flow>& flow : {incoming.of_row, incoming.other}) {
        if (!flow) continue;
        results.push_back(SinkOp::create(b_, loc_, b_.getF32Type(), value_under(*flow, kNone), read.getCapture(),
                                         places(read), read.getExtents(), mlir::DenseBoolArrayAttr(),
                                         feeds_row_shift_.contains(read) && is_of_row(*flow, kNone)));
      }
    }
    ret->setOperands(results);
    for (mlir::Operation* op : operations) take_kink_marks(*op);
    llvm::SmallVector<mlir::Type> types;
    for (const Value result : results) types.push_back(result.getType());
    function_.setType(b_.getFunctionType({b_.getF32Type(), b_.getF32Type()}, types));
    erase_dead(block);
    return mlir::success();
  }

 private:
  // ---- What is known of values

  // Of original operations and of those made here, in the order of the block.
  void note(mlir::Operation& op) {
    const Value result = op.getResult(0);
    auto index = llvm::dyn_cast<IndexOp>(op);
    const bool varies = index ? index.getRole() == Role::Kv
                              : llvm::any_of(op.getOperands(), [&](Value v) { return varies_.contains(v); });
    if (varies) varies_.insert(result);
    if (!result.getType().isF32()) return;
    const double most = find_largest(op);
    if (most <= static_cast<double>(std::numeric_limits<float>::max())) largest_[result] = most;
  }

  // No value of a finite bound is NaN.
  double largest(Value v) {
    const auto found = largest_.find(v);
    return found == largest_.end() ? kUnbounded : found->second;
  }
  bool is_finite(Value v) { return largest_.contains(v); }

  double find_largest(mlir::Operation& op) {
    const auto of = [&](unsigned i) { return largest(op.getOperand(i)); };
    return llvm::TypeSwitch<mlir::Operation*, double>(&op)
        .Case<arith::ConstantOp>([](arith::ConstantOp constant) {
          const double value = llvm::cast<mlir::FloatAttr>(constant.getValue()).getValueAsDouble();
          return std::isnan(value) ? kUnbounded : std::abs(value);
        })
        .Case<arith::SIToFPOp, arith::UIToFPOp>([](auto) { return 0x1p63; })
        .Case<arith::NegFOp, math::AbsFOp>([&](auto) { return of(0); })
        .Case<math::FloorOp, math::CeilOp, math::RoundEvenOp>([&](auto) { return of(0) + 1; })
        .Case<arith::AddFOp, arith::SubFOp>([&](auto) { return of(0) + of(1); })
        .Case<arith::MulFOp>([&](auto) { return of(0) * of(1); })
        .Case<arith::MaximumFOp, arith::MinimumFOp>([&](auto) { return std::max(of(0), of(1)); })
        .Case<arith::SelectOp>([&](auto) { return std::max(of(1), of(2)); })
        .Case<math::TanhOp, math::ErfOp, math::SinOp, math::CosOp>(
            [&](auto) { return is_finite(op.getOperand(0)) ? 1.0 : kUnbounded; })
        .Default([](mlir::Operation*) { return kUnbounded; });
  }

  // Whether a gradient is wanted of what the result depends on, and whether of a read that may be a row shift.
  void find_active(mlir::Operation& op) {
    const Value result = op.getResult(0);
    if (!result.getType().isF32() || op.hasAttr(kFlatAttr)) return;
    if (auto read = llvm::dyn_cast<ReadOp>(op)) {
      if (((gradients_ >> read.getCapture()) & 1) == 0) return;
      active_.insert(result);
      if (!varies_.contains(result) && !partial_keys_) feeds_row_shift_.insert(result);
      return;
    }
    if (llvm::isa<math::FloorOp, math::CeilOp, math::RoundEvenOp>(op)) return;
    for (const Value operand : op.getOperands()) {
      if (active_.contains(operand)) active_.insert(result);
      if (feeds_row_shift_.contains(operand)) feeds_row_shift_.insert(result);
    }
  }

  static bool is_literal(Value v, double* value = nullptr) {
    mlir::FloatAttr attribute;
    if (!mlir::matchPattern(v, mlir::m_Constant(&attribute))) return false;
    if (value) *value = attribute.getValueAsDouble();
    return true;
  }

  // The indices of a read; of a dimension of one element that element, whatever the index is computed from.
  llvm::SmallVector<Value> places(ReadOp read) {
    llvm::SmallVector<Value> indices(read.getIndices());
    for (const auto& [i, extent] : llvm::enumerate(read.getExtents()))
      if (extent == 1) indices[i] = arith::ConstantOp::create(b_, loc_, b_.getI64IntegerAttr(0));
    return indices;
  }

  // ---- Making operations

  template <typename T, typename... Args>
  Value make(Args... args) {
    T op = T::create(b_, loc_, args...);
    note(*op.getOperation());
    return op;
  }
  Value literal(double value) { return make<arith::ConstantOp>(b_.getF32FloatAttr(static_cast<float>(value))); }
  Value mul(Value a, Value b) { return make<arith::MulFOp>(a, b); }
  Value add(Value a, Value b) { return make<arith::AddFOp>(a, b); }
  Value sub(Value a, Value b) { return make<arith::SubFOp>(a, b); }
  Value div(Value a, Value b) { return make<arith::DivFOp>(a, b); }
  Value select(Value condition, Value yes, Value no) { return make<arith::SelectOp>(condition, yes, no); }
  Value compare(CmpFPredicate p, Value a, Value b) { return make<arith::CmpFOp>(p, a, b); }
  Value both(Value a, Value b) { return make<arith::AndIOp>(a, b); }
  Value either(Value a, Value b) { return make<arith::OrIOp>(a, b); }
  Value negation(Value condition) {
    Value& made = negations_[condition];
    if (!made) made = make<arith::XOrIOp>(condition, make<arith::ConstantOp>(b_.getBoolAttr(true)));
    return made;
  }

  // ---- Conditions

  struct Condition {
    Conditions before;
    Value value;
    bool holds;
  };
  const Condition& condition(Conditions last) const { return conditions_[static_cast<std::size_t>(last)]; }

  // `before` and one more; nothing where the two exclude each other.
  std::optional<Conditions> with(Conditions before, Value value, bool holds) {
    for (Conditions at = before; at != kNone; at = condition(at).before)
      if (condition(at).value == value) return condition(at).holds == holds ? std::optional(before) : std::nullopt;
    const auto [found, is_new] = known_conditions_.try_emplace({before, value.getAsOpaquePointer(), holds},
                                                               static_cast<Conditions>(conditions_.size()));
    if (is_new) conditions_.push_back({before, value, holds});
    return found->second;
  }

  // Those that `last` has beyond `given`, its part, in one value; there is at least one.
  Value all(Conditions last, Conditions given) {
    Value& known = conjunctions_[{last, given}];
    if (known) return known;
    std::vector<Conditions> more;
    for (Conditions at = last; at != given; at = condition(at).before) more.push_back(at);
    Value result;
    for (const Conditions next : llvm::reverse(more)) {
      const Value holds = condition(next).holds ? condition(next).value : negation(condition(next).value);
      result = result ? both(result, holds) : holds;
    }
    return known = result;
  }

  // What two lists have in common, from the first one on, and their next conditions.
  struct Fork {
    Conditions common, next_a = kNone, next_b = kNone;
  };
  Fork fork(Conditions a, Conditions b) {
    llvm::DenseMap<Conditions, Conditions> of_a;  // to the next one
    for (Conditions next = kNone;; next = a, a = condition(a).before) {
      of_a[a] = next;
      if (a == kNone) break;
    }
    Conditions next = kNone;
    while (!of_a.contains(b)) {
      next = b;
      b = condition(b).before;
    }
    return {.common = b, .next_a = of_a[b], .next_b = next};
  }

  // ---- Flows

  // The raw value with its factor in it.
  Value product(const Flow& flow) {
    if (flow.factor == -1.0) return make<arith::NegFOp>(flow.raw);
    return flow.factor == 1.0 ? flow.raw : mul(flow.raw, literal(flow.factor));
  }

  // The flow as a value wherever `given` holds.
  Value value_under(const Flow& flow, Conditions given) {
    if (flow.under == given) return product(flow);
    return select(all(flow.under, given), product(flow), literal(0.0));
  }

  // Whether the flow, as a value wherever `given` holds, is `grad` times what is free of kv_idx and score.
  bool is_of_row(const Flow& flow, Conditions given) const {
    for (Conditions at = flow.under; at != given; at = condition(at).before)
      if (varies_.contains(condition(at).value)) return false;
    return flow.of_row;
  }

  Flow sum(Flow a, Flow b) {
    Flow result;
    if (a.factor == b.factor) {
      result.factor = a.factor;
      a.factor = b.factor = 1.0;
    }
    const Fork at = fork(a.under, b.under);
    result.under = at.common;
    if (at.next_a != kNone && at.next_b != kNone && condition(at.next_a).value == condition(at.next_b).value) {
      // The two sides of one choice.
      const Value of_a = value_under(a, at.next_a), of_b = value_under(b, at.next_b);
      const bool a_first = condition(at.next_a).holds;
      result.raw = of_a;
      result.of_row = is_of_row(a, at.next_a) && is_of_row(b, at.next_b);
      if (of_a != of_b) {
        result.raw = select(condition(at.next_a).value, a_first ? of_a : of_b, a_first ? of_b : of_a);
        result.of_row &= !varies_.contains(condition(at.next_a).value);
      }
    } else {
      result.of_row = is_of_row(a, at.common) && is_of_row(b, at.common);
      result.raw = add(value_under(a, at.common), value_under(b, at.common));
    }
    return result;
  }

  // Adds `flow` to what flows into `v`.
  void give(Value v, const Flow& flow) {
    if (!active_.contains(v)) return;
    Incoming& incoming = incoming_[v];
    // Apart only as long as it may matter.
    const bool apart = feeds_row_shift_.contains(v) && is_of_row(flow, kNone);
    std::optional<Flow>& slot = apart ? incoming.of_row : incoming.other;
    slot = slot ? sum(*slot, flow) : flow;
  }

  Flow times(Flow flow, Value factor) {
    double value = 0;
    if (is_literal(factor, &value)) return scaled(flow, value);
    if (!is_finite(factor)) flow = where_not_zero(flow);
    flow.raw = mul(flow.raw, factor);
    flow.of_row &= !varies_.contains(factor);
    return flow;
  }
  Flow divided(Flow flow, Value divisor) {
    double value = 0;
    const bool by_literal = is_literal(divisor, &value);
    if (by_literal && is_usual(1.0 / value)) return scaled(flow, 1.0 / value);
    if (!by_literal || value == 0.0 || std::isnan(value)) flow = where_not_zero(flow);
    flow.raw = div(flow.raw, divisor);
    flow.of_row &= !varies_.contains(divisor);
    return flow;
  }
  Flow negated(Flow flow) {
    flow.factor = -flow.factor;
    return flow;
  }
  // What literals of this size are taken out of neither overflows nor vanishes for it.
  static bool is_usual(double factor) {
    constexpr double kLargest = 0x1p12;
    return std::abs(factor) <= kLargest && std::abs(factor) >= 1.0 / kLargest;
  }
  Flow scaled(Flow flow, double by) {
    if (is_usual(flow.factor * by)) {
      flow.factor *= by;
      return flow;
    }
    const Value rest = literal(by);
    if (!is_finite(rest)) flow = where_not_zero(flow);
    flow.raw = mul(product(flow), rest);
    flow.factor = 1.0;
    return flow;
  }
  // What is nothing stays nothing, whatever it is about to be multiplied by.
  Flow where_not_zero(Flow flow) {
    Value& nonzero = nonzero_[flow.raw];
    if (!nonzero) nonzero = compare(CmpFPredicate::UNE, flow.raw, literal(0.0));
    flow.under = with(flow.under, nonzero, true).value_or(flow.under);
    return flow;
  }
  // One of two flows under the same conditions.
  Flow one_of(Value condition, Flow yes, const Flow& no) {
    yes.raw = select(condition, product(yes), product(no));
    yes.factor = 1.0;
    yes.of_row &= !varies_.contains(condition);
    return yes;
  }
  std::optional<Flow> where(Flow flow, Value condition, bool yes = true) {
    const std::optional<Conditions> under = with(flow.under, condition, yes);
    if (!under) return std::nullopt;
    flow.under = *under;
    return flow;
  }
  void give_where(Value v, const Flow& flow, Value condition, bool yes = true) {
    if (const std::optional<Flow> under = where(flow, condition, yes)) give(v, *under);
  }

  // ---- Derivatives

  // Hands what flows into the result of `op` on to what it is made of.
  mlir::LogicalResult propagate(mlir::Operation& op, const Flow& flow) {
    if (llvm::isa<ReadOp>(op)) return mlir::success();
    if (op.hasAttr(kClampAttr)) return clamp(op, flow);
    if (auto quotient = llvm::dyn_cast<arith::DivFOp>(op)) {
      if (const Value x = argument_of_sigmoid(quotient)) {
        // sigmoid(-x) by itself: neither an infinity over one, nor the few digits that 1 - sigmoid(x) has.
        const Value one = literal(1.0);
        const Value other = div(one, add(make<math::ExpOp>(x), one));
        if (active_.contains(quotient.getLhs())) give(quotient.getLhs(), divided(flow, quotient.getRhs()));
        if (active_.contains(x)) give(x, times(flow, mul(quotient, other)));
        return mlir::success();
      }
    }
    for (unsigned i = 0; i < op.getNumOperands(); ++i)
      if (active_.contains(op.getOperand(i)) && mlir::failed(through(op, i, flow))) return mlir::failure();
    return mlir::success();
  }

  // x of `n / (1 + exp(-x))`: through its parts the derivative would be NaN for large -x.
  static Value argument_of_sigmoid(arith::DivFOp quotient) {
    auto sum = quotient.getRhs().getDefiningOp<arith::AddFOp>();
    if (!sum) return {};
    for (const auto& [exp, one] : {std::pair(sum.getLhs(), sum.getRhs()), std::pair(sum.getRhs(), sum.getLhs())}) {
      double value = 0;
      auto power = exp.getDefiningOp<math::ExpOp>();
      if (!power || !is_literal(one, &value) || value != 1.0) continue;
      if (auto negative = power.getOperand().getDefiningOp<arith::NegFOp>()) return negative.getOperand();
    }
    return {};
  }

  mlir::LogicalResult clamp(mlir::Operation& op, const Flow& flow) {
    auto outer = llvm::dyn_cast<arith::MinimumFOp>(op);
    auto inner = outer ? outer.getLhs().getDefiningOp<arith::MaximumFOp>() : arith::MaximumFOp();
    if (!inner || inner->getAttr(kClampAttr) != outer->getAttr(kClampAttr))
      return op.emitOpError("is marked as a clamp's but is no minimum of its maximum");
    const Value x = inner.getLhs(), lo = inner.getRhs(), hi = outer.getRhs();
    if (active_.contains(x))
      give_where(x, flow, both(compare(CmpFPredicate::OGE, x, lo), compare(CmpFPredicate::OLE, x, hi)));
    if (active_.contains(lo))
      give_where(lo, flow, both(compare(CmpFPredicate::OLT, x, lo), compare(CmpFPredicate::OLT, lo, hi)));
    if (active_.contains(hi)) {
      const Value crossed = both(compare(CmpFPredicate::OLT, hi, lo), compare(CmpFPredicate::ORD, x, x));
      give_where(hi, flow, either(compare(CmpFPredicate::OGT, x, hi), crossed));
    }
    return mlir::success();
  }

  // To operand `i` alone, which is active.
  mlir::LogicalResult through(mlir::Operation& op, unsigned i, const Flow& flow) {
    const Value out = op.getResult(0), x = op.getOperand(i);
    const Value other = op.getNumOperands() == 2 ? op.getOperand(1 - i) : Value();
    return llvm::TypeSwitch<mlir::Operation*, mlir::LogicalResult>(&op)
        .Case<arith::AddFOp>([&](auto) { return given(x, flow); })
        .Case<arith::SubFOp>([&](auto) { return given(x, i == 0 ? flow : negated(flow)); })
        .Case<arith::NegFOp>([&](auto) { return given(x, negated(flow)); })
        .Case<arith::MulFOp>([&](auto) { return given(x, times(flow, other)); })
        .Case<arith::DivFOp>(
            [&](auto) { return given(x, i == 0 ? divided(flow, other) : negated(times(flow, div(out, x)))); })
        .Case<arith::RemFOp>([&](auto) {
          // What the remainder leaves is a multiple of the divisor: the quotient is near an integer.
          return given(x, i == 0 ? flow : negated(times(flow, make<math::RoundEvenOp>(div(sub(other, out), x)))));
        })
        .Case<arith::SelectOp>([&](arith::SelectOp choice) {
          give_where(x, flow, choice.getCondition(), i == 1);
          return mlir::success();
        })
        .Case<arith::MaximumFOp, arith::MinimumFOp>([&](auto) {
          const bool is_max = llvm::isa<arith::MaximumFOp>(op);
          if (op.hasAttr(kReluAttr)) {
            give_where(x, flow, compare(CmpFPredicate::OGT, x, other));
            return mlir::success();
          }
          // NaN on either side is a choice of both.
          const Value is_chosen = compare(is_max ? CmpFPredicate::UGE : CmpFPredicate::ULE, x, other);
          const Value tie = compare(CmpFPredicate::OEQ, x, other);
          if (const auto to_chosen = where(flow, is_chosen)) give(x, one_of(tie, scaled(*to_chosen, 0.5), *to_chosen));
          return mlir::success();
        })
        .Case<math::AbsFOp>([&](auto) {
          const Value zero = literal(0.0);
          if (const auto nonzero = where(flow, compare(CmpFPredicate::UNE, x, zero)))
            give(x, one_of(compare(CmpFPredicate::OLT, x, zero), negated(*nonzero), *nonzero));
          return mlir::success();
        })
        .Case<math::ExpOp>([&](auto) { return given(x, times(flow, out)); })
        .Case<math::Exp2Op>([&](auto) { return given(x, times(scaled(flow, std::numbers::ln2), out)); })
        .Case<math::LogOp>([&](auto) { return given(x, divided(flow, x)); })
        .Case<math::Log2Op>([&](auto) { return given(x, divided(scaled(flow, std::numbers::log2e), x)); })
        .Case<math::Log1pOp>([&](auto) { return given(x, divided(flow, add(x, literal(1.0)))); })
        .Case<math::SqrtOp>([&](auto) { return given(x, divided(scaled(flow, 0.5), out)); })
        .Case<math::RsqrtOp>([&](auto) { return given(x, times(times(times(scaled(flow, -0.5), out), out), out)); })
        .Case<math::TanhOp>([&](auto) { return given(x, times(flow, sub(literal(1.0), mul(out, out)))); })
        .Case<math::ErfOp>(
            [&](auto) { return given(x, times(flow, mul(gaussian(x, 1.0), literal(2 * std::numbers::inv_sqrtpi)))); })
        .Case<GeluOp>([&](auto) { return given(x, times(flow, gelu_derivative(x, out))); })
        .Case<math::SinOp>([&](auto) { return given(x, times(flow, make<math::CosOp>(x))); })
        .Case<math::CosOp>([&](auto) { return given(x, negated(times(flow, make<math::SinOp>(x)))); })
        .Case<math::PowFOp>(
            [&](auto) { return i == 0 ? power_to_base(x, other, flow) : power_to_exponent(other, x, out, flow); })
        .Default([](mlir::Operation* unknown) { return unknown->emitOpError("has no derivative"); });
  }

  mlir::LogicalResult given(Value v, const Flow& flow) {
    give(v, flow);
    return mlir::success();
  }

  // exp(-factor * x * x)
  Value gaussian(Value x, double factor) { return make<math::ExpOp>(mul(mul(x, x), literal(-factor))); }

  // Phi(x) + x * phi(x). Phi is gelu(x) / x, which keeps its digits for negative x; beside 0 it is 1/2 to the last one.
  Value gelu_derivative(Value x, Value out) {
    const Value tiny = compare(CmpFPredicate::OLT, make<math::AbsFOp>(x), literal(0x1p-60));
    const Value phi = mul(gaussian(x, 0.5), literal(std::numbers::inv_sqrtpi / std::numbers::sqrt2));
    return add(select(tiny, literal(0.5), div(out, x)), mul(x, phi));
  }

  mlir::LogicalResult power_to_base(Value x, Value y, const Flow& flow) {
    double exponent = 0;
    if (!is_literal(y, &exponent)) {
      const std::optional<Flow> nonzero = where(flow, compare(CmpFPredicate::UNE, y, literal(0.0)));
      if (!nonzero) return mlir::success();
      const Value power = make<math::PowFOp>(x, add(y, literal(-1.0)));
      return given(x, times(*nonzero, mul(y, power)));
    }
    if (exponent == 0.0) return mlir::success();
    // As the builder writes small powers.
    if (exponent == 1.0) return given(x, flow);
    Value power = exponent == 3.0 ? mul(x, x) : exponent == 4.0 ? mul(mul(x, x), x) : Value();
    if (!power) power = make<math::PowFOp>(x, literal(exponent - 1.0));
    return given(x, times(flow, mul(y, power)));
  }

  mlir::LogicalResult power_to_exponent(Value x, Value y, Value out, const Flow& flow) {
    const Value zero = literal(0.0);
    const Value flat = both(compare(CmpFPredicate::OEQ, x, zero), compare(CmpFPredicate::OGE, y, zero));
    if (const auto steep = where(flow, flat, false)) give(y, times(*steep, mul(out, make<math::LogOp>(x))));
    return mlir::success();
  }

  // What flows into a value. What is the row's is apart where it may end in a row shift.
  struct Incoming {
    std::optional<Flow> of_row, other;
  };

  mlir::func::FuncOp function_;
  std::uint32_t gradients_;
  bool partial_keys_;
  mlir::OpBuilder b_;
  mlir::Location loc_;
  Value grad_;
  llvm::DenseSet<Value> varies_;  // with kv_idx or the score
  llvm::DenseMap<Value, double> largest_;
  llvm::DenseSet<Value> active_, feeds_row_shift_;
  llvm::DenseMap<Value, Incoming> incoming_;
  std::vector<Condition> conditions_;
  std::map<std::tuple<Conditions, const void*, bool>, Conditions> known_conditions_;
  std::map<std::pair<Conditions, Conditions>, Value> conjunctions_;
  llvm::DenseMap<Value, Value> negations_, nonzero_;
};

class Differentiate : public impl::DifferentiateBase<Differentiate> {
 public:
  using DifferentiateBase::DifferentiateBase;

 private:
  void runOnOperation() override {
    mlir::func::FuncOp function = getOperation();
    const mlir::FunctionType type = function.getFunctionType();
    if (function.isExternal() || !function.getBody().hasOneBlock() || type.getNumInputs() != 1 ||
        !type.getInput(0).isF32() || type.getNumResults() != 2 || !type.getResult(0).isF32() ||
        !type.getResult(1).isInteger(1)) {
      function.emitOpError("is not split: expected one block and the type (f32) -> (f32, i1), got ") << type;
      return signalPassFailure();
    }
    if (mlir::failed(Differentiator(function, gradients, partialKeys).run())) signalPassFailure();
  }
};

}  // namespace
}  // namespace attnjit::compiler
