// attnjit-dropped-elements: the rule of docs/language.md, "Dropped elements", as a second result.
#include <optional>

#include "compiler/passes/passes.h"
#include "llvm/ADT/DenseMap.h"
#include "mlir/Dialect/Arith/IR/Arith.h"
#include "mlir/IR/Matchers.h"

namespace attnjit::compiler {

#define GEN_PASS_DEF_DROPPEDELEMENTS
#include "AttnjitPasses.h.inc"

namespace {

namespace arith = mlir::arith;
using mlir::Value;

// When an element is kept: always, never, or under a condition.
struct Keep {
  std::optional<bool> fixed = true;
  Value condition;
};

// `value` stands for the original one wherever `keep` holds.
struct Split {
  Value value;
  Keep keep;
};

class Splitter {
 public:
  explicit Splitter(mlir::OpBuilder& builder, mlir::Location loc) : b_(builder), loc_(loc) {}

  Split get(Value value) const {
    const auto found = splits_.find(value);
    return found == splits_.end() ? Split{value, {}} : found->second;
  }

  void visit(mlir::Operation& op) {
    if (op.removeAttr(kOpaqueAttr)) return;
    b_.setInsertionPointAfter(&op);
    if (auto constant = llvm::dyn_cast<arith::ConstantOp>(op)) {
      const auto value = llvm::dyn_cast<mlir::FloatAttr>(constant.getValue());
      if (value && value.getValue().isInfinity() && value.getValue().isNegative())
        splits_[constant] = {constant, {false, {}}};
    } else if (auto select = llvm::dyn_cast<arith::SelectOp>(op)) {
      visit_select(select);
    } else if (auto add = llvm::dyn_cast<arith::AddFOp>(op)) {
      visit_both(add);
    } else if (auto minimum = llvm::dyn_cast<arith::MinimumFOp>(op)) {
      visit_both(minimum);
    } else if (auto sub = llvm::dyn_cast<arith::SubFOp>(op)) {
      const Split lhs = get(sub.getLhs());
      if (lhs.keep.fixed != true) splits_[sub] = {arith::SubFOp::create(b_, loc_, lhs.value, sub.getRhs()), lhs.keep};
    } else if (auto mul = llvm::dyn_cast<arith::MulFOp>(op)) {
      visit_product(mul);
    }
  }

  Value condition(const Keep& keep) {
    return keep.fixed ? Value(arith::ConstantOp::create(b_, loc_, b_.getBoolAttr(*keep.fixed))) : keep.condition;
  }

 private:
  Keep both(const Keep& a, const Keep& b) {
    if (a.fixed) return *a.fixed ? b : a;
    if (b.fixed) return *b.fixed ? a : b;
    if (a.condition == b.condition) return a;
    return {std::nullopt, arith::AndIOp::create(b_, loc_, a.condition, b.condition)};
  }

  template <typename T>
  void visit_both(T op) {
    const Split lhs = get(op.getLhs()), rhs = get(op.getRhs());
    if (lhs.keep.fixed == true && rhs.keep.fixed == true) return;
    const Keep keep = both(lhs.keep, rhs.keep);
    splits_[op] = {T::create(b_, loc_, lhs.value, rhs.value), keep};
  }

  void visit_product(arith::MulFOp op) {
    for (const auto& [factor, other] : {std::pair(op.getLhs(), op.getRhs()), std::pair(op.getRhs(), op.getLhs())}) {
      mlir::FloatAttr literal;
      if (!mlir::matchPattern(factor, mlir::m_Constant(&literal))) continue;
      const llvm::APFloat& k = literal.getValue();
      const Split split = get(other);
      if (k.isNaN() || k.isNegative() || k.isZero() || split.keep.fixed == true) continue;
      splits_[op] = {arith::MulFOp::create(b_, loc_, split.value, factor), split.keep};
      return;
    }
  }

  void visit_select(arith::SelectOp op) {
    if (!op.getType().isF32()) return;
    const Split yes = get(op.getTrueValue()), no = get(op.getFalseValue());
    if (yes.keep.fixed == true && no.keep.fixed == true) return;
    const Value c = op.getCondition();
    if (no.keep.fixed == false) {
      splits_[op] = {yes.value, both({std::nullopt, c}, yes.keep)};
      return;
    }
    if (yes.keep.fixed == false) {
      const Value otherwise = arith::XOrIOp::create(b_, loc_, c, condition({true, {}}));
      splits_[op] = {no.value, both({std::nullopt, otherwise}, no.keep)};
      return;
    }
    const Value keep = arith::SelectOp::create(b_, loc_, c, condition(yes.keep), condition(no.keep));
    splits_[op] = {arith::SelectOp::create(b_, loc_, c, yes.value, no.value), {std::nullopt, keep}};
  }

  mlir::OpBuilder& b_;
  mlir::Location loc_;
  llvm::DenseMap<Value, Split> splits_;
};

class DroppedElements : public impl::DroppedElementsBase<DroppedElements> {
 public:
  using DroppedElementsBase::DroppedElementsBase;

 private:
  void runOnOperation() override {
    mlir::func::FuncOp function = getOperation();
    const mlir::FunctionType type = function.getFunctionType();
    if (function.isExternal() || !function.getBody().hasOneBlock() || type.getNumInputs() != 1 ||
        !type.getInput(0).isF32() || type.getNumResults() != 1 || !type.getResult(0).isF32()) {
      function.emitOpError("is no score_mod: expected one block and the type (f32) -> f32, got ") << type;
      return signalPassFailure();
    }
    if (!kinks)
      for (mlir::Operation& op : function.front()) take_kink_marks(op);
    mlir::OpBuilder builder(function);
    Splitter splitter(builder, function.getLoc());
    for (mlir::Operation& op : llvm::make_early_inc_range(function.front().without_terminator())) splitter.visit(op);
    auto ret = llvm::cast<mlir::func::ReturnOp>(function.front().getTerminator());
    builder.setInsertionPoint(ret);
    const Split result = splitter.get(ret.getOperand(0));
    ret->setOperands({result.value, splitter.condition(result.keep)});
    function.setType(builder.getFunctionType(type.getInputs(), {type.getResult(0), builder.getI1Type()}));
  }
};

}  // namespace
}  // namespace attnjit::compiler
