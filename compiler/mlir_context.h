// One MLIR context per compile, with what the compiler needs in it, and its diagnostics.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "llvm/IR/LLVMContext.h"
#include "llvm/IR/Module.h"
#include "mlir/IR/BuiltinOps.h"
#include "mlir/IR/MLIRContext.h"

namespace attnjit::compiler {

// What the code is generated for.
enum class Target : std::uint8_t { kCpu, kCuda };

// A context without threads whose errors are collected instead of printed.
class MlirSession {
 public:
  MlirSession();
  mlir::MLIRContext& context() { return context_; }
  // Everything reported so far, one error per line.
  const std::string& errors() const { return errors_; }

  // The pipelines and passes of passes/passes.h; false with errors() set where a pass failed.
  bool canonicalize(mlir::ModuleOp module);
  bool find_facts(mlir::ModuleOp module, Target target);
  // The same two for the backward; `gradients` and `partial_keys` as in ModProblem.
  bool differentiate(mlir::ModuleOp module, std::uint32_t gradients, bool partial_keys);
  bool find_gradient_facts(mlir::ModuleOp module, Target target);
  // Of the module that derive_tile_facts made.
  bool finish_tile_facts(mlir::ModuleOp module, Target target);
  bool stage_reads(mlir::ModuleOp module);
  // Lowers to the LLVM dialect and translates. Null with errors() set on failure.
  std::unique_ptr<llvm::Module> to_llvm(mlir::ModuleOp module, llvm::LLVMContext& llvm_context);

 private:
  mlir::MLIRContext context_;
  std::string errors_;
};

}  // namespace attnjit::compiler
