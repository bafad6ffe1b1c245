// Between which constants a mod's value lies, whatever the score, the indices and the captured values are.
#pragma once

#include <optional>

#include "compiler/compiler.h"
#include "mlir/Dialect/Func/IR/FuncOps.h"

namespace attnjit::compiler {

// Of result 0 of a forward or a backward, in the units that the function has it in; nothing where an end is not finite.
// A value that is NaN is in no bounds.
std::optional<ScoreBounds> score_bounds(mlir::func::FuncOp function);

}  // namespace attnjit::compiler
