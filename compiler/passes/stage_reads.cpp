// attnjit-stage-reads: which captured reads the CPU transposes before its tile, and which gradients behind it.
#include "compiler/dialect/dialect.h"
#include "compiler/passes/passes.h"
#include "kernels_templates/cpu/tile_abi.h"
#include "llvm/ADT/DenseMap.h"
#include "mlir/Dialect/Arith/IR/Arith.h"

namespace attnjit::compiler {

#define GEN_PASS_DEF_STAGEREADS
#include "AttnjitPasses.h.inc"

namespace {

namespace arith = mlir::arith;
using mlir::Value;

// What a value may vary with, a set of bits.
using Dependence = unsigned;
constexpr Dependence kOnScore = 1, kOnQ = 2, kOnKv = 4;

class StageReads : public impl::StageReadsBase<StageReads> {
  void runOnOperation() override {
    mlir::func::FuncOp function = getOperation();
    if (function.isExternal()) return;
    mlir::Block* const block = only_block(function);
    if (!block) return signalPassFailure();
    dependence_.clear();
    for (const Value argument : block->getArguments()) dependence_[argument] = kOnScore;
    std::int32_t count = 0;
    for (mlir::Operation& op : block->without_terminator()) {
      Dependence all = 0;
      for (const Value operand : op.getOperands()) all |= dependence_[operand];
      if (auto index = llvm::dyn_cast<IndexOp>(op)) {
        if (index.getRole() == Role::Q) all = kOnQ;
        if (index.getRole() == Role::Kv) all = kOnKv;
      }
      for (const Value result : op.getResults()) dependence_[result] = all;
      if (auto sink = llvm::dyn_cast<SinkOp>(op)) {
        sink->removeAttr(kAlongKeysAttr);
        if (along_keys(sink)) sink->setAttr(kAlongKeysAttr, mlir::UnitAttr::get(&getContext()));
      }
      auto read = llvm::dyn_cast<ReadOp>(op);
      if (!read) continue;
      read.removeStagedAttr();
      if (count < cpu::kMaxStagedReads && worthwhile(read)) read.setStaged(count++);
    }
  }

  bool worthwhile(ReadOp read) {
    if (read.getElement().isInteger(64)) return false;
    bool rows_along_keys = false, gathered = false;
    const std::optional<llvm::ArrayRef<bool>> in_bounds = read.getInBounds();
    for (unsigned i = 0; i < read.getIndices().size(); ++i) {
      const Value index = read.getIndices()[i];
      const Dependence on = dependence_[index];
      const std::int64_t stride = read.getStrides()[i];
      if (on & kOnScore) return false;
      if (on & kOnKv) {
        const bool proven = in_bounds && (*in_bounds)[i];
        if (rows_along_keys || stride != 1 || on != kOnKv || !proven || !steps_with_kv(index)) return false;
        rows_along_keys = true;
      }
      // Where the lanes' rows are 1 apart, or 0, they are read well as they are.
      if (on & kOnQ && stride == -1 && read.getExtents()[i] > 1) gathered = true;
      if (on & kOnQ && stride == 1) return false;
    }
    return rows_along_keys && gathered;
  }

  // Whether a packed tensor has the places side by side for one query and consecutive keys.
  bool along_keys(SinkOp sink) {
    const std::optional<llvm::ArrayRef<bool>> in_bounds = sink.getInBounds();
    bool innermost = true, found = false;
    for (unsigned i = sink.getIndices().size(); i-- > 0;) {
      if (sink.getExtents()[i] == 1) continue;
      const Value index = sink.getIndices()[i];
      const Dependence on = dependence_[index];
      if (on & kOnScore) return false;
      if (on & kOnKv) {
        const bool proven = in_bounds && (*in_bounds)[i];
        if (!innermost || on != kOnKv || !proven || !steps_with_kv(index)) return false;
        found = true;
      }
      innermost = false;
    }
    return found;
  }

  // Whether `index` is kv_idx plus or minus what does not vary with it.
  bool steps_with_kv(Value index) {
    while (true) {
      mlir::Operation* op = index.getDefiningOp();
      if (!op) return false;
      if (llvm::isa<IndexOp>(op)) return true;
      if (!llvm::isa<arith::AddIOp, arith::SubIOp>(op)) return false;
      const Value lhs = op->getOperand(0), rhs = op->getOperand(1);
      const bool left = dependence_[lhs] & kOnKv, right = dependence_[rhs] & kOnKv;
      if (left == right || (right && llvm::isa<arith::SubIOp>(op))) return false;
      index = left ? lhs : rhs;
    }
  }

  llvm::DenseMap<Value, Dependence> dependence_;
};

}  // namespace

llvm::SmallVector<ReadOp> staged_reads(mlir::func::FuncOp function) {
  llvm::SmallVector<ReadOp> reads;
  function.walk([&](ReadOp read) {
    if (read.getStaged()) reads.push_back(read);
  });
  return reads;
}

}  // namespace attnjit::compiler
