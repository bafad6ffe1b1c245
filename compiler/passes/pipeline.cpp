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

void take_kink_marks(mlir::Operation& op) {
  for (const llvm::StringRef mark : {kClampAttr, kReluAttr, kFlatAttr}) op.removeAttr(mark);
}

namespace {

void add_canonical_form(mlir::OpPassManager& function) {
  // What ordering brings together folds, and folding changes the order: twice is enough for what people write, and a
  // difference that stayed would cost a shared hash only.
  for (int round = 0; round < 2; ++round) {
    function.addPass(mlir::createCanonicalizerPass());
    function.addPass(createCanonicalOrder());
    function.addPass(mlir::createCSEPass());
  }
  function.addPass(createCanonicalOrder());
}

// `natural`: the score stays in natural units, as the backward has it.
void add_facts(mlir::OpPassManager& function, bool natural, bool cuda) {
  function.addPass(createScoreInLog2({.natural = natural}));
  function.addPass(createProveBounds());
  function.addPass(createNarrowIntegers({.addresses = cuda}));
  if (cuda) function.addPass(createSplitConversions());
}

}  // namespace

void build_canonical_pipeline(mlir::OpPassManager& passes) {
  mlir::OpPassManager& function = passes.nest<mlir::func::FuncOp>();
  function.addPass(createDroppedElements());
  add_canonical_form(function);
}

void build_gradient_pipeline(mlir::OpPassManager& passes, std::uint32_t gradients, bool partial_keys) {
  mlir::OpPassManager& function = passes.nest<mlir::func::FuncOp>();
  function.addPass(createDroppedElements({.kinks = true}));
  // What is read twice has one gradient.
  function.addPass(mlir::createCSEPass());
  function.addPass(createDifferentiate({.gradients = gradients, .partialKeys = partial_keys}));
  add_canonical_form(function);
}

void build_fact_pipeline(mlir::OpPassManager& passes) { add_facts(passes.nest<mlir::func::FuncOp>(), false, false); }
void build_cuda_fact_pipeline(mlir::OpPassManager& passes) {
  add_facts(passes.nest<mlir::func::FuncOp>(), false, true);
}
void build_gradient_fact_pipeline(mlir::OpPassManager& passes) {
  add_facts(passes.nest<mlir::func::FuncOp>(), true, false);
}
void build_cuda_gradient_fact_pipeline(mlir::OpPassManager& passes) {
  add_facts(passes.nest<mlir::func::FuncOp>(), true, true);
}
void build_tile_facts_pipeline(mlir::OpPassManager& passes, bool cuda) {
  mlir::OpPassManager& function = passes.nest<mlir::func::FuncOp>();
  for (int round = 0; round < 2; ++round) {
    function.addPass(mlir::createCanonicalizerPass());
    function.addPass(mlir::createCSEPass());
  }
  function.addPass(createProveBounds());
  function.addPass(createNarrowIntegers({.addresses = cuda}));
  function.addPass(mlir::createCSEPass());
}

}  // namespace attnjit::compiler
