// The expressions of the numerics suite: every registered mod, and by hand what is easy to get wrong.
#pragma once

#include <cstdint>
#include <ostream>
#include <span>
#include <string>

#include "tests/numerics/case.h"

namespace attnjit::numerics {

// `fields` is the part of a case's line that belongs to the expression; the extents of its captures may be the letters
// B, H, Q and K: the case's batch, heads, seqlen_q and seqlen_kv.
struct Expression {
  const char* name;
  const char* fields;
  // Rows that float32 does not decide: none, fewer than one in a hundred (jumps), or as many as there are (the
  // expression's own rounding errors grow without bound somewhere).
  enum Undecided { kNone, kFew, kAny } undecided = kNone;

  // Whether that many of `rows` are as it says. Small problems may have one.
  bool allows(std::int64_t count, std::int64_t rows) const {
    return undecided == kAny || (undecided == kFew && count <= rows / 100 + 1) || count == 0;
  }
};

inline std::ostream& operator<<(std::ostream& out, const Expression& expression) { return out << expression.fields; }

// One or more per mod of the registry.
std::span<const Expression> registry_expressions();
// Arithmetic, functions, captures, masks, poison.
std::span<const Expression> other_expressions();

// With captured tensors whose gradients differ in where and how they are added up.
std::span<const Expression> learnable_expressions();

// A random typed expression with its captures; `style` 0: moderate values without jumps, which float32 decides; 1:
// moderate values with jumps; 2: anything, poles and poison included. The same for the same seed on every platform.
Case with_generated_expression(const Case& spec, std::uint64_t seed, int style);

// `spec` with the fields of `expression`.
Case with_expression(const Case& spec, const std::string& fields);

// `spec` with every gradient that it has: dq, dk, dv and those of all captured floats.
Case with_all_gradients(const Case& spec);

}  // namespace attnjit::numerics
