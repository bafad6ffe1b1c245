// Text to expression tree. Recursive descent over the grammar of docs/language.md; never throws on any input.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "dsl/expr.h"
#include "dsl/registry.h"

namespace attnjit::dsl {

enum class ModKind : std::uint8_t { kScoreMod, kMaskMod };

// Parses `text`. A name of `registry` (`causal`, `softcap(30)`, `causal() and sliding_window(512)`) expands in place.
// As kScoreMod, a text that is nothing but registered masks (one, or several joined by and, or, not, &, |, ~) stands
// for `where(masks, score, -inf)`. A kMaskMod may not read `score`.
Expected<Expr> parse(std::string_view text, ModKind kind = ModKind::kScoreMod,
                     const Registry& registry = Registry::builtin());

// Parses the body of `entry`, whose parameters may be values or captured tensors. Used by Registry::add.
std::optional<Error> check_body(const RegistryEntry& entry, const Registry& registry);

// What a name means before a registry, `let` or capture gives it a meaning.
enum class NameKind : std::uint8_t {
  kFree,
  kElement,   // score, b, h, q_idx, kv_idx and their aliases
  kFunction,  // the functions' table and `where`
  kKeyword,   // of the language, or a word of Python that it refuses
};
NameKind name_kind(std::string_view name);

// The name of the language, of `registry` or of `others` that looks most like `name`; empty when none is near. For the
// message about a captured name that nobody bound.
std::string nearest_name(std::string_view name, std::span<const std::string> others = {},
                         const Registry& registry = Registry::builtin());

}  // namespace attnjit::dsl
