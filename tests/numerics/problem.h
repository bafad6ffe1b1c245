// A case made real: tensors with values, and expressions parsed and bound.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "dsl/expr.h"
#include "tests/numerics/case.h"
#include "tests/numerics/tensor.h"

namespace attnjit::numerics {

struct NamedTensor {
  std::string name;
  Tensor tensor;
};

// One expression with the captured tensors in the order of its own table.
struct BoundMod {
  dsl::Expr expr;
  std::vector<Tensor> captures;

  std::vector<dsl::CaptureView> views() const;
  const std::string& name_of(std::int32_t capture) const {
    return expr.captures[static_cast<std::size_t>(capture)].name;
  }
};

struct Problem {
  Case spec;
  Tensor q, k, v;                     // as the library gets them
  std::vector<NamedTensor> captures;  // 0-d ones are scalars
  BoundMod score_mod;
  std::optional<BoundMod> mask_mod;
  // Of a backward: what flows in. grad_lse is made, and used, where the case has one.
  Tensor grad_out, grad_lse;

  double scale() const { return spec.effective_scale(); }
  std::int64_t head_kv(std::int64_t h) const { return h / (spec.num_heads / spec.num_heads_kv); }
  const NamedTensor& capture(std::string_view name) const;
};

// Builds the tensors from the seed and binds the expressions. On a mistake of the case (an expression that does not
// parse, a captured name without a spec) returns false and says it in `error`.
bool make_problem(const Case& spec, Problem* problem, std::string* error);

// Parses and binds the expressions of `problem->spec` against `problem->captures`, for one whose parts were changed.
bool bind_mods(Problem* problem, std::string* error);

// Fills the tensor of a capture.
void fill_capture(Tensor* tensor, Fill fill, Random* random);

}  // namespace attnjit::numerics
