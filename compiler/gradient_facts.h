// What the backward's function says of itself after the passes.
#pragma once

#include <vector>

#include "compiler/compiler.h"
#include "mlir/Dialect/Func/IR/FuncOps.h"

namespace attnjit::compiler {

// Of `(f32 score, f32 grad) -> (f32 value, i1 keep, f32 dscore, f32 sinks...)`, after attnjit-prove-bounds.
GradientNeed gradient_need(mlir::func::FuncOp function);
// One per sink, in the order of the results. Places are the problem's, whose extents tell which coordinates vary.
std::vector<SinkFacts> sink_facts(mlir::func::FuncOp function, const ModProblem& problem);

}  // namespace attnjit::compiler
