// attnjit-prove-bounds, attnjit-narrow-integers and attnjit-split-conversions: what upstream's integer range analysis
// proves.
#include <algorithm>
#include <cstdlib>

#include "compiler/dialect/dialect.h"
#include "compiler/passes/passes.h"
#include "llvm/ADT/DenseMap.h"
#include "mlir/Analysis/DataFlow/DeadCodeAnalysis.h"
#include "mlir/Analysis/DataFlow/IntegerRangeAnalysis.h"
#include "mlir/Analysis/DataFlowFramework.h"
#include "mlir/Dialect/Arith/IR/Arith.h"
#include "mlir/IR/Matchers.h"

namespace attnjit::compiler {

#define GEN_PASS_DEF_PROVEBOUNDS
#define GEN_PASS_DEF_NARROWINTEGERS
#define GEN_PASS_DEF_SPLITCONVERSIONS
#include "AttnjitPasses.h.inc"

namespace {

namespace arith = mlir::arith;
using mlir::Value;

mlir::LogicalResult solve(mlir::DataFlowSolver& solver, mlir::Operation* op) {
  solver.load<mlir::dataflow::DeadCodeAnalysis>();
  solver.load<mlir::dataflow::IntegerRangeAnalysis>();
  return solver.initializeAndRun(op);
}

// Whether every value of `v` (signed) lies in [low, high].
bool within(mlir::DataFlowSolver& solver, Value v, std::int64_t low, std::int64_t high) {
  const auto* lattice = solver.lookupState<mlir::dataflow::IntegerValueRangeLattice>(v);
  if (!lattice || lattice->getValue().isUninitialized()) return false;
  const mlir::ConstantIntRanges& range = lattice->getValue().getValue();
  return range.smin().getSExtValue() >= low && range.smax().getSExtValue() <= high;
}

class ProveBounds : public impl::ProveBoundsBase<ProveBounds> {
  void runOnOperation() override {
    mlir::DataFlowSolver solver;
    if (mlir::failed(solve(solver, getOperation()))) return signalPassFailure();
    getOperation().walk([&](mlir::Operation* op) {
      if (auto read = llvm::dyn_cast<ReadOp>(op)) prove(solver, read);
      if (auto sink = llvm::dyn_cast<SinkOp>(op)) prove(solver, sink);
    });
  }

  template <typename T>
  void prove(mlir::DataFlowSolver& solver, T op) {
    llvm::SmallVector<bool> in_bounds;
    for (const auto& [index, extent] : llvm::zip(op.getIndices(), op.getExtents()))
      in_bounds.push_back(within(solver, index, 0, extent - 1));
    op.setInBoundsAttr(mlir::DenseBoolArrayAttr::get(&getContext(), in_bounds));
  }
};

class NarrowIntegers : public impl::NarrowIntegersBase<NarrowIntegers> {
 public:
  using NarrowIntegersBase::NarrowIntegersBase;

 private:
  void runOnOperation() override {
    mlir::func::FuncOp function = getOperation();
    if (function.isExternal()) return;
    mlir::Block* const block = only_block(function);
    if (!block) return signalPassFailure();
    mlir::DataFlowSolver solver;
    if (mlir::failed(solve(solver, function))) return signalPassFailure();
    narrow_.clear();
    bool all_fit = true;
    mlir::OpBuilder builder(function);
    for (mlir::Operation& op : llvm::make_early_inc_range(block->without_terminator())) {
      const Value result = op.getResult(0);
      if (llvm::isa<ReadOp, SinkOp>(op)) narrow_indices(builder, op);
      builder.setInsertionPointAfter(&op);
      if (result.getType().isInteger(64)) {
        if (fits(solver, result)) {
          narrow_[result] = narrow(builder, op);
        } else {
          all_fit = false;
        }
      } else {
        consume(builder, op);
      }
    }
    if (all_fit) function->setAttr(kFits32Attr, builder.getUnitAttr());
    erase_dead(*block);
  }

  static bool fits(mlir::DataFlowSolver& solver, Value v) {
    return within(solver, v, std::numeric_limits<std::int32_t>::min(), std::numeric_limits<std::int32_t>::max());
  }

  bool all_narrow(mlir::ValueRange values) {
    return llvm::all_of(values, [&](Value v) { return narrow_.contains(v); });
  }

  // A 32-bit value equal to `op`'s, whose result is known to fit.
  Value narrow(mlir::OpBuilder& builder, mlir::Operation& op) {
    const mlir::Type i32 = builder.getI32Type();
    const mlir::Location loc = op.getLoc();
    // The exact result fits: no signed wrap.
    const auto flags = arith::IntegerOverflowFlagsAttr::get(op.getContext(), arith::IntegerOverflowFlags::nsw);
    if (auto constant = llvm::dyn_cast<arith::ConstantOp>(op)) {
      const std::int64_t value = llvm::cast<mlir::IntegerAttr>(constant.getValue()).getInt();
      return arith::ConstantOp::create(builder, loc, builder.getI32IntegerAttr(static_cast<std::int32_t>(value)));
    }
    if (auto ext = llvm::dyn_cast<arith::ExtUIOp>(op)) return arith::ExtUIOp::create(builder, loc, i32, ext.getIn());
    if (auto select = llvm::dyn_cast<arith::SelectOp>(op);
        select && all_narrow({select.getTrueValue(), select.getFalseValue()}))
      return arith::SelectOp::create(builder, loc, select.getCondition(), narrow_[select.getTrueValue()],
                                     narrow_[select.getFalseValue()]);
    if (llvm::isa<arith::AddIOp, arith::SubIOp, arith::MulIOp, arith::MaxSIOp, arith::MinSIOp, arith::AndIOp,
                  arith::OrIOp, arith::XOrIOp, FloorDivOp, FloorModOp>(op) &&
        all_narrow(op.getOperands())) {
      const Value lhs = narrow_[op.getOperand(0)], rhs = narrow_[op.getOperand(1)];
      mlir::OperationState state(loc, op.getName(), {lhs, rhs}, {i32});
      mlir::Operation* made = builder.create(state);
      if (auto overflow = llvm::dyn_cast<arith::ArithIntegerOverflowFlagsInterface>(made))
        made->setAttr(overflow.getIntegerOverflowAttrName(), flags);
      if (llvm::isa<FloorDivOp, FloorModOp>(op)) {
        // A division costs several times its 64-bit users' extension.
        const Value wide = arith::ExtSIOp::create(builder, loc, builder.getI64Type(), made->getResult(0));
        op.getResult(0).replaceAllUsesWith(wide);
        narrow_[wide] = made->getResult(0);
      }
      return made->getResult(0);
    }
    if (llvm::isa<FloorLog2Op>(op) && all_narrow(op.getOperands()))
      return FloorLog2Op::create(builder, loc, i32, narrow_[op.getOperand(0)]);
    return arith::TruncIOp::create(builder, loc, i32, op.getResult(0));
  }

  // Comparisons and conversions to float take the 32-bit versions; a truncation to 32 bits is one.
  void consume(mlir::OpBuilder& builder, mlir::Operation& op) {
    if (llvm::isa<arith::TruncIOp>(op) && op.getResult(0).getType().isInteger(32) && all_narrow(op.getOperands()))
      op.getResult(0).replaceAllUsesWith(narrow_[op.getOperand(0)]);
    if (!llvm::isa<arith::CmpIOp, arith::SIToFPOp>(op) || !all_narrow(op.getOperands())) return;
    for (mlir::OpOperand& operand : op.getOpOperands()) operand.set(narrow_[operand.get()]);
  }

  // Of a read or a sink.
  void narrow_indices(mlir::OpBuilder& builder, mlir::Operation& op) {
    if (!addresses) return;
    builder.setInsertionPoint(&op);
    for (mlir::OpOperand& index : op.getOpOperands()) {
      const auto found = narrow_.find(index.get());
      if (found != narrow_.end())
        index.set(arith::ExtSIOp::create(builder, op.getLoc(), builder.getI64Type(), found->second));
    }
  }

  llvm::DenseMap<Value, Value> narrow_;
};

class SplitConversions : public impl::SplitConversionsBase<SplitConversions> {
  void runOnOperation() override {
    mlir::func::FuncOp function = getOperation();
    if (function.isExternal()) return;
    mlir::Block* const block = only_block(function);
    if (!block) return signalPassFailure();
    mlir::DataFlowSolver solver;
    if (mlir::failed(solve(solver, function))) return signalPassFailure();
    solver_ = &solver;
    varies_.clear();
    multiples_.clear();
    floats_.clear();
    mlir::OpBuilder builder(function);
    for (mlir::Operation& op : llvm::make_early_inc_range(block->without_terminator())) {
      note(op);
      auto conversion = llvm::dyn_cast<arith::SIToFPOp>(op);
      if (!conversion || !varies_twice(conversion) || !splits(conversion.getIn())) continue;
      builder.setInsertionPoint(conversion);
      conversion.replaceAllUsesWith(split(builder, conversion.getIn()));
    }
    erase_dead(*block);
  }

  // What the result of `op` varies with.
  void note(mlir::Operation& op) {
    const Value result = op.getResult(0);
    unsigned varies = 0;
    for (const Value operand : op.getOperands()) varies |= varies_.lookup(operand);
    if (auto index = llvm::dyn_cast<IndexOp>(op)) {
      if (index.getRole() == Role::Q) varies = kWithQuery, multiples_[result] = {1, 0};
      if (index.getRole() == Role::Kv) varies = kWithKey, multiples_[result] = {0, 1};
    } else if (llvm::isa<arith::ExtSIOp, arith::TruncIOp, arith::AddIOp, arith::SubIOp>(op) &&
               llvm::all_of(op.getOperands(),
                            [&](Value v) { return multiples_.contains(v) || varies_.lookup(v) == 0; })) {
      Multiples sum = multiples_.lookup(op.getOperand(0));
      if (op.getNumOperands() == 2) {
        const Multiples other = multiples_.lookup(op.getOperand(1));
        const int sign = llvm::isa<arith::SubIOp>(op) ? -1 : 1;
        sum = {sum.first + sign * other.first, sum.second + sign * other.second};
      }
      constexpr int kSensible = 1 << 16;  // a text can double a sum a thousand times
      if (std::max(std::abs(sum.first), std::abs(sum.second)) <= kSensible) multiples_[result] = sum;
      if (sum.first != 0 && sum.first + sum.second == 0) varies = kWithDifference;
    }
    varies_[result] = varies;
  }
  bool varies_twice(Value v) { return llvm::popcount(varies_.lookup(v)) > 1; }

  // Whether `v`, and all it is made of, is exact as float and can be put together from what varies in one way only.
  bool splits(Value v) {
    constexpr std::int64_t kExact = 1 << 24;
    if (!within(*solver_, v, -kExact, kExact)) return false;
    if (!varies_twice(v)) return true;
    mlir::Operation* op = v.getDefiningOp();
    if (auto select = llvm::dyn_cast<arith::SelectOp>(op))
      return splits(select.getTrueValue()) && splits(select.getFalseValue());
    return llvm::isa<arith::AddIOp, arith::SubIOp, arith::MulIOp, arith::MaxSIOp, arith::MinSIOp>(op) &&
           splits(op->getOperand(0)) && splits(op->getOperand(1));
  }

  Value split(mlir::OpBuilder& builder, Value v) {
    if (const Value made = floats_.lookup(v)) return made;
    const mlir::Location loc = v.getLoc();
    mlir::Operation* op = v.getDefiningOp();
    Value result;
    if (!varies_twice(v)) {
      llvm::APInt literal;
      if (mlir::matchPattern(v, mlir::m_ConstantInt(&literal))) {
        result = arith::ConstantOp::create(builder, loc,
                                           builder.getF32FloatAttr(static_cast<float>(literal.getSExtValue())));
      } else {
        result = arith::SIToFPOp::create(builder, loc, builder.getF32Type(), v);
      }
    } else if (auto select = llvm::dyn_cast<arith::SelectOp>(op)) {
      const Value yes = split(builder, select.getTrueValue()), no = split(builder, select.getFalseValue());
      result = arith::SelectOp::create(builder, loc, select.getCondition(), yes, no);
    } else {
      const Value lhs = split(builder, op->getOperand(0)), rhs = split(builder, op->getOperand(1));
      if (llvm::isa<arith::AddIOp>(op)) {
        result = arith::AddFOp::create(builder, loc, lhs, rhs);
      } else if (llvm::isa<arith::SubIOp>(op)) {
        result = arith::SubFOp::create(builder, loc, lhs, rhs);
      } else if (llvm::isa<arith::MulIOp>(op)) {
        result = arith::MulFOp::create(builder, loc, lhs, rhs);
      } else if (llvm::isa<arith::MaxSIOp>(op)) {
        result = arith::MaximumFOp::create(builder, loc, lhs, rhs);
      } else {
        result = arith::MinimumFOp::create(builder, loc, lhs, rhs);
      }
    }
    floats_[v] = result;
    varies_[result] = varies_.lookup(v);
    return result;
  }

  static constexpr unsigned kWithQuery = 1, kWithKey = 2, kWithDifference = 4;
  using Multiples = std::pair<int, int>;  // of the query's and the key's position, in a sum with what varies with none
  mlir::DataFlowSolver* solver_ = nullptr;
  llvm::DenseMap<Value, unsigned> varies_;
  llvm::DenseMap<Value, Multiples> multiples_;
  llvm::DenseMap<Value, Value> floats_;
};

}  // namespace
}  // namespace attnjit::compiler
