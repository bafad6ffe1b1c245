// Type rules: gives every node a type and makes conversions explicit, once the captured dtypes are known.
#pragma once

#include <span>

#include "dsl/expr.h"
#include "dsl/parser.h"

namespace attnjit::dsl {

// What a captured name is bound to. `rank` must equal Capture::rank.
struct CaptureBinding {
  DType dtype = DType::kF32;
  int rank = 0;
};

// `bindings[i]` belongs to `expr.captures[i]`. The result has Node::type set everywhere; operands of an operator have
// one type (kDiv, float functions: float; kPow: int only for int ** non-negative int literal), conversions stand as
// kCall of kToFloat, kToInt or kToBool, indices of a read are ints, a select's condition is a bool.
// A score_mod's root is a float (an int or bool result of arithmetic is converted, a bare condition is an error that
// suggests mask_mod); a mask_mod's root is a bool.
Expected<Expr> bind(const Expr& expr, std::span<const CaptureBinding> bindings, ModKind kind);

}  // namespace attnjit::dsl
