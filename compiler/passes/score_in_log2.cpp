// attnjit-score-in-log2: how the value depends on the score, and the folds of log2(e) and of a literal into the scale.
#include <algorithm>
#include <cmath>
#include <limits>

#include "compiler/dialect/dialect.h"
#include "compiler/passes/passes.h"
#include "dsl/functions.h"
#include "llvm/ADT/DenseMap.h"
#include "llvm/ADT/DenseSet.h"
#include "mlir/Dialect/Arith/IR/Arith.h"
#include "mlir/Dialect/Math/IR/Math.h"
#include "mlir/IR/Matchers.h"

namespace attnjit::compiler {

#define GEN_PASS_DEF_SCOREINLOG2
#include "AttnjitPasses.h.inc"

namespace {

namespace arith = mlir::arith;
namespace math = mlir::math;
using mlir::Value;

constexpr double kLog2E = 1.44269504088896340736;
// The smallest float that stays finite when it is multiplied by log2(e).
constexpr double kSmallest = -0x1.62e42ep127;

enum class Dependence { kFree, kAffine, kNonlinear };

class ScoreInLog2 : public impl::ScoreInLog2Base<ScoreInLog2> {
 public:
  using ScoreInLog2Base::ScoreInLog2Base;

 private:
  void runOnOperation() override {
    mlir::func::FuncOp function = getOperation();
    const mlir::FunctionType type = function.getFunctionType();
    const bool of_backward = natural && type.getNumInputs() == 2 && type.getNumResults() > 2;
    const bool of_forward = type.getNumInputs() == 1 && type.getNumResults() == 2;
    if (function.isExternal() || !function.getBody().hasOneBlock() || !(of_forward || of_backward) ||
        !type.getResult(0).isF32() || !type.getResult(1).isInteger(1)) {
      function.emitOpError("is not split: expected one block and the type (f32) -> (f32, i1), got ") << type;
      return signalPassFailure();
    }
    dependence_.clear();
    extreme_.clear();
    scaled_.clear();
    mlir::Block& block = function.front();
    const Value score = block.getArgument(0);
    dependence_[score] = Dependence::kAffine;
    for (mlir::Operation& op : block.without_terminator()) {
      dependence_[op.getResult(0)] = classify(op);
      if (is_extreme(op)) extreme_.insert(op.getResult(0));
    }

    auto ret = llvm::cast<mlir::func::ReturnOp>(block.getTerminator());
    const Value value = ret.getOperand(0), keep = ret.getOperand(1);
    const bool affine = dependence(value) != Dependence::kNonlinear;
    const bool mask_reads_score = dependence(keep) != Dependence::kFree;
    mlir::OpBuilder builder(function);
    function->setAttr(kScoreClassAttr, builder.getStringAttr(value == score ? "identity"
                                                             : affine       ? "affine"
                                                                            : "nonlinear"));
    if (mask_reads_score) function->setAttr(kMaskReadsScoreAttr, builder.getUnitAttr());
    if (natural) return;
    // A condition on the score wants the plain score: scaling back would move the place where it jumps.
    if (affine && !mask_reads_score) {
      function->setAttr(kScoreFactorAttr, builder.getF64FloatAttr(kLog2E));
      scaled_[score] = score;
      for (mlir::Operation& op : llvm::make_early_inc_range(block.without_terminator()))
        if (dependence(op.getResult(0)) == Dependence::kAffine) scale(builder, op);
      builder.setInsertionPoint(ret);
      ret.setOperand(0, scaled(builder, value));
    } else {
      builder.setInsertionPoint(ret);
      ret.setOperand(0, times_log2e(builder, value));
      if (const double factor = take_literal(score); factor != 1.0)
        function->setAttr(kScoreFactorAttr, builder.getF64FloatAttr(factor));
    }
    erase_dead(block);
  }

  // Where all that reads the score is one product or quotient with a literal, and all that reads that is tanh, the
  // literal can come with the scale: the operation goes, and its factor is returned. Nothing else may see the result:
  // it is rounded once in the place of twice. tanh never enlarges a relative error, and its bound leaves room for this
  // one.
  double take_literal(Value score) {
    // Two floats hold the product with any scale.
    constexpr double kLargest = 0x1p64;
    if (!score.hasOneUse()) return 1.0;
    mlir::Operation* const op = *score.user_begin();
    mlir::FloatAttr literal;
    if (!llvm::isa<arith::MulFOp, arith::DivFOp>(op) || op->getOperand(0) != score ||
        !mlir::matchPattern(op->getOperand(1), mlir::m_Constant(&literal)))
      return 1.0;
    const double x = literal.getValueAsDouble(), factor = llvm::isa<arith::DivFOp>(op) ? 1.0 / x : x;
    const bool usual = std::abs(factor) >= 1.0 / kLargest && std::abs(factor) <= kLargest;
    if (!usual || !llvm::all_of(op->getUsers(), llvm::IsaPred<math::TanhOp>)) return 1.0;
    op->getResult(0).replaceAllUsesWith(score);
    return factor;
  }

  Dependence dependence(Value value) {
    const auto found = dependence_.find(value);
    return found == dependence_.end() ? Dependence::kFree : found->second;
  }

  Dependence classify(mlir::Operation& op) {
    using enum Dependence;
    Dependence most = kFree;
    for (const Value operand : op.getOperands()) most = std::max(most, dependence(operand));
    if (most == kFree || most == kNonlinear) return most;
    if (llvm::isa<arith::AddFOp, arith::SubFOp, arith::NegFOp>(op)) return kAffine;
    if (llvm::isa<arith::MulFOp>(op) && dependence(op.getOperand(0)) != dependence(op.getOperand(1))) return kAffine;
    if (llvm::isa<arith::DivFOp>(op) && dependence(op.getOperand(1)) == kFree) return kAffine;
    if (llvm::isa<arith::SelectOp>(op) && dependence(op.getOperand(0)) == kFree) return kAffine;
    return kNonlinear;
  }

  // Whether the result may be a number that log2(e) carries out of float's range: a mask made of float's smallest
  // number, captured or literal, that arrives unchanged. Not asked of products: those would pay for what nobody writes.
  bool is_extreme(mlir::Operation& op) {
    if (auto read = llvm::dyn_cast<ReadOp>(op)) return read.getElement().isF32() || read.getElement().isBF16();
    if (auto constant = llvm::dyn_cast<arith::ConstantOp>(op)) {
      const auto literal = llvm::dyn_cast<mlir::FloatAttr>(constant.getValue());
      return literal && literal.getValue().isFinite() && literal.getValueAsDouble() < kSmallest;
    }
    if (!llvm::isa<arith::SelectOp, arith::AddFOp, arith::SubFOp, arith::MinimumFOp, arith::MaximumFOp>(op))
      return false;
    return llvm::any_of(op.getOperands(), [&](Value operand) { return extreme_.contains(operand); });
  }

  // v * log2(e); a literal factor of v takes it in.
  Value times_log2e(mlir::OpBuilder& builder, Value v) {
    // What is finite stays above -inf: a row whose every element is float's smallest number is not a dropped one.
    const auto literal = [&](double x) {
      return arith::ConstantOp::create(builder, v.getLoc(), builder.getF32FloatAttr(dsl::float32_literal(x)));
    };
    mlir::FloatAttr constant;
    if (mlir::matchPattern(v, mlir::m_Constant(&constant))) return literal(constant.getValueAsDouble() * kLog2E);
    if (auto product = v.getDefiningOp<arith::MulFOp>();
        product && mlir::matchPattern(product.getRhs(), mlir::m_Constant(&constant)))
      return arith::MulFOp::create(builder, v.getLoc(), product.getLhs(),
                                   literal(constant.getValueAsDouble() * kLog2E));
    if (extreme_.contains(v)) {
      const auto select_if = [&](arith::CmpFPredicate p, Value bound, Value yes, Value no) {
        const Value condition = arith::CmpFOp::create(builder, v.getLoc(), p, v, bound);
        return arith::SelectOp::create(builder, v.getLoc(), condition, yes, no);
      };
      // Before the product, which can then become part of an FMA; a maximum instruction that keeps NaN.
      const Value smallest = literal(kSmallest);
      const Value clamped = select_if(arith::CmpFPredicate::OLT, smallest, smallest, v);
      v = select_if(arith::CmpFPredicate::OEQ, literal(-std::numeric_limits<double>::infinity()), v, clamped);
    }
    return arith::MulFOp::create(builder, v.getLoc(), v, literal(kLog2E));
  }

  // `v` in log2 units, given a score in log2 units.
  Value scaled(mlir::OpBuilder& builder, Value v) {
    const auto found = scaled_.find(v);
    if (found != scaled_.end()) return found->second;
    const Value result = times_log2e(builder, v);
    scaled_[v] = result;
    return result;
  }

  void scale(mlir::OpBuilder& builder, mlir::Operation& op) {
    builder.setInsertionPointAfter(&op);
    llvm::SmallVector<Value> operands(op.getOperands());
    const bool product = llvm::isa<arith::MulFOp>(op);
    for (unsigned i = 0; i < operands.size(); ++i) {
      // Of a product only the factor with the score is scaled, of a quotient the numerator, of a select the branches.
      const bool skip = product
                            ? dependence(operands[i]) == Dependence::kFree
                            : (llvm::isa<arith::DivFOp>(op) && i == 1) || (llvm::isa<arith::SelectOp>(op) && i == 0);
      if (!skip) operands[i] = scaled_here(builder, op, operands[i]);
    }
    mlir::Operation* clone = builder.clone(op);
    clone->setOperands(operands);
    scaled_[op.getResult(0)] = clone->getResult(0);
  }

  // What is free of the score is scaled next to its definition, so that later users find it.
  Value scaled_here(mlir::OpBuilder& builder, mlir::Operation& op, Value v) {
    if (dependence(v) == Dependence::kFree && !scaled_.contains(v)) {
      mlir::OpBuilder::InsertionGuard guard(builder);
      builder.setInsertionPointAfterValue(v);
      return scaled(builder, v);
    }
    return scaled(builder, v);
  }

  llvm::DenseMap<Value, Dependence> dependence_;
  llvm::DenseSet<Value> extreme_;
  llvm::DenseMap<Value, Value> scaled_;
};

}  // namespace
}  // namespace attnjit::compiler
