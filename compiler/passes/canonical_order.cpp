// attnjit-canonical-order: one text for all spellings that differ in order and polarity only.
#include <tuple>

#include "compiler/dialect/dialect.h"
#include "compiler/passes/passes.h"
#include "llvm/ADT/DenseMap.h"
#include "llvm/ADT/DenseSet.h"
#include "llvm/Support/raw_ostream.h"
#include "llvm/Support/xxhash.h"
#include "mlir/Dialect/Arith/IR/Arith.h"
#include "mlir/IR/Matchers.h"

namespace attnjit::compiler {

#define GEN_PASS_DEF_CANONICALORDER
#include "AttnjitPasses.h.inc"

namespace {

namespace arith = mlir::arith;
using arith::CmpFPredicate;
using arith::CmpIPredicate;
using mlir::Value;

// Where a value stands among commutative operands: the score, indices, reads, all else by structure, constants last
// (where upstream's canonicalize puts them).
using Key = std::tuple<int, std::uint64_t>;

CmpIPredicate inverse(CmpIPredicate p) { return arith::invertPredicate(p); }

// Exact, NaN included: ordered comparisons become unordered ones.
CmpFPredicate inverse(CmpFPredicate p) {
  switch (p) {
    case CmpFPredicate::AlwaysFalse:
      return CmpFPredicate::AlwaysTrue;
    case CmpFPredicate::OEQ:
      return CmpFPredicate::UNE;
    case CmpFPredicate::OGT:
      return CmpFPredicate::ULE;
    case CmpFPredicate::OGE:
      return CmpFPredicate::ULT;
    case CmpFPredicate::OLT:
      return CmpFPredicate::UGE;
    case CmpFPredicate::OLE:
      return CmpFPredicate::UGT;
    case CmpFPredicate::ONE:
      return CmpFPredicate::UEQ;
    case CmpFPredicate::ORD:
      return CmpFPredicate::UNO;
    case CmpFPredicate::UEQ:
      return CmpFPredicate::ONE;
    case CmpFPredicate::UGT:
      return CmpFPredicate::OLE;
    case CmpFPredicate::UGE:
      return CmpFPredicate::OLT;
    case CmpFPredicate::ULT:
      return CmpFPredicate::OGE;
    case CmpFPredicate::ULE:
      return CmpFPredicate::OGT;
    case CmpFPredicate::UNE:
      return CmpFPredicate::OEQ;
    case CmpFPredicate::UNO:
      return CmpFPredicate::ORD;
    case CmpFPredicate::AlwaysTrue:
      return CmpFPredicate::AlwaysFalse;
  }
  return p;
}

CmpFPredicate swapped(CmpFPredicate p) {
  switch (p) {
    case CmpFPredicate::OGT:
      return CmpFPredicate::OLT;
    case CmpFPredicate::OGE:
      return CmpFPredicate::OLE;
    case CmpFPredicate::OLT:
      return CmpFPredicate::OGT;
    case CmpFPredicate::OLE:
      return CmpFPredicate::OGE;
    case CmpFPredicate::UGT:
      return CmpFPredicate::ULT;
    case CmpFPredicate::UGE:
      return CmpFPredicate::ULE;
    case CmpFPredicate::ULT:
      return CmpFPredicate::UGT;
    case CmpFPredicate::ULE:
      return CmpFPredicate::UGE;
    default:
      return p;
  }
}

CmpIPredicate swapped(CmpIPredicate p) {
  switch (p) {
    case CmpIPredicate::slt:
      return CmpIPredicate::sgt;
    case CmpIPredicate::sle:
      return CmpIPredicate::sge;
    case CmpIPredicate::sgt:
      return CmpIPredicate::slt;
    case CmpIPredicate::sge:
      return CmpIPredicate::sle;
    case CmpIPredicate::ult:
      return CmpIPredicate::ugt;
    case CmpIPredicate::ule:
      return CmpIPredicate::uge;
    case CmpIPredicate::ugt:
      return CmpIPredicate::ult;
    case CmpIPredicate::uge:
      return CmpIPredicate::ule;
    default:
      return p;
  }
}

// The one of a predicate and its inverse that a select's condition keeps.
bool preferred(CmpIPredicate p, bool against_constant) {
  switch (p) {
    case CmpIPredicate::eq:
    case CmpIPredicate::sge:
    case CmpIPredicate::uge:
      return true;
    case CmpIPredicate::sle:
    case CmpIPredicate::ule:
      return !against_constant;  // x <= 4 is not (x >= 5)
    default:
      return false;
  }
}
bool preferred(CmpFPredicate p) {
  switch (p) {
    case CmpFPredicate::OEQ:
    case CmpFPredicate::OGT:
    case CmpFPredicate::OGE:
    case CmpFPredicate::OLT:
    case CmpFPredicate::OLE:
    case CmpFPredicate::ONE:
    case CmpFPredicate::UNO:
      return true;
    default:
      return false;
  }
}

std::uint64_t hash_text(llvm::StringRef text) { return llvm::xxh3_64bits(text); }

class CanonicalOrder : public impl::CanonicalOrderBase<CanonicalOrder> {
  void runOnOperation() override {
    mlir::func::FuncOp function = getOperation();
    if (function.isExternal()) return;
    mlir::Block* const block = only_block(function);
    if (!block) return signalPassFailure();
    keys_.clear();
    for (const auto& [i, argument] : llvm::enumerate(block->getArguments()))
      keys_[argument] = {0, static_cast<std::uint64_t>(i)};
    mlir::OpBuilder builder(function);
    for (mlir::Operation& op : llvm::make_early_inc_range(block->without_terminator())) {
      builder.setInsertionPoint(&op);
      if (const Value replacement = simplify(builder, op)) {
        op.getResult(0).replaceAllUsesWith(replacement);
        op.erase();
      } else {
        remember(op);
      }
    }
    schedule(*block);
  }

  const Key& key(Value value) { return keys_.find(value)->second; }
  bool is_constant(Value value) { return std::get<0>(key(value)) == 8; }

  template <typename T>
  T made(T op) {
    remember(*op.getOperation());
    return op;
  }

  void remember(mlir::Operation& op) {
    std::string text;
    llvm::raw_string_ostream stream(text);
    stream << op.getName() << ' ' << op.getAttrDictionary() << ' ' << op.getResultTypes().front();
    for (const Value operand : op.getOperands())
      stream << ' ' << std::get<0>(key(operand)) << '.' << std::get<1>(key(operand));
    int rank = 7;
    if (auto index = llvm::dyn_cast<IndexOp>(op)) rank = 1 + static_cast<int>(index.getRole());
    if (llvm::isa<ReadOp>(op)) rank = 6;
    if (llvm::isa<arith::ConstantOp>(op)) rank = 8;
    keys_[op.getResult(0)] = {rank, hash_text(text)};
  }

  // Normalises `op` in place, or returns what replaces it.
  Value simplify(mlir::OpBuilder& builder, mlir::Operation& op) {
    if (op.hasTrait<mlir::OpTrait::IsCommutative>() && op.getNumOperands() == 2 &&
        key(op.getOperand(1)) < key(op.getOperand(0)))
      op.setOperands({op.getOperand(1), op.getOperand(0)});
    if (auto add = llvm::dyn_cast<arith::AddFOp>(op)) {
      // The sign of a zero is not observable, so +0 is as neutral as -0.
      if (mlir::matchPattern(add.getRhs(), mlir::m_AnyZeroFloat())) return add.getLhs();
    } else if (auto sub = llvm::dyn_cast<arith::SubFOp>(op)) {
      return float_difference(builder, sub);
    } else if (auto subi = llvm::dyn_cast<arith::SubIOp>(op)) {
      return int_difference(builder, subi);
    } else if (auto div = llvm::dyn_cast<arith::DivFOp>(op)) {
      return quotient(builder, div);
    } else if (auto cmp = llvm::dyn_cast<arith::CmpIOp>(op)) {
      normalise(builder, cmp);
    } else if (auto cmpf = llvm::dyn_cast<arith::CmpFOp>(op)) {
      if (key(cmpf.getRhs()) < key(cmpf.getLhs())) {
        cmpf.setPredicate(swapped(cmpf.getPredicate()));
        cmpf->setOperands({cmpf.getRhs(), cmpf.getLhs()});
      }
    } else if (auto x = llvm::dyn_cast<arith::XOrIOp>(op)) {
      if (mlir::matchPattern(x.getRhs(), mlir::m_One()) && x.getType().isInteger(1))
        return negated(builder, x.getLhs());
    } else if (auto select = llvm::dyn_cast<arith::SelectOp>(op)) {
      normalise(builder, select);
    }
    return {};
  }

  // x - c is x + (-c), exactly; x - 0 is x.
  Value float_difference(mlir::OpBuilder& builder, arith::SubFOp op) {
    mlir::FloatAttr literal;
    if (!mlir::matchPattern(op.getRhs(), mlir::m_Constant(&literal))) return {};
    if (literal.getValue().isZero()) return op.getLhs();
    const auto negative = mlir::FloatAttr::get(op.getType(), -literal.getValue());
    const Value constant = made(arith::ConstantOp::create(builder, op.getLoc(), negative));
    return made(arith::AddFOp::create(builder, op.getLoc(), op.getLhs(), constant));
  }

  Value int_difference(mlir::OpBuilder& builder, arith::SubIOp op) {
    mlir::IntegerAttr literal;
    if (!mlir::matchPattern(op.getRhs(), mlir::m_Constant(&literal))) return {};
    const auto negative = mlir::IntegerAttr::get(op.getType(), -literal.getValue());
    const Value constant = made(arith::ConstantOp::create(builder, op.getLoc(), negative));
    return made(arith::AddIOp::create(builder, op.getLoc(), op.getLhs(), constant));
  }

  // Division by a power of two is a product, exactly.
  Value quotient(mlir::OpBuilder& builder, arith::DivFOp op) {
    mlir::FloatAttr literal;
    if (!mlir::matchPattern(op.getRhs(), mlir::m_Constant(&literal))) return {};
    llvm::APFloat reciprocal(0.0f);
    if (!literal.getValue().getExactInverse(&reciprocal)) return {};
    const auto attribute = mlir::FloatAttr::get(op.getType(), reciprocal);
    const Value constant = made(arith::ConstantOp::create(builder, op.getLoc(), attribute));
    return made(arith::MulFOp::create(builder, op.getLoc(), op.getLhs(), constant));
  }

  void normalise(mlir::OpBuilder& builder, arith::CmpIOp op) {
    if (key(op.getRhs()) < key(op.getLhs())) {
      op.setPredicate(swapped(op.getPredicate()));
      op->setOperands({op.getRhs(), op.getLhs()});
    }
    // x > c is x >= c + 1, x < c is x <= c - 1, where those exist.
    mlir::IntegerAttr literal;
    if (!mlir::matchPattern(op.getRhs(), mlir::m_Constant(&literal))) return;
    const llvm::APInt& c = literal.getValue();
    llvm::APInt bound = c;
    if (op.getPredicate() == CmpIPredicate::sgt && !c.isMaxSignedValue()) {
      op.setPredicate(CmpIPredicate::sge);
      ++bound;
    } else if (op.getPredicate() == CmpIPredicate::slt && !c.isMinSignedValue()) {
      op.setPredicate(CmpIPredicate::sle);
      --bound;
    } else {
      return;
    }
    const auto attribute = mlir::IntegerAttr::get(literal.getType(), bound);
    op->setOperand(1, made(arith::ConstantOp::create(builder, op.getLoc(), attribute)));
  }

  // The comparison with the inverse answer, or nothing where `condition` is no comparison.
  Value negated(mlir::OpBuilder& builder, Value condition) {
    if (auto cmp = condition.getDefiningOp<arith::CmpIOp>()) {
      auto op = arith::CmpIOp::create(builder, cmp.getLoc(), inverse(cmp.getPredicate()), cmp.getLhs(), cmp.getRhs());
      normalise(builder, op);
      return made(op);
    }
    if (auto cmp = condition.getDefiningOp<arith::CmpFOp>())
      return made(
          arith::CmpFOp::create(builder, cmp.getLoc(), inverse(cmp.getPredicate()), cmp.getLhs(), cmp.getRhs()));
    return {};
  }

  void normalise(mlir::OpBuilder& builder, arith::SelectOp op) {
    const Value condition = op.getCondition();
    auto cmp = condition.getDefiningOp<arith::CmpIOp>();
    auto cmpf = condition.getDefiningOp<arith::CmpFOp>();
    if (!cmp && !cmpf) return;
    if (cmp ? preferred(cmp.getPredicate(), is_constant(cmp.getRhs())) : preferred(cmpf.getPredicate())) return;
    // At the ends of the integers neither form is preferred: leave those alone.
    const Value inverted = negated(builder, condition);
    if (auto other = inverted.getDefiningOp<arith::CmpIOp>();
        other && !preferred(other.getPredicate(), is_constant(other.getRhs()))) {
      other.erase();
      return;
    }
    op->setOperands({inverted, op.getFalseValue(), op.getTrueValue()});
  }

  // Orders operations as a depth-first walk from the result meets them; what it does not meet is dead.
  void schedule(mlir::Block& block) {
    mlir::Operation* terminator = block.getTerminator();
    llvm::DenseSet<mlir::Operation*> placed;
    std::vector<std::pair<mlir::Operation*, unsigned>> stack{{terminator, 0}};
    while (!stack.empty()) {
      auto& [op, next] = stack.back();
      if (next < op->getNumOperands()) {
        mlir::Operation* operand = op->getOperand(next++).getDefiningOp();
        if (operand && placed.insert(operand).second) stack.emplace_back(operand, 0u);
      } else {
        if (op != terminator) op->moveBefore(terminator);
        stack.pop_back();
      }
    }
    erase_dead(block);
  }

  llvm::DenseMap<Value, Key> keys_;
};

}  // namespace
}  // namespace attnjit::compiler
