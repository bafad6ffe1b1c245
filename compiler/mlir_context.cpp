// Contexts, pipelines and the step from the LLVM dialect to LLVM IR.
#include "compiler/mlir_context.h"

#include "compiler/dialect/dialect.h"
#include "compiler/passes/passes.h"
#include "llvm/Support/raw_ostream.h"
#include "mlir/Dialect/Arith/IR/Arith.h"
#include "mlir/Dialect/Func/IR/FuncOps.h"
#include "mlir/Dialect/Math/IR/Math.h"
#include "mlir/IR/Diagnostics.h"
#include "mlir/Pass/PassManager.h"
#include "mlir/Target/LLVMIR/Dialect/Builtin/BuiltinToLLVMIRTranslation.h"
#include "mlir/Target/LLVMIR/Dialect/LLVMIR/LLVMToLLVMIRTranslation.h"
#include "mlir/Target/LLVMIR/Export.h"

namespace attnjit::compiler {
namespace {

const mlir::DialectRegistry& registry() {
  static const mlir::DialectRegistry* const shared = [] {
    auto* r = new mlir::DialectRegistry;
    r->insert<AttnjitDialect, mlir::arith::ArithDialect, mlir::func::FuncDialect, mlir::math::MathDialect>();
    mlir::registerBuiltinDialectTranslation(*r);
    mlir::registerLLVMDialectTranslation(*r);
    return r;
  }();
  return *shared;
}

}  // namespace

MlirSession::MlirSession() : context_(registry(), mlir::MLIRContext::Threading::DISABLED) {
  context_.loadDialect<AttnjitDialect, mlir::arith::ArithDialect, mlir::func::FuncDialect, mlir::math::MathDialect>();
  context_.getDiagEngine().registerHandler([this](mlir::Diagnostic& diagnostic) {
    if (diagnostic.getSeverity() == mlir::DiagnosticSeverity::Error) {
      if (!errors_.empty()) errors_ += '\n';
      errors_ += diagnostic.str();
    }
    return mlir::success();
  });
}

bool MlirSession::canonicalize(mlir::ModuleOp module) {
  mlir::PassManager passes(&context_);
  build_canonical_pipeline(passes);
  return mlir::succeeded(passes.run(module));
}

bool MlirSession::find_facts(mlir::ModuleOp module, Target target) {
  mlir::PassManager passes(&context_);
  if (target == Target::kCuda) {
    build_cuda_fact_pipeline(passes);
  } else {
    build_fact_pipeline(passes);
  }
  return mlir::succeeded(passes.run(module));
}

bool MlirSession::differentiate(mlir::ModuleOp module, std::uint32_t gradients, bool partial_keys) {
  mlir::PassManager passes(&context_);
  build_gradient_pipeline(passes, gradients, partial_keys);
  return mlir::succeeded(passes.run(module));
}

bool MlirSession::find_gradient_facts(mlir::ModuleOp module, Target target) {
  mlir::PassManager passes(&context_);
  if (target == Target::kCuda) {
    build_cuda_gradient_fact_pipeline(passes);
  } else {
    build_gradient_fact_pipeline(passes);
  }
  return mlir::succeeded(passes.run(module));
}

bool MlirSession::finish_tile_facts(mlir::ModuleOp module, Target target) {
  mlir::PassManager passes(&context_);
  build_tile_facts_pipeline(passes, target == Target::kCuda);
  return mlir::succeeded(passes.run(module));
}

bool MlirSession::stage_reads(mlir::ModuleOp module) {
  mlir::PassManager passes(&context_);
  passes.addNestedPass<mlir::func::FuncOp>(createStageReads());
  return mlir::succeeded(passes.run(module));
}

std::unique_ptr<llvm::Module> MlirSession::to_llvm(mlir::ModuleOp module, llvm::LLVMContext& llvm_context) {
  mlir::PassManager passes(&context_);
  passes.addPass(createLowerToLlvm());
  if (mlir::failed(passes.run(module))) return nullptr;
  return mlir::translateModuleToLLVMIR(module, llvm_context, "attnjit_mod");
}

}  // namespace attnjit::compiler
