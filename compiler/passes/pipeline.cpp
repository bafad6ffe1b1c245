// The order of the passes, and what several of them need.
#include "compiler/passes/passes.h"
#include "mlir/Transforms/Passes.h"

namespace attnjit::compiler {

mlir::Block* only_block(mlir::func::FuncOp function) {
  if (function.getBody().hasOneBlock()) return &function.front();
  function.emitOpError("needs a body of one block");
  return nullptr;
}

void erase_dead(mlir::Block& block) {
  // From the back, so that users go before what they use.
  for (mlir::Operation* op = block.getTerminator()->getPrevNode(); op;) {
    mlir::Operation* previous = op->getPrevNode();
    if (op->use_empty()) op->erase();
    op = previous;
  }
}

void build_canonical_pipeline(mlir::OpPassManager& passes) {
  mlir::OpPassManager& function = passes.nest<mlir::func::FuncOp>();
  function.addPass(createDroppedElements());
  // What ordering brings together folds, and folding changes the order: twice is enough for what people write, and a
  // difference that stayed would cost a shared hash only.
  for (int round = 0; round < 2; ++round) {
    function.addPass(mlir::createCanonicalizerPass());
    function.addPass(createCanonicalOrder());
    function.addPass(mlir::createCSEPass());
  }
  function.addPass(createCanonicalOrder());
}

void build_fact_pipeline(mlir::OpPassManager& passes) {
  mlir::OpPassManager& function = passes.nest<mlir::func::FuncOp>();
  function.addPass(createScoreInLog2());
  function.addPass(createProveBounds());
  function.addPass(createNarrowIntegers());
}

void build_cuda_fact_pipeline(mlir::OpPassManager& passes) {
  mlir::OpPassManager& function = passes.nest<mlir::func::FuncOp>();
  function.addPass(createScoreInLog2());
  function.addPass(createProveBounds());
  function.addPass(createNarrowIntegers({.addresses = true}));
  function.addPass(createSplitConversions());
}

}  // namespace attnjit::compiler
