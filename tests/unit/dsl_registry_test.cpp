// Registered mods: the built-in ones and what is refused from a user.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "dsl/parser.h"
#include "dsl/registry.h"

namespace attnjit::dsl {
namespace {

std::string added(RegistryEntry entry) {
  Registry registry = Registry::builtin();
  const auto error = registry.add(std::move(entry));
  return error ? error->message : "";
}

TEST(DslRegistry, HoldsTheBuiltins) {
  std::vector<std::string> names;
  for (const RegistryEntry* entry : Registry::builtin().entries()) {
    names.push_back(entry->name);
    EXPECT_FALSE(entry->summary.empty()) << entry->name;
  }
  EXPECT_EQ(names, (std::vector<std::string>{"alibi", "alibi_exp2", "causal", "document", "head_bias", "noop",
                                             "prefix_lm", "rel", "sliding_window", "softcap"}));
  EXPECT_EQ(Registry::builtin().find("cau"), nullptr);
}

TEST(DslRegistry, RefusesWhatCannotWork) {
  using testing::HasSubstr;
  EXPECT_EQ(added({.name = "mine", .parameters = {"k"}, .body = "score * k"}), "");
  EXPECT_THAT(added({.name = "exp", .body = "score"}), HasSubstr("'exp' is a word of the language"));
  EXPECT_THAT(added({.name = "where", .body = "score"}), HasSubstr("word of the language"));
  EXPECT_THAT(added({.name = "kv_idx", .body = "score"}), HasSubstr("word of the language"));
  EXPECT_THAT(added({.name = "lambda", .body = "score"}), HasSubstr("word of the language"));
  EXPECT_THAT(added({.name = "2x", .body = "score"}), HasSubstr("is not a name"));
  EXPECT_THAT(added({.name = "", .body = "score"}), HasSubstr("is not a name"));
  EXPECT_THAT(added({.name = "causal", .body = "score"}), HasSubstr("registered already"));
  EXPECT_THAT(added({.name = "mine", .body = "score +"}), HasSubstr("in the body of 'mine': expected a value"));
  EXPECT_THAT(added({.name = "mine", .body = "score > 1", .is_mask = true}), HasSubstr("without the score"));
  EXPECT_THAT(added({.name = "mine", .parameters = {"a", "a"}, .body = "a"}),
              HasSubstr("'a' of 'mine' is given twice"));
  EXPECT_THAT(added({.name = "mine", .parameters = {"exp"}, .body = "score"}), HasSubstr("leaves free"));
  EXPECT_THAT(added({.name = "mine", .parameters = {"t"}, .body = "t + t[0]"}), HasSubstr("captured as a tensor"));
}

TEST(DslRegistry, CopiesAreIndependent) {
  Registry copy = Registry::builtin();
  EXPECT_FALSE(copy.add({.name = "mine", .body = "score"}));
  EXPECT_NE(copy.find("mine"), nullptr);
  EXPECT_EQ(Registry::builtin().find("mine"), nullptr);
}

}  // namespace
}  // namespace attnjit::dsl
