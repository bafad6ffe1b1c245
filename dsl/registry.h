// Named score_mods and mask_mods: the built-in ones, one row each, and a user's own.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "dsl/expr.h"

namespace attnjit::dsl {

struct RegistryEntry {
  std::string name;
  std::vector<std::string> parameters = {};  // values or names of captured tensors, substituted in `body`
  std::string body;                          // an expression
  bool is_mask = false;                      // the body is a condition to keep an element
  std::string summary = {};                  // one line for a list of mods
};

// A value: copies are independent. Entries are checked (they parse) when added.
class Registry {
 public:
  // noop, causal, rel, head_bias, alibi, alibi_exp2(num_heads), softcap(c), sliding_window(w), prefix_lm(n),
  // document(ids).
  static const Registry& builtin();

  // Refuses a name that is a function, an index, a keyword or already taken, and a body that does not parse. The
  // error's location is in the body.
  std::optional<Error> add(RegistryEntry entry);
  const RegistryEntry* find(std::string_view name) const;
  std::vector<const RegistryEntry*> entries() const;  // by name

 private:
  std::map<std::string, RegistryEntry, std::less<>> entries_;
};

}  // namespace attnjit::dsl
