// The expressions of a call: parsed with a context's registry, joined in one table of captures, bound to dtypes.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "dsl/expr.h"
#include "dsl/registry.h"
#include "runtime/status.h"
#include "runtime/validation.h"

namespace attnjit::runtime {

// score_mod and mask_mod with one table of captures between them, sorted by name: capture numbers are the places of
// CheckedCall::captures.
struct Mods {
  dsl::Expr score_mod;
  std::optional<dsl::Expr> mask_mod;

  const std::vector<dsl::Capture>& captures() const { return score_mod.captures; }
};

// `score_mod` NULL: noop; `mask_mod` NULL: none. Fails with ATTNJIT_INVALID_EXPRESSION, the message naming which of the
// two, line, column, with a caret; or where the two read one name with different numbers of indices.
Result<Mods> parse_mods(const char* score_mod, const char* mask_mod, const dsl::Registry& registry);

// Binds `parsed` to the captures of `call`: every name read has a tensor of that rank, and every tensor is read.
// `score_mod` and `mask_mod` are the texts that were parsed and `registry` what with, for messages.
Result<Mods> bind_mods(const Mods& parsed, const char* score_mod, const char* mask_mod, const dsl::Registry& registry,
                       const CheckedCall& call);

// Names for a message, shortened: `a, b`.
template <typename Names>
std::string listed(const Names& names) {
  std::string text;
  for (const std::string_view name : names) text += (text.empty() ? "" : ", ") + dsl::shortened(name);
  return text;
}

}  // namespace attnjit::runtime
