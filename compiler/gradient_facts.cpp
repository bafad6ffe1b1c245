// What a sink's place depends on, and whether each element has a place of its own.
#include "compiler/gradient_facts.h"

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <utility>

#include "compiler/dialect/dialect.h"
#include "llvm/ADT/DenseMap.h"
#include "mlir/Dialect/Arith/IR/Arith.h"
#include "mlir/IR/Matchers.h"

namespace attnjit::compiler {
namespace {

namespace arith = mlir::arith;
using mlir::Value;

// Sets of what a value is computed from. kWithDifference: from the two positions, but through their difference alone.
enum : unsigned {
  kWithB = 1,
  kWithH = 2,
  kWithQuery = 4,
  kWithKey = 8,
  kWithDifference = 16,
  kWithScore = 32,
  kWithGrad = 64,
  kWithData = 128,
};
constexpr unsigned kAllIndices = kWithB | kWithH | kWithQuery | kWithKey;

class Dependences {
 public:
  explicit Dependences(mlir::func::FuncOp function) {
    mlir::Block& block = function.front();
    from_[block.getArgument(0)] = kWithScore;
    from_[block.getArgument(1)] = kWithGrad;
    for (mlir::Operation& op : block.without_terminator()) note(op);
  }

  unsigned of(Value v) const { return from_.lookup(v); }

 private:
  void note(mlir::Operation& op) {
    const Value result = op.getResult(0);
    unsigned from = 0;
    for (const Value operand : op.getOperands()) from |= from_.lookup(operand);
    if (auto index = llvm::dyn_cast<IndexOp>(op)) {
      from = 1u << static_cast<unsigned>(index.getRole());
      if (index.getRole() == Role::Q) multiples_[result] = {1, 0};
      if (index.getRole() == Role::Kv) multiples_[result] = {0, 1};
    } else if (llvm::isa<ReadOp>(op)) {
      from |= kWithData;
    } else if (llvm::isa<arith::ExtSIOp, arith::TruncIOp, arith::AddIOp, arith::SubIOp>(op) &&
               llvm::all_of(op.getOperands(), [&](Value v) { return is_multiple(v); })) {
      Multiples sum = multiples_.lookup(op.getOperand(0));
      if (op.getNumOperands() == 2) {
        const Multiples other = multiples_.lookup(op.getOperand(1));
        const int sign = llvm::isa<arith::SubIOp>(op) ? -1 : 1;
        sum = {sum.first + sign * other.first, sum.second + sign * other.second};
      }
      if (std::max(std::abs(sum.first), std::abs(sum.second)) <= 1) {
        multiples_[result] = sum;
        if (sum.first != 0 && sum.first + sum.second == 0) from = (from & ~(kWithQuery | kWithKey)) | kWithDifference;
      }
    }
    from_[result] = from;
  }

  // Whether `v` is followed as a sum of positions and of what varies with neither.
  bool is_multiple(Value v) const {
    return multiples_.contains(v) || (from_.lookup(v) & (kWithQuery | kWithKey | kWithDifference | kWithScore)) == 0;
  }

  using Multiples = std::pair<int, int>;  // of the query's and the key's position
  llvm::DenseMap<Value, unsigned> from_;
  llvm::DenseMap<Value, Multiples> multiples_;
};

SinkLevel level(unsigned from) {
  switch (from & (kWithQuery | kWithKey | kWithDifference | kWithScore)) {
    case 0:
      return SinkLevel::kBlock;
    case kWithQuery:
      return SinkLevel::kRow;
    case kWithKey:
      return SinkLevel::kColumn;
    case kWithDifference:
      return SinkLevel::kDiagonal;
    default:
      return SinkLevel::kElement;
  }
}

// The indices that a value is computed from.
unsigned indices(unsigned from) {
  if (from & kWithDifference) from |= kWithQuery | kWithKey;
  return from & kAllIndices;
}

// The one coordinate outside `known` that `v`, together with those, gives away; 0 where that is not seen.
unsigned told_by(const Dependences& dependences, Value v, unsigned known) {
  while (true) {
    mlir::Operation* const op = v.getDefiningOp();
    if (!op) return 0;
    if (auto index = llvm::dyn_cast<IndexOp>(op)) return (1u << static_cast<unsigned>(index.getRole())) & ~known;
    // Narrowed where the value fits, so that nothing is cut off. A sum may wrap: it still tells one operand's values
    // apart.
    if (llvm::isa<arith::ExtSIOp, arith::TruncIOp>(op)) {
      v = op->getOperand(0);
      continue;
    }
    if (!llvm::isa<arith::AddIOp, arith::SubIOp>(op)) return 0;
    const auto is_known = [&](Value operand) {
      const unsigned from = dependences.of(operand);
      return (from & kWithScore) == 0 && (indices(from) & ~known) == 0;
    };
    const Value lhs = op->getOperand(0), rhs = op->getOperand(1);
    if (is_known(lhs) == is_known(rhs)) return 0;
    v = is_known(lhs) ? rhs : lhs;
  }
}

// How many values each coordinate has among the elements that are stored.
struct StoredExtents {
  explicit StoredExtents(const ModProblem& problem)
      : of{problem.batch, problem.num_heads, problem.stored_seqlen_q > 0 ? problem.stored_seqlen_q : problem.seqlen_q,
           problem.stored_seqlen_kv > 0 ? problem.stored_seqlen_kv : problem.seqlen_kv} {}
  std::int64_t of[4];  // by Role
};

// The values of `v`, a sum of coordinates and literals, over those elements; nothing where it is something else.
std::optional<std::pair<std::int64_t, std::int64_t>> range_of(Value v, const StoredExtents& extents) {
  mlir::Operation* const op = v.getDefiningOp();
  if (!op) return std::nullopt;
  if (auto index = llvm::dyn_cast<IndexOp>(op))
    return std::pair(std::int64_t{0}, extents.of[static_cast<int>(index.getRole())] - 1);
  if (llvm::APInt literal; mlir::matchPattern(v, mlir::m_ConstantInt(&literal)))
    return std::pair(literal.getSExtValue(), literal.getSExtValue());
  // Narrowed where the value fits.
  if (llvm::isa<arith::ExtSIOp, arith::TruncIOp>(op)) return range_of(op->getOperand(0), extents);
  if (!llvm::isa<arith::AddIOp, arith::SubIOp>(op)) return std::nullopt;
  const auto a = range_of(op->getOperand(0), extents), b = range_of(op->getOperand(1), extents);
  if (!a || !b) return std::nullopt;
  const bool minus = llvm::isa<arith::SubIOp>(op);
  std::pair<std::int64_t, std::int64_t> range;
  const bool wraps = minus ? __builtin_sub_overflow(a->first, b->second, &range.first) ||
                                 __builtin_sub_overflow(a->second, b->first, &range.second)
                           : __builtin_add_overflow(a->first, b->first, &range.first) ||
                                 __builtin_add_overflow(a->second, b->second, &range.second);
  return wraps ? std::nullopt : std::optional(range);
}

bool is_injective(const Dependences& dependences, SinkOp sink, const ModProblem& problem) {
  const StoredExtents extents(problem);
  unsigned known = 0;
  for (int role = 0; role < 4; ++role) known |= extents.of[role] == 1 ? 1u << role : 0;
  const std::optional<llvm::ArrayRef<bool>> in_bounds = sink.getInBounds();
  // Each dimension may tell another coordinate, given those that are known.
  for (bool found = true; found;) {
    found = false;
    for (const auto& [i, index] : llvm::enumerate(sink.getIndices())) {
      // A clamped index is shared.
      const auto range = range_of(index, extents);
      const bool inside = range && range->first >= 0 && range->second < sink.getExtents()[i];
      if (!inside && (!in_bounds || !(*in_bounds)[i])) continue;
      const unsigned told = told_by(dependences, index, known);
      known |= told;
      found |= told != 0;
    }
  }
  return known == kAllIndices;
}

}  // namespace

GradientNeed gradient_need(mlir::func::FuncOp function) {
  const Dependences dependences(function);
  const Value grad = function.getArgument(1);
  mlir::Operation* const ret = function.front().getTerminator();
  unsigned from = 0;
  bool plain = ret->getOperand(2) == grad;
  from |= dependences.of(ret->getOperand(2));
  for (const Value result : ret->getOperands().drop_front(3)) {
    auto sink = result.getDefiningOp<SinkOp>();
    if (sink.getRowShift()) continue;
    plain &= sink.getValue() == grad;
    from |= dependences.of(sink.getValue());
  }
  if (plain) return GradientNeed::kNothing;
  return from & kWithScore ? GradientNeed::kScore : GradientNeed::kFactor;
}

std::vector<SinkFacts> sink_facts(mlir::func::FuncOp function, const ModProblem& problem) {
  const Dependences dependences(function);
  std::vector<SinkFacts> facts;
  std::vector<SinkOp> sinks;
  for (const Value result : function.front().getTerminator()->getOperands().drop_front(3))
    sinks.push_back(result.getDefiningOp<SinkOp>());
  for (SinkOp sink : sinks) {
    unsigned from = 0;
    // A dimension of one element has one place, whatever its index.
    for (const auto& [index, extent] : llvm::zip(sink.getIndices(), sink.getExtents()))
      if (extent > 1) from |= dependences.of(index);
    const bool alone =
        llvm::count_if(sinks, [&](SinkOp other) { return other.getCapture() == sink.getCapture(); }) == 1;
    facts.push_back({.capture = static_cast<int>(sink.getCapture()),
                     .level = level(from),
                     .row_shift = sink.getRowShift(),
                     .data_dependent = (from & (kWithData | kWithScore)) != 0,
                     .injective = alone && !sink.getRowShift() && is_injective(dependences, sink, problem)});
  }
  return facts;
}

}  // namespace attnjit::compiler
