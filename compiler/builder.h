// Bound expression to MLIR function.
#pragma once

#include "compiler/compiler.h"
#include "mlir/IR/BuiltinOps.h"
#include "mlir/IR/MLIRContext.h"
#include "mlir/IR/OwningOpRef.h"

namespace attnjit::compiler {

// A module with one function `@score_mod(%score: f32) -> f32`, operation by operation as the expression says; the
// mask_mod, if any, stands as a last select of -inf. Both expressions must be bound.
mlir::OwningOpRef<mlir::ModuleOp> build_module(mlir::MLIRContext& context, const ModProblem& problem);

}  // namespace attnjit::compiler
