// The language's functions: name, arity, types and double-precision meaning, one row each in functions.cpp.
#pragma once

#include <array>
#include <span>
#include <string_view>

#include "dsl/expr.h"

namespace attnjit::dsl {

// One value of the interpreter. The field of its type counts: f for floats, i for ints, i = 0 or 1 for bools.
struct Scalar {
  std::int64_t i = 0;
  double f = 0.0;
};

// How a function's arguments and result are typed.
enum class Signature : std::uint8_t {
  kFloat,       // floats to a float
  kNumeric,     // ints (and bools) to an int; where one is a float, floats to a float
  kRounding,    // a float to a float; an int is its own result
  kTest,        // a float to a bool
  kConversion,  // any type to FunctionInfo::result
};

// Gradients of a function's arguments; of as many as there are.
using Adjoints = std::array<double, 3>;

struct FunctionInfo {
  Function function = Function::kMin;
  std::string_view name;
  int arity = 1;
  bool variadic = false;  // takes more than `arity` arguments, which nest to the left: f(f(a, b), c)
  Signature signature = Signature::kFloat;
  Type result = Type::kFloat;  // for kNumeric and kRounding: when called with floats
  // `args` are `arity` values of type `operand`, the type that the signature gives them.
  Scalar (*evaluate)(const Scalar* args, Type operand) = nullptr;
  // The gradients of float arguments, given the result's: docs/backward.md's where there is a kink, exactly 0 for what
  // is not chosen. Null: they are 0 everywhere.
  Adjoints (*adjoints)(const Scalar* args, double grad) = nullptr;
};

// The table, in the order of enum Function.
std::span<const FunctionInfo> functions();
const FunctionInfo& function_info(Function function);
const FunctionInfo* find_function(std::string_view name);  // null when there is none of that name

// Integer arithmetic of the language: two's complement, wrapping, total.
std::int64_t wrapping_add(std::int64_t a, std::int64_t b);
std::int64_t wrapping_sub(std::int64_t a, std::int64_t b);
std::int64_t wrapping_mul(std::int64_t a, std::int64_t b);
std::int64_t floor_div(std::int64_t a, std::int64_t b);               // a // 0 is 0, the smallest int // -1 wraps
std::int64_t floor_mod(std::int64_t a, std::int64_t b);               // a % 0 is 0; otherwise the sign of b
std::int64_t wrapping_pow(std::int64_t base, std::int64_t exponent);  // exponent >= 0
double floor_mod(double a, double b);                                 // the sign of b; NaN for b = 0
std::int64_t saturating_int(double x);                                // truncates; NaN gives 0

// A literal in float32. A finite one stays finite and one that is not zero stays so: out of float's range it is the
// nearest float of that kind.
float float32_literal(double x);

}  // namespace attnjit::dsl
