// Expression tree to text that parses back to the same tree.
#pragma once

#include <string>

#include "dsl/expr.h"

namespace attnjit::dsl {

// Minimal parentheses; a shared node that is not a leaf becomes a `let`. Floats print with the digits that read back.
std::string print(const Expr& expr);

}  // namespace attnjit::dsl
