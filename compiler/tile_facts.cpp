// The analysis behind tile_facts.h. Integers are followed as linear forms over what varies within a tile; a comparison
// of two is decided by the ends of their difference, conditions are joined in three-valued logic. What does not vary
// within a tile is computed as it stands. Everything emitted is arithmetic that cannot wrap, or whose result is then
// not used: what is too large to be sure of that is guarded.
#include "compiler/tile_facts.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <map>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "compiler/dialect/dialect.h"
#include "compiler/passes/passes.h"
#include "compiler/projection.h"
#include "llvm/ADT/DenseMap.h"
#include "llvm/ADT/SetVector.h"
#include "llvm/ADT/SmallVector.h"
#include "llvm/ADT/TypeSwitch.h"
#include "mlir/Analysis/DataFlow/DeadCodeAnalysis.h"
#include "mlir/Analysis/DataFlow/IntegerRangeAnalysis.h"
#include "mlir/Analysis/DataFlowFramework.h"
#include "mlir/Dialect/Arith/IR/Arith.h"
#include "mlir/Dialect/Math/IR/Math.h"
#include "mlir/IR/IRMapping.h"
#include "mlir/IR/Matchers.h"

namespace attnjit::compiler {
namespace {

namespace arith = mlir::arith;
namespace math = mlir::math;
using mlir::Value;

// Longer conditions are not looked at: what is asked once per tile has to be cheap.
constexpr std::size_t kMostOperations = 256;
// Bounds within which no sum of ours leaves 64 bits.
constexpr std::int64_t kLargestTerm = std::int64_t{1} << 40;
constexpr std::int64_t kLargestFactor = 1 << 16;
constexpr std::size_t kMostTerms = 8;
// Values that the type does not bound are trusted up to here, so that what is added to them seldom needs 64 bits.
constexpr std::int64_t kLargestTrusted = 1 << 30;
// Up to here integers are exact as float32.
constexpr std::int64_t kLargestExact = 1 << 24;
// How many choices of one comparison are told apart.
constexpr int kDeepestChoice = 4;
// Of a mask whose comparisons are looked at together: larger ones are left to intervals.
constexpr std::size_t kMostConjuncts = 16;
constexpr std::size_t kMostForms = 8;
constexpr std::size_t kMostUnknowns = 4;

enum Varies : unsigned { kWithH = 1, kWithQ = 2, kWithKv = 4, kWithScore = 8 };

struct Range {
  std::int64_t low = 0, high = 0;
  bool within(std::int64_t bound) const { return low >= -bound && high <= bound; }
};
Range scaled(Range range, std::int64_t factor) {
  return factor < 0 ? Range{range.high * factor, range.low * factor} : Range{range.low * factor, range.high * factor};
}
std::int64_t floor_div(std::int64_t a, std::int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0) ? 1 : 0); }

// sum of factor * term, plus a constant.
struct Form {
  std::map<int, std::int64_t> terms;  // factors by the term's number, never 0
  std::int64_t constant = 0;
  Value guard = {};  // where it is false nothing is known of the value; null: true
};

enum class TermKind : std::uint8_t { kEnd, kUniform, kFloorDiv, kMax, kMin, kSelect, kOther };

// What a form is made of: between two values over a tile.
struct Term {
  TermKind kind = TermKind::kOther;
  unsigned varies = 0;
  Value low, high;      // of the tile
  Range range;          // of all tiles
  Form a = {}, b = {};  // operands of kMax, kMin and kSelect; `a` the dividend of kFloorDiv
  std::int64_t divisor = 0;
  Value condition = {};  // of kSelect, in the mod
};

// A condition over a tile: false for all elements, true for all.
struct Truth {
  Value never, always;
};

// Of a condition: where it is the same for all keys of the tile, for each query and head by itself, even if it is not
// for all of them. Null: nowhere. `by_chance`: because values that vary with the key may be the same for all of a tile.
struct ByRow {
  Value holds = {};
  bool by_chance = false;
};

// Of one coordinate, where a condition holds at all. Null: no bound.
struct Bounds {
  Value lower = {}, upper = {};
};

// `form` compared with 0.
struct Atom {
  enum Relation : std::uint8_t { kLess, kLessEqual, kEqual, kNotEqual } relation;
  Form form;
};

class Analysis {
 public:
  Analysis(mlir::OpBuilder& builder, mlir::func::FuncOp function, const ModProblem& problem,
           mlir::DataFlowSolver& solver, std::vector<TileSummary>& summaries)
      : b_(builder),
        loc_(builder.getUnknownLoc()),
        function_(function),
        problem_(problem),
        solver_(solver),
        summaries_(summaries),
        extents_{problem.batch, problem.num_heads, problem.seqlen_q, problem.seqlen_kv} {}

  // False where it gives up. Inserts at the builder's place, the return included.
  bool run() {
    const Value keep = function_.front().getTerminator()->getOperand(1);
    llvm::SetVector<mlir::Operation*> needed;
    const auto need = [&](Value v) {
      if (mlir::Operation* op = v.getDefiningOp()) needed.insert(op);
    };
    need(keep);
    for (std::size_t i = 0; i < needed.size() && needed.size() <= kMostOperations; ++i)
      for (const Value operand : needed[i]->getOperands()) need(operand);
    if (needed.size() > kMostOperations) return false;
    for (const mlir::BlockArgument argument : function_.getArguments()) varies_[argument] = kWithScore;
    // In order, so that what an operation needs is there.
    for (mlir::Operation& op : function_.front().without_terminator()) {
      if (!needed.contains(&op)) continue;
      const Value result = op.getResult(0);
      unsigned varies = 0;
      for (const Value operand : op.getOperands()) varies |= varies_.lookup(operand);
      if (auto index = llvm::dyn_cast<IndexOp>(op)) varies = bit(index.getRole());
      varies_[result] = varies;
      if (result.getType().isInteger(64)) {
        if (std::optional<Form> form = form_of(op)) forms_[result] = std::move(*form);
      } else if (result.getType().isF32()) {
        if (std::optional<Form> form = exact_float(op)) forms_[result] = std::move(*form);
      } else if (result.getType().isInteger(1)) {
        if (std::optional<Atom> atom = atom_of(op)) atoms_[result] = std::move(*atom);
        truths_[result] = truth_of(op);
        rows_[result] = by_row(op);
        for (const Role role : {Role::Q, Role::Kv})
          for (const bool holds : {false, true}) bounds_[key(result, role, holds)] = bounds_of(op, role, holds);
      }
    }
    if (varies_.lookup(keep) & kWithScore) return false;
    const Truth truth = truths_.lookup(keep);
    llvm::SmallVector<Value> results{projected(keep, true).value_or(truth.never),
                                     projected(keep, false).value_or(truth.always)};
    for (const Role role : {Role::Kv, Role::Q}) {
      const Bounds bounds = bounds_.lookup(key(keep, role, true));
      const Value first = end(role, false), last = end(role, true);
      results.push_back(bounds.lower ? larger(first, bounds.lower) : first);
      results.push_back(bounds.upper ? smaller(last, bounds.upper) : last);
    }
    for (Value& result : llvm::MutableArrayRef(results).drop_front(2))
      result = arith::TruncIOp::create(b_, loc_, b_.getI32Type(), result);
    const ByRow rows = rows_.lookup(keep);
    results.push_back(rows.by_chance ? rows.holds : boolean(false));
    mlir::func::ReturnOp::create(b_, loc_, results);
    return true;
  }

 private:
  static unsigned bit(Role role) {
    constexpr unsigned kBits[] = {0, kWithH, kWithQ, kWithKv};
    return kBits[static_cast<int>(role)];
  }
  static std::pair<Value, unsigned> key(Value v, Role role, bool holds) {
    return {v, 2 * static_cast<unsigned>(role) + (holds ? 1 : 0)};
  }

  // ---- What is emitted

  Value i64(std::int64_t value) { return arith::ConstantOp::create(b_, loc_, b_.getI64IntegerAttr(value)); }
  Value boolean(bool value) { return arith::ConstantOp::create(b_, loc_, b_.getBoolAttr(value)); }
  Truth unknown() { return {boolean(false), boolean(false)}; }
  template <typename Op>
  Value make(Value a, Value b) {
    return b_.createOrFold<Op>(loc_, a, b);
  }
  // A null is true.
  Value both(Value a, Value b) { return !a ? b : !b ? a : make<arith::AndIOp>(a, b); }
  Value either(Value a, Value b) { return make<arith::OrIOp>(a, b); }
  Value inverted(Value a) { return make<arith::XOrIOp>(a, boolean(true)); }
  Value select(Value condition, Value yes, Value no) {
    return b_.createOrFold<arith::SelectOp>(loc_, condition, yes, no);
  }
  Value smaller(Value a, Value b) { return make<arith::MinSIOp>(a, b); }
  Value larger(Value a, Value b) { return make<arith::MaxSIOp>(a, b); }
  Value compare(arith::CmpIPredicate predicate, Value a, Value b) {
    return b_.createOrFold<arith::CmpIOp>(loc_, predicate, a, b);
  }
  // Of a value that lies in `known` anyway.
  Value clamped(Value v, Range range, Range known) {
    if (known.high > range.high) v = smaller(v, i64(range.high));
    return known.low < range.low ? larger(v, i64(range.low)) : v;
  }
  Value clamped(Value v, Range range) { return larger(smaller(v, i64(range.high)), i64(range.low)); }
  static bool is_false(Value v) { return mlir::matchPattern(v, mlir::m_Zero()); }

  std::int64_t extent(Role role) const { return std::max<std::int64_t>(extents_[static_cast<std::size_t>(role)], 1); }
  Value end(Role role, bool last) {
    Value& known = ends_[{static_cast<int>(role), last}];
    if (!known)
      known =
          TileEndOp::create(b_, loc_, last ? End::Last : End::First, role, static_cast<std::uint64_t>(extent(role)));
    return known;
  }

  // `v` as the mod has it, for the tile's batch and its first head; of what varies with neither query nor key.
  Value cloned(Value v) {
    if (copies_.contains(v)) return copies_.lookup(v);
    llvm::SetVector<mlir::Operation*> needed;
    needed.insert(v.getDefiningOp());
    for (std::size_t i = 0; i < needed.size(); ++i)
      for (const Value operand : needed[i]->getOperands())
        if (!copies_.contains(operand)) needed.insert(operand.getDefiningOp());
    for (mlir::Operation& op : function_.front()) {
      if (!needed.contains(&op)) continue;
      if (auto index = llvm::dyn_cast<IndexOp>(op)) {
        copies_.map(op.getResult(0), end(index.getRole(), false));
      } else {
        b_.clone(op, copies_);
      }
    }
    return copies_.lookup(v);
  }
  bool is_uniform(Value v) const { return (varies_.lookup(v) & ~kWithH) == 0; }
  // Under which condition cloned() is `v` for all heads of the tile.
  Value one_head(Value v) {
    if ((varies_.lookup(v) & kWithH) == 0) return {};
    return compare(arith::CmpIPredicate::eq, end(Role::H, false), end(Role::H, true));
  }

  // Whether computed at another place of the code `v` has the same bits: nothing in it is fused with what uses it.
  bool is_reproducible(Value v) {
    if (const auto known = reproducible_.find(v); known != reproducible_.end()) return known->second;
    llvm::SetVector<mlir::Operation*> needed;
    const auto need = [&](Value operand) {
      if (mlir::Operation* op = operand.getDefiningOp()) needed.insert(op);
    };
    need(v);
    bool result = true;
    for (std::size_t i = 0; i < needed.size(); ++i) {
      mlir::Operation* const op = needed[i];
      for (const Value operand : op->getOperands()) {
        need(operand);
        // Behind a negation or a choice, too.
        const bool is_product = operand.getDefiningOp<arith::MulFOp>() || operand.getDefiningOp<arith::NegFOp>() ||
                                operand.getDefiningOp<arith::SelectOp>();
        result &= !(llvm::isa<arith::AddFOp, arith::SubFOp>(op) && is_product);
      }
      const bool is_float = op->getResult(0).getType().isF32();
      result &=
          !is_float || llvm::isa<arith::ConstantOp, ReadOp, arith::AddFOp, arith::SubFOp, arith::MulFOp, arith::DivFOp,
                                 arith::NegFOp, arith::SelectOp, arith::MaximumFOp, arith::MinimumFOp, arith::SIToFPOp,
                                 arith::UIToFPOp, math::AbsFOp, math::FloorOp, math::CeilOp, math::RoundEvenOp>(op);
    }
    return reproducible_[v] = result;
  }

  // ---- Forms

  int add_term(Term term) {
    terms_.push_back(std::move(term));
    return static_cast<int>(terms_.size()) - 1;
  }
  Form form_of_term(int term, Value guard = {}) { return {.terms = {{term, 1}}, .constant = 0, .guard = guard}; }
  Form of_coordinate(Role role) {
    const auto [found, is_new] = coordinates_.try_emplace(static_cast<int>(role), 0);
    if (is_new)
      found->second = add_term({.kind = role == Role::B ? TermKind::kUniform : TermKind::kEnd,
                                .varies = bit(role),
                                .low = end(role, false),
                                .high = end(role, role != Role::B),
                                .range = {0, extent(role) - 1}});
    return form_of_term(found->second);
  }
  const Term& term(int number) const { return terms_[static_cast<std::size_t>(number)]; }

  Range range_of(const Form& form) const {
    Range sum{form.constant, form.constant};
    for (const auto& [number, factor] : form.terms) {
      const Range part = scaled(term(number).range, factor);
      sum = {sum.low + part.low, sum.high + part.high};
    }
    return sum;
  }
  unsigned varies(const Form& form) const {
    unsigned all = 0;
    for (const auto& [number, factor] : form.terms) all |= term(number).varies;
    return all;
  }

  // a + factor * b, if it is none too large: whatever its size, no sum of its parts wraps.
  std::optional<Form> sum(const Form& a, std::int64_t factor, const Form& b) {
    Form result = a;
    if (std::abs(factor) > kLargestFactor) return std::nullopt;
    result.constant += factor * b.constant;
    if (std::abs(result.constant) > kLargestTerm) return std::nullopt;
    for (const auto& [number, of_b] : b.terms) {
      std::int64_t& total = result.terms[number];
      total += factor * of_b;
      if (std::abs(total) > kLargestFactor) return std::nullopt;
      if (total == 0) result.terms.erase(number);
    }
    if (result.terms.size() > kMostTerms) return std::nullopt;
    result.guard = both(a.guard, b.guard);
    return result;
  }
  std::optional<Form> scaled_form(const Form& form, std::int64_t factor) { return sum({}, factor, form); }

  // The form's least or largest value over the tile, without the guard.
  Value end_of(const Form& form, bool high) {
    Value plus = ends_of(form, high, 1), minus = ends_of(form, high, -1);
    if (form.constant > 0) plus = plus ? make<arith::AddIOp>(plus, i64(form.constant)) : i64(form.constant);
    if (form.constant < 0 && plus) plus = make<arith::SubIOp>(plus, i64(-form.constant));
    if (form.constant < 0 && !plus) plus = i64(form.constant);
    if (!plus) plus = i64(0);
    return minus ? make<arith::SubIOp>(plus, minus) : plus;
  }
  // The sum of the terms whose factors have that sign, all taken positive; null where there are none. `high`: at that
  // end of the whole form.
  Value ends_of(const Form& form, bool high, int sign) {
    Value total;
    for (const auto& [number, factor] : form.terms) {
      if ((factor > 0) != (sign > 0)) continue;
      Value part = (sign > 0) == high ? term(number).high : term(number).low;
      if (std::abs(factor) != 1) part = make<arith::MulIOp>(part, i64(std::abs(factor)));
      total = total ? make<arith::AddIOp>(total, part) : part;
    }
    return total;
  }
  // How that end compares with 0, as people would write it.
  Value end_compares(const Form& form, bool high, arith::CmpIPredicate predicate) {
    const Value plus = ends_of(form, high, 1), minus = ends_of(form, high, -1);
    if (form.constant == 0 || !plus || !minus) {
      // a < b, a < 5, 5 < b
      const Value constant = i64(plus ? -form.constant : form.constant);
      return compare(predicate, plus ? plus : constant, minus ? minus : plus ? constant : i64(0));
    }
    return compare(predicate, make<arith::SubIOp>(plus, minus), i64(-form.constant));
  }

  std::optional<Form> known(Value v) const {
    const auto found = forms_.find(v);
    return found == forms_.end() ? std::nullopt : std::optional(found->second);
  }

  // What the analysis of single values knows; the whole of 64 bits where that is nothing.
  Range static_range(Value v) const {
    const auto* lattice = solver_.lookupState<mlir::dataflow::IntegerValueRangeLattice>(v);
    if (!lattice || lattice->getValue().isUninitialized())
      return {std::numeric_limits<std::int64_t>::min(), std::numeric_limits<std::int64_t>::max()};
    const mlir::ConstantIntRanges& range = lattice->getValue().getValue();
    return {range.smin().getSExtValue(), range.smax().getSExtValue()};
  }

  // ---- Summaries

  struct Ends {
    Value low, high, guard;
  };

  // Of a captured read whose place varies within a tile along one dimension.
  std::optional<Ends> summarised(ReadOp read) {
    const auto capture = static_cast<int>(read.getCapture());
    int dimension = -1;
    Ends ends;
    for (const auto& [i, index] : llvm::enumerate(read.getIndices())) {
      if (is_uniform(index)) {
        ends.guard = both(ends.guard, one_head(index));
      } else if (dimension < 0) {
        dimension = static_cast<int>(i);
      } else {
        return std::nullopt;
      }
    }
    if (!problem_.summaries || dimension < 0) return std::nullopt;
    const std::optional<Form> along = known(read.getIndices()[static_cast<unsigned>(dimension)]);
    const std::optional<unsigned> number = summary_number(capture, dimension);
    if (!along || !number) return std::nullopt;
    ends.guard = both(ends.guard, along->guard);

    const CaptureInfo& info = problem_.captures[static_cast<std::size_t>(capture)];
    const std::vector<std::int64_t> extents = summary_extents(info, dimension);
    std::vector<std::int64_t> strides(extents.size(), -1);
    strides.back() = 1;
    llvm::SmallVector<Value> indices;
    for (const auto& [i, index] : llvm::enumerate(read.getIndices()))
      if (static_cast<int>(i) != dimension) indices.push_back(cloned(index));
    const Range places{0, info.extent[static_cast<std::size_t>(dimension)] - 1};
    const auto block_of = [&](bool high) {
      return make<FloorDivOp>(clamped(end_of(*along, high), places, range_of(*along)), i64(kSummaryBlock));
    };
    const Value first = block_of(false), last = block_of(true);
    const Value length = make<arith::AddIOp>(make<arith::SubIOp>(last, first), i64(1));
    const Value level = FloorLog2Op::create(b_, loc_, b_.getI64Type(), length);
    const mlir::Type element = info.dtype == dsl::DType::kInt64 ? b_.getI64Type() : b_.getI32Type();
    const auto part = [&](int which, Value block) {
      llvm::SmallVector<Value> at(indices);
      at.append({i64(which), level, block});
      return ReadOp::create(b_, loc_, b_.getI64Type(), *number, at, extents, strides, mlir::DenseBoolArrayAttr(),
                            mlir::IntegerAttr(), element)
          .getResult();
    };
    ends.low = smaller(part(0, first), part(1, last));
    ends.high = larger(part(2, first), part(3, last));
    return ends;
  }

  // Where the view of a summary stands; nothing where there is no place, or no such summary.
  std::optional<unsigned> summary_number(int capture, int dimension) {
    const CaptureInfo& info = problem_.captures[static_cast<std::size_t>(capture)];
    if (dsl::value_type(info.dtype) == dsl::Type::kFloat) return std::nullopt;
    std::int64_t elements = 1;
    for (const std::int64_t extent : summary_extents(info, dimension))
      if (llvm::MulOverflow(elements, extent, elements) || elements > std::numeric_limits<std::int32_t>::max())
        return std::nullopt;
    auto found = llvm::find_if(summaries_, [&](const TileSummary& summary) {
      return summary.capture == capture && summary.dimension == dimension;
    });
    const auto number = static_cast<std::size_t>(found - summaries_.begin()) + problem_.captures.size();
    if (number >= static_cast<std::size_t>(dsl::kMaxCaptures) || info.extent.size() + 2 > dsl::kMaxRank)
      return std::nullopt;
    if (found == summaries_.end()) summaries_.push_back({.capture = capture, .dimension = dimension});
    return static_cast<unsigned>(number);
  }

  std::optional<Form> summarised_form(ReadOp read) {
    std::optional<Ends> ends = summarised(read);
    if (!ends) return std::nullopt;
    Range range = static_range(read.getResult());
    if (!range.within(kLargestTerm)) {
      range = {-kLargestTrusted, kLargestTrusted};
      for (Value* const value : {&ends->low, &ends->high}) {
        const Value trusted = clamped(*value, range);
        ends->guard = both(ends->guard, compare(arith::CmpIPredicate::eq, trusted, *value));
        *value = trusted;
      }
    }
    return form_of_term(
        add_term({.varies = varies_.lookup(read.getResult()), .low = ends->low, .high = ends->high, .range = range}),
        ends->guard);
  }

  // What does not vary within a tile, or only with the head. Where the type does not bound it, it is trusted up to a
  // bound.
  Form uniform(Value v) {
    Range range = static_range(v);
    Value value = cloned(v), guard = one_head(v);
    if (!range.within(kLargestTerm)) {
      range = {-kLargestTrusted, kLargestTrusted};
      const Value trusted = clamped(value, range);
      guard = both(guard, compare(arith::CmpIPredicate::eq, trusted, value));
      value = trusted;
    }
    return form_of_term(add_term({.kind = TermKind::kUniform, .low = value, .high = value, .range = range}), guard);
  }

  // Between two literals, or nothing.
  std::optional<Form> between_literals(Value v) {
    const Range range = static_range(v);
    if (!range.within(kLargestTerm)) return std::nullopt;
    return form_of_term(
        add_term({.varies = varies_.lookup(v), .low = i64(range.low), .high = i64(range.high), .range = range}));
  }

  std::optional<Form> form_of(mlir::Operation& op) {
    const Value result = op.getResult(0);
    if (llvm::APInt literal; mlir::matchPattern(result, mlir::m_ConstantInt(&literal))) {
      const std::int64_t value = literal.getSExtValue();
      if (std::abs(value / 2) < kLargestTerm / 2) return Form{.terms = {}, .constant = value, .guard = {}};
      return std::nullopt;
    }
    if (auto index = llvm::dyn_cast<IndexOp>(op)) return of_coordinate(index.getRole());
    if (varies_.lookup(result) == 0) return is_reproducible(result) ? uniform(result) : between_literals(result);
    std::optional<Form> form = followed(op);
    if (form && range_of(*form).within(kLargestTerm)) return form;
    if (is_uniform(result)) return is_reproducible(result) ? uniform(result) : between_literals(result);
    if (auto read = llvm::dyn_cast<ReadOp>(op))
      if (std::optional<Form> summary = summarised_form(read)) return summary;
    return between_literals(result);
  }

  std::optional<Form> followed(mlir::Operation& op) {
    const Value result = op.getResult(0);
    if (auto choice = llvm::dyn_cast<arith::SelectOp>(op)) {
      const std::optional<Form> a = known(choice.getTrueValue()), b = known(choice.getFalseValue());
      if (!a || !b) return std::nullopt;
      return one_of(result, TermKind::kSelect, *a, *b, choice.getCondition());
    }
    if (auto bool_value = llvm::dyn_cast<arith::ExtUIOp>(op)) {
      const auto found = truths_.find(bool_value.getIn());
      if (found == truths_.end()) return std::nullopt;
      const Truth& truth = found->second;
      return form_of_term(add_term({.varies = varies_.lookup(result),
                                    .low = make_extended(truth.always),
                                    .high = make_extended(inverted(truth.never)),
                                    .range = {0, 1}}));
    }
    if (op.getNumOperands() != 2) return std::nullopt;
    const std::optional<Form> a = known(op.getOperand(0)), b = known(op.getOperand(1));
    if (!a || !b) return std::nullopt;
    return llvm::TypeSwitch<mlir::Operation*, std::optional<Form>>(&op)
        .Case<arith::AddIOp>([&](auto) { return sum(*a, 1, *b); })
        .Case<arith::SubIOp>([&](auto) { return sum(*a, -1, *b); })
        .Case<arith::MulIOp>([&](auto) { return product(result, *a, *b); })
        .Case<arith::MaxSIOp>([&](auto) { return one_of(result, TermKind::kMax, *a, *b); })
        .Case<arith::MinSIOp>([&](auto) { return one_of(result, TermKind::kMin, *a, *b); })
        .Case<FloorDivOp>([&](auto) { return quotient(result, *a, *b); })
        .Case<FloorModOp>([&](auto) { return remainder(result, *a, *b); })
        .Default([](auto) { return std::nullopt; });
  }

  Value make_extended(Value bool_value) { return b_.createOrFold<arith::ExtUIOp>(loc_, b_.getI64Type(), bool_value); }

  std::optional<Form> product(Value result, const Form& a, const Form& b) {
    if (a.terms.empty()) return scaled_form(b, a.constant);
    if (b.terms.empty()) return scaled_form(a, b.constant);
    const Range x = range_of(a), y = range_of(b);
    constexpr std::int64_t kLargestFactors = 1 << 20;
    if (!x.within(kLargestFactors) || !y.within(kLargestFactors)) return std::nullopt;
    Value low, high;
    Range range{std::numeric_limits<std::int64_t>::max(), std::numeric_limits<std::int64_t>::min()};
    for (const bool a_high : {false, true}) {
      for (const bool b_high : {false, true}) {
        const Value corner = make<arith::MulIOp>(end_of(a, a_high), end_of(b, b_high));
        low = low ? smaller(low, corner) : corner;
        high = high ? larger(high, corner) : corner;
        const std::int64_t value = (a_high ? x.high : x.low) * (b_high ? y.high : y.low);
        range = {std::min(range.low, value), std::max(range.high, value)};
      }
    }
    return form_of_term(add_term({.varies = varies_.lookup(result), .low = low, .high = high, .range = range}),
                        both(a.guard, b.guard));
  }

  std::optional<Form> one_of(Value result, TermKind kind, const Form& a, const Form& b, Value condition = {}) {
    const Range x = range_of(a), y = range_of(b);
    Term made{.kind = kind,
              .varies = varies_.lookup(result),
              .low = kind == TermKind::kMax ? larger(end_of(a, false), end_of(b, false))
                                            : smaller(end_of(a, false), end_of(b, false)),
              .high = kind == TermKind::kMin ? smaller(end_of(a, true), end_of(b, true))
                                             : larger(end_of(a, true), end_of(b, true)),
              .range = {kind == TermKind::kMax ? std::max(x.low, y.low) : std::min(x.low, y.low),
                        kind == TermKind::kMin ? std::min(x.high, y.high) : std::max(x.high, y.high)},
              .a = a,
              .b = b,
              .condition = condition};
    return form_of_term(add_term(std::move(made)), both(a.guard, b.guard));
  }

  std::optional<Form> quotient(Value result, const Form& a, const Form& b) {
    if (!b.terms.empty() || b.constant == 0) return std::nullopt;
    const std::int64_t divisor = b.constant;
    const auto divided = [&](bool high) { return make<FloorDivOp>(end_of(a, (divisor > 0) == high), i64(divisor)); };
    Range range = range_of(a);
    range = {floor_div(divisor > 0 ? range.low : range.high, divisor),
             floor_div(divisor > 0 ? range.high : range.low, divisor)};
    return form_of_term(add_term({.kind = TermKind::kFloorDiv,
                                  .varies = varies_.lookup(result),
                                  .low = divided(false),
                                  .high = divided(true),
                                  .range = range,
                                  .a = a,
                                  .divisor = divisor}),
                        both(a.guard, b.guard));
  }

  // Within one period it is a difference, across periods anything.
  std::optional<Form> remainder(Value result, const Form& a, const Form& b) {
    if (!b.terms.empty() || b.constant <= 0) return std::nullopt;
    const std::int64_t divisor = b.constant;
    const Range range = range_of(a);
    if (range.low >= 0 && range.high < divisor) return a;
    const Value low = end_of(a, false), high = end_of(a, true);
    const Value one_period =
        compare(arith::CmpIPredicate::eq, make<FloorDivOp>(low, i64(divisor)), make<FloorDivOp>(high, i64(divisor)));
    return form_of_term(add_term({.varies = varies_.lookup(result),
                                  .low = select(one_period, make<FloorModOp>(low, i64(divisor)), i64(0)),
                                  .high = select(one_period, make<FloorModOp>(high, i64(divisor)), i64(divisor - 1)),
                                  .range = {0, divisor - 1}}),
                        both(a.guard, b.guard));
  }

  // Floats that are integers, and exact at every step.
  std::optional<Form> exact_float(mlir::Operation& op) {
    std::optional<Form> form;
    if (mlir::FloatAttr literal; mlir::matchPattern(op.getResult(0), mlir::m_Constant(&literal))) {
      const double value = literal.getValueAsDouble();
      if (std::abs(value) <= static_cast<double>(kLargestExact) && value == std::floor(value))
        form = Form{.terms = {}, .constant = static_cast<std::int64_t>(value), .guard = {}};
    } else if (llvm::isa<arith::SIToFPOp>(op)) {
      form = known(op.getOperand(0));
    } else if (llvm::isa<arith::NegFOp>(op)) {
      if (const std::optional<Form> a = known(op.getOperand(0))) form = scaled_form(*a, -1);
    } else if (llvm::isa<arith::AddFOp, arith::SubFOp, arith::MulFOp>(op)) {
      const std::optional<Form> a = known(op.getOperand(0)), b = known(op.getOperand(1));
      if (!a || !b) return std::nullopt;
      if (!llvm::isa<arith::MulFOp>(op)) {
        form = sum(*a, llvm::isa<arith::SubFOp>(op) ? -1 : 1, *b);
      } else if (a->terms.empty() || b->terms.empty()) {
        form = product(op.getResult(0), *a, *b);
      }
    }
    // A guarded value may be anything where the guard does not hold, and nothing is said of it there.
    if (form && range_of(*form).within(kLargestExact)) return form;
    return std::nullopt;
  }

  // ---- Conditions

  static Atom negated(Atom atom) {
    Form& form = atom.form;
    switch (atom.relation) {
      case Atom::kEqual:
        atom.relation = Atom::kNotEqual;
        return atom;
      case Atom::kNotEqual:
        atom.relation = Atom::kEqual;
        return atom;
      default:
        break;
    }
    // not (x < 0) is -x <= 0.
    atom.relation = atom.relation == Atom::kLess ? Atom::kLessEqual : Atom::kLess;
    for (auto& [number, factor] : form.terms) factor = -factor;
    form.constant = -form.constant;
    return atom;
  }

  std::optional<Atom> atom_of(mlir::Operation& op) {
    using P = arith::CmpIPredicate;
    P predicate = P::eq;
    if (auto integers = llvm::dyn_cast<arith::CmpIOp>(op)) {
      predicate = integers.getPredicate();
    } else if (auto floats = llvm::dyn_cast<arith::CmpFOp>(op)) {
      // Of exact integers, none of which is NaN.
      using F = arith::CmpFPredicate;
      switch (floats.getPredicate()) {
        case F::OEQ:
        case F::UEQ:
          predicate = P::eq;
          break;
        case F::ONE:
        case F::UNE:
          predicate = P::ne;
          break;
        case F::OLT:
        case F::ULT:
          predicate = P::slt;
          break;
        case F::OLE:
        case F::ULE:
          predicate = P::sle;
          break;
        case F::OGT:
        case F::UGT:
          predicate = P::sgt;
          break;
        case F::OGE:
        case F::UGE:
          predicate = P::sge;
          break;
        default:
          return std::nullopt;
      }
    } else {
      return std::nullopt;
    }
    const Value lhs = op.getOperand(0), rhs = op.getOperand(1);
    std::optional<Form> a = known(lhs), b = known(rhs);
    // Compared alone, what the type does not bound needs no trust: it is clamped to where the comparison is decided.
    if (a && b && lhs.getType().isInteger(64)) {
      if (!static_range(rhs).within(kLargestTerm) && varies_.lookup(rhs) == 0)
        b = near(rhs, *a);
      else if (!static_range(lhs).within(kLargestTerm) && varies_.lookup(lhs) == 0)
        a = near(lhs, *b);
    }
    if (!a || !b) return std::nullopt;
    const bool greater = predicate == P::sgt || predicate == P::sge;
    std::optional<Form> difference = greater ? sum(*b, -1, *a) : sum(*a, -1, *b);
    if (!difference) return std::nullopt;
    difference = tightened(std::move(*difference));
    switch (predicate) {
      case P::eq:
        return Atom{Atom::kEqual, std::move(*difference)};
      case P::ne:
        return Atom{Atom::kNotEqual, std::move(*difference)};
      case P::slt:
      case P::sgt:
        return Atom{Atom::kLess, std::move(*difference)};
      case P::sle:
      case P::sge:
        return Atom{Atom::kLessEqual, std::move(*difference)};
      default:
        return std::nullopt;
    }
  }
  Form near(Value v, const Form& other) {
    const Range range = range_of(other);
    return form_of_term(clamped_term(cloned(v), {range.low - 1, range.high + 1}));
  }
  int clamped_term(Value v, Range range) {
    const Value value = clamped(v, range);
    return add_term({.kind = TermKind::kUniform, .low = value, .high = value, .range = range});
  }

  // `form`, compared with 0, so that sums need no 64 bits: beyond what the other terms can outweigh, one term that is
  // the same for the tile need not go.
  Form tightened(Form form) {
    if ((form.terms.size() < 3 && form.constant == 0) || fits_32(range_of(form))) return form;
    int number = -1;
    for (const auto& [candidate, factor] : form.terms) {
      if (term(candidate).kind != TermKind::kUniform || std::abs(factor) != 1) continue;
      if (number >= 0) return form;
      number = candidate;
    }
    if (number < 0) return form;
    const std::int64_t factor = form.terms.at(number);
    form.terms.erase(number);
    const Range others = scaled(range_of(form), -factor);
    form.terms[clamped_term(term(number).low, {others.low - 1, others.high + 1})] = factor;
    return form;
  }
  static bool fits_32(Range range) { return range.within(std::numeric_limits<std::int32_t>::max()); }

  // `atom` with the choice `number` taken: its terms replaced by those of `chosen`.
  std::optional<Atom> with(const Atom& atom, int number, const Form& chosen) {
    Atom result = atom;
    const std::int64_t factor = result.form.terms.at(number);
    result.form.terms.erase(number);
    std::optional<Form> form = sum(result.form, factor, chosen);
    if (!form) return std::nullopt;
    result.form = std::move(*form);
    return result;
  }
  // The term of `atom` that is to be told apart into two; -1 for none.
  int choice_in(const Atom& atom) const {
    for (const auto& [number, factor] : atom.form.terms) {
      const TermKind kind = term(number).kind;
      if (kind == TermKind::kSelect) return number;
      const bool ordered = atom.relation == Atom::kLess || atom.relation == Atom::kLessEqual;
      if (ordered && (kind == TermKind::kMax || kind == TermKind::kMin)) return number;
    }
    return -1;
  }
  // max(a, b) + c < 0 where both are, min(a, b) + c < 0 where either is.
  bool is_both(const Atom& atom, int number) const {
    return (term(number).kind == TermKind::kMax) == (atom.form.terms.at(number) > 0);
  }

  Truth decide(const Atom& atom, int depth) {
    using P = arith::CmpIPredicate;
    if (const int number = choice_in(atom); number >= 0 && depth < kDeepestChoice) {
      const Term made = term(number);
      const std::optional<Atom> a = with(atom, number, made.a), b = with(atom, number, made.b);
      if (a && b) {
        const Truth x = decide(*a, depth + 1), y = decide(*b, depth + 1);
        if (made.kind == TermKind::kSelect) return choose(truths_.lookup(made.condition), x, y);
        return is_both(atom, number) ? conjunction(x, y) : disjunction(x, y);
      }
    }
    if (atom.relation == Atom::kNotEqual) return inverted(decide(negated(atom), depth));
    const Form& form = atom.form;
    Truth truth;
    switch (atom.relation) {
      case Atom::kLess:
        truth = {end_compares(form, false, P::sge), end_compares(form, true, P::slt)};
        break;
      case Atom::kLessEqual:
        truth = {end_compares(form, false, P::sgt), end_compares(form, true, P::sle)};
        break;
      default:
        truth = {either(end_compares(form, false, P::sgt), end_compares(form, true, P::slt)),
                 both(end_compares(form, false, P::sge), end_compares(form, true, P::sle))};
    }
    return {both(truth.never, form.guard), both(truth.always, form.guard)};
  }

  Truth conjunction(const Truth& a, const Truth& b) { return {either(a.never, b.never), both(a.always, b.always)}; }
  Truth disjunction(const Truth& a, const Truth& b) { return {both(a.never, b.never), either(a.always, b.always)}; }
  Truth inverted(const Truth& a) { return {a.always, a.never}; }
  Truth choose(const Truth& condition, const Truth& yes, const Truth& no) {
    const auto chosen = [&](Value of_yes, Value of_no) {
      return either(either(both(condition.always, of_yes), both(condition.never, of_no)), both(of_yes, of_no));
    };
    return {chosen(yes.never, no.never), chosen(yes.always, no.always)};
  }

  Truth truth_of(mlir::Operation& op) {
    const Value result = op.getResult(0);
    if (varies_.lookup(result) == 0) return uniform_truth(result);
    std::optional<Truth> truth;
    if (const auto atom = atoms_.find(result); atom != atoms_.end()) {
      truth = decide(atom->second, 0);
    } else if (llvm::isa<arith::CmpFOp>(op)) {
      truth = float_comparison(llvm::cast<arith::CmpFOp>(op));
    } else if (auto read = llvm::dyn_cast<ReadOp>(op)) {
      if (const std::optional<Ends> ends = summarised(read))
        truth = {both(ends->guard, compare(arith::CmpIPredicate::eq, ends->high, i64(0))),
                 both(ends->guard, compare(arith::CmpIPredicate::ne, ends->low, i64(0)))};
    } else {
      truth = joined(op);
    }
    if (truth) return *truth;
    return is_uniform(result) ? uniform_truth(result) : unknown();
  }
  Truth uniform_truth(Value v) {
    if (!is_reproducible(v)) return unknown();
    const Value value = cloned(v), guard = one_head(v);
    return {both(guard, inverted(value)), both(guard, value)};
  }

  std::optional<Truth> joined(mlir::Operation& op) {
    if (!llvm::all_of(op.getOperands(), [&](Value v) { return truths_.contains(v); })) return std::nullopt;
    const auto of = [&](unsigned i) { return truths_.lookup(op.getOperand(i)); };
    if (llvm::isa<arith::AndIOp>(op)) return conjunction(of(0), of(1));
    if (llvm::isa<arith::OrIOp>(op)) return disjunction(of(0), of(1));
    if (llvm::isa<arith::SelectOp>(op)) return choose(of(0), of(1), of(2));
    if (llvm::isa<arith::XOrIOp>(op)) return choose(of(0), inverted(of(1)), of(1));
    auto comparison = llvm::dyn_cast<arith::CmpIOp>(op);
    if (!comparison) return std::nullopt;
    using P = arith::CmpIPredicate;
    const Truth a = of(0), b = of(1);
    switch (comparison.getPredicate()) {
      case P::eq:
        return choose(a, b, inverted(b));
      case P::ne:
        return choose(a, inverted(b), b);
      case P::ult:
        return conjunction(inverted(a), b);
      case P::ule:
        return disjunction(inverted(a), b);
      case P::ugt:
        return conjunction(a, inverted(b));
      case P::uge:
        return disjunction(a, inverted(b));
      default:
        return std::nullopt;
    }
  }

  ByRow by_row(mlir::Operation& op) {
    const Value result = op.getResult(0);
    if ((varies_.lookup(result) & (kWithKv | kWithScore)) == 0) return {boolean(true)};
    if (const auto atom = atoms_.find(result); atom != atoms_.end()) return by_row(atom->second.form);
    if (!llvm::all_of(op.getOperands(), [&](Value v) { return truths_.contains(v); })) return {};
    ByRow all{boolean(true)};
    for (const Value operand : op.getOperands()) {
      const ByRow own = rows_.lookup(operand);
      const Truth truth = truths_.lookup(operand);
      const Value decided = either(truth.never, truth.always);
      all.holds = both(all.holds, own.holds ? either(own.holds, decided) : decided);
      all.by_chance |= own.by_chance;
    }
    return all;
  }
  // Of what is made of the query's parts and the key's: where the key's are the same for the tile.
  ByRow by_row(const Form& form) {
    Value same = boolean(true);
    for (const auto& [number, factor] : form.terms) {
      const Term& part = term(number);
      if ((part.varies & kWithKv) == 0) continue;
      if ((part.varies & kWithQ) != 0 || part.kind == TermKind::kEnd) return {};
      same = both(same, compare(arith::CmpIPredicate::eq, part.low, part.high));
    }
    return {both(same, form.guard), true};
  }

  // Rounding is monotone: what is between two numbers is so after it.
  std::optional<Ends> float_ends(Value v) {
    mlir::Operation* const op = v.getDefiningOp();
    if (!op) return std::nullopt;
    if (is_uniform(v)) {
      if (!is_reproducible(v)) return std::nullopt;
      return Ends{cloned(v), cloned(v), one_head(v)};
    }
    const auto converted = [&](Value end) {
      return arith::SIToFPOp::create(b_, loc_, b_.getF32Type(), end).getResult();
    };
    const auto of_form = [&](const Form& form) {
      return Ends{converted(end_of(form, false)), converted(end_of(form, true)), form.guard};
    };
    if (const std::optional<Form> form = known(v)) return of_form(*form);
    if (llvm::isa<arith::SIToFPOp>(op)) {
      if (const std::optional<Form> form = known(op->getOperand(0))) return of_form(*form);
      return std::nullopt;
    }
    if (!llvm::isa<arith::MulFOp, arith::DivFOp>(op)) return std::nullopt;
    mlir::FloatAttr literal;
    if (!mlir::matchPattern(op->getOperand(1), mlir::m_Constant(&literal))) return std::nullopt;
    const double factor = literal.getValueAsDouble();
    const std::optional<Ends> ends = float_ends(op->getOperand(0));
    if (!ends || !std::isfinite(factor) || factor == 0) return std::nullopt;
    const auto scaled_end = [&](Value end) {
      mlir::IRMapping mapping;
      mapping.map(op->getOperand(0), end);
      mapping.map(op->getOperand(1), cloned(op->getOperand(1)));
      return b_.clone(*op, mapping)->getResult(0);
    };
    const Value first = scaled_end(ends->low), second = scaled_end(ends->high);
    return factor > 0 ? Ends{first, second, ends->guard} : Ends{second, first, ends->guard};
  }

  std::optional<Truth> float_comparison(arith::CmpFOp op) {
    using P = arith::CmpFPredicate;
    std::optional<Ends> a = float_ends(op.getLhs()), b = float_ends(op.getRhs());
    if (!a || !b) return std::nullopt;
    P predicate = op.getPredicate();
    bool negative = false;
    // The unordered ones are the opposite of ordered ones.
    switch (predicate) {
      case P::ULT:
        predicate = P::OGE, negative = true;
        break;
      case P::ULE:
        predicate = P::OGT, negative = true;
        break;
      case P::UGT:
        predicate = P::OLE, negative = true;
        break;
      case P::UGE:
        predicate = P::OLT, negative = true;
        break;
      case P::UNE:
        predicate = P::OEQ, negative = true;
        break;
      default:
        break;
    }
    if (predicate == P::OGT || predicate == P::OGE) {
      std::swap(a, b);
      predicate = predicate == P::OGT ? P::OLT : P::OLE;
    }
    const auto is = [&](P p, Value x, Value y) { return b_.createOrFold<arith::CmpFOp>(loc_, p, x, y); };
    Truth truth;
    if (predicate == P::OLT || predicate == P::OLE) {
      truth = {inverted(is(predicate, a->low, b->high)), is(predicate, a->high, b->low)};
    } else if (predicate == P::OEQ) {
      truth = {either(inverted(is(P::OLE, a->low, b->high)), inverted(is(P::OGE, a->high, b->low))),
               both(is(P::OLE, a->high, b->low), is(P::OGE, a->low, b->high))};
    } else {
      return std::nullopt;
    }
    const Value guard = both(a->guard, b->guard);
    truth = {both(truth.never, guard), both(truth.always, guard)};
    return negative ? inverted(truth) : truth;
  }

  // ---- Conditions together

  // Forms that are at most 0, and conditions of which no more is known than where they cannot hold.
  struct Conjunct {
    std::vector<Form> forms;
    std::vector<Value> impossible;
  };
  using Disjunction = std::vector<Conjunct>;

  // Where `condition` cannot be `holds` anywhere in the tile, if two of its comparisons together say more of that than
  // each by itself; nothing where they don't, or there are too many.
  std::optional<Value> projected(Value condition, bool holds) {
    disjunctions_.clear();
    const std::optional<Disjunction> any = disjunction_of(condition, holds);
    if (!any) return std::nullopt;
    bool more = false;
    std::size_t emitted = 0;
    struct Found {
      Symbols symbols;
      std::vector<Affine> beyond;
      bool never = false;
    };
    std::vector<Found> found(any->size());
    for (const auto& [i, conjunct] : llvm::enumerate(*any)) {
      const Conditions conditions = conditions_of(conjunct, found[i].symbols);
      if (conditions.conditions.empty()) continue;
      std::optional<Projection> projection = project(conditions);
      if (!projection) return std::nullopt;
      found[i].beyond = std::move(projection->beyond);
      found[i].never = projection->never;
      emitted += found[i].beyond.size();
      // What values that are the same for all tiles exclude is no reason to ask of each.
      more |= found[i].never || llvm::any_of(found[i].beyond, [&](const Affine& row) {
                return llvm::any_of(llvm::enumerate(found[i].symbols.values), [&](auto symbol) {
                  return row[symbol.index()] != 0 && !found[i].symbols.same[symbol.index()];
                });
              });
    }
    constexpr std::size_t kMostBeyond = 24;
    if (!more || emitted > kMostBeyond) return std::nullopt;
    Value none;
    for (const auto& [i, conjunct] : llvm::enumerate(*any)) {
      Value impossible = boolean(false);
      for (const Value condition_fails : conjunct.impossible) impossible = either(impossible, condition_fails);
      for (const Form& form : conjunct.forms)
        impossible = either(impossible, both(end_compares(form, false, arith::CmpIPredicate::sgt), form.guard));
      Value beyond = boolean(found[i].never);
      for (const Affine& row : found[i].beyond) beyond = either(beyond, is_negative(row, found[i].symbols));
      none = both(none, either(impossible, both(beyond, all_guards(conjunct))));
    }
    return none ? none : boolean(true);
  }
  Value all_guards(const Conjunct& conjunct) {
    Value guard = boolean(true);
    for (const Form& form : conjunct.forms) guard = both(guard, form.guard);
    return guard;
  }

  // `condition` is `holds`, or opposite, as a disjunction of conjuncts; nothing where it is too long.
  std::optional<Disjunction> disjunction_of(Value condition, bool holds) {
    const auto known = disjunctions_.find({condition, holds ? 1u : 0u});
    if (known != disjunctions_.end()) return known->second;
    std::optional<Disjunction> made = make_disjunction(condition, holds);
    disjunctions_[{condition, holds ? 1u : 0u}] = made;
    return made;
  }

  std::optional<Disjunction> make_disjunction(Value condition, bool holds) {
    mlir::Operation* const op = condition.getDefiningOp();
    const auto of = [&](unsigned i, bool operand_holds) { return disjunction_of(op->getOperand(i), operand_holds); };
    const bool is_joined =
        varies_.lookup(condition) != 0 && llvm::all_of(op->getOperands(), [&](Value v) { return truths_.contains(v); });
    if (is_joined && llvm::isa<arith::AndIOp, arith::OrIOp>(op)) {
      return llvm::isa<arith::AndIOp>(op) == holds ? all_of(of(0, holds), of(1, holds))
                                                   : any_of(of(0, holds), of(1, holds));
    }
    if (is_joined && llvm::isa<arith::XOrIOp>(op) && mlir::matchPattern(op->getOperand(1), mlir::m_One()))
      return of(0, !holds);
    if (is_joined && llvm::isa<arith::XOrIOp>(op))
      return any_of(all_of(of(0, true), of(1, !holds)), all_of(of(0, false), of(1, holds)));
    if (is_joined && llvm::isa<arith::SelectOp>(op))
      return any_of(all_of(of(0, true), of(1, holds)), all_of(of(0, false), of(2, holds)));
    if (const auto atom = atoms_.find(condition); atom != atoms_.end() && varies_.lookup(condition) != 0)
      return expanded(holds ? atom->second : negated(atom->second), 0);
    if (mlir::matchPattern(condition, holds ? mlir::m_Zero() : mlir::m_One())) return Disjunction{};
    const Truth truth = truths_.lookup(condition);
    return Disjunction{{.forms = {}, .impossible = {holds ? truth.never : truth.always}}};
  }

  std::optional<Disjunction> expanded(const Atom& atom, int depth) {
    if (const int number = choice_in(atom); number >= 0 && depth < kDeepestChoice) {
      const Term made = term(number);
      const std::optional<Atom> a = with(atom, number, made.a), b = with(atom, number, made.b);
      if (a && b) {
        const std::optional<Disjunction> x = expanded(*a, depth + 1), y = expanded(*b, depth + 1);
        if (made.kind == TermKind::kSelect)
          return any_of(all_of(disjunction_of(made.condition, true), x),
                        all_of(disjunction_of(made.condition, false), y));
        return is_both(atom, number) ? all_of(x, y) : any_of(x, y);
      }
    }
    const auto opposite = [&](Atom::Relation relation) -> std::optional<Atom> {
      std::optional<Form> form = scaled_form(atom.form, -1);
      if (!form) return std::nullopt;
      return Atom{relation, std::move(*form)};
    };
    if (atom.relation == Atom::kEqual || atom.relation == Atom::kNotEqual) {
      const bool equal = atom.relation == Atom::kEqual;
      const Atom::Relation relation = equal ? Atom::kLessEqual : Atom::kLess;
      const std::optional<Atom> other = opposite(relation);
      if (!other) return std::nullopt;
      const std::optional<Disjunction> x = expanded({relation, atom.form}, depth), y = expanded(*other, depth);
      return equal ? all_of(x, y) : any_of(x, y);
    }
    Form form = atom.form;
    if (atom.relation == Atom::kLess) form.constant += 1;
    return Disjunction{{.forms = {std::move(form)}, .impossible = {}}};
  }

  static std::optional<Disjunction> any_of(std::optional<Disjunction> a, const std::optional<Disjunction>& b) {
    if (!a || !b || a->size() + b->size() > kMostConjuncts) return std::nullopt;
    a->insert(a->end(), b->begin(), b->end());
    return a;
  }
  static std::optional<Disjunction> all_of(const std::optional<Disjunction>& a, const std::optional<Disjunction>& b) {
    if (!a || !b || a->size() * b->size() > kMostConjuncts) return std::nullopt;
    Disjunction all;
    for (const Conjunct& x : *a) {
      for (const Conjunct& y : *b) {
        Conjunct conjunct = x;
        conjunct.forms.insert(conjunct.forms.end(), y.forms.begin(), y.forms.end());
        conjunct.impossible.insert(conjunct.impossible.end(), y.impossible.begin(), y.impossible.end());
        if (conjunct.forms.size() > kMostForms) return std::nullopt;
        all.push_back(std::move(conjunct));
      }
    }
    return all;
  }

  // Values over a tile that are the same for its elements.
  struct Symbols {
    std::vector<Value> values;
    std::vector<Range> ranges;
    std::vector<bool> same;  // for all tiles of a batch
  };

  // The forms of a conjunct that share what varies within the tile with others; what varies is an unknown each, the
  // same in all of them.
  Conditions conditions_of(const Conjunct& conjunct, Symbols& symbols) {
    std::map<int, int> uses;  // by term
    for (const Form& form : conjunct.forms)
      for (const auto& [number, factor] : form.terms)
        if (term(number).kind != TermKind::kUniform) ++uses[number];
    std::vector<const Form*> forms;
    std::map<int, std::size_t> unknowns;
    for (const Form& form : conjunct.forms) {
      if (llvm::none_of(form.terms, [&](const auto& part) { return uses[part.first] > 1; })) continue;
      forms.push_back(&form);
      for (const auto& [number, factor] : form.terms)
        if (term(number).kind != TermKind::kUniform) unknowns.try_emplace(number, unknowns.size());
    }
    Conditions conditions;
    if (forms.size() < 2 || unknowns.size() > kMostUnknowns) return conditions;
    // Numbers of symbols first: rows are as long as there are.
    const auto note = [&](int number, Value value, bool same) {
      if (mlir::matchPattern(value, mlir::m_Constant()) || llvm::is_contained(symbols.values, value)) return;
      symbols.values.push_back(value);
      symbols.ranges.push_back(term(number).range);
      symbols.same.push_back(same);
    };
    for (const auto& [number, unknown] : unknowns) {
      note(number, term(number).low, false);
      note(number, term(number).high, false);
    }
    for (const Form* form : forms)
      for (const auto& [number, factor] : form->terms)
        if (!unknowns.contains(number)) note(number, term(number).low, true);
    conditions.symbols = symbols.values.size();
    const auto plus = [&](Affine& row, std::int64_t factor, Value value) {
      if (llvm::APInt literal; mlir::matchPattern(value, mlir::m_ConstantInt(&literal))) {
        row.back() += factor * literal.getSExtValue();
      } else {
        row[static_cast<std::size_t>(llvm::find(symbols.values, value) - symbols.values.begin())] += factor;
      }
    };
    const Affine zero(conditions.symbols + 1, 0);
    conditions.ends.assign(unknowns.size(), {zero, zero});
    for (const auto& [number, unknown] : unknowns) {
      plus(conditions.ends[unknown].first, 1, term(number).low);
      plus(conditions.ends[unknown].second, 1, term(number).high);
      // Of positions: what depends on lengths would make texts of their own.
      if (term(number).kind == TermKind::kEnd) conditions.known.push_back(conditions.ends[unknown].first);
    }
    for (const Form* form : forms) {
      Conditions::AtLeastZero condition{.unknowns = std::vector<std::int64_t>(unknowns.size(), 0), .rest = zero};
      condition.rest.back() = -form->constant;
      for (const auto& [number, factor] : form->terms) {
        if (const auto unknown = unknowns.find(number); unknown != unknowns.end()) {
          condition.unknowns[unknown->second] = -factor;
        } else {
          plus(condition.rest, -factor, term(number).low);
        }
      }
      conditions.conditions.push_back(std::move(condition));
    }
    return conditions;
  }

  // Whether the sum is below 0; never where it might leave 64 bits.
  Value is_negative(const Affine& row, const Symbols& symbols) {
    constexpr std::int64_t kLargestSum = std::int64_t{1} << 60;
    Value plus, minus;
    std::int64_t largest = std::abs(row.back());
    for (const auto& [i, symbol] : llvm::enumerate(symbols.values)) {
      const std::int64_t factor = row[i];
      if (factor == 0) continue;
      const Range range = symbols.ranges[i];
      largest += std::abs(factor) * std::max(std::abs(range.low), std::abs(range.high));
      if (largest > kLargestSum) return boolean(false);
      const Value part = std::abs(factor) == 1 ? symbol : make<arith::MulIOp>(symbol, i64(std::abs(factor)));
      Value& sum = factor > 0 ? plus : minus;
      sum = sum ? make<arith::AddIOp>(sum, part) : part;
    }
    if (row.back() > 0 && plus) plus = make<arith::AddIOp>(plus, i64(row.back()));
    if (row.back() < 0 && minus) minus = make<arith::AddIOp>(minus, i64(-row.back()));
    if (!plus) plus = i64(std::max<std::int64_t>(row.back(), 0));
    if (!minus) minus = i64(std::max<std::int64_t>(-row.back(), 0));
    return compare(arith::CmpIPredicate::slt, plus, minus);
  }

  // ---- Ranges

  Bounds intersection(const Bounds& a, const Bounds& b) {
    return {.lower = !a.lower   ? b.lower
                     : !b.lower ? a.lower
                                : larger(a.lower, b.lower),
            .upper = !a.upper   ? b.upper
                     : !b.upper ? a.upper
                                : smaller(a.upper, b.upper)};
  }
  Bounds hull(const Bounds& a, const Bounds& b) {
    Bounds result;
    if (a.lower && b.lower) result.lower = smaller(a.lower, b.lower);
    if (a.upper && b.upper) result.upper = larger(a.upper, b.upper);
    return result;
  }

  // Where of `role`'s coordinate the condition can be `holds`, for any of the tile's other coordinates.
  Bounds bounds_of(mlir::Operation& op, Role role, bool holds) {
    const Value result = op.getResult(0);
    if ((varies_.lookup(result) & bit(role)) == 0) {
      const Truth truth = truths_.lookup(result);
      const Value fails = holds ? truth.never : truth.always;
      if (is_false(fails)) return {};
      // So that it is neutral to hulls and intersections.
      const Value first = end(role, false), last = end(role, true);
      return {.lower = select(fails, make<arith::AddIOp>(last, i64(1)), first),
              .upper = select(fails, make<arith::SubIOp>(first, i64(1)), last)};
    }
    if (const auto atom = atoms_.find(result); atom != atoms_.end())
      return solved(holds ? atom->second : negated(atom->second), role, 0);
    const auto of = [&](unsigned i, bool operand_holds) {
      return bounds_.lookup(key(op.getOperand(i), role, operand_holds));
    };
    if (llvm::isa<arith::AndIOp, arith::OrIOp>(op)) {
      return llvm::isa<arith::AndIOp>(op) == holds ? intersection(of(0, holds), of(1, holds))
                                                   : hull(of(0, holds), of(1, holds));
    }
    if (llvm::isa<arith::XOrIOp>(op) && mlir::matchPattern(op.getOperand(1), mlir::m_One())) return of(0, !holds);
    if (llvm::isa<arith::SelectOp>(op))
      return hull(intersection(of(0, true), of(1, holds)), intersection(of(0, false), of(2, holds)));
    return {};
  }

  Bounds solved(const Atom& atom, Role role, int depth) {
    if (const int number = choice_in(atom); number >= 0 && depth < kDeepestChoice) {
      const Term made = term(number);
      const std::optional<Atom> a = with(atom, number, made.a), b = with(atom, number, made.b);
      if (a && b) {
        Bounds x = solved(*a, role, depth + 1), y = solved(*b, role, depth + 1);
        if (made.kind == TermKind::kSelect) {
          x = intersection(x, bounds_.lookup(key(made.condition, role, true)));
          y = intersection(y, bounds_.lookup(key(made.condition, role, false)));
          return hull(x, y);
        }
        return is_both(atom, number) ? intersection(x, y) : hull(x, y);
      }
    }
    Bounds bounds;
    Form form = atom.form;
    if (atom.relation == Atom::kNotEqual) return bounds;
    if (atom.relation == Atom::kEqual) {
      const Bounds below = solved({Atom::kLessEqual, form}, role, kDeepestChoice);
      const std::optional<Form> opposite = scaled_form(form, -1);
      if (!opposite) return below;
      return intersection(below, solved({Atom::kLessEqual, *opposite}, role, kDeepestChoice));
    }
    if (atom.relation == Atom::kLess) form.constant += 1;
    form = tightened(std::move(form));
    solve(form, role, bounds);
    if (!form.guard) return bounds;
    if (bounds.lower) bounds.lower = select(form.guard, bounds.lower, end(role, false));
    if (bounds.upper) bounds.upper = select(form.guard, bounds.upper, end(role, true));
    return bounds;
  }

  // form <= 0 for some values of the other coordinates.
  void solve(Form form, Role role, Bounds& bounds) {
    while (true) {
      int number = -1;
      for (const auto& [candidate, factor] : form.terms) {
        if ((term(candidate).varies & bit(role)) == 0) continue;
        if (number >= 0) return;
        number = candidate;
      }
      if (number < 0) return;
      const std::int64_t factor = form.terms.at(number);
      form.terms.erase(number);
      const Term unknown = term(number);
      // factor * x <= -rest: x <= floor(-rest / factor), or x >= -floor(-rest / -factor), at the rest's least.
      const std::optional<Form> opposite = scaled_form(form, -1);
      if (!opposite) return;
      Range range = range_of(*opposite);
      Value value;
      const std::int64_t divisor = std::abs(factor);
      if (factor > 0) {
        value = end_of(*opposite, true);
        if (divisor != 1) value = make<FloorDivOp>(value, i64(divisor));
        range = {floor_div(range.low, divisor), floor_div(range.high, divisor)};
      } else {
        value = divisor == 1 ? end_of(form, false)
                             : make<arith::SubIOp>(i64(0), make<FloorDivOp>(end_of(*opposite, true), i64(divisor)));
        range = {-floor_div(range.high, divisor), -floor_div(range.low, divisor)};
      }
      if (unknown.kind == TermKind::kEnd) {
        // Within 32 bits, as the ends are.
        if (factor > 0) {
          bounds.upper = range.low < std::numeric_limits<std::int32_t>::min() ? larger(value, i64(-1)) : value;
        } else {
          bounds.lower =
              range.high > std::numeric_limits<std::int32_t>::max() ? smaller(value, i64(extent(role))) : value;
        }
        return;
      }
      if (unknown.kind != TermKind::kFloorDiv || unknown.divisor <= 0 || !range.within(kLargestTerm)) return;
      // x // d <= value: x - d * value - (d - 1) <= 0; x // d >= value: d * value - x <= 0.
      const Form bound =
          form_of_term(add_term({.kind = TermKind::kUniform, .low = value, .high = value, .range = range}));
      const std::optional<Form> whole = scaled_form(bound, unknown.divisor);
      std::optional<Form> next;
      if (whole) next = factor > 0 ? sum(unknown.a, -1, *whole) : sum(*whole, -1, unknown.a);
      if (!next) return;
      form = std::move(*next);
      if (factor > 0) form.constant -= unknown.divisor - 1;
    }
  }

  mlir::OpBuilder& b_;
  mlir::Location loc_;
  mlir::func::FuncOp function_;
  const ModProblem& problem_;
  mlir::DataFlowSolver& solver_;
  std::vector<TileSummary>& summaries_;
  std::array<std::int64_t, 4> extents_;  // by Role
  std::map<std::pair<int, bool>, Value> ends_;
  mlir::IRMapping copies_;
  std::vector<Term> terms_;
  std::map<int, int> coordinates_;  // terms by role
  llvm::DenseMap<Value, unsigned> varies_;
  llvm::DenseMap<Value, bool> reproducible_;
  llvm::DenseMap<Value, Form> forms_;
  llvm::DenseMap<Value, Atom> atoms_;
  llvm::DenseMap<Value, Truth> truths_;
  llvm::DenseMap<Value, ByRow> rows_;
  llvm::DenseMap<std::pair<Value, unsigned>, Bounds> bounds_;
  llvm::DenseMap<std::pair<Value, unsigned>, std::optional<Disjunction>> disjunctions_;
};

// Whether result number `i` is just the tile's end.
bool is_end(mlir::func::FuncOp tile_facts, TileResult result) {
  Value v = tile_facts.front().getTerminator()->getOperand(static_cast<unsigned>(result));
  while (auto trunc = v.getDefiningOp<arith::TruncIOp>()) v = trunc.getIn();
  return v.getDefiningOp<TileEndOp>() != nullptr;
}

}  // namespace

std::vector<std::int64_t> summary_extents(const CaptureInfo& capture, int dimension) {
  std::vector<std::int64_t> extents = capture.extent;
  const auto along = extents.begin() + dimension;
  const std::int64_t blocks = llvm::divideCeil(static_cast<std::uint64_t>(*along), kSummaryBlock);
  extents.erase(along);
  extents.insert(extents.end(), {4, llvm::Log2_64(static_cast<std::uint64_t>(blocks)) + std::int64_t{1}, blocks});
  return extents;
}

mlir::OwningOpRef<mlir::ModuleOp> derive_tile_facts(mlir::func::FuncOp function, const ModProblem& problem,
                                                    std::vector<TileSummary>& summaries) {
  constexpr std::int64_t kLargestExtent = std::numeric_limits<std::int32_t>::max();
  if (std::max({problem.batch, problem.num_heads, problem.seqlen_q, problem.seqlen_kv}) > kLargestExtent) return {};
  if (mlir::matchPattern(function.front().getTerminator()->getOperand(1), mlir::m_One())) return {};
  mlir::DataFlowSolver solver;
  solver.load<mlir::dataflow::DeadCodeAnalysis>();
  solver.load<mlir::dataflow::IntegerRangeAnalysis>();
  if (mlir::failed(solver.initializeAndRun(function))) return {};
  mlir::OpBuilder builder(function.getContext());
  const mlir::Location loc = builder.getUnknownLoc();
  mlir::OwningOpRef<mlir::ModuleOp> module(mlir::ModuleOp::create(builder, loc));
  builder.setInsertionPointToEnd(module->getBody());
  const mlir::Type i1 = builder.getI1Type(), i32 = builder.getI32Type();
  auto made = mlir::func::FuncOp::create(builder, loc, kTileFactsName,
                                         builder.getFunctionType({}, {i1, i1, i32, i32, i32, i32, i1}));
  builder.setInsertionPointToEnd(made.addEntryBlock());
  if (!Analysis(builder, function, problem, solver, summaries).run()) {
    summaries.clear();
    return {};
  }
  return module;
}

bool knows_tiles(mlir::func::FuncOp tile_facts) {
  return llvm::any_of(tile_facts.front().getTerminator()->getOperands().take_front(2),
                      [](Value v) { return !mlir::matchPattern(v, mlir::m_Zero()); });
}
bool knows_kv_range(mlir::func::FuncOp tile_facts) {
  return !is_end(tile_facts, TileResult::kKvFirst) || !is_end(tile_facts, TileResult::kKvLast);
}
bool knows_q_range(mlir::func::FuncOp tile_facts) {
  return !is_end(tile_facts, TileResult::kQFirst) || !is_end(tile_facts, TileResult::kQLast);
}

bool knows_rows(mlir::func::FuncOp tile_facts) {
  return !mlir::matchPattern(tile_facts.front().getTerminator()->getOperand(static_cast<unsigned>(TileResult::kByRow)),
                             mlir::m_Zero());
}

}  // namespace attnjit::compiler
