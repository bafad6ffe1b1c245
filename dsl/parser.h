// Text to expression tree. Recursive descent over the grammar of docs/language.md; never throws on any input.
#pragma once

#include <string_view>

#include "dsl/expr.h"
#include "dsl/registry.h"

namespace attnjit::dsl {

enum class ModKind : std::uint8_t { kScoreMod, kMaskMod };

// Parses `text`. A name of `registry` (`causal`, `softcap(30)`, `causal() and sliding_window(512)`) expands in place.
// As kScoreMod, a registered mask `m` that is the whole text becomes `where(m, score, -inf)`.
// A kMaskMod may not read `score`.
Expected<Expr> parse(std::string_view text, ModKind kind = ModKind::kScoreMod,
                     const Registry& registry = Registry::builtin());

}  // namespace attnjit::dsl
