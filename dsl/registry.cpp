// The built-in mods and the checks of a user's own.
#include "dsl/registry.h"

#include <algorithm>
#include <utility>

#include "dsl/lexer.h"
#include "dsl/parser.h"

namespace attnjit::dsl {
namespace {

// A function, not a constant: other translation units may ask before this one is initialised.
std::vector<RegistryEntry> builtins() {
  // clang-format off
  return {
    {"noop", {}, "score", false, "the score itself"},
    {"causal", {}, "q_idx >= kv_idx", true, "a query sees the keys up to its own position"},
    {"rel", {}, "score + (q_idx - kv_idx)", false, "adds the relative position"},
    {"head_bias", {}, "score + 2*h", false, "adds twice the query head's number"},
    // The two usual ways to give ALiBi ("Train Short, Test Long: Attention with Linear Biases", 2022) its slopes.
    {"alibi", {}, "score + alibi_slopes[h] * (kv_idx - q_idx)", false,
     "ALiBi with one slope per query head in the captured tensor alibi_slopes"},
    {"alibi_exp2", {"num_heads"}, "score + exp2(-((h + 1) * 8.0 / num_heads)) * (kv_idx - q_idx)", false,
     "ALiBi with the slopes 2**(-8 (h + 1) / num_heads)"},
    {"softcap", {"c"}, "c * tanh(score / c)", false, "bounds the score softly to (-c, c)"},
    {"sliding_window", {"w"}, "q_idx >= kv_idx and q_idx - kv_idx <= w", true,
     "causal, and at most w positions back"},
    {"prefix_lm", {"length"}, "kv_idx < length or q_idx >= kv_idx", true,
     "causal behind a prefix that every query sees"},
    {"document", {"ids"}, "ids[q_idx] == ids[kv_idx]", true,
     "a query sees its own document; ids holds each position's document"},
  };
  // clang-format on
}

Error refuse(std::string message) { return {std::move(message), {}}; }

}  // namespace

const Registry& Registry::builtin() {
  static const Registry registry = [] {
    Registry built;
    for (RegistryEntry& entry : builtins()) built.add(std::move(entry));
    return built;
  }();
  return registry;
}

std::optional<Error> Registry::add(RegistryEntry entry) {
  const auto quoted = [](const std::string& name) { return "'" + shortened(name) + "'"; };
  if (!is_name(entry.name)) {
    return refuse("the mod's name " + quoted(entry.name) + " is not a name: letters, digits and _, no digit first");
  }
  if (name_kind(entry.name) != NameKind::kFree) {
    return refuse("the mod's name " + quoted(entry.name) + " is a word of the language");
  }
  if (entries_.contains(entry.name)) return refuse("a mod named " + quoted(entry.name) + " is registered already");
  for (auto parameter = entry.parameters.begin(); parameter != entry.parameters.end(); ++parameter) {
    if (!is_name(*parameter) || name_kind(*parameter) == NameKind::kKeyword ||
        name_kind(*parameter) == NameKind::kFunction) {
      return refuse("the parameter " + quoted(*parameter) + " of " + quoted(entry.name) +
                    " is not a name that the language leaves free");
    }
    if (std::find(entry.parameters.begin(), parameter, *parameter) != parameter) {
      return refuse("the parameter " + quoted(*parameter) + " of " + quoted(entry.name) + " is given twice");
    }
  }
  if (auto error = check_body(entry, *this)) {
    error->message = "in the body of " + quoted(entry.name) + ": " + error->message;
    return error;
  }
  std::string name = entry.name;
  entries_.emplace(std::move(name), std::move(entry));
  return std::nullopt;
}

const RegistryEntry* Registry::find(std::string_view name) const {
  const auto found = entries_.find(name);
  return found == entries_.end() ? nullptr : &found->second;
}

std::vector<const RegistryEntry*> Registry::entries() const {
  std::vector<const RegistryEntry*> all;
  all.reserve(entries_.size());
  for (const auto& [name, entry] : entries_) all.push_back(&entry);
  return all;
}

}  // namespace attnjit::dsl
